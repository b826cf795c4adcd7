"""outrider bench on real proxies: NGINX alone, with ModSecurity and the CRS, and both with Outrider inside; skipped
where they, or what building the modules needs, aren't installed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from bench import load, nginx_hosts, proxy, traffic
from bench.hosts import EnvoyHost, Host, HostError
from bench.nginx_hosts import NginxHost
from bench.rig import Rig
from sidecar import plugins
from sidecar.demo.envoy import DemoError, find_envoy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if shutil.which("wrk") is None:
        pytest.skip("wrk isn't installed")
    try:
        find_envoy()
        nginx_hosts.find_nginx()
    except (DemoError, HostError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def peer() -> Iterator[Rig]:
    try:
        nginx_hosts.modsecurity_module()
    except HostError as error:
        pytest.skip(str(error))
    with Rig(["nginx_bare", "nginx_modsecurity"], {"nginx_bare", "nginx_modsecurity"}) as rig:
        yield rig


def require_plugins() -> None:
    try:
        plugins.nginx_source()
        plugins.compiler()
        plugins.cython_version()
    except plugins.PluginError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def inside() -> Iterator[Rig]:
    require_plugins()
    names = ["envoy_plugin", "nginx_bare", "nginx_plugin", "nginx_auth_request"]
    with Rig(names, set(names)) as rig:
        yield rig


def host_of(rig: Rig, name: str) -> Host:
    return next(host for host in rig.hosts if host.name == name)


def nginx_of(rig: Rig, name: str) -> NginxHost:
    host = host_of(rig, name)
    assert isinstance(host, NginxHost)
    return host


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# ---- the peer ----


ATTACKS = {
    "SQL injection": "1' OR 1=1 UNION SELECT password FROM users-- ",
    "script": "<script>alert(document.cookie)</script>",
    "path traversal": "../../../../etc/passwd",
    "command": "; cat /etc/passwd",
}


@pytest.mark.parametrize("what", list(ATTACKS))
def test_the_peer_refuses_attacks_that_nginx_alone_passes(peer: Rig, what: str) -> None:
    body = json.dumps({"user": "kim", "note": ATTACKS[what]}).encode()
    for name, status in (("nginx_modsecurity", 403), ("nginx_bare", 200)):
        host = nginx_of(peer, name)
        assert host.status_of(f"/api/v1/chairs?id={quote(ATTACKS[what])}") == status
        assert host.status_of("/api/v1/orders", body) == status


def test_the_peer_reads_bodies_and_passes_the_benchmarks_own_requests(peer: Rig) -> None:
    inputs = proxy.Inputs(peer.folder, ["get", "post_1k"])
    for case in ("get", "post_1k"):
        host = nginx_of(peer, "nginx_modsecurity")
        done = proxy.take(
            host, peer.pids(), lambda h=host, c=case: load.closed(h.url, inputs.raw(c, addressed=True), 4, 1)  # type: ignore[misc]
        )
        assert done.sample.answered > 0
        assert done.sample.non2xx == done.sample.errors == 0
        assert done.cpu_proxy_us > 0
    assert "paranoia level 1" in host.facts()["peer"]
    assert "OWASP CRS 3." in host.facts()["peer"]
    assert " rules)" in host.facts()["peer"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("SecRuleEngine On", "SecRuleEngine DetectionOnly", "an attack in a query was answered 200, not 403"),
        ("SecRequestBodyAccess On", "SecRequestBodyAccess Off", "an attack in a query was answered 200, not 403"),
        ("ctl:requestBodyProcessor=JSON", "ctl:ruleEngine=Off", "an attack with a JSON body was answered 200, not 403"),
        ("setvar:tx.crs_setup_version", "setvar:tx.other", "was answered 500, not 403"),
        ("SecTmpDir", "SecNonsense", "NGINX refuses its configuration"),
    ],
)
def test_a_peer_that_is_not_at_work_is_not_measured(
    peer: Rig, monkeypatch: pytest.MonkeyPatch, old: str, new: str, words: str
) -> None:
    rules = nginx_hosts.modsecurity_rules
    monkeypatch.setattr(nginx_hosts, "modsecurity_rules", lambda folder: rules(folder).replace(old, new))
    with pytest.raises(HostError, match=words), Rig(["nginx_modsecurity"], {"nginx_modsecurity"}):
        pass


# ---- NGINX's processes ----


def test_requests_are_counted_by_nginx_itself(peer: Rig) -> None:
    host = nginx_of(peer, "nginx_bare")
    before = host.handled()
    assert host.handled() == before
    for _ in range(10):
        assert host.status_of("/") == 200
    assert host.handled() == before + 10


def test_a_worker_that_dies_spoils_the_slice() -> None:
    with Rig(["nginx_bare"], {"nginx_bare"}, workers=2) as rig:
        host = nginx_of(rig, "nginx_bare")
        assert len(host.proxy_pids()) == 3
        inputs = proxy.Inputs(rig.folder, ["get"])

        def work() -> load.Sample:
            os.kill(min(host.workers_started), signal.SIGKILL)
            return load.closed(host.url, inputs.raw("get", addressed=True), 4, 1)

        with pytest.raises(HostError, match="ended while it was measured"):
            proxy.take(host, rig.pids(), work)


def test_no_worker_outlives_its_rig_even_when_the_master_was_killed() -> None:
    for kill in (False, True):
        with Rig(["nginx_bare"], {"nginx_bare"}) as rig:
            host = nginx_of(rig, "nginx_bare")
            pids = host.proxy_pids()
            if kill:
                os.kill(host.proxy.pid, signal.SIGKILL)
                host.proxy.process.wait(10)  # type: ignore[union-attr]
        gone_by = time.monotonic() + 5
        while any(map(alive, pids)) and time.monotonic() < gone_by:
            time.sleep(0.02)
        assert not any(map(alive, pids))


def test_a_configuration_that_nginx_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    host = NginxHost("nginx_bare", tmp_path / "host", 9, set(), 1, answer="outrider_nonsense on;")
    with pytest.raises(HostError, match=r'(?s)refuses its configuration.*unknown directive "outrider_nonsense"'):
        host.start()


# ---- Outrider inside ----


@pytest.mark.parametrize("name", ["envoy_plugin", "nginx_plugin", "nginx_auth_request"])
def test_every_request_is_judged_and_none_of_the_benign_refused(inside: Rig, name: str) -> None:
    host, inputs = host_of(inside, name), proxy.Inputs(inside.folder, traffic.CASES)
    for case in traffic.CASES:
        sent = inputs.raw(case, addressed=name.startswith("nginx"))
        done = proxy.take(host, inside.pids(), lambda s=sent: load.closed(host.url, s, 8, 1))  # type: ignore[misc]
        assert done.sample.answered > 0
        assert done.counts.judged >= done.sample.answered
        assert done.sample.non2xx == done.counts.refused == done.counts.unjudged == done.counts.skipped == 0
        assert done.cpu_proxy_us > 0


@pytest.mark.parametrize("name", ["envoy_plugin", "nginx_plugin", "nginx_auth_request"])
def test_attacks_are_refused_and_counted(inside: Rig, name: str) -> None:
    host, rng = host_of(inside, name), random.Random(7)
    path = inside.folder / f"attacks-{name}"
    traffic.write_raw(traffic.addressed([traffic.attack(rng) for _ in range(200)], "x-bench-client"), path)
    before = host.counts()
    sample = load.closed(host.url, path, 4, 1)
    refused = (host.counts() - before).refused
    assert sample.non2xx > 0.9 * sample.requests > 0
    assert refused >= sample.non2xx


def test_hosts_say_what_they_are(inside: Rig) -> None:
    assert isinstance(host_of(inside, "envoy_plugin"), EnvoyHost)
    assert [host.opens for host in inside.hosts] == [True, False, False, False]
    plan = proxy.Plan(tuple(host.name for host in inside.hosts), ("get",), (32,), (), 1, 1, 1)
    facts = proxy.facts(plan, inside.hosts)
    assert facts["proxy"].startswith("envoy 1.")
    assert ", nginx 1." in facts["proxy"]
    assert "NGINX in the closed loop only" in facts["method"]


def test_scaling_end_to_end(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    require_plugins()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OUTRIDER_RUN_DIR": str(tmp_path)}
    line = [sys.executable, "-m", "sidecar.cli", "bench", "scaling", "--seconds", "1", "--rounds", "1", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [result["host"] for result in found] == ["envoy_plugin", "nginx_plugin"]
    for result in found:
        assert [row["workers"] for row in result["workers"]] == [1, 2]
        assert result["rps_ratio"] > 0
        for row in result["workers"]:
            assert row["rps"] > 0
            assert row["cpu_proxy_us"] > row["cpu_rest_us"] > 0, "the generator takes more than what is measured"
            assert row["errors"] == row["unheard"] == 0
        assert result["symbols"] or result["perf"]
    assert list(tmp_path.iterdir()) == []
