"""Routes' figures in the arena, what is made of them, and `outrider latency`."""
from __future__ import annotations

import itertools
import json
import math
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from native.arenafile import ArenaFile, latency_bucket
from native.engine import HISTOGRAM_BOUNDS_US, LATENCY_BOUNDS_US, Engine
from sidecar.cli import main
from sidecar.config import loads
from sidecar.latency import Snapshot, between, quantile_us, take, times
from sidecar.policy import compile_policy
from sidecar.serve import sheds
from sidecar.serve.metrics import Outrider, Tally, make_registry

ROUTES = """
latency: {budget: 2ms}
routes:
  - {name: login, path: /login, budget: 10us}
  - {name: search, path: /search, budget: 500ms}
  - {name: health, path: /health, exempt: true}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arena"


def make(path: Path, text: str = ROUTES) -> ArenaFile:
    arena = ArenaFile.create(path, clients=1024, events=64, blocklist=64)
    arena.write_policy(compile_policy(loads(text)))
    return arena


def decide(arena: ArenaFile, **counts: int) -> None:
    engine = Engine(arena)
    for name, n in counts.items():
        for _ in range(n):
            engine.decide("GET", f"/{name}", client="192.0.2.1")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["latency", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


# ---- buckets


def test_each_time_falls_into_the_bucket_of_the_next_bound() -> None:
    bounds = [round(bound * 1000) for bound in LATENCY_BOUNDS_US]
    rng = random.Random(7)
    wanted = [0, 1, 10**9, 2**40, *(rng.randrange(2 ** rng.randrange(1, 26)) for _ in range(20_000))]
    for bound in bounds:
        wanted += [bound - 1, bound, bound + 1]
    for ns in wanted:
        assert latency_bucket(ns) == bisect_left(bounds, ns), ns


def test_bounds_are_fine_enough_and_hold_the_coarse_ones() -> None:
    assert set(HISTOGRAM_BOUNDS_US) <= set(LATENCY_BOUNDS_US)
    assert (LATENCY_BOUNDS_US[0], LATENCY_BOUNDS_US[-1]) == (1, 10_000)
    assert all(b / a <= 1.25 for a, b in itertools.pairwise(LATENCY_BOUNDS_US))


def test_quantiles_are_at_most_a_bucket_from_the_truth() -> None:
    rng = random.Random(3)
    sent = sorted(rng.lognormvariate(3, 1) for _ in range(5000))
    counts = [0] * (len(LATENCY_BOUNDS_US) + 1)
    for us in sent:
        counts[bisect_left(LATENCY_BOUNDS_US, us)] += 1
    for q in (0.01, 0.5, 0.99, 0.999):
        true = sent[math.ceil(q * len(sent)) - 1]
        found = quantile_us(counts, LATENCY_BOUNDS_US, q)
        assert found is not None
        assert true / 1.26 <= found <= true * 1.26
    assert quantile_us([0] * 5, LATENCY_BOUNDS_US, 0.5) is None
    assert quantile_us([1, 1], [10.0], 0.99) == math.inf
    assert quantile_us([4, 0], [10.0], 0.5) == 5


# ---- the arena's figures


def test_each_route_has_its_own_figures(path: Path) -> None:
    arena = make(path)
    arena.block(arena.client_key("192.0.2.9"), 60)
    decide(arena, login=3, search=5, health=2, other=1)
    Engine(arena).decide("GET", "/login", client="192.0.2.9")
    figures = {route["name"]: route for route in ArenaFile.open(path).routes()}
    assert list(figures) == ["default", "login", "search", "health"]
    assert {name: route["requests"] for name, route in figures.items()} == {
        "default": 1, "login": 4, "search": 5, "health": 2}
    assert [route["budget_us"] for route in figures.values()] == [2000, 10, 500_000, 2000]
    assert figures["login"]["path"] == "/login"
    assert figures["login"]["actions"]["block"] == 1
    assert figures["search"]["actions"]["allow"] == 5
    assert sum(figures["search"]["stages"]["behaviour"]) == 5
    assert sum(figures["health"]["stages"]["behaviour"]) == 0  # exempt: unread
    assert all(route["spent_s"] > 0 for route in figures.values())
    assert all(sum(route["decisions"]) == route["requests"] for route in figures.values())
    assert sum(arena.histograms()["total"]) == 12
    assert sum(arena.histograms()["client"]) == 9


def test_overruns_are_counted_per_route(path: Path) -> None:
    arena = make(path)
    body = json.dumps({f"f{i}": "x" for i in range(20)})
    engine = Engine(arena, unhurried=True)
    for _ in range(50):
        engine.decide("GET", "/login", [(f"x-{i}", body) for i in range(60)], client="192.0.2.1")
        engine.decide("GET", "/search", client="192.0.2.1")
    figures = {route["name"]: route["overruns"] for route in arena.routes()}
    assert figures["login"] == arena.counters()["budget_overruns"]
    assert figures["search"] == 0


def test_figures_stay_with_the_name_when_routes_change(path: Path) -> None:
    arena = make(path)
    decide(arena, login=3, search=5, health=2, other=1)
    arena.note(2, True, 30, 1000)
    totals = arena.histograms()
    arena.write_policy(compile_policy(loads("""
latency: {budget: 2ms}
routes:
  - {name: new, path: /new}
  - {name: search, path: /find, budget: 500ms}
  - {name: login, path: /login, budget: 10us}
""")))
    figures = {route["name"]: route for route in arena.routes()}
    assert {name: route["requests"] for name, route in figures.items()} == {
        "default": 1, "new": 0, "search": 5, "login": 3}
    assert figures["search"]["shed_now"] == ["random_forest"]
    assert arena.histograms() == totals  # what the route that went had counted is not lost
    decide(arena, new=4)
    assert arena.routes()[1]["requests"] == 4
    arena.write_policy(compile_policy(loads(ROUTES)))
    assert arena.routes()[3]["requests"] == 0  # health is new again
    assert sum(arena.histograms()["total"]) == 15


def test_256_routes_have_256_places(path: Path) -> None:
    names = [f"r{i}" for i in range(255)]

    def written(names: list[str]) -> str:
        return f"routes: [{', '.join(f'{{name: {name}, path: /{name}}}' for name in names)}]"

    arena = make(path, written(names))
    decide(arena, **dict.fromkeys(names, 1))
    assert [route["requests"] for route in arena.routes()] == [0] + [1] * 255
    arena.write_policy(compile_policy(loads(written(names[:99:-1]))))
    assert [route["requests"] for route in arena.routes()] == [0] + [1] * 155


def test_records_say_the_routes_name(path: Path) -> None:
    arena = make(path)
    arena.block(arena.client_key("192.0.2.7"), 60)
    Engine(arena).decide("GET", "/search", client="192.0.2.7")
    arena.write_policy(compile_policy(loads("{}")))
    (record,) = arena.drain()
    assert record["route"] == "search"  # as it was when it was decided
    assert record["shed"] == record["skipped"] == []


# ---- differences


def test_a_span_counts_only_what_happened_in_it(path: Path) -> None:
    arena = make(path)
    decide(arena, login=7, search=2)
    before = take(arena)
    decide(arena, login=4)
    span = between(before, take(arena))
    assert {route["name"]: times(route).requests for route in span.routes} == {
        "default": 0, "login": 4, "search": 0, "health": 0}
    login = times(span.routes[1])
    assert sum(stage.runs for stage in login.stages if stage.name == "behaviour") == 4
    assert times(span.routes[2]).p99_us is None


def test_a_route_that_went_and_came_counts_anew(path: Path) -> None:
    arena = make(path)
    decide(arena, login=7)
    before = take(arena)
    arena.write_policy(compile_policy(loads("{}")))
    arena.write_policy(compile_policy(loads(ROUTES)))
    decide(arena, login=2)
    assert times(between(before, take(arena)).routes[1]).requests == 2


def route_of(**changes: Any) -> dict[str, Any]:
    latency = [0] * (len(LATENCY_BOUNDS_US) + 1)
    latency[LATENCY_BOUNDS_US.index(50.0)] = 1000
    names = ("blocklist", "client", "behaviour", "text", "xgboost", "random_forest")
    return {
        "name": "r", "path": "/r", "budget_us": 50, "requests": 1000, "latency": latency, "spent_s": 0.048,
        "stages": {name: [0] * 16 for name in names}, "actions": {"allow": 1000}, "overruns": 10,
        "skipped": {**dict.fromkeys(names, 0), "text": 300, "random_forest": 1000},
        "shed": {**dict.fromkeys(names, 0), "text": 100}, "texts_in_part": 200, "shed_now": ["random_forest"],
        "sheds": 2, "taken_back": 1, **changes}


def test_a_budget_holds_where_one_percent_overran_and_not_one_more() -> None:
    assert times(route_of()).holds is True
    assert times(route_of(overruns=11)).holds is False
    assert times(route_of(budget_us=0, overruns=0)).holds is None
    assert times(route_of(requests=0, overruns=0)).holds is None


def test_texts_read_in_part_are_told_from_those_left_out() -> None:
    route = times(route_of())
    assert route.skipped == {"text": 0.1, "random_forest": 1.0}
    assert route.texts_in_part == 0.2
    assert route.mean_us == pytest.approx(48)
    assert route.shed == {"text": 0.1}


# ---- the command


def test_the_table_names_what_an_operator_asks_for(path: Path) -> None:
    arena = make(path)
    decide(arena, search=300)
    arena.note(2, True, 30, 1000)
    code, text = run("--arena", path, "--stages")
    assert code == 0
    for word in ("search", "300", "500ms", "p99.9", "random_forest"[7:], "over budget", "behaviour", "shed now"):
        assert word in text
    assert "No traffic" not in text


def test_json_is_complete(path: Path) -> None:
    arena = make(path)
    decide(arena, search=300, other=1)
    code, text = run("--arena", path, "--json")
    assert code == 0
    found = json.loads(text)
    assert found["seconds"] is None
    assert found["since"] == pytest.approx(arena.created, abs=0.01)
    rows = {row["route"]: row for row in found["routes"]}
    assert set(rows) == {"default", "login", "search", "health"}
    search = rows["search"]
    assert (search["requests"], search["budget_us"], search["holds"], search["overruns"]) == (300, 500_000, True, 0)
    assert 0 < search["p50_us"] <= search["p99_us"] <= search["p999_us"]
    assert search["stages"]["behaviour"]["runs"] == 300
    assert rows["login"]["p99_us"] is None
    assert rows["login"]["holds"] is None


def test_one_route_of_many(path: Path) -> None:
    decide(make(path), search=3)
    code, text = run("--arena", path, "--json", "--route", "search", "--route", "login")
    assert [row["route"] for row in json.loads(text)["routes"]] == ["login", "search"]
    code, text = run("--arena", path, "--route", "serach")
    assert code == 2
    assert "no route is called serach (there are: default, health, login, search)" in text


def test_the_configuration_names_the_arena(path: Path, tmp_path: Path) -> None:
    decide(make(path), search=3)
    config = tmp_path / "outrider.yaml"
    config.write_text(f"arena: {{path: {path}}}\n")
    assert run("-c", config)[0] == 0
    config.write_text("arena: {pth: /x}\n")
    code, text = run("-c", config)
    assert code == 2
    assert "did you mean path?" in text
    code, text = run("-c", tmp_path / "none.yaml")
    assert code == 2
    assert "cannot be read" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the configuration (-c FILE) or the arena (--arena PATH)"),
        (["-c", "a", "--arena", "b"], "name the configuration"),
        (["--arena", "b", "--for", "10"], "'10' has no unit: write 10us, 10ms or 10s"),
        (["--arena", "b", "--for", "2h"], "not between 100ms and 1h"),
        (["--arena", "b", "--watch", "--check"], "--watch has none"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str) -> None:
    code, text = run(*arguments)
    assert code == 2
    assert says in text


def test_no_arena_or_another_file(path: Path, tmp_path: Path) -> None:
    code, text = run("--arena", path)
    assert code == 2
    assert f"{path}: there is no arena (is the sidecar running" in text
    path.write_bytes(b"\x1b[31m" * 4096)
    code, text = run("--arena", path)
    assert code == 2
    assert "not an Outrider arena" in text
    assert "\x1b" not in text
    code, text = run("--arena", tmp_path / "\x1b[31mred")
    assert code == 2
    assert "\x1b" not in text


def test_an_arena_of_another_version(path: Path) -> None:
    make(path)
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"\x63")
    code, text = run("--arena", path)
    assert code == 2
    assert "layout version 99, this build reads version 4: this outrider is not the version that runs" in text


def test_an_arena_without_a_policy(path: Path) -> None:
    ArenaFile.create(path, clients=1024, events=64, blocklist=64)
    code, text = run("--arena", path)
    assert code == 2
    assert "no policy yet" in text


def test_no_traffic_yet(path: Path) -> None:
    make(path)
    code, text = run("--arena", path)
    assert code == 0
    assert "No traffic yet" in text
    code, text = run("--arena", path, "--check")
    assert code == 2
    assert "nothing to check" in text


def test_check_tells_a_budget_that_holds_from_one_that_does_not(path: Path) -> None:
    arena = make(path)
    decide(arena, search=100)
    assert run("--arena", path, "--check")[0] == 0
    heavy = [(f"x-{i}", json.dumps([i] * 90)) for i in range(60)]
    engine = Engine(arena, unhurried=True)
    for _ in range(200):
        engine.decide("GET", "/login", [*heavy, ("x-api-key", "k")], client="192.0.2.1")
    with open(path, "r+b") as file:  # without models nothing takes 10 us: make it so
        data = file.read()
        before = arena.routes()[1]["overruns"]
        at = find_overruns(arena, data, before)
        file.seek(at)
        file.write((150).to_bytes(8, "little"))
    code, text = run("--arena", path, "--check")
    assert code == 1
    assert "login: 75.00% of 200 decisions took longer than 10us, at most 1% may" in text
    assert run("--arena", path, "--check", "--route", "search")[0] == 0


def find_overruns(arena: ArenaFile, data: bytes, overruns: int) -> int:
    """Where the overruns of the route login stand: its counters are those with 200 decisions and 200 allowed."""
    region = struct.unpack_from("<Q", data, 88 + 8 * 16)[0]
    for start in range(region, len(data) - 1600, 1600):
        words = struct.unpack_from("<200Q", data, start)
        if sum(words[:82]) == 200 and words[82 + 96] == 200:
            assert words[82 + 96 + 5 + 6 + 6 + 1] == overruns
            return start + 8 * (82 + 96 + 5 + 6 + 6 + 1)
    raise AssertionError("not found")


def test_a_span_of_time(path: Path) -> None:
    arena = make(path)
    decide(arena, search=500)
    thread = threading.Timer(0.2, decide, (arena,), {"search": 7})
    thread.start()
    code, text = run("--arena", path, "--for", "600ms", "--json")
    thread.join()
    assert code == 0
    found = json.loads(text)
    assert found["seconds"] == 0.6
    assert {row["route"]: row["requests"] for row in found["routes"]}["search"] == 7


def test_an_arena_replaced_while_measuring(path: Path) -> None:
    make(path)
    thread = threading.Timer(0.2, make, (path,))
    thread.start()
    code, text = run("--arena", path, "--for", "600ms")
    thread.join()
    assert code == 2
    assert "was replaced while this was measured" in text


def test_hostile_names_in_a_damaged_arena_are_escaped(path: Path) -> None:
    make(path)
    data = path.read_bytes()
    with open(path, "r+b") as file:
        at = -1
        while (at := data.find(b"search", at + 1)) >= 0:
            file.seek(at)
            file.write(b"\x1b[31m]")
    code, text = run("--arena", path, "--stages")
    assert code == 0
    assert "\x1b" not in text
    assert "[31m" in text


def test_watch_ends_quietly(path: Path) -> None:
    decide(make(path), search=5)
    command = [sys.executable, "-m", "sidecar.cli", "latency", "--arena", str(path), "--json"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--watch", "--for", "100ms"], text=True, **both) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert [len(json.loads(line)["routes"]) for line in lines] == [4, 4, 4]
    assert process.returncode == 0
    assert errors == ""


def test_watch_shows_the_table_until_it_is_stopped(path: Path) -> None:
    decide(make(path), search=5)
    command = [sys.executable, "-m", "sidecar.cli", "latency", "--arena", str(path), "--watch"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--for", "100ms"], text=True, **both) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == ""
    assert out.count("search") == 1  # where there is no terminal, what was last


# ---- metrics and the log


def test_metrics_by_route(path: Path) -> None:
    arena = make(path)
    decide(arena, search=30)
    arena.note(2, True, 30, time.monotonic_ns() // 1_000_000)
    decide(arena, search=1)
    collector = Outrider(arena.counters, arena.histograms, HISTOGRAM_BOUNDS_US, dict, Tally(), dict, "9.9",
                         lambda: "observe", arena.routes)
    text = generate_latest(make_registry(collector)).decode()
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    search = ("route", "search")
    name = "outrider_route_decision_duration_seconds"
    assert found[f"{name}_count", (search,)] == 31
    assert found[f"{name}_bucket", (("le", "+Inf"), search)] == 31
    assert found[f"{name}_bucket", (("le", "0.01"), search)] <= 31
    assert found[f"{name}_sum", (search,)] == pytest.approx(arena.routes()[2]["spent_s"])
    assert found["outrider_route_decisions_total", (("action", "allow"), search)] == 31
    assert found["outrider_route_budget_seconds", (search,)] == 0.5
    assert found["outrider_route_shed_level", (search,)] == 1
    assert found["outrider_route_shed_level", (("route", "login"),)] == 0
    assert found["outrider_route_budget_overruns_total", (search,)] == 0
    assert found["outrider_route_stages_skipped_total", (search, ("stage", "text"))] == 0
    bounds = {dict(labels)["le"] for key, labels in found if key == f"{name}_bucket"}
    assert len(bounds) == len(HISTOGRAM_BOUNDS_US) + 1


def test_changes_of_what_is_shed_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "outrider.latency")
    seen: dict[str, int] = {}
    order = [[], ["random_forest"], ["random_forest", "text_in_part"], ["random_forest", "text"]]
    for level in (0, 1, 1, 2, 3, 2, 0):
        seen = sheds.tell(seen, [route_of(shed_now=order[level], shed_level=level)])
    assert [(record.levelname, record.__dict__["shed"]) for record in caplog.records] == [
        ("WARNING", order[1]), ("WARNING", order[2]), ("WARNING", order[3]), ("INFO", order[2]), ("INFO", [])]
    assert {record.__dict__["route"] for record in caplog.records} == {"r"}


def test_snapshots_of_nothing() -> None:
    empty = Snapshot(1.0, 2.0, ())
    assert between(empty, empty).routes == ()
