"""Shedding: when a route gives stages up, when it takes them back, and that decisions say so. All times are made up."""
from __future__ import annotations

import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest

from native.arenafile import ArenaFile, shed_at, shed_step
from native.engine import Engine
from sidecar.config import Settings, loads
from sidecar.core import Core, open_core
from sidecar.policy import compile_policy

ATTACK = "/search?q=%27%20UNION%20SELECT%20password%20FROM%20users--%20"
ORDER = ["random_forest", "xgboost", "text", "behaviour"]
FIRST_MS, MOST_MS = 1000, 300_000


def level(state: int) -> int:
    return state & 15


class Route:
    """A route's state under a clock of our own."""

    def __init__(self, levels: int = 4) -> None:
        self.state, self.ms, self.levels = 0, 1_000_000, levels

    def window(self, overruns: int, requests: int = 2000, after_ms: int = 0) -> int:
        self.ms += after_ms
        self.state = shed_step(self.state, requests, overruns, self.ms, self.levels, FIRST_MS)
        return level(self.state)

    def recovers_after_ms(self) -> int:
        """How long good windows must go on for a stage to be taken back."""
        for ms in range(0, 4 * MOST_MS, 100):
            if level(shed_step(self.state, 2000, 0, self.ms + ms, self.levels, FIRST_MS)) < level(self.state):
                return ms
        raise AssertionError("never")


def test_one_more_stage_per_bad_window_down_to_the_last() -> None:
    route = Route()
    assert route.window(20) == 0  # exactly 1% is still within
    assert [route.window(21) for _ in range(6)] == [1, 2, 3, 4, 4, 4]


def test_between_good_and_bad_nothing_moves() -> None:
    route = Route()
    route.window(100)
    assert [route.window(overruns, after_ms=60_000) for overruns in (11, 15, 20)] == [1, 1, 1]
    assert route.window(10) == 0


def test_stages_come_back_one_at_a_time_after_a_hold_off() -> None:
    route = Route()
    for _ in range(3):
        route.window(500)
    assert route.window(0, after_ms=FIRST_MS - 1) == 3
    assert route.window(0, after_ms=1) == 2
    assert route.window(0) == 2  # the next one waits, too
    assert route.window(0, after_ms=FIRST_MS) == 1
    assert route.window(0, after_ms=FIRST_MS) == 0
    assert route.window(0, after_ms=FIRST_MS) == 0


def test_each_failed_trial_doubles_the_hold_off_up_to_five_minutes() -> None:
    route = Route()
    route.window(500)
    waits = []
    for _ in range(12):
        waits.append(route.recovers_after_ms())
        assert route.window(0, after_ms=waits[-1]) == 0
        assert route.window(500, after_ms=50) == 1
    assert waits[:6] == [1000, 2000, 4000, 8000, 16000, 32000]
    assert waits[-1] == MOST_MS == max(waits)


def test_a_trial_that_lasts_forgets_the_failures() -> None:
    route = Route()
    route.window(500)
    for _ in range(4):
        route.window(0, after_ms=route.recovers_after_ms())
        route.window(500)
    assert route.recovers_after_ms() == 16_000
    route.window(0, after_ms=16_000)
    assert route.window(500, after_ms=40_000) == 1  # a new trouble, not the trial's
    assert route.recovers_after_ms() == FIRST_MS


def test_going_down_further_is_no_failed_trial() -> None:
    route = Route()
    for _ in range(4):
        route.window(500, after_ms=10)
    assert route.recovers_after_ms() == FIRST_MS


def test_a_longer_first_hold_off_is_kept_to() -> None:
    state = shed_step(0, 2000, 100, 10**9, 4, 600_000)
    assert level(shed_step(state, 2000, 0, 10**9 + 599_999, 4, 600_000)) == 1
    assert level(shed_step(state, 2000, 0, 10**9 + 600_000, 4, 600_000)) == 0


def test_a_state_from_before_the_machine_was_started_again_recovers() -> None:
    state = shed_step(0, 2000, 100, 10**9, 4, FIRST_MS)
    assert level(shed_step(state, 2000, 0, 5_000, 4, FIRST_MS)) == 0


def test_a_shorter_order_bounds_the_level() -> None:
    assert level(shed_step(4, 2000, 15, 10**9, 2, FIRST_MS)) == 2
    assert level(shed_step(4, 2000, 500, 10**9, 0, FIRST_MS)) == 0


def test_the_text_is_cut_short_before_it_goes() -> None:
    assert [shed_at(ORDER, n)[1] for n in range(6)] == [
        [],
        ["random_forest"],
        ["random_forest", "xgboost"],
        ["random_forest", "xgboost", "text_in_part"],
        ["random_forest", "xgboost", "text"],
        ORDER,
    ]
    assert shed_at(ORDER, 15) == (5, ORDER)
    assert shed_at([], 15) == (0, [])
    assert shed_at(["behaviour"], 1) == (1, ["behaviour"])


# ---- windows in the arena


@pytest.fixture
def arena(tmp_path: Path) -> ArenaFile:
    return make(tmp_path / "arena", loads("latency: {budget: 1s}"))


def make(path: Path, settings: Settings) -> ArenaFile:
    arena = ArenaFile.create(path, clients=1024, events=64, blocklist=64)
    arena.write_policy(compile_policy(settings))
    return arena


def shed_now(arena: ArenaFile, route: int = 0) -> list[str]:
    return list(arena.routes()[route]["shed_now"])


def test_a_full_window_with_few_overruns_is_good(arena: ArenaFile) -> None:
    for _ in range(5):
        assert arena.note(0, True, 20, 1000) == 0
        assert arena.note(0, False, 1980, 1000) == 0
    assert shed_now(arena) == []


def test_a_window_that_can_only_be_bad_is_judged_at_once(arena: ArenaFile) -> None:
    assert arena.note(0, True, 20, 1000) == 0
    assert arena.note(0, True, 1, 1000) == 1
    assert shed_now(arena) == ["random_forest"]
    assert arena.routes()[0]["sheds"] == 1


def test_a_route_that_few_ask_for_recovers_too(arena: ArenaFile) -> None:
    arena.note(0, True, 21, 1000)  # shed ...
    arena.note(0, False, 1, 2000)
    assert arena.note(0, False, 5, 60_900) == 0
    assert arena.note(0, False, 1, 62_000) == 1  # ... and tried again after a minute without an overrun
    assert arena.routes()[0]["shed_level"] == 0
    arena.note(0, True, 21, 63_000)
    arena.note(0, True, 1, 64_000)
    assert arena.note(0, False, 5, 130_000) == 0  # there was one: it takes more requests to tell


def test_a_quiet_route_is_judged_by_time_once_it_says_something(arena: ArenaFile) -> None:
    arena.note(0, True, 3, 1000)
    assert arena.note(0, False, 196, 60_000) == 0  # 199 requests: too few
    assert arena.note(0, False, 1, 60_000) == 1  # 1.5% of 200 after a minute
    arena.note(0, False, 200, 69_999)
    assert shed_now(arena) == ["random_forest"]
    assert arena.note(0, False, 1, 70_000) == 1  # ten seconds later: good
    assert arena.routes()[0]["taken_back"] == 1


def test_routes_are_judged_each_by_itself(tmp_path: Path) -> None:
    arena = make(tmp_path / "arena", loads("routes: [{name: a, path: /a}, {name: b, path: /b}]"))
    arena.note(2, True, 21, 1000)
    assert [route["shed_now"] for route in arena.routes()] == [[], [], ["random_forest"]]
    with pytest.raises(ValueError, match="no route 3"):
        arena.note(3, True, 1, 1000)


def test_threads_together_change_the_level_once_per_window(arena: ArenaFile) -> None:
    """More windows are full than there are levels; each change is made by exactly one of the workers."""
    changes: list[int] = []

    def work(overran: bool, now_ms: int) -> None:
        changes.append(arena.note(0, overran, 100_000, now_ms))

    for overran, now_ms in ((True, 1000), (False, 5000), (False, 9000)):
        threads = [threading.Thread(target=work, args=(overran, now_ms)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (route,) = arena.routes()
    assert route["sheds"] == 5
    assert route["taken_back"] == 2  # one per hold-off, however many windows were good
    assert sum(changes) == 7
    assert route["shed_now"] == ["random_forest", "xgboost", "text_in_part"]


def test_a_worker_that_dies_over_a_full_window_wedges_nothing(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = make(path, loads("latency: {budget: 1s}"))
    arena.note(0, False, 1, 1000)
    # whoever made the window full died before taking it out
    with open(path, "r+b") as file:
        file.seek(88 + 9 * 16)
        control = struct.unpack("<Q", file.read(8))[0]
        file.seek(control)
        file.write(struct.pack("<Q", 5000 | 900 << 32))
    assert arena.note(0, False, 1, 1001) == 1
    assert shed_now(arena) == ["random_forest"]


# ---- what a decision makes of it


def hurried(text: str) -> tuple[Core, Engine]:
    core = open_core(loads(text, "test"), private=True)
    return core, Engine(core.arena, core.models)


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def bad_window(core: Core) -> None:
    # the one request before it opens the window
    core.arena.note(0, True, 22 if not core.arena.routes()[0]["sheds"] else 21, now_ms())


# what costs next to nothing is spared: these do cost something
LONG = {"headers": {"content-type": "text/plain"}, "body": "the quick brown fox; " * 3000, "client": "192.0.2.1"}


def test_a_shed_stage_is_left_out_and_named() -> None:
    core, engine = hurried("latency: {budget: 1s}\nthresholds: {tag: null, throttle: null, block: 0.9}")
    seen = []
    for _ in range(6):
        record = engine.decide("POST", ATTACK, **LONG).record()
        assert record["skipped"] == record["shed"]  # a second is enough for everything else
        seen.append(record["shed"])
        bad_window(core)
    trees = ["xgboost", "random_forest"]
    assert seen == [[], ["random_forest"], trees, trees, ["text", *trees], ["behaviour", "text", *trees]]
    assert record["raw"]["linear"] is None
    assert record["action"] == "allow"
    counters, (route,) = core.arena.counters(), core.arena.routes()
    assert counters["skipped_random_forest"] == route["skipped"]["random_forest"] == 5
    assert route["shed"] == {**dict.fromkeys(route["shed"], 0), "random_forest": 5, "xgboost": 4, "text": 2,
                             "behaviour": 1}
    assert counters["stages_shed"] == 12
    assert route["texts_in_part"] == 0  # that short text was read whole in its quarter of a second


def test_with_its_trees_shed_the_text_is_still_judged() -> None:
    core, engine = hurried("latency: {budget: 1s}\nthresholds: {tag: null, throttle: null, block: 0.9}")
    for _ in range(2):
        bad_window(core)
    verdict = engine.decide("POST", ATTACK, **LONG)
    assert verdict.skipped == ["xgboost", "random_forest"]
    assert verdict.action == "block"


def test_small_requests_are_spared() -> None:
    """Whoever makes a route overrun doesn't blind it: what costs little is still read in full."""
    core, engine = hurried("latency: {budget: 1s}\nthresholds: {tag: null, throttle: null, block: 0.9}")
    for _ in range(6):
        bad_window(core)
    assert engine.decide("POST", ATTACK, **LONG).skipped != []
    verdict = engine.decide("GET", ATTACK, client="192.0.2.1")
    assert verdict.skipped == []
    assert verdict.action == "block"


def test_a_new_budget_starts_with_clean_figures() -> None:
    core, engine = hurried("latency: {budget: 10us, shed: false, skip: []}")
    for _ in range(50):
        engine.decide("POST", ATTACK, **LONG)
    (route,) = core.arena.routes()
    assert route["requests"] == 50
    assert route["overruns"] > 0  # at least the first one, on cold memory
    core.reload(loads("latency: {budget: 1s, shed: false, skip: []}"))
    engine.decide("POST", ATTACK, **LONG)
    (route,) = core.arena.routes()
    assert (route["requests"], route["overruns"]) == (1, 0)
    assert core.arena.counters()["requests"] == 51  # the totals stay


def test_shedding_can_be_switched_off() -> None:
    core, engine = hurried("latency: {budget: 1s, shed: false}")
    bad_window(core)
    assert engine.decide("GET", "/", client="192.0.2.1").skipped == []
    assert shed_now(core.arena) == []


def test_what_takes_its_time_sheds_nothing_and_counts_for_nothing() -> None:
    core = open_core(loads("latency: {budget: 10us}", "test"), private=True)
    patient = core.engine()
    body = json.dumps({f"field{i}": f"some words, number {i}" for i in range(400)})
    for _ in range(60):
        verdict = patient.decide("POST", "/", [("content-type", "application/json")], body, client="192.0.2.1")
        assert verdict.skipped == []
    assert core.arena.counters()["budget_overruns"] == 60
    assert shed_now(core.arena) == []


def test_what_the_lists_settle_counts_for_nothing() -> None:
    """Refusals that take no time must not hide that the others take too long."""
    core, engine = hurried("latency: {budget: 1s}\nlists: {block: [192.0.2.0/24]}")
    core.arena.note(0, True, 20, now_ms())
    for _ in range(3000):
        assert engine.decide("GET", "/", client="192.0.2.1").action == "block"
    assert core.arena.note(0, True, 1, now_ms()) == 1


def test_an_impossible_budget_sheds_by_itself_and_overruns_no_more_than_it_must() -> None:
    core, engine = hurried("latency: {budget: 10us, skip: [random_forest, xgboost]}\ntext: {body: 1MiB}")
    body = json.dumps({"text": "some words " * 50_000})
    for _ in range(100):
        engine.decide("POST", "/", [("content-type", "application/json")], body, client="192.0.2.1")
    # a body that long makes the deadline pass in the text at each request, wherever the clock is read
    (route,) = core.arena.routes()
    assert route["skipped"]["random_forest"] == route["skipped"]["xgboost"] == 100
    assert route["texts_in_part"] + route["skipped"]["text"] >= 100


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", json.dumps(list(range(150_000)))),
        ("application/json", "[" + " " * 1_000_000 + "]"),
        ("application/json", json.dumps({"a": "some words " * 90_000})),
        ("application/json", json.dumps({"a": "\n" * 500_000})),
        ("application/x-www-form-urlencoded", "&".join(f"a{i}={i}" for i in range(80_000))),
        ("application/x-www-form-urlencoded", "&" * 1_000_000),
        ("application/xml", "<a>" + "<b c='1'/>" * 90_000 + "</a>"),
        ("application/xml", "<a " + "b " * 500_000 + "/>"),
        ("multipart/form-data; boundary=x", "--x\r\n\r\n1\r\n" * 90_000),
        ("text/plain", "QUJD" * 250_000),
        ("text/plain", "words " * 160_000),
        ("application/graphql", "{ a" + " b" * 400_000 + " }"),
    ],
    ids=lambda value: value[:12],
)
def test_every_kind_of_body_is_left_when_the_time_is_up(kind: str, body: str) -> None:
    """A million bytes take ms; whoever never looks at the clock would read them to the end and not say so."""
    _, engine = hurried("latency: {budget: 100us, skip: [], shed: false}\ntext: {body: 1MiB}")
    found = [engine.decide("POST", "/", [("content-type", kind)], body, client="192.0.2.1") for _ in range(5)]
    assert all(verdict.skipped == ["text"] for verdict in found)


# ---- configuration


def test_a_new_budget_or_order_tries_everything_again(tmp_path: Path) -> None:
    arena = make(tmp_path / "arena", loads("latency: {budget: 1s}"))
    arena.note(0, True, 30, 1000)
    arena.write_policy(compile_policy(loads("latency: {budget: 1s, recover: 30s}")))
    assert shed_now(arena) == ["random_forest"]  # nothing that matters has changed
    arena.write_policy(compile_policy(loads("latency: {budget: 900ms}")))
    assert shed_now(arena) == []
    arena.note(0, True, 30, 2000)
    arena.write_policy(compile_policy(loads("latency: {budget: 900ms, skip: [text]}")))
    assert shed_now(arena) == []


def test_another_process_sees_what_was_shed(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    arena = make(path, loads("latency: {budget: 1s}"))
    child = os.fork()
    if child == 0:
        ArenaFile.open(path).note(0, True, 30, now_ms())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert Engine(arena).decide("GET", "/", client="192.0.2.1").skipped == []  # there are no models to skip
    assert shed_now(arena) == ["random_forest"]
