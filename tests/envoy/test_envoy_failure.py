"""The sidecar dies, hangs, drains, is reconfigured or gets new models while requests are coming in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import BLOCKED, FRIEND, Load, ask, eventually, make_bundle, metrics

from sidecar.demo.stack import Stack, envoy_stats, merge
from sidecar.demo.supervisor import answers, free_port
from sidecar.demo.traffic import json_case, send

GUESSER = "198.51.100.66"


@pytest.fixture
def fresh(envoy_binary: Path, settings: dict[str, Any]) -> Iterator[Stack]:
    """A stack of its own, failing open."""
    with Stack(settings, fixed_ports=False) as running:
        yield running


@pytest.fixture
def closed(envoy_binary: Path, settings: dict[str, Any]) -> Iterator[Stack]:
    """A stack of its own, failing closed."""
    with Stack(
        merge(settings, {"service": {"failure": "closed"}}), {"failure_open": False}, fixed_ports=False
    ) as running:
        yield running


def guess_until_refused(stack: Stack, client: str) -> int:
    """Wrong passwords until the client is refused; at which request that was."""
    for attempt in range(1, 51):
        case = json_case("", True, "/login", {"user": "ada", "password": f"guess{attempt}"})
        if send(stack.ports["envoy"], case, client).status == 403:
            return attempt
    raise AssertionError("50 guesses and never refused")


def test_killed_under_load_it_fails_open_and_comes_back_with_its_memory(fresh: Stack) -> None:
    refused_at = guess_until_refused(fresh, GUESSER)
    assert refused_at > 3
    known = metrics(fresh)["outrider_clients"]
    with Load(fresh) as load:
        eventually(lambda: load.seen()["200"] > 50, "load before the kill")
        fresh.sidecar.kill()
        fresh.wait_for_envoy(healthy=False)
        load.reset()
        eventually(lambda: load.seen()["200"] > 100, "load without the sidecar")
        assert set(load.seen()) == {"200"}
        # nobody is refused now, as configured: not even who is on the list
        assert ask(fresh, "/items", BLOCKED).status == 200
        fresh.start_sidecar()
        fresh.wait_for_envoy()
        eventually(lambda: ask(fresh, "/items", BLOCKED).status == 403, "decisions again")
    # at the moment of the kill too, no request got an error
    assert set(load.seen()) == {"200"}
    assert ask(fresh, "/items", GUESSER).status == 403
    assert ask(fresh, "/items", FRIEND).status == 200
    assert metrics(fresh)["outrider_clients"] >= known


def test_killed_under_load_it_fails_closed_where_that_is_configured(closed: Stack) -> None:
    with Load(closed) as load:
        eventually(lambda: load.seen()["200"] > 50, "load before the kill")
        assert set(load.seen()) == {"200"}
        closed.sidecar.kill()
        closed.wait_for_envoy(healthy=False)
        load.reset()
        eventually(lambda: load.seen()["503"] > 50, "refusals without the sidecar")
        assert set(load.seen()) == {"503"}
        closed.start_sidecar()
        closed.wait_for_envoy()
        eventually(lambda: ask(closed, "/items").status == 200, "decisions again")
        load.reset()
        eventually(lambda: load.seen()["200"] > 50, "load after the restart")
        assert set(load.seen()) == {"200"}


def test_killed_again_and_again(fresh: Stack) -> None:
    """Each time under load, each time the arena is taken over."""
    with Load(fresh) as load:
        for _ in range(3):
            load.reset()
            eventually(lambda: load.seen()["200"] > 30, "load")
            fresh.sidecar.kill()
            fresh.start_sidecar()
        fresh.wait_for_envoy()
        eventually(lambda: ask(fresh, "/items", BLOCKED).status == 403, "decisions again")
    assert set(load.seen()) == {"200"}
    assert metrics(fresh)["outrider_requests_total"] > 30


def test_stopped_it_costs_no_more_than_the_timeout(fresh: Stack) -> None:
    """SIGSTOP: the socket is there, nobody answers. Requests pass when Envoy's patience ends."""
    os.kill(fresh.sidecar.pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        assert ask(fresh, "/items").status == 200
        assert time.monotonic() - begun < fresh.plan.message_timeout_s * 3 + 2
        fresh.wait_for_envoy(healthy=False)
        begun = time.monotonic()
        for _ in range(5):
            assert ask(fresh, "/items").status == 200
        assert time.monotonic() - begun < 3, "once known to be down it must cost nothing"
    finally:
        os.kill(fresh.sidecar.pid, signal.SIGCONT)
    fresh.wait_for_envoy()
    eventually(lambda: ask(fresh, "/items", BLOCKED).status == 403, "decisions again")


def test_a_stop_drains_without_an_error(fresh: Stack) -> None:
    with Load(fresh) as load:
        eventually(lambda: load.seen()["200"] > 50, "load")
        assert fresh.sidecar.process is not None
        fresh.sidecar.process.terminate()
        eventually(lambda: not answers(fresh.admin_url + "/readyz"), "not ready", 3)
        assert fresh.sidecar.process.wait(15) == 0
        load.reset()
        eventually(lambda: load.seen()["200"] > 20, "load after the stop")
    assert set(load.seen()) == {"200"}
    assert not fresh.socket.exists()
    assert "Traceback" not in fresh.sidecar.tail()


# ---- changes while serving


def reloads(stack: Stack, result: str) -> float:
    return metrics(stack)[f'outrider_config_reloads_total{{result="{result}"}}']


def test_a_changed_configuration_is_taken_up_while_serving(fresh: Stack, settings: dict[str, Any]) -> None:
    with Load(fresh) as load:
        assert ask(fresh, "/items", "192.0.2.7").status == 200
        fresh.write_settings(merge(settings, {"lists": {"block": ["192.0.2.0/24"]}}))
        eventually(lambda: ask(fresh, "/items", "192.0.2.7").status == 403, "the new list")
        assert ask(fresh, "/items", BLOCKED).status == 200
        assert reloads(fresh, "applied") == 1
    assert set(load.seen()) == {"200"}


def test_a_bad_configuration_is_refused_and_counted(fresh: Stack, settings: dict[str, Any]) -> None:
    good = fresh.settings_file.read_text()
    fresh.settings_file.write_text(good + "\nmistake: 1\nservice: [what\n")
    eventually(lambda: reloads(fresh, "refused") >= 1, "the refusal counted")
    assert metrics(fresh)["outrider_config_last_reload_successful"] == 0
    assert ask(fresh, "/items", BLOCKED).status == 403
    assert "configuration refused" in fresh.sidecar.tail()
    fresh.write_settings(merge(settings, {"lists": {"block": []}}))
    eventually(lambda: ask(fresh, "/items", BLOCKED).status == 200, "the repaired file taken up")
    assert metrics(fresh)["outrider_config_last_reload_successful"] == 1


def test_a_hang_up_reopens_the_decision_log(fresh: Stack) -> None:
    ask(fresh, "/items")
    eventually(lambda: fresh.decisions.exists(), "the decision log")
    rotated = fresh.decisions.with_suffix(".1")
    fresh.decisions.rename(rotated)
    os.kill(fresh.sidecar.pid, signal.SIGHUP)
    eventually(lambda: reloads(fresh, "unchanged") == 1, "the hang-up heard")
    ask(fresh, "/items")
    eventually(lambda: fresh.decisions.exists() and fresh.decisions.read_text(), "a new decision log")


def test_models_are_swapped_while_serving_and_bad_ones_refused(
    envoy_binary: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The service's two bundles score everything 0.1 or 0.95; 0.9 is refused."""
    bundle = make_bundle(tmp_path / "bundle", 0.1)
    with Stack(merge(settings, {"models": {"bundle": str(bundle)}}), fixed_ports=False) as stack:
        assert ask(stack, "/items").status == 200
        with Load(stack) as load:
            eventually(lambda: load.seen()["200"] > 30, "load")
            make_bundle(bundle, 0.95)
            eventually(lambda: load.seen()["403"] > 30, "the new models' refusals")
            load.reset()
            eventually(lambda: load.seen()["403"] > 30, "refusals")
            assert set(load.seen()) == {"403"}
            (bundle / "manifest.json").write_text("{}")
            name = 'outrider_model_reloads_total{{result="{}"}}'
            eventually(lambda: metrics(stack)[name.format("refused")] == 1, "the bad bundle refused")
            load.reset()
            eventually(lambda: load.seen()["403"] > 30, "the models in use kept")
            assert set(load.seen()) == {"403"}
            make_bundle(bundle, 0.1)
            # another client: the load's is being held for what it did
            eventually(lambda: ask(stack, "/items", "192.0.2.44").status == 200, "the calm models again")
        assert set(load.seen()) <= {"200", "403"}
        assert metrics(stack)[name.format("applied")] == 2


# ---- what can't start says so


def serve(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sidecar.cli", "serve", "-c", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )


def changed(stack: Stack, folder: Path, **over: Any) -> Path:
    base = yaml.safe_load(stack.settings_file.read_text())
    path = folder / "outrider.yaml"
    path.write_text(yaml.safe_dump(merge(base, over)))
    return path


def test_a_second_sidecar_is_told_why_it_cannot_start(stack: Stack, tmp_path: Path) -> None:
    admin: dict[str, Any] = {"address": f"127.0.0.1:{free_port(0, set())}"}
    listen = {"address": f"127.0.0.1:{free_port(0, set())}"}
    arena = {"path": str(tmp_path / "arena")}
    taken = {"address": f"127.0.0.1:{stack.ports['api']}"}
    for over, word in (
        ({"admin": admin}, "another process already listens"),
        ({"admin": admin, "listen": listen}, "another sidecar is using this arena"),
        ({"arena": arena, "listen": listen}, "admin.address"),
        ({"arena": arena, "listen": taken, "admin": admin}, "is in use by another process"),
        ({"arena": {"path": "/proc/arena"}, "listen": listen, "admin": admin}, "arena"),
    ):
        done = serve(changed(stack, tmp_path, **over))
        assert done.returncode in (2, 3), done.stderr
        assert word in done.stderr
        assert "Traceback" not in done.stderr
    assert ask(stack, "/items", BLOCKED).status == 403  # the first one was left alone


def test_a_bundle_that_is_none_is_refused(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    done = serve(
        changed(
            stack,
            tmp_path,
            listen={"address": f"127.0.0.1:{free_port(0, set())}"},
            admin={"address": None},
            arena={"path": str(tmp_path / "arena")},
            models={"bundle": str(tmp_path)},
        )
    )
    assert (done.returncode, "models.bundle" in done.stderr, "Traceback" in done.stderr) == (4, True, False)


def test_a_wrong_configuration_is_refused_with_every_mistake(tmp_path: Path) -> None:
    path = tmp_path / "outrider.yaml"
    path.write_text("service: {mode: maybe}\nlatency: {budget: 5}\nunknown: 1\n")
    done = serve(path)
    assert done.returncode == 2
    for word in ("mode", "budget", "unknown"):
        assert word in done.stderr


def test_envoy_counts_no_protocol_errors(stack: Stack) -> None:
    """In all of the shared stack's traffic so far."""
    for number in range(20):
        ask(stack, f"/items/{number}")
    stats = envoy_stats(stack.envoy_admin_url, everything=True)

    def one(ending: str) -> int:
        (value,) = [value for name, value in stats.items() if name.endswith(ending)]
        return value

    assert one("ext_proc.outrider.streams_started") >= 20
    assert one("ext_proc.outrider.stream_msgs_received") >= 30
    for fault in (
        "spurious_msgs_received",
        "streams_failed",
        "failure_mode_allowed",
        "message_timeouts",
        "rejected_header_mutations",
    ):
        assert one(f"ext_proc.outrider.{fault}") == 0, fault
    assert one("cluster.outrider.http2.rx_messaging_error") == 0
    assert one("cluster.outrider.upstream_cx_protocol_error") == 0
