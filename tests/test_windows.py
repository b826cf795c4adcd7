"""Client table and windows: parity with the plain reference, eviction, locks, principals."""
from __future__ import annotations

import base64
import json
import math
import multiprocessing
import os
import random
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.arenafile import ArenaFile
from native.engine import BEHAVIOUR_FEATURE_NAMES, CLIENT_ENTRY_BYTES, Engine
from sidecar.config import Settings, loads
from sidecar.core import Core, open_core
from sidecar.policy import compile_policy
from tests.reference_windows import Client, siphash24

DISTINCT = {"paths": "paths", "objects": "objects", "identities": "identities", "agents": "agents"}


def core(text: str = "", **arena: int) -> Core:
    return open_core(loads(text, "test") if text else Settings(), private=True, load_models=False)


requests = st.tuples(
    st.floats(0, 400).map(lambda s: round(s, 3)),
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]),
    st.sampled_from(
        ["/", "/login", "/api/Auth/x", "/items", "/a/b.html", "/logo123.png", "/users/8d3c0ffee1234567/x"]
        + [f"/api/orders/{i}" for i in range(12)]
        + [f"/api/view?order_id={i}&x=1" for i in range(5)]
        + [f"/inv/INV-{i:05d}" for i in range(5)]
    ),
    st.sampled_from([None, "curl/8", "Mozilla/5.0", "okhttp"]),
    st.sampled_from([0, 0, 10, 4000]),
    st.sampled_from([None, "alice", "bob", "carol"]),
    st.sampled_from([200, 200, 201, 302, 400, 401, 403, 404, 500, 503]),
    st.sampled_from([None, 3.0, 250.0]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, min_size=1, max_size=60), st.integers(0, 10**9))
def test_features_are_those_of_the_reference(story: list, start: int) -> None:
    c = core()
    engine = c.engine(keep_features=True)
    reference = Client()
    t = float(start)
    for gap, method, url, agent, body, _principal, status, response_ms in story:
        t = round(t + gap, 3)
        headers = [("user-agent", agent)] if agent else []
        # the principal has an entry of its own, whose row the forest sees: read the address's row by
        # giving none, and count identities apart
        verdict = engine.decide(method, url, headers, b"x" * body, client="192.0.2.1", ts=t)
        reference.request(t, method, url, agent, body, None)
        got = dict(zip(BEHAVIOUR_FEATURE_NAMES, verdict.behaviour.tolist(), strict=True))
        for name, want in reference.features(t).items():
            assert got[name] == pytest.approx(want, rel=2e-3, abs=2e-3), name
        for name in ("paths", "objects", "agents"):
            exact = reference.count_distinct(t, name)
            assert math.expm1(got[name]) == pytest.approx(exact, abs=1.5 + 0.15 * exact), name
        engine.respond(verdict, status, response_ms, ts=t)
        reference.response(t, method, url, status, response_ms)


def test_every_feature_has_a_name() -> None:
    verdict = core().engine(keep_features=True).decide("GET", "/", client="192.0.2.1")
    assert len(BEHAVIOUR_FEATURE_NAMES) == len(verdict.behaviour) == len(set(BEHAVIOUR_FEATURE_NAMES))


def test_an_entry_costs_at_most_a_kibibyte() -> None:
    assert CLIENT_ENTRY_BYTES <= 1024


def test_the_principal_has_a_story_of_its_own() -> None:
    engine = core().engine(keep_features=True)
    for i in range(20):
        engine.decide("GET", "/", client=f"192.0.2.{i}", principal="alice", ts=1000.0 + i)
    verdict = engine.decide("GET", "/", client="192.0.2.99", principal="alice", ts=1020.0)
    got = dict(zip(BEHAVIOUR_FEATURE_NAMES, verdict.behaviour.tolist(), strict=True))
    assert math.expm1(got["requests_600s"]) == pytest.approx(21, rel=0.01)


def _jwt(claims: dict) -> str:
    parts = [{"alg": "none"}, claims]
    encoded = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=").decode() for p in parts]
    return "Bearer " + ".".join([*encoded, "c2ln"])


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ([("x-api-key", "k1")], [("X-API-Key", "k1")], [("x-api-key", "k2")]),
        (
            [("authorization", _jwt({"sub": "alice", "iat": 1}))],
            [("authorization", _jwt({"iat": 2, "nested": {"sub": "bob"}, "sub": "alice"}))],
            [("authorization", _jwt({"sub": "bob"}))],
        ),
        (
            [("authorization", "Basic " + base64.b64encode(b"alice:one").decode())],
            [("authorization", "basic " + base64.b64encode(b"alice:two").decode())],
            [("authorization", "Basic " + base64.b64encode(b"bob:one").decode())],
        ),
        (
            [("cookie", "a=b; sid=S1; c=d")],
            [("cookie", "sid=S1")],
            [("cookie", "xsid=S1; sid=S2")],
        ),
    ],
)
def test_principals(one: list, same: list, other: list) -> None:
    engine = core(
        "client: {principal: [{header: x-api-key}, {jwt_claim: sub}, {basic: true}, {cookie: sid}]}"
    ).engine()

    def key(headers: list) -> str | None:
        found = engine.decide("GET", "/", headers, client="192.0.2.1").record()["principal_key"]
        assert found is None or isinstance(found, str)
        return found

    assert key(one) == key(same) != key(other)
    assert None not in (key(one), key(other))
    assert key([("authorization", "Bearer opaque")]) is None
    assert key([("authorization", "Basic !!!!")]) is None
    assert key([("authorization", "Bearer a.b.c")]) is None


@given(st.binary(max_size=300))
def test_hostile_credentials_are_only_bytes(value: bytes) -> None:
    engine = core("client: {principal: [{jwt_claim: sub}, {basic: true}, {cookie: sid}]}").engine()
    part = base64.b64encode(value)
    for prefix in (b"", b"Bearer a.", b"Basic ", b"Bearer " + part + b"." + part + b"."):
        engine.decide("GET", "/", [("authorization", prefix + value), ("cookie", value)], client="192.0.2.1")


def test_siphash_of_the_reference_is_the_papers() -> None:
    key = bytes(range(16))
    k0, k1 = struct.unpack("<QQ", key)
    assert siphash24(bytes(range(15)), k0, k1) == 0xA129CA6149BE45E5


@given(st.text(max_size=60).filter(lambda s: s))
def test_client_keys_are_siphash(name: str) -> None:
    c = core()
    k0, k1 = struct.unpack("<QQ", c.arena.key)
    data = ("name " + name).encode("utf-8", "surrogateescape")
    assert c.arena.client_key("name " + name) == siphash24(data, k0, k1) | 1


def test_an_attacker_who_rotates_addresses_does_not_push_out_busy_clients(tmp_path: Path) -> None:
    """4,096 places; 1,000 clients in use; 80,000 addresses that come once each while the clients go on."""
    arena = ArenaFile.create(tmp_path / "arena", clients=4096, events=64, blocklist=64)
    arena.write_policy(compile_policy(Settings()))
    engine = Engine(arena)
    busy = [f"10.1.{i // 250}.{i % 250}" for i in range(1000)]
    t = 1e6
    for _ in range(10):
        for client in busy:
            engine.decide("GET", "/", client=client, ts=t)
        t += 30
    rng = random.Random(5)
    for i in range(80_000):
        engine.decide("GET", "/", client=f"2001:db8:{rng.getrandbits(16):x}:{rng.getrandbits(16):x}::1", ts=t)
        t += 0.002
        if i % 20_000 == 19_999:
            for client in busy:
                engine.decide("GET", "/", client=client, ts=t)
    assert arena.counters()["clients_evicted"] > 60_000
    kept = sum(arena.knows(client) == 14 for client in busy)
    # a bucket in which eight busy clients meet loses its least one; nothing else is lost
    assert kept >= 995


def test_a_client_long_gone_gives_way(tmp_path: Path) -> None:
    arena = ArenaFile.create(tmp_path / "arena", clients=8, events=64, blocklist=64)
    arena.write_policy(compile_policy(Settings()))
    engine = Engine(arena)
    for _ in range(1000):
        engine.decide("GET", "/", client="192.0.2.1", ts=1000.0)
    for i in range(2, 9):
        for _ in range(20):
            engine.decide("GET", "/", client=f"192.0.2.{i}", ts=1000.0 + 7 * 3600)
    engine.decide("GET", "/", client="192.0.2.100", ts=1000.0 + 7 * 3600 + 1)
    assert arena.knows("192.0.2.1") == 0
    assert all(arena.knows(f"192.0.2.{i}") == 20 for i in range(2, 9))


def test_many_threads_on_one_client() -> None:
    c = core()
    engines = [c.engine() for _ in range(4)]

    def work(engine: Engine) -> None:
        for i in range(3000):
            verdict = engine.decide("GET", f"/api/orders/{i % 50}", client="192.0.2.1", ts=1000.0 + i / 100)
            engine.respond(verdict, 200, 5.0, ts=1000.0 + i / 100)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters = c.arena.counters()
    assert counters["requests"] == 12000
    assert c.arena.knows("192.0.2.1") + counters["clients_contended"] >= 12000


def _hammer(path: str) -> None:
    engine = Engine(ArenaFile.open(path))
    while True:
        engine.decide("GET", "/", client="192.0.2.1", ts=1000.0)


def test_a_writer_killed_at_any_point_does_not_wedge_the_others(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = ArenaFile.create(path, clients=64, events=64, blocklist=64)
    arena.write_policy(compile_policy(Settings()))
    engine = Engine(arena)
    context = multiprocessing.get_context("fork")
    for round_ in range(20):
        worker = context.Process(target=_hammer, args=(str(path),))
        worker.start()
        time.sleep(0.02 + 0.001 * round_)
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        time.sleep(0.06)  # a stale lock is one held for longer than 50 ms
        before = arena.knows("192.0.2.1")
        for _ in range(3):
            engine.decide("GET", "/", client="192.0.2.1", ts=1000.0)
        assert arena.knows("192.0.2.1") == before + 3


def test_a_lock_left_behind_is_taken_over(tmp_path: Path) -> None:
    """As above, but certain: the entry's lock word is set by hand."""
    path = tmp_path / "arena"
    arena = ArenaFile.create(path, clients=8, events=64, blocklist=64)
    arena.write_policy(compile_policy(Settings()))
    engine = Engine(arena)
    engine.decide("GET", "/", client="192.0.2.1", ts=1000.0)
    header = path.read_bytes()[:512]
    (entries_at,) = struct.unpack_from("<Q", header, 88 + 3 * 16)
    (entry_bytes,) = struct.unpack_from("<I", header, 76)
    stamp = int(time.monotonic() * 1000) & 0x7FFFFFFF | 0x80000000
    with open(path, "r+b") as file:
        for i in range(8):
            file.seek(entries_at + i * entry_bytes)
            file.write(struct.pack("<I", stamp))
    engine.decide("GET", "/", client="192.0.2.1", ts=1000.0)
    assert arena.counters()["clients_contended"] == 1  # held just now: the decision did not wait
    time.sleep(0.06)
    engine.decide("GET", "/", client="192.0.2.1", ts=1000.0)
    assert arena.counters()["locks_stolen"] == 1
    assert arena.knows("192.0.2.1") == 2


def test_a_clock_that_goes_back_is_harmless() -> None:
    engine = core().engine(keep_features=True)
    for t in (1e9, 1e9 - 86400, 0.0, 1e9 + 1, 2e9, 1e9):
        verdict = engine.decide("GET", "/", client="192.0.2.1", ts=t)
        assert np.isfinite(verdict.behaviour).all()
        assert (np.abs(verdict.behaviour) < 1e9).all()
