"""outrider bench without load: the hosts of NGINX and the plugins, what is said of them, and scaling."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import hosts, measure, nginx_hosts, proxy, report, scaling, traffic, verdicts
from bench.hosts import Counts, HostError
from bench.load import PERCENTILES, Sample
from bench.rig import make_host
from bench.scaling import Scaling, Taken
from sidecar import plugins
from sidecar.cli import main
from sidecar.commands import bench as command
from sidecar.demo.envoy import EnvoyPlan


def a_slice(rps: float = 1000.0, p50: float = 1000.0, proxy_us: float = 50.0, sidecar_us: float = 0.0) -> proxy.Slice:
    points = tuple(p50 + i for i in range(len(PERCENTILES)))
    sample = Sample(int(rps), int(rps), 1.0, 0, 0, p50, p50 * 2, p50 * 3, p50 * 4, points)
    return proxy.Slice(sample, proxy_us, sidecar_us, measure.Memory(40960, 30000, 9000), Counts(judged=int(rps)))


def a_run(connections: int = 32, **slices: list[proxy.Slice]) -> proxy.Run:
    plan = proxy.Plan(tuple(slices), ("get",), (connections,), (), 1, 2, 1)
    run = proxy.Run(plan, {"proxy": "envoy 1.40.0, nginx 1.22.1"}, {})
    run.proxies = {name: "nginx 1.22.1" if name.startswith("nginx") else "envoy 1.40.0" for name in slices}
    for name, done in slices.items():
        run.slices["closed", name, "get", connections] = done
    return run


def said(run: proxy.Run, words: str) -> list[verdicts.Verdict]:
    return [v for v in verdicts.verdicts(run) if words in v.text]


# ---- rows: each against its own proxy ----


def test_every_host_has_a_name_in_all_places() -> None:
    assert set(command.HOST_NAMES) == set(hosts.HOSTS) == set(report.NAMES)
    assert {hosts.base_of(name) for name in hosts.HOSTS} == set(report.PROXIES) == {"bare", "nginx_bare"}


def test_each_host_is_compared_with_its_own_proxy() -> None:
    run = a_run(
        bare=[a_slice(1000, 1000, 60)],
        envoy_plugin=[a_slice(950, 1050, 64, 0.5)],
        nginx_bare=[a_slice(4000, 200, 15)],
        nginx_plugin=[a_slice(3600, 230, 19)],
    )
    rows = {row["host"]: row for row in json.loads(json.dumps(run.rows()))}
    assert (rows["envoy_plugin"]["base"], rows["envoy_plugin"]["rps_ratio"]) == ("bare", 0.95)
    assert rows["envoy_plugin"]["p50_ratio"] == 1.05
    assert rows["envoy_plugin"]["cpu_us_added"] == 4.5
    assert (rows["nginx_plugin"]["base"], rows["nginx_plugin"]["rps_ratio"]) == ("nginx_bare", 0.9)
    assert rows["nginx_plugin"]["cpu_us_added"] == 4
    assert rows["nginx_bare"]["cpu_us_added"] is None
    assert (rows["bare"]["proxy"], rows["nginx_bare"]["proxy"]) == ("envoy 1.40.0", "nginx 1.22.1")


def test_cpu_that_is_added_is_of_the_same_round() -> None:
    bare, plugin = ([a_slice(proxy_us=us) for us in each] for each in ((10, 30, 30), (14, 34, 35)))
    run = a_run(nginx_bare=bare, nginx_plugin=plugin)
    assert run.cpu_added_us(("closed", "nginx_plugin", "get", 32)) == 4
    assert run.cpu_added_us(("closed", "nginx_plugin", "get", 64)) is None


def test_rates_of_the_open_loop_do_not_come_from_nginx() -> None:
    run = a_run(bare=[a_slice(2000)], envoy_plugin=[a_slice(1000)], nginx_bare=[a_slice(90_000)])
    assert max(proxy.rates_for(run, "get")) == 800


def test_a_slow_host_gets_longer_slices_within_reason() -> None:
    plan = a_run(bare=[a_slice()]).plan
    assert proxy.slice_s(plan, 32, math.inf) == proxy.slice_s(plan, 32, 5000) == plan.duration_s
    assert proxy.slice_s(plan, 32, 32) == proxy.SLICE_TURNS
    assert proxy.slice_s(plan, 32, 0.5) == proxy.slice_s(plan, 32, 0) == proxy.SLICE_S_MAX
    assert proxy.slice_s(replace(plan, duration_s=60), 32, 0.5) == 60


# ---- verdicts ----


@pytest.mark.parametrize(
    ("host", "base", "rps", "p50", "good"),
    [
        ("envoy_plugin", "bare", 0.93, 1.10, True),
        ("envoy_plugin", "bare", 0.92, 1.00, False),
        ("envoy_plugin", "bare", 0.99, 1.11, False),
        ("nginx_plugin", "nginx_bare", 0.85, 1.50, True),
        ("nginx_plugin", "nginx_bare", 0.84, 1.00, False),
        ("nginx_auth_request", "nginx_bare", 0.30, 3.00, None),
    ],
)
def test_goals_against_the_proxy_alone(host: str, base: str, rps: float, p50: float, good: bool | None) -> None:
    slices = {base: [a_slice(10_000, 1000)], host: [a_slice(10_000 * rps, 1000 * p50)]}
    (found,) = said(a_run(**slices), f"{rps:.0%} of")
    assert f"x{p50:.2f} of its p50" in found.text
    assert found.good is good
    (elsewhere,) = said(a_run(256, **slices), f"{rps:.0%} of")
    assert elsewhere.good is None, "the goals are for 32 connections"


def test_the_peer_is_compared_by_what_it_adds_and_in_all() -> None:
    run = a_run(
        nginx_bare=[a_slice(proxy_us=20)],
        nginx_plugin=[a_slice(proxy_us=24, sidecar_us=1)],
        nginx_modsecurity=[a_slice(100, proxy_us=1020)],
    )
    (added,) = said(run, "adds 1,000 us")
    assert "it 5.0 us (sidecar included): 1/200 of it" in added.text
    assert added.good is True
    (whole,) = said(run, "all of NGINX")
    assert "25.0 us" in whole.text
    assert "40.8 times" in whole.text
    assert whole.good is None
    run.slices["closed", "nginx_plugin", "get", 32] = [a_slice(proxy_us=41)]
    assert [v.good for v in said(run, "1/48 of it")] == [False]
    run.slices["closed", "nginx_plugin", "get", 32] = [a_slice(proxy_us=19)]
    assert [v.good for v in said(run, "less than can be measured")] == [True]


def test_the_peers_refusals_are_its_own() -> None:
    done = a_slice()
    run = a_run(nginx_bare=[a_slice()], nginx_modsecurity=[replace(done, sample=replace(done.sample, non2xx=50))])
    assert [v.good for v in said(run, "ModSecurity refused 50 of the benign requests (5.0%)")] == [False]
    assert said(run, "neither 2xx") == []


def test_answers_that_outrider_has_not_heard_of_are_said() -> None:
    deaf = replace(a_slice(), counts=Counts(judged=400, unjudged=100))
    for host in hosts.OUTRIDER:
        (found,) = said(a_run(**{host: [deaf]}), "heard nothing")
        assert "of 500 answered requests" in found.text
    assert said(a_run(nginx_bare=[deaf], bare=[deaf], null_native=[deaf]), "heard nothing") == []


def test_report_shows_each_proxy_by_itself() -> None:
    run = a_run(
        bare=[a_slice(1000)], envoy_plugin=[a_slice(950)], nginx_bare=[a_slice(4000)], nginx_modsecurity=[a_slice(50)]
    )
    page = report.render(run.rows(), {"peer": "ModSecurity 3.0.9"}, {}, verdicts.verdicts(run))
    assert "Envoy: throughput at 32 connections" in page
    assert "NGINX: throughput at 32 connections" in page
    styles = report.CSS.read_text()
    assert all(f".h-{name}" in styles for name in hosts.HOSTS)
    assert page.count("<svg") == 6


# ---- what is sent, and to what ----


@pytest.mark.parametrize("case", list(traffic.CASES))
def test_requests_bring_their_clients_along(case: str) -> None:
    plain = traffic.variants(case)
    sent = traffic.addressed(plain, hosts.CLIENT_HEADER)
    assert sent == traffic.addressed(plain, hosts.CLIENT_HEADER)
    addresses = {dict(fields)[hosts.CLIENT_HEADER] for _, _, fields, _ in sent}
    assert len(sent) / 2 < len(addresses) <= traffic.CLIENTS
    assert sum(len(traffic.raw(request)) for request in sent) < traffic.SENT_BYTES_MAX * 1.1
    assert [(m, p, b) for m, p, _, b in sent[: len(plain)]] == [(m, p, b) for m, p, _, b in plain]
    assert all(fields[:-1] == before for (_, _, fields, _), (_, _, before, _) in zip(sent, plain, strict=False))


def test_the_plugins_filter_stands_where_ext_proc_stood(tmp_path: Path) -> None:
    plan = EnvoyPlan(1, 2, 3, tmp_path / "s", tmp_path / "log", arena=tmp_path / "arena")
    behind, inside = hosts.proxy_config(plan), hosts.proxy_config(plan, "plugin")

    def names(config: dict) -> list[str]:  # type: ignore[type-arg]
        return [f["name"] for f in hosts.filters(config)["hcm"]["http_filters"]]

    assert [name.replace(hosts.EXT_PROC, hosts.PLUGIN) for name in names(behind)] == names(inside)
    assert hosts.filters(inside)[hosts.PLUGIN]["filter_config"]["value"] == f"arena={tmp_path / 'arena'} failure=open"
    assert [c["name"] for c in inside["static_resources"]["clusters"]] == ["api"]


def test_a_plugin_that_cannot_be_built_is_missing_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none(kind: str) -> Path:
        raise plugins.PluginError(f"no compiler for {kind}")

    monkeypatch.setattr(plugins, "build", none)
    monkeypatch.setattr(nginx_hosts, "find_nginx", lambda: "/usr/sbin/nginx")
    for name, kind in (("envoy_plugin", "envoy"), ("nginx_plugin", "nginx")):
        with pytest.raises(HostError, match=f"no compiler for {kind}"):
            make_host(name, tmp_path / name, 9, set(), 1)


def test_what_is_not_installed_names_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nginx_hosts, "MODULE_PLACES", (str(tmp_path),))
    with pytest.raises(HostError, match="apt-get install libnginx-mod-http-modsecurity modsecurity-crs"):
        nginx_hosts.modsecurity_module()
    (tmp_path / nginx_hosts.MODSECURITY_MODULE).touch()
    monkeypatch.setattr(nginx_hosts, "CRS_RULES", tmp_path)
    with pytest.raises(HostError, match="OWASP CRS isn't at"):
        nginx_hosts.modsecurity_module()
    monkeypatch.setattr(nginx_hosts.shutil, "which", lambda name, path=None: None)
    with pytest.raises(HostError, match="apt-get install nginx"):
        nginx_hosts.find_nginx()


def test_settings_that_this_build_does_not_know_are_a_reason(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"refuses its settings: .*listen\.telepathy"):
        hosts.sidecar_settings("nginx_plugin", tmp_path, 1, over={"listen": {"telepathy": True}})


# ---- scaling ----


def taken(rps: float, cpu: float = 100.0, rest: float = 10.0) -> Taken:
    return Taken(rps, 1000, 2000, cpu, rest, 0, 0, 0.0)


def a_scaling(**over: object) -> Scaling:
    slices = {1: [taken(8000), taken(4000)], 2: [taken(15_200), taken(7200, 105)]}
    return replace(Scaling("nginx_plugin", slices), **over)  # type: ignore[arg-type]


def test_scaling_is_the_ratio_of_each_round_and_knows_what_the_generator_takes() -> None:
    found = a_scaling()
    assert found.ratio == pytest.approx((1.9 + 1.8) / 2)
    # 110 us of a request on two cores are 18,182 requests/s; one worker did 6,000 in the median
    assert found.reachable(2) == 2.0
    assert replace(found, slices={1: [taken(9800)], 2: [taken(1)]}).reachable(2) == pytest.approx(1.855, abs=0.001)
    record = json.loads(json.dumps(found.record(2)))
    assert (record["rps_ratio"], record["goal"]) == (1.85, scaling.GOAL)
    assert [row["cpu_proxy_us"] for row in record["workers"]] == [100, 102.5]


PERF = """
    50.93%|[.] __pyx_f_score_windows|ngx_http_outrider_module.so
    11.20%|[k] native_queued_spin_lock_slowpath|[kernel.kallsyms]
     2.20%|[k] _raw_spin_unlock_irqrestore|[kernel.kallsyms]
     1.40%|[.] __vdso_clock_gettime|[vdso]
     1.10%|[.] ngx_http_block_reading|nginx
     1.00%|[.] pthread_mutex_lock|libc.so.6
     0.90%|[k] futex_wait|[kernel.kallsyms]
     0.80%|[.] or_cas64|liboutrider.so
     0.70%|[.] cast_value|liboutrider.so
     0.60%|[.] walk|liboutrider.so
     0.50%|[.] eleventh|liboutrider.so
"""


def test_functions_that_lock_are_told_from_clocks_and_blocks() -> None:
    found = a_scaling(symbols=scaling.parse_symbols(PERF))
    assert len(found.symbols) == scaling.SYMBOLS
    assert found.symbols[0] == (50.93, "__pyx_f_score_windows  ngx_http_outrider_module.so")
    assert [name.split()[0] for _, name in found.locking] == [
        "native_queued_spin_lock_slowpath", "pthread_mutex_lock", "futex_wait", "or_cas64",
    ]  # fmt: skip
    assert scaling.parse_symbols("# no samples\n\nsome error|x\n") == []


def test_scaling_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    console = Console(width=140)
    fine = a_scaling(symbols=[(60.0, "score  core.so")], perf="cycles at 499 Hz")
    poor = replace(a_scaling(), host="envoy_plugin", slices={1: [taken(1000)], 2: [taken(1100)]})
    poor.symbols, poor.perf = scaling.parse_symbols(PERF), "cpu-clock"
    poor.slices[2][0].unheard = 7
    poor.slices[1][0].others = poor.slices[2][0].others = 1.0
    scaling.show(console, [fine, poor], {}, 2)
    text = capsys.readouterr().out
    assert "+ NGINX + Outrider inside it: two workers do 1.85 times" in text
    assert "none waits or locks" in text
    assert "! Envoy + Outrider inside it: two workers do 1.10 times" in text
    assert "13.9% is in such that wait or lock: native_queued_spin_lock_slowpath" in text
    assert "7 answers without a decision" in text
    assert "other processes used 1.00 of the 2 cores" in text


def test_long_requests_are_long_and_fit_nginxs_buffers() -> None:
    import random

    request = scaling.long_get(random.Random(1))
    lines = traffic.raw(request).split(b"\r\n")
    assert 5000 < sum(map(len, lines)) < 8000
    assert max(map(len, lines)) < 8192
    assert request[3] is None


@pytest.mark.parametrize("line", [["--host", "bare"], ["--seconds", "0"], ["--rounds", "51"]])
def test_mistakes_of_scaling(line: list[str]) -> None:
    result = CliRunner().invoke(main, ["bench", "scaling", *line])
    assert result.exit_code == 2
    assert line[1] in result.output


def test_scaling_needs_its_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["bench", "scaling"])
    assert result.exit_code == 1
    assert "apt-get install wrk" in result.output or "two workers need two cores" in result.output
