"""Several processes decide by one arena: the sidecar's metrics, latency figures and decision log are of all of them."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_sidecar import ROOT, Sidecar, until

# decides until it has N, or without N for ever; every fifth request comes from a blocked range
WRITER = """
import sys
from native.engine import Engine, Models
from native.arenafile import ArenaFile
arena, name, n = ArenaFile.open(sys.argv[1]), sys.argv[2], int(sys.argv[3])
engine = Engine(arena, Models())
i = 0
while n == 0 or i < n:
    engine.decide("GET", f"/w/{name}", client="198.51.100.1" if i % 5 == 0 else f"192.0.2.{i % 200}")
    i += 1
    if i == 1:
        print("deciding", flush=True)
"""


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    sidecar = Sidecar(tmp_path, lists={"block": ["198.51.100.0/24"]}, arena={"events": 65536},
                      routes=[{"name": "writers", "path": "/w/**"}], detectors={"request_flood": {"enabled": False}})
    yield sidecar.start()
    if sidecar.process is not None and sidecar.process.poll() is None:
        sidecar.process.kill()
        sidecar.process.wait()


def writer(sidecar: Sidecar, name: str, n: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(sidecar.arena), name, str(n)], stdout=subprocess.PIPE,
                            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def latency(sidecar: Sidecar) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-m", "sidecar.cli", "latency", "--arena", str(sidecar.arena), "--json"],
                          capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          check=True)
    return {route["route"]: route["requests"] for route in json.loads(done.stdout)["routes"]}


def test_all_writers_count(sidecar: Sidecar) -> None:
    writers = [writer(sidecar, name, 500) for name in ("a", "b", "c")]
    for process in writers:
        assert process.wait(60) == 0
        assert process.stdout is not None
        process.stdout.close()
    assert sidecar.metric("outrider_requests_total") == 1500
    assert sidecar.metric('outrider_enforced_total{action="block"}') == 300
    assert sidecar.metric('outrider_route_decisions_total{action="block",route="writers"}') == 300
    assert sidecar.metric('outrider_route_decision_duration_seconds_count{route="writers"}') == 1500
    assert latency(sidecar)["writers"] == 1500
    logged = until(lambda: found if len(found := sidecar.decisions()) >= 300 else None, "all are logged")
    assert Counter(record["path"] for record in logged) == {"/w/a": 100, "/w/b": 100, "/w/c": 100}
    assert len({record["id"] for record in logged}) == 300
    assert {record["route"] for record in logged} == {"writers"}
    assert sidecar.metric("outrider_events_dropped_total") == 0


def test_writers_that_are_killed_stop_nobody(sidecar: Sidecar) -> None:
    """Also amid a record: at most that one is lost."""
    for _ in range(3):
        process = writer(sidecar, "killed", 0)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        process.stdout.close()
    last = writer(sidecar, "last", 50)
    assert last.wait(60) == 0
    assert last.stdout is not None
    last.stdout.close()
    until(lambda: sum(record["path"] == "/w/last" for record in sidecar.decisions()) == 10, "the last ones are logged")
    decided, refused = (sidecar.metric(name) for name in (
        "outrider_requests_total", 'outrider_enforced_total{action="block"}'))
    assert decided is not None
    assert refused is not None
    given_up = sidecar.metric("outrider_events_given_up_total")
    assert given_up is not None
    assert given_up <= 3
    dropped = sidecar.metric("outrider_events_dropped_total")
    assert dropped is not None
    assert refused - 3 <= len(sidecar.decisions()) + dropped <= refused + 3
    assert latency(sidecar)["writers"] >= decided - 3


def test_what_is_decided_without_a_sidecar_is_counted_and_logged_by_the_next(sidecar: Sidecar) -> None:
    assert sidecar.stop(signal.SIGKILL) == -signal.SIGKILL
    process = writer(sidecar, "alone", 100)
    assert process.wait(60) == 0
    assert process.stdout is not None
    process.stdout.close()
    assert latency(sidecar)["writers"] == 100
    sidecar.start()
    assert sidecar.metric("outrider_requests_total") == 100
    logged = until(lambda: found if len(found := sidecar.decisions()) >= 20 else None, "all are logged")
    assert {record["path"] for record in logged} == {"/w/alone"}
