"""The arena file: refusals, persistence, counters, the event ring, the blocklist."""
from __future__ import annotations

import multiprocessing
import os
import struct
import subprocess
from pathlib import Path

import pytest

from native.arenafile import ArenaFile
from native.engine import LIMITS, ArenaError, Engine
from sidecar.config.settings import Settings
from sidecar.policy import compile_policy

MAGIC_AT, VERSION_AT, TOTAL_AT = 0, 8, 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arena"


def make(path: Path, **kwargs: int) -> ArenaFile:
    arena = ArenaFile.create(path, **{"clients": 1024, "events": 64, "blocklist": 64, **kwargs})
    arena.write_policy(compile_policy(Settings()))
    return arena


def patch(path: Path, at: int, form: str, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, value))


def test_opened_by_another_it_is_the_same(path: Path) -> None:
    arena = make(path)
    engine = Engine(arena)
    engine.decide("GET", "/a", client="192.0.2.1")
    other = ArenaFile.open(path)
    assert other.knows("192.0.2.1") == 1
    Engine(other).decide("GET", "/a", client="192.0.2.1")
    assert arena.knows("192.0.2.1") == 2
    assert other.counters()["requests"] == 2
    assert other.shape == {
        **{"clients": 1024, "events": 64, "escalations": 256},
        **{"blocklist": 64, "counter_slots": 16},
    }


def test_only_the_owner_may_read_it(path: Path) -> None:
    make(path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("at", "form", "value", "says"),
    [
        (MAGIC_AT, "<Q", 0x1234, "wrong magic"),
        (VERSION_AT, "<I", 99, "layout version 99, this build reads version 4"),
        (TOTAL_AT, "<Q", 4096, "size mismatch"),
    ],
)
def test_wrong_header_is_refused_and_says_why(path: Path, at: int, form: str, value: int, says: str) -> None:
    make(path)
    patch(path, at, form, value)
    with pytest.raises(ArenaError, match=says) as caught:
        ArenaFile.open(path)
    assert str(path) in str(caught.value)
    assert "remove the file" in str(caught.value)


def test_every_word_of_the_layout_is_checked(path: Path) -> None:
    """Whatever 4-byte word of sizes and offsets is changed, the file is refused."""
    make(path)
    good = path.read_bytes()[:512]
    # key (24..40) and creation time (40..48) may be anything
    for at in [*range(0, 24, 4), *range(48, 88 + 11 * 16, 4)]:
        word = struct.unpack_from("<I", good, at)[0]
        patch(path, at, "<I", word ^ 0x10)
        with pytest.raises(ArenaError):
            ArenaFile.open(path)
        patch(path, at, "<I", word)
    ArenaFile.open(path)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 100_000])
def test_wrong_size_is_refused(path: Path, size: int) -> None:
    make(path)
    os.truncate(path, size)
    with pytest.raises(ArenaError, match=r"too short|size mismatch"):
        ArenaFile.open(path)


def test_no_arena_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="cannot open: No such file"):
        ArenaFile.open(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArenaError, match="cannot open"):
        ArenaFile.open(tmp_path / "link")
    with pytest.raises(ArenaError, match="make the folder"):
        ArenaFile.create(tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize("name", ["clients", "events", "blocklist", "counter_slots"])
@pytest.mark.parametrize("value", [0, -1, 1 << 30])
def test_counts_have_bounds(path: Path, name: str, value: int) -> None:
    with pytest.raises(ArenaError, match=name):
        ArenaFile.create(path, **{name: value})
    assert not path.exists()


def test_events_come_out_as_decision_records(path: Path) -> None:
    arena = make(path)
    engine = Engine(arena)
    arena.block(arena.client_key("192.0.2.7"), 60)
    engine.decide("GET", "/x\x1b[31m?a=1", [("User-Agent", "curl\x00/8"), ("host", "api.example")], client="192.0.2.7")
    (record,) = arena.drain()
    assert record["action"] == record["enforced"] == "block"
    assert record["client"] == "192.0.2.7"
    assert record["path"] == "/x\x1b[31m"  # as sent: whoever shows it escapes it
    assert record["user_agent"] == "curl\x00/8"
    assert record["authority"] == "api.example"
    assert record["reasons"][0]["name"] == "blocked_address"
    assert 55 < record["reasons"][0]["value"] <= 60
    assert arena.drain() == []


def test_a_full_ring_drops_and_counts(path: Path) -> None:
    arena = make(path, events=64)
    engine = Engine(arena)
    arena.block(arena.client_key("192.0.2.7"), 60)
    for _ in range(100):
        engine.decide("GET", "/", client="192.0.2.7")
    counters = arena.counters()
    assert (counters["events"], counters["events_dropped"]) == (64, 36)
    ids = [record["id"] for record in arena.drain(1000)]
    assert ids == sorted(ids)
    assert len(ids) == 64
    engine.decide("GET", "/", client="192.0.2.7")
    assert len(arena.drain()) == 1


def test_an_event_that_was_never_finished_does_not_wedge_the_ring(path: Path) -> None:
    arena = make(path)
    engine = Engine(arena)
    arena.block(arena.client_key("192.0.2.7"), 60)
    # a writer that claimed a place and died: only the head has moved
    head_at = find_head(path)
    patch(path, head_at, "<Q", 1)
    engine.decide("GET", "/", client="192.0.2.7")
    assert arena.drain() == []  # it gets its time ...
    import time

    time.sleep(0.25)
    assert len(arena.drain()) == 1  # ... and is passed over
    assert arena.events_given_up == 1


def find_head(path: Path) -> int:
    """Offset of event_head in the header: the only live word that an event moves from 0 to 1."""
    arena = ArenaFile.open(path)
    before = path.read_bytes()[:4096]
    engine = Engine(arena)
    arena.block(arena.client_key("198.51.100.1"), 60)
    engine.decide("GET", "/", client="198.51.100.1")
    after = path.read_bytes()[:4096]
    moved = [
        at
        for at in range(0, 4096, 8)
        if before[at : at + 8] == bytes(8) and after[at : at + 8] == struct.pack("<Q", 1)
    ]
    arena.drain()
    tailed = path.read_bytes()[:4096]
    # head and tail are a cache line apart; the head is the one that had moved before the drain.
    # Put both back, so that the ring is as new
    (tail,) = [at for at in range(0, 4096, 8) if after[at : at + 8] != tailed[at : at + 8]]
    head = max(at for at in moved if at < tail and tail - at == 64)
    patch(path, head, "<Q", 0)
    patch(path, tail, "<Q", 0)
    events_at = struct.unpack_from("<Q", before, 88 + 5 * 16)[0]
    patch(path, events_at, "<Q", 0)
    return head


def test_blocklist_expires_and_can_be_undone(path: Path) -> None:
    arena = make(path)
    engine = Engine(arena)
    key = arena.client_key("2001:db8::1")
    assert key == arena.client_key("2001:db8::ffff")  # the same /64
    assert key != arena.client_key("2001:db8:0:1::1")
    arena.block(key, 3600, "throttle")
    assert engine.decide("GET", "/", client="2001:db8::2").action == "throttle"
    assert engine.decide("GET", "/", client="2001:db8::2").reasons == ["blocked_address"]
    assert engine.decide("GET", "/", client="2001:db8::2", ts=4e9).action == "allow"
    assert arena.unblock(key)
    assert not arena.unblock(key)
    assert engine.decide("GET", "/", client="2001:db8::2").action == "allow"


def test_blocklist_says_when_it_is_full(path: Path) -> None:
    arena = make(path, blocklist=16)
    for i in range(1, 17):
        arena.block(i << 32 | 1, 3600)
    with pytest.raises(ArenaError, match="blocklist is full"):
        arena.block(17 << 32 | 1, 3600)


def _decide(path: str, n: int, client: str) -> None:
    engine = Engine(ArenaFile.open(path))
    for _ in range(n):
        engine.decide("GET", "/", client=client, ts=1000.0)


def test_writers_in_several_processes_lose_nothing(path: Path) -> None:
    arena = make(path)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_decide, args=(str(path), 5000, "192.0.2.1")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    counters = arena.counters()
    assert counters["requests"] == 20000
    assert arena.knows("192.0.2.1") + counters["clients_contended"] == 20000


def test_policy_with_too_much_is_refused(path: Path) -> None:
    arena = make(path)
    generation = arena.policy_generation
    policy = compile_policy(Settings())
    policy["routes"] = policy["routes"] * (LIMITS["routes"] + 2)
    with pytest.raises(ValueError, match="too many"):
        arena.write_policy(policy)
    assert arena.policy_generation == generation
    assert Engine(arena).decide("GET", "/", client="192.0.2.1").record()["budget_us"] == 1000


def test_models_are_published(path: Path) -> None:
    arena = make(path)
    assert arena.published_models == ("", 0)
    arena.publish_models("/var/cache/outrider/abc", 77)
    assert ArenaFile.open(path).published_models == ("/var/cache/outrider/abc", 77)
    with pytest.raises(ValueError, match="at most 1023"):
        arena.publish_models("/" + "x" * 1100, 78)
    assert arena.published_models[1] == 77


def test_all_memory_is_there_from_the_start(path: Path) -> None:
    arena = ArenaFile.create(path, clients=4096, events=64, blocklist=64, reserve=True)
    assert path.stat().st_blocks * 512 >= arena.bytes


def test_a_file_system_that_is_too_small_is_said_so(tmp_path: Path) -> None:
    """A tmpfs of 8 MiB, where we may mount one; 65,536 clients need about 60."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs privileges that this machine does not give")
    try:
        with pytest.raises(ArenaError, match=r"has \d+ MiB free of 8 MiB \(lower arena\.clients"):
            ArenaFile.create(small / "arena")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
