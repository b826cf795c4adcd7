"""What the data plane hands to the judge: which requests, how many, with what text."""
from __future__ import annotations

import base64
import json
import multiprocessing
import random
import struct
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.arenafile import BEHAVIOUR_FEATURE_NAMES, CLIENT_ENTRY_BYTES, ArenaFile
from native.engine import Engine, Models
from native.text import cut_around
from sidecar.config import ConfigError, Settings, loads
from sidecar.core import Core, open_core
from sidecar.judge.types import Escalation
from sidecar.policy import compile_policy

OPEN = "client_per_minute: 6000, per_second: 10000"
UNCERTAIN = "/s?q=%24%7B7*7%7D"  # ${7*7}: tagged by the bundle that ships
ATTACK = "/s?q=1%27+or+2%3D2"
HEADER_BYTES, REGION_AT = 4096, 88


@pytest.fixture(scope="module")
def models() -> Models:
    return open_core(Settings(), private=True).models


def open_with(models: Models, text: str) -> tuple[Core, Engine]:
    core = open_core(loads(text, "test"), private=True, load_models=False)
    return core, Engine(core.arena, models, unhurried=True)


def ask(engine: Engine, url: str, client: str = "192.0.2.1", ts: float = 1000.0, **more: Any) -> Any:
    return engine.decide("GET", url, client=client, ts=ts, **more)


def escalated(engine: Engine, url: str, **more: Any) -> bool:
    return bool(ask(engine, url, **more).record()["escalated"])


# -- which ---------------------------------------------------------------------------------------


def test_a_request_in_the_band_comes_out_with_all_that_a_judge_needs(models: Models) -> None:
    core, engine = open_with(models, f"escalation: {{{OPEN}}}\nroutes: [{{name: search, path: /s}}]")
    verdict = engine.decide(
        "POST",
        UNCERTAIN + "&page=2",
        [("User-Agent", "curl/8"), ("host", "api.example"), ("content-type", "application/json"), ("x-api-key", "k1")],
        body=b'{"a": 1}',
        client="2001:db8::1",
        ts=1000.5,
    )
    (got,) = core.arena.drain_escalations()
    assert core.arena.drain_escalations() == []
    assert (got["id"], got["ts"], got["why"]) == (verdict.record()["id"], 1000.5, "uncertain")
    assert (got["client"], got["client_key"]) == ("2001:db8::1", core.arena.client_key("2001:db8::1"))
    assert got["principal_key"] == int(verdict.record()["principal_key"], 16) > 0
    assert got["payload_key"] > 0
    assert (got["method"], got["path"], got["query"]) == ("POST", "/s", "q=%24%7B7*7%7D&page=2")
    assert (got["authority"], got["user_agent"], got["route"]) == ("api.example", "curl/8", "search")
    assert (got["place"], got["body_type"], got["action"]) == ("query.q", "application/json", "tag")
    assert (got["text"], got["text_as_sent"], got["text_cut"], got["secret"]) == (b"%24%7B7*7%7D", True, False, False)
    assert (got["excerpt"], got["reasons"]) == ("${7*7}", ["suspicious_text"])
    assert got["score"] == got["score_text"] == pytest.approx(verdict.score, abs=1e-6)
    assert tuple(got["behaviour"]) == BEHAVIOUR_FEATURE_NAMES
    assert 0 <= got["unusual"] <= 1
    json.dumps({**got, "text": ""})


def test_the_edges_of_the_band(models: Models) -> None:
    score = ask(open_with(models, "{}")[1], UNCERTAIN).score
    above, below = score + 1e-6, score - 1e-6
    for begin, end, shown in ((score, 0.99, True), (above, 0.99, False), (0.1, score, False), (below, above, True)):
        _, engine = open_with(models, f"escalation: {{uncertain_from: {begin!r}, uncertain_to: {end!r}, novel: null}}")
        assert escalated(engine, UNCERTAIN) is shown, (begin, end)


def test_without_a_band_of_its_own_it_lies_between_tag_and_block(models: Models) -> None:
    score = ask(open_with(models, "{}")[1], UNCERTAIN).score
    for tag, block, shown in (
        (score, 0.99, True),
        (score + 1e-6, 0.99, False),
        (0.1, score, False),
        ("null", 0.99, False),
        (0.1, "null", True),
    ):
        text = f"thresholds: {{tag: {tag}, throttle: null, block: {block}}}\nescalation: {{novel: null}}"
        assert escalated(open_with(models, text)[1], UNCERTAIN) is shown, (tag, block)


def test_what_is_blocked_allow_listed_exempt_or_listed_is_not_shown(models: Models) -> None:
    core, engine = open_with(
        models,
        f"escalation: {{uncertain_from: 0, uncertain_to: 1, novel: 0, {OPEN}}}\n"
        "lists: {allow: [198.51.100.0/24], block: [203.0.113.0/24]}\n"
        "routes: [{name: free, path: /free, exempt: true}]",
    )
    core.arena.block(core.arena.client_key("192.0.2.9"), 60, "throttle")
    assert ask(engine, ATTACK).action == "block"
    now = time.time()
    assert not escalated(engine, ATTACK)
    for client in ("198.51.100.1", "203.0.113.1", "192.0.2.9"):
        assert not escalated(engine, UNCERTAIN, client=client, ts=now)
    assert not escalated(engine, "/free?q=%24%7B7*7%7D")
    assert escalated(engine, "/s")  # nothing was taken from those whose turn it is
    assert len(core.arena.drain_escalations()) == 1


def test_novel_behaviour_is_shown_whatever_the_text(models: Models) -> None:
    core, engine = open_with(models, "escalation: {novel: 0}")
    assert escalated(engine, "/plain")
    (got,) = core.arena.drain_escalations()
    assert (got["why"], got["payload_key"]) == ("novel", 0)
    unusual = got["unusual"]
    for novel, shown in ((unusual - 1e-5, True), (unusual + 1e-5, False), ("null", False)):
        _, engine = open_with(models, f"escalation: {{novel: {novel}}}")
        assert escalated(engine, "/plain") is shown
    # a text in the band is what the judge is asked about
    core, engine = open_with(models, "escalation: {novel: 0}")
    assert escalated(engine, UNCERTAIN)
    assert core.arena.drain_escalations()[0]["why"] == "uncertain"


@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.25, 850, 1150), (1, 4000, 4000)])
def test_a_share_of_all_others_is_sampled(models: Models, share: float, low: int, high: int) -> None:
    core, engine = open_with(models, f"escalation: {{sample: {share}, novel: null, {OPEN}}}")
    got = []
    for i in range(4000):
        ask(engine, f"/p{i % 7}", client=f"192.0.{i % 200}.{i % 199}", ts=1000 + i * 0.01)
        if i % 100 == 99:
            got += core.arena.drain_escalations(1000)
    assert low <= len(got) <= high
    assert {one["why"] for one in got} <= {"sampled"}
    assert {one["payload_key"] for one in got} <= {0}


def test_routes_say_otherwise(models: Models) -> None:
    _, engine = open_with(
        models,
        f"escalation: {{novel: null, {OPEN}}}\nroutes:\n"
        "  - {name: a, path: /a, escalation: {enabled: false}}\n"
        "  - {name: b, path: /b, escalation: {sample: 1}}\n"
        "  - {name: c, path: /c, escalation: {uncertain_from: 0.95, uncertain_to: 0.99}}\n"
        "  - {name: d, path: /d, thresholds: {tag: 0.88, throttle: null}}\n",
    )
    question = UNCERTAIN.removeprefix("/s")
    shown = [escalated(engine, path + question) for path in ("/s", "/a", "/b", "/c", "/d")]
    assert shown == [True, False, True, False, False]
    assert [escalated(engine, path) for path in ("/s", "/a", "/b", "/c")] == [False, False, True, False]


def test_a_secret_is_not_shown_and_nobody_is_asked_about_it(models: Models) -> None:
    core, engine = open_with(models, f"escalation: {{novel: null, {OPEN}}}\nroutes: [{{name: all, path: /all, "
                                     "escalation: {sample: 1}}]")
    question = "?access_token=%24%7B7*7%7D"
    assert ask(engine, "/s" + question).action == "tag"
    assert not escalated(engine, "/s" + question)
    assert escalated(engine, "/all" + question)
    (got,) = core.arena.drain_escalations()
    assert (got["why"], got["secret"], got["text"], got["excerpt"], got["payload_key"]) == ("sampled", True, b"", "", 0)


def test_without_models_nothing_is_shown_but_samples() -> None:
    core = open_core(loads("escalation: {sample: 1}", "test"), private=True, load_models=False)
    ask(core.engine(), UNCERTAIN)
    (got,) = core.arena.drain_escalations()
    assert (got["why"], got["text"], got["unusual"], got["payload_key"]) == ("sampled", b"", None, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("escalation: {uncertain_from: 0.9, uncertain_to: 0.5}", "escalation.uncertain_to: no score reaches 0.9"),
        ("routes: [{name: a, path: /a, escalation: {uncertain_from: 0.9}}]",
         r"routes\[0\].escalation.uncertain_from: no score"),
        ("routes: [{name: a, path: /a, exempt: true, escalation: {sample: 1}}]", "no effect on a route with exempt"),
        ("escalation: {text: 8KiB}", "escalation.text: '8KiB' is above"),
        ("escalation: {per_second: 0}", "escalation.per_second: 0 is below"),
        ("escalation: {sample: 1.5}", "escalation.sample"),
        ("arena: {escalations: 100}", "arena.escalations"),
    ],
)
def test_settings_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        loads(text, "test")


# -- how many ------------------------------------------------------------------------------------


def test_a_client_has_a_rate(models: Models) -> None:
    core, engine = open_with(models, "escalation: {client_per_minute: 6}")
    shown = [escalated(engine, UNCERTAIN, ts=1000 + i * 0.1) for i in range(20)]
    assert shown == [True] * 6 + [False] * 14
    # every ten seconds there is room for one more, by whatever name the client goes; a clock may be set back
    assert [escalated(engine, UNCERTAIN, ts=1000 + s) for s in (9.9, 10.1, 10.2, 19.9, 20.1)] == [
        *(False, True, False, False, True)]
    keys = [[("x-api-key", f"key {i}")] for i in range(5)]
    assert [escalated(engine, UNCERTAIN, headers=key, ts=1020.2) for key in keys] == [False] * 5
    assert escalated(engine, UNCERTAIN, client="192.0.2.2", ts=1020.2)
    assert escalated(engine, UNCERTAIN, ts=500.0)
    counters = core.arena.counters()
    assert (counters["escalated"], counters["escalations_limited"]) == (10, 14 + 3 + 5)
    assert len(core.arena.drain_escalations()) == 10


@pytest.mark.parametrize("ts", [4294967.0, 4294967.296, 4294967.3, 2147483.6, 4294.967, 1.7e9])
def test_rates_hold_where_the_words_that_keep_them_wrap(models: Models, ts: float) -> None:
    """Times are kept in 32 bits, a client's in ms, the service's in us."""
    _, engine = open_with(models, "escalation: {client_per_minute: 6}")
    assert [escalated(engine, UNCERTAIN, ts=ts + i * 0.05) for i in range(10)] == [True] * 6 + [False] * 4
    assert [escalated(engine, UNCERTAIN, ts=ts + s) for s in (11, 12, 21, 22)] == [True, False, True, False]
    _, engine = open_with(models, "escalation: {per_second: 5}")
    clients = [f"192.0.2.{i}" for i in range(1, 30)]
    shown = [escalated(engine, UNCERTAIN, client=client, ts=ts + i * 0.001) for i, client in enumerate(clients)]
    assert shown == [True] * 5 + [False] * 24
    assert escalated(engine, UNCERTAIN, ts=ts + 0.25)
    assert not escalated(engine, UNCERTAIN, client="192.0.2.200", ts=ts + 0.26)


def test_a_clients_entry_fills_whole_cache_lines() -> None:
    """One line more to touch costs each request 0.2 us."""
    bytes_of_key = 8
    assert (CLIENT_ENTRY_BYTES - bytes_of_key) % 64 == 0
    assert CLIENT_ENTRY_BYTES <= 1024


def test_the_service_has_a_rate(models: Models) -> None:
    core, engine = open_with(models, "escalation: {per_second: 20}")
    shown = [escalated(engine, UNCERTAIN, client=f"192.0.2.{i}", ts=1000.0) for i in range(100)]
    assert shown == [True] * 20 + [False] * 80
    assert sum(escalated(engine, UNCERTAIN, client=f"198.51.100.{i}", ts=1000.5) for i in range(100)) == 10
    assert core.arena.counters()["escalations_limited"] == 170


def test_a_full_ring_is_counted_and_changes_no_decision(models: Models) -> None:
    core, engine = open_with(models, f"arena: {{escalations: 16}}\nescalation: {{{OPEN}}}")
    _, other = open_with(models, "escalation: {enabled: false}")
    skipped = {"escalated", "spent_us", "stages_us", "client_key"}
    for i in range(50):
        mine, its = ask(engine, UNCERTAIN, ts=1000.0 + i).record(), ask(other, UNCERTAIN, ts=1000.0 + i).record()
        assert {k: v for k, v in mine.items() if k not in skipped} == {k: v for k, v in its.items() if k not in skipped}
    counters = core.arena.counters()
    assert (counters["escalated"], counters["escalations_dropped"], counters["events"]) == (16, 34, 50)
    assert [one["ts"] for one in core.arena.drain_escalations(10)] == [1000.0 + i for i in range(10)]
    assert escalated(engine, UNCERTAIN, ts=2000.0)
    assert [one["ts"] for one in core.arena.drain_escalations()][-1] == 2000.0


def _escalate(path: str, runtime: str, client: str, n: int) -> None:
    models = Models()
    models.load(runtime)
    engine = Engine(ArenaFile.open(path), models, unhurried=True)
    for i in range(n):
        ask(engine, UNCERTAIN, client=client, ts=1000.0 + i)


def test_all_processes_share_ring_and_rates(models: Models, tmp_path: Path) -> None:
    arena = ArenaFile.create(tmp_path / "arena", clients=1024, events=64, blocklist=64, escalations=256)
    arena.write_policy(compile_policy(loads("escalation: {client_per_minute: 60, per_second: 1000}", "test")))
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_escalate, args=(str(tmp_path / "arena"), models.folder, f"192.0.2.{1 + i // 2}", 30))
        for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    got = arena.drain_escalations(1000)
    counters = arena.counters()
    assert len(got) == counters["escalated"] == len({one["id"] for one in got})
    # 60 at once and one a second: all of each client's 60, but for updates of the word that met
    assert counters["escalated"] + counters["escalations_limited"] == 120
    assert {one["text"] for one in got} == {b"%24%7B7*7%7D"}


# -- the text ------------------------------------------------------------------------------------

PAYLOAD = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
WIDE = f"escalation: {{uncertain_from: 0.001, uncertain_to: 1, {OPEN}, text: 1KiB}}\nthresholds: {{block: null}}"


def post(engine: Engine, body: bytes, kind: str = "application/x-www-form-urlencoded") -> None:
    engine.decide("POST", "/s", [("content-type", kind)], body=body, client="192.0.2.1", ts=1000.0)


@pytest.mark.parametrize("encode", [str, quote, lambda text: quote(quote(text))], ids=["plain", "quoted", "twice"])
@pytest.mark.parametrize("before", [0, 700, 3000, 7500, 20000])
def test_a_long_text_is_cut_around_what_is_worst_in_it(models: Models, encode: Any, before: int) -> None:
    core, engine = open_with(models, WIDE)
    rng = random.Random(before)
    words = ["the", "lamp", "was", "lit", "again", "and", "nobody", "came", "until", "morning"]

    def filler(n: int) -> str:
        return " ".join(rng.choice(words) for _ in range(n // 4 + 1))[:n]

    post(engine, (filler(before) + " " + encode(PAYLOAD) + " " + filler(5000)).encode(), "text/plain")
    (got,) = core.arena.drain_escalations()
    assert got["text_cut"]
    assert len(got["text"]) == 1024
    assert encode(PAYLOAD).encode() in got["text"]
    assert got["text_as_sent"]


@pytest.mark.parametrize("pad", [" " * 6000, "/*" + "x" * 5000 + "*/", "%20" * 2000, "\n\t" * 3000, "%2520" * 1400])
def test_padding_does_not_push_the_payload_out_of_sight(models: Models, pad: str) -> None:
    core, engine = open_with(models, WIDE)
    half = len(PAYLOAD) // 2
    bodies = [pad + PAYLOAD, PAYLOAD + pad, PAYLOAD[:half] + pad + PAYLOAD[half:]]
    for body in bodies[:2] if "\t" in pad else bodies:  # what interpreters don't skip leaves two halves
        post(engine, body.encode(), "text/plain")
        (got,) = core.arena.drain_escalations()
        assert len(got["text"]) <= 1024
        shown = got["text"].decode().lower() + got["excerpt"]
        assert "__class__" in shown
        assert "subclasses" in shown


def test_what_a_text_holds_in_base64_is_shown(models: Models) -> None:
    core, engine = open_with(models, WIDE)
    inside = "the lamp was lit again " * 60 + PAYLOAD + " and nobody came" * 60
    engine.decide("GET", "/s?q=" + quote(base64.b64encode(inside.encode()).decode()), client="192.0.2.1", ts=1.0)
    (got,) = core.arena.drain_escalations()
    assert PAYLOAD.encode() in got["text"] or "__mro__" in got["excerpt"]
    assert not got["text_as_sent"]


def test_text_out_of_a_document_is_kept_while_the_rest_is_read(models: Models) -> None:
    """Strings with escapes are undone in a place that the next one uses again."""
    core, engine = open_with(models, WIDE)
    values = ["a\tlamp\n" * 50, PAYLOAD + "\n\"quoted\"", *(f"{i}\tand \"more\" of it" * 40 for i in range(30))]
    note = ("x-note", '{"a": "plain\\n and \\"simple\\""}')
    body = json.dumps(values).encode()
    engine.decide("POST", "/s", [("content-type", "application/json"), note], body=body, client="192.0.2.1", ts=1000.0)
    (got,) = core.arena.drain_escalations()
    assert got["text"] == (PAYLOAD + '\n"quoted"').encode()
    assert (got["place"], got["text_as_sent"]) == ("json[1]", False)


def test_a_header_that_is_remembered_is_shown_as_it_came_now(models: Models) -> None:
    core, engine = open_with(models, WIDE)
    for _ in range(3):
        value = ("Mozilla/5.0 " + PAYLOAD).encode() + b""
        ask(engine, "/", headers=[("user-agent", value), ("x-other", b"a plain note of somebody")])
        del value
    got = core.arena.drain_escalations()
    assert [one["text"] for one in got] == [("Mozilla/5.0 " + PAYLOAD).encode()] * 3
    for _ in range(2):
        ask(engine, "/", headers=[("x-doc", json.dumps({"a": "x\ny", "b": PAYLOAD + "\n"}))])
    first, second = core.arena.drain_escalations()
    assert first["text"] == second["text"]
    assert PAYLOAD.encode() in first["text"]


def test_cut_around_never_exceeds_and_never_fails() -> None:
    rng = random.Random(5)
    for _ in range(300):
        text = rng.randbytes(rng.randrange(0, 9000))
        window = rng.randbytes(rng.randrange(0, 160))
        keep = rng.choice([0, 1, 3, 256, 4096])
        part, _found = cut_around(text, window, keep)
        assert len(part) <= max(keep, 0)
    assert cut_around(b"a" * 5000 + b"needle" + b"b" * 5000, b"needle", 100)[1]
    assert cut_around(b"a" * 5000, b"needle", 100) == (b"needle", False)


HOSTILE = st.binary(max_size=3000)
TOKEN = st.binary(min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(method=st.binary(max_size=40), query=HOSTILE, body=HOSTILE, agent=st.binary(max_size=400),
       kind=st.binary(max_size=100), name=TOKEN)
def test_hostile_bytes_come_out_bounded(models: Models, method: bytes, query: bytes, body: bytes, agent: bytes,
                                        kind: bytes, name: bytes) -> None:
    core, engine = open_with(models, f"arena: {{clients: 1024, escalations: 16}}\nescalation: {{sample: 1, novel: 0, "
                                     f"{OPEN}}}")
    engine.decide(method, b"/" + query, [(b"user-agent", agent), (b"content-type", kind), (name, body)], body=body,
                  client="192.0.2.1", ts=1000.0)
    for got in core.arena.drain_escalations():
        assert len(got["text"]) <= 2048
        as_escalation(got)


def as_escalation(got: dict[str, Any]) -> Escalation:
    """It survives being sent."""
    made = Escalation(
        id=str(got["id"]), ts=got["ts"], service="test", method=got["method"], path=got["path"], why=got["why"],
        client=got["client"], client_key=got["client_key"], payload_key=got["payload_key"],
        user_agent=got["user_agent"], place=got["place"], text=got["text"].decode("utf-8", "backslashreplace"),
        score=got["score"], reasons=tuple(got["reasons"]), story=got["behaviour"],
    )
    back = Escalation.from_wire(made.to_wire())
    assert back.text == made.text
    return made


def test_whatever_stands_in_the_ring_comes_out_bounded(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = ArenaFile.create(path, clients=1024, events=64, blocklist=64, escalations=16)
    arena.write_policy(compile_policy(Settings()))
    header = path.read_bytes()[:512]
    at, size = struct.unpack_from("<QQ", header, REGION_AT + 10 * 16)
    slot_bytes = size // 16
    rng = random.Random(3)
    position = 0
    for _ in range(20):
        with open(path, "r+b") as file:
            for _slot in range(16):
                file.seek(at + position % 16 * slot_bytes)
                file.write(struct.pack("<Q", position + 1) + rng.randbytes(slot_bytes - 8))
                position += 1
        got = arena.drain_escalations(100)
        assert len(got) == 16
        for one in got:
            assert len(one["text"]) <= 2048
            assert len(one["path"]) + len(one["query"]) <= 4 * 1024
            assert one["why"] in ("uncertain", "novel", "sampled")
            as_escalation(one)


def test_one_that_was_never_finished_does_not_wedge_the_ring(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = ArenaFile.create(path, clients=1024, events=64, blocklist=64, escalations=16)
    arena.write_policy(compile_policy(Settings()))
    engine = Engine(arena, models, unhurried=True)
    before = path.read_bytes()[:HEADER_BYTES]
    ask(engine, UNCERTAIN)
    after = path.read_bytes()[:HEADER_BYTES]
    assert len(arena.drain_escalations()) == 1
    tailed = path.read_bytes()[:HEADER_BYTES]
    (tail_at,) = [at for at in range(0, HEADER_BYTES, 8) if after[at : at + 8] != tailed[at : at + 8]]
    head_at = tail_at - 64
    assert (before[head_at : head_at + 8], after[head_at : head_at + 8]) == (bytes(8), struct.pack("<Q", 1))
    with open(path, "r+b") as file:  # a writer that claimed a place and died
        file.seek(head_at)
        file.write(struct.pack("<Q", 2))
    ask(engine, UNCERTAIN)
    assert arena.drain_escalations() == []
    time.sleep(0.25)
    assert len(arena.drain_escalations()) == 1
    assert arena.escalations_given_up == 1
    assert arena.events_given_up == 0
