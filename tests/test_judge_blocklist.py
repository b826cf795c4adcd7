"""The blocklist that judges write to: clients, principals and payloads, by key and for a time."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from native.arenafile import ArenaFile
from native.engine import ArenaError, Engine, Models
from sidecar.config import Settings, loads
from sidecar.core import Core, open_core
from sidecar.policy import compile_policy
from sidecar.reasons import sentences

BENIGN = [
    "/",
    "/items?page=2&limit=5",
    "/search?q=select+a+lamp+from+the+catalogue+and+order+by+price",
    "/u?name=O%27Brien&mail=ann%40example.com",
    "/s?q=hello+world",
    "/a/b/c.css?v=1.2.3",
    "/p?url=https%3A%2F%2Fexample.com%2Fa%3Fb%3D1",
]
AGENT = [("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0")]


@pytest.fixture(scope="module")
def models() -> Models:
    return open_core(Settings(), private=True).models


def open_with(models: Models, text: str = "") -> tuple[Core, Engine]:
    # all of it is shown, so that each text's key comes out
    core = open_core(
        loads(text + "\nescalation: {uncertain_to: 1, client_per_minute: 6000, per_second: 10000}", "test"),
        private=True,
        load_models=False,
    )
    return core, Engine(core.arena, models, unhurried=True)


def ask(engine: Engine, text: str, **more: Any) -> Any:
    return engine.decide("GET", "/s?q=" + quote(text), AGENT, client="192.0.2.1", **more)


def key_of(core: Core, engine: Engine, text: str) -> int:
    ask(engine, text)
    (got,) = core.arena.drain_escalations()
    return int(got["payload_key"])


def test_a_payload_has_the_same_key_with_other_numbers(models: Models) -> None:
    core, engine = open_with(models, "thresholds: {block: null}")
    same = ["${7*7}", "${8*9}", "${1234*77}", "${7*7}"]
    others = ["${7+7}", "${7*7", "{{7*7}}", "${7*7}${7*7}", "${a*7}"]
    assert len({key_of(core, engine, text) for text in same}) == 1
    keys = []
    for text in [same[0], *others]:
        ask(engine, text)
        keys += [one["payload_key"] for one in core.arena.drain_escalations()]
    assert len(set(keys)) == len(keys) > 3
    # decoded and lower-cased, wherever it stands; another arena has other keys
    engine.decide("POST", "/x", [("content-type", "application/x-www-form-urlencoded")], body=b"z=%24%7b%37*8%7D",
                  client="192.0.2.7")
    assert core.arena.drain_escalations()[0]["payload_key"] == keys[0]
    other, its = open_with(models)
    assert key_of(other, its, same[0]) != keys[0] > 0


def test_pods_with_the_same_key_file_agree_on_payloads(models: Models, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_bytes(b"0123456789abcdef0123")
    secret.chmod(0o400)
    pods = [open_with(models, f"client: {{key_file: {secret}}}") for _ in range(2)]
    assert len({key_of(core, engine, "${7*7}") for core, engine in pods}) == 1


@pytest.mark.parametrize("action", ["throttle", "challenge", "block"])
def test_a_blocked_payload_is_refused_for_whoever_sends_it(models: Models, action: str) -> None:
    core, engine = open_with(models)
    key = key_of(core, engine, "${7*7}")
    core.arena.block(key, 60, action, kind="payload")
    for i in range(5):
        verdict = engine.decide("GET", f"/other/{i}?z=%24%7B{i}*9%7D", client=f"198.51.100.{i}")
        assert verdict.action == verdict.enforced == action
        assert "blocked_payload" in verdict.reasons
        assert verdict.score == 1
        assert not verdict.record()["escalated"]  # it has been judged
        assert any("on the shared blocklist for another" in text for text in sentences(verdict.record()))
    assert ask(engine, "${7+7}").action == "tag"
    (entry,) = core.arena.blocked()
    assert (entry["key"], entry["kind"], entry["action"], entry["hits"]) == (key, "payload", action, 5)
    assert 55 < entry["remaining_s"] <= 60
    assert ask(engine, "${7*7}", ts=time.time() + 61).action == "tag"  # expired
    assert core.arena.unblock(key)
    assert ask(engine, "${7*7}").action == "tag"
    assert core.arena.blocked() == []


def test_a_payload_entry_never_weakens_an_answer(models: Models) -> None:
    core, engine = open_with(models, "thresholds: {tag: 0.4, throttle: 0.5, block: 0.6}")
    strict = ask(engine, "${7*7}")
    assert strict.action == "block"
    loose, its = open_with(models)
    key = key_of(loose, its, "${7*7}")
    core.arena.block(key, 60, "throttle", kind="payload")
    loose.arena.block(key, 60, "throttle", kind="payload")
    assert (ask(engine, "${7*7}").action, ask(its, "${7*7}").action) == ("block", "throttle")


def test_benign_requests_have_no_key_and_are_not_hit(models: Models) -> None:
    """Whoever gets a text judged that everybody sends must not have everybody blocked: there is no key to block."""
    core, engine = open_with(models, "routes: [{name: all, path: /**, escalation: {sample: 1, novel: null}}]")
    for path in BENIGN:
        engine.decide("GET", path, AGENT, client="192.0.2.1")
    assert [one["payload_key"] for one in core.arena.drain_escalations(100)] == [0] * len(BENIGN)
    core.arena.block(key_of(core, engine, "${7*7}"), 60, kind="payload")
    for path in BENIGN:
        assert engine.decide("GET", path, AGENT, client="192.0.2.1").action == "allow"
    assert core.arena.blocked()[0]["hits"] == 0


def test_the_floor_lies_at_half_of_tag_and_is_the_routes_own() -> None:
    policy = compile_policy(loads(
        "routes:\n  - {name: a, path: /a, thresholds: {tag: null}}\n  - {name: b, path: /b, thresholds: {tag: 0}}\n"
        "  - {name: c, path: /c, escalation: {uncertain_from: 0.05}}", "test"))
    assert [route["payload_floor"] for route in policy["routes"]] == [0.25, 0.5, 0.1, 0.25]


def test_an_allow_listed_client_is_refused_by_no_entry(models: Models) -> None:
    core, engine = open_with(models, "lists: {allow: [192.0.2.0/24]}")
    arena = core.arena
    engine.decide("GET", "/s?q=%24%7B7*7%7D", client="198.51.100.1")
    (got,) = arena.drain_escalations()
    arena.block(got["payload_key"], 60, kind="payload")
    arena.block(arena.client_key("192.0.2.1"), 60)
    key = [("x-api-key", "k")]
    principal = int(engine.decide("GET", "/", key, client="198.51.100.2").record()["principal_key"], 16)
    arena.block(principal, 60)
    assert engine.decide("GET", "/", key, client="198.51.100.2").reasons == ["blocked_principal"]
    for _ in range(3):
        assert engine.decide("GET", "/s?q=%24%7B7*7%7D", key, client="192.0.2.1").action in ("allow", "tag")
    assert {entry["hits"] for entry in arena.blocked()} == {0, 1}
    assert engine.decide("GET", "/s?q=%24%7B7*7%7D", client="198.51.100.3").action == "block"


@pytest.mark.parametrize("action", ["throttle", "challenge", "block"])
def test_addresses_and_principals_get_the_entrys_action(models: Models, action: str) -> None:
    core, engine = open_with(models)
    arena = core.arena
    key = [("x-api-key", "k")]
    principal = int(engine.decide("GET", "/", key, client="192.0.2.1").record()["principal_key"], 16)
    arena.block(arena.client_key("192.0.2.2"), 60, action)
    arena.block(principal, 60, action)
    for verdict, reason in (
        (engine.decide("GET", "/", client="192.0.2.2"), "blocked_address"),
        (engine.decide("GET", "/", key, client="192.0.2.3"), "blocked_principal"),
    ):
        assert (verdict.action, verdict.reasons, verdict.score) == (action, [reason], 1.0)
    assert [entry["hits"] for entry in arena.blocked()] == [1, 1]


# -- the table -----------------------------------------------------------------------------------


@pytest.fixture
def arena(tmp_path: Path) -> ArenaFile:
    made = ArenaFile.create(tmp_path / "arena", clients=1024, events=64, blocklist=64)
    made.write_policy(compile_policy(Settings()))
    return made


def keys_at(place: int, n: int) -> list[int]:
    """Keys that all want to stand there."""
    return [(place << 32) | (i << 1) | 1 for i in range(n)]


def test_a_free_place_before_a_key_makes_no_second_entry(arena: ArenaFile) -> None:
    first, second, third = keys_at(5, 3)
    for key in (first, second, third):
        arena.block(key, 60)
    assert arena.unblock(first)
    arena.block(third, 600, "throttle")  # its old place comes after the free one
    entries = [entry for entry in arena.blocked() if entry["key"] == third]
    assert [(entry["action"], entry["remaining_s"] > 500) for entry in entries] == [("throttle", True)]
    assert arena.unblock(third)
    assert not arena.unblock(third)
    assert [entry["key"] for entry in arena.blocked()] == [second]


def test_a_key_is_found_behind_places_that_became_free(arena: ArenaFile) -> None:
    keys = keys_at(62, 16)  # around the end of the table
    for key in keys:
        arena.block(key, 60)
    with pytest.raises(ArenaError, match="blocklist is full"):
        arena.block(keys_at(62, 17)[-1], 60)
    for key in keys[:15]:
        assert arena.unblock(key)
    assert [entry["key"] for entry in arena.blocked()] == keys[15:]
    assert arena.unblock(keys[15])


def test_an_expired_place_is_used_again_whatever_stood_there(arena: ArenaFile) -> None:
    for key in keys_at(7, 16):
        arena.block(key, 0.01, kind="payload")
    time.sleep(0.02)
    assert arena.blocked() == []
    for key in keys_at(9, 5):
        arena.block(key, 60)
    assert {entry["kind"] for entry in arena.blocked()} == {"client"}
    arena.block(keys_at(7, 1)[0], 60, kind="payload")
    assert arena.sweep_blocked() == 10
    assert sorted(entry["key"] for entry in arena.blocked()) == sorted([*keys_at(9, 5), keys_at(7, 1)[0]])


def test_sweeping_makes_an_expired_list_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = ArenaFile.create(path, clients=1024, events=64, blocklist=64)
    empty = path.read_bytes()[:4096]
    for i, kind in enumerate(("client", "payload")):
        arena.block(keys_at(i, 1)[0], 0.01, kind=kind)
    assert path.read_bytes()[:4096] != empty
    time.sleep(0.02)
    assert arena.sweep_blocked() == 2
    assert path.read_bytes()[:4096] == empty
    for kind in ("client", "payload"):
        arena.block(99, 60, kind=kind)
    assert len(arena.blocked()) == 2
    assert arena.unblock(99)  # of whatever kind
    assert path.read_bytes()[:4096] == empty


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1, 60, "allow"), "a blocklist refuses"),
        ((1, 60, "tag"), "a blocklist refuses"),
        ((1, 60, "block", 0, "address"), "one of client, payload"),
        ((0, 60), "a key isn't 0"),
        ((1, 0), "more than 0"),
        ((1, -5), "more than 0"),
        ((1, float("nan")), "more than 0"),
        ((1, 1e12), "more than 0"),
    ],
)
def test_what_cannot_be_blocked_is_said(arena: ArenaFile, arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        arena.block(*arguments)
    assert arena.blocked() == []
