"""The latency budget: what gives way, in which order, and that it shows. No times are asserted: a budget is made
impossible or absent instead."""
from __future__ import annotations

import json

import pytest

from native.engine import Engine
from sidecar.config import loads
from sidecar.core import Core, open_core

LONG = json.dumps({f"field{i}": f"a harmless sentence, number {i}, with some words in it" for i in range(250)})
ATTACK = "/search?q=%27%20UNION%20SELECT%20password%20FROM%20users--%20"
MINIMAL = "latency: {budget: 10us%s}\nthresholds: {tag: null, throttle: null, block: 0.9}\n"


def hurried(text: str) -> tuple[Core, Engine]:
    """A core that minds its budget, as in service (a private core's own engines take their time)."""
    core = open_core(loads(text, "test"), private=True)
    return core, Engine(core.arena, core.models)


def test_a_large_body_does_not_fit_ten_microseconds_and_says_so() -> None:
    core, engine = hurried(MINIMAL % "")
    records = [
        engine.decide("POST", "/x", [("content-type", "application/json")], LONG, client="192.0.2.1").record()
        for _ in range(200)
    ]
    assert all(record["skipped"] for record in records)
    assert all("random_forest" in record["skipped"] for record in records)  # the first to give way
    counters = core.arena.counters()
    assert counters["skipped_random_forest"] == 200
    assert counters["requests"] == 200
    assert any(record["spent_us"] % 1 for record in records)  # tenths of a us


def test_what_gives_way_is_the_operators_choice() -> None:
    _, engine = hurried(MINIMAL % ", skip: [text, xgboost]")
    for _ in range(50):
        record = engine.decide("POST", "/x", [("content-type", "application/json")], LONG, client="192.0.2.1").record()
        assert "behaviour" not in record["skipped"]
        assert set(record["skipped"]) <= {"text", "xgboost", "random_forest"}
        # without values there is nothing for the trees to look at; otherwise the forest always runs
        assert ("random_forest" in record["skipped"]) <= ("text" in record["skipped"])


def test_nothing_gives_way_where_nothing_may() -> None:
    core, engine = hurried(MINIMAL % ", skip: []")
    for _ in range(50):
        verdict = engine.decide("POST", "/x", [("content-type", "application/json")], LONG, client="192.0.2.1")
        assert set(verdict.skipped) <= {"text"}  # which stops by itself at the deadline, with what it has
        assert verdict.record()["raw"]["random_forest"] is not None
    assert core.arena.counters()["budget_overruns"] > 0


@pytest.mark.parametrize("budget", ["10us", "200us", "2ms", "20ms"])
def test_skipped_names_what_did_not_run_and_nothing_else(budget: str) -> None:
    """A stage that was to give way may find time after all: then it isn't skipped."""
    core, _ = hurried(f"latency: {{budget: {budget}}}")
    blob = b"\x00" * 60_000
    skipped = 0
    for _ in range(20):
        engine = Engine(core.arena, core.models)  # its first guess at the text's cost is far too high for this body
        record = engine.decide("POST", "/x", [("content-type", "image/png")], blob, client="192.0.2.1").record()
        assert ("random_forest" in record["skipped"]) == (record["raw"]["random_forest"] is None)
        assert ("xgboost" in record["skipped"]) == (record["raw"]["xgboost"] is None)
        skipped += "random_forest" in record["skipped"]
    assert core.arena.counters()["skipped_random_forest"] == skipped


def test_a_held_client_is_not_freed_by_a_stage_that_gives_way() -> None:
    core, engine = hurried(MINIMAL % ", skip: [behaviour]")
    patient = core.engine()
    for i in range(30):
        patient.respond(patient.decide("POST", "/login", client="192.0.2.1", ts=1000.0 + i), 401, ts=1000.5 + i)
    records = [
        engine.decide(
            "POST", "/x", [("content-type", "application/json")], LONG, client="192.0.2.1", ts=1031.0
        ).record()
        for _ in range(20)
    ]
    assert any("behaviour" in record["skipped"] for record in records)
    assert all(record["action"] == "block" for record in records)


def test_an_ample_budget_changes_nothing() -> None:
    _, engine = hurried("latency: {budget: 1s}")
    core = open_core(loads("{}", "test"), private=True)
    unhurried = core.engine()
    for url in ("/", ATTACK, "/a/b?c=d"):
        one = engine.decide("GET", url, client="192.0.2.1", ts=1000.0)
        other = unhurried.decide("GET", url, client="192.0.2.1", ts=1000.0)
        assert one.skipped == other.skipped == []
        assert one.record()["scores"] == other.record()["scores"]
        assert one.action == other.action


@pytest.mark.parametrize("skip", ["[random_forest]", "[random_forest, xgboost]"])
def test_the_linear_kernel_alone_still_finds_the_plain_attack(skip: str) -> None:
    """A stage left out must not shift the scale: each subset of models is calibrated by itself."""
    core = open_core(loads(f"latency: {{skip: {skip}}}", "test"), private=True)
    full = core.engine().decide("GET", ATTACK, client="192.0.2.1")
    assert full.action == "block"
    assert full.place == "query.q"
    assert "sql_injection" in full.reasons
