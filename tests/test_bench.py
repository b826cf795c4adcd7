"""outrider bench without load: parsing the generators, schedules, rows, verdicts, mistakes."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench import hosts, load, measure, proxy, report, show, svg, traffic, verdicts
from bench.hosts import Counts, HostError
from bench.load import LoadError, Sample
from bench.soak import Soak
from bench.verdicts import Verdict
from sidecar.cli import main
from sidecar.demo.envoy import EnvoyPlan

KEYS = {
    "host", "base", "proxy", "case", "connections", "workers", "rps", "rps_ratio", "p50_us", "p50_ratio", "p99_us",
    "cpu_us_proxy", "cpu_us_sidecar", "cpu_us_added", "non2xx",
}  # fmt: skip

H2LOAD = """starting benchmark...
spawning thread #0: 8 total client(s). 200 total requests
Application protocol: h2c
progress: 10% done

finished in 1.53s, 130.72 req/s, 5.08KB/s
requests: 203 total, 202 started, 201 done, 200 succeeded, 1 failed, 2 errored, 3 timeout
status codes: 190 2xx, 1 3xx, 7 4xx, 2 5xx
traffic: 7.78KB (7963) total, 1.56KB (1600) headers (space savings 92.59%), 2.15KB (2200) data
                     min         max         mean         sd        +/- sd
time for request:       61us      4.61ms       399us       481us    92.50%
"""
WRK = """Running 2s test @ http://127.0.0.1:18080
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.61ms  653.93us   9.46ms   83.69%
    Req/Sec    19.83k     1.95k   22.98k    71.43%
  41434 requests in 2.10s, 9.96MB read
  Non-2xx or 3xx responses: 3
Requests/sec:  19722.23
Transfer/sec:      4.74MB
RESULT {"requests":41434,"duration_us":2100874,"non2xx":3,"socket_errors":1,"timeouts":2,"p50_us":1540,"p99_us":4192,\
"p999_us":6000,"max_us":9460,"points":[POINTS]}
""".replace("POINTS", ",".join(f"[{p:.5f},{100 + i}]" for i, p in enumerate(load.PERCENTILES)))


def sample(rps: float = 1000.0, p99: float = 2000.0, **over: object) -> Sample:
    points = tuple(p99 / 2 + i for i in range(len(load.PERCENTILES)))
    made = Sample(int(rps), int(rps), 1.0, 0, 0, p99 / 2, p99, p99 * 1.2, p99 * 2, points)
    return replace(made, **over)  # type: ignore[arg-type]


def a_slice(rps: float = 1000.0, p99: float = 2000.0, cpu: float = 20.0, **over: int) -> proxy.Slice:
    counts = Counts(**{"judged": int(rps), **over})
    return proxy.Slice(sample(rps, p99), 50.0, cpu, measure.Memory(40960, 30000, 9000), counts)


def a_run(**slices: list[proxy.Slice]) -> proxy.Run:
    """One case, 32 connections; the hosts' slices by name."""
    plan = proxy.Plan(tuple(slices), ("get",), (32,), (), 1, 2, 1)
    run = proxy.Run(plan, {"proxy": "envoy 1.40.0", "date": "today"}, {})
    for name, done in slices.items():
        run.slices["closed", name, "get", 32] = done
    return run


# ---- the generators' outputs ----


def test_wrk_result_is_read() -> None:
    found = load.parse_wrk(WRK)
    assert (found.requests, found.non2xx, found.errors) == (41434, 3, 3)
    assert (found.p50_us, found.p99_us, found.max_us) == (1540, 4192, 9460)
    assert found.rps == pytest.approx(41434 / 2.100874)
    assert found.points[-1] == 150


@pytest.mark.parametrize("out", ["", "unable to connect to 127.0.0.1:1 Connection refused\n", "RESULTS {}"])
def test_wrk_failure_shows_what_it_said(out: str) -> None:
    with pytest.raises(LoadError, match="wrk failed") as error:
        load.parse_wrk(out, 1)
    assert out.strip() in str(error.value)


def test_wrk_result_with_other_percentiles_is_refused() -> None:
    with pytest.raises(LoadError, match="percentiles"):
        load.parse_wrk('RESULT {"points": [[50, 1]]}')


def test_h2load_summary_is_read() -> None:
    counts, seconds = load.parse_h2load(H2LOAD)
    assert seconds == pytest.approx(1.53)
    assert counts == {
        "total": 203, "started": 202, "done": 201, "succeeded": 200, "failed": 1, "errored": 2, "timeout": 3,
        "2xx": 190, "3xx": 1, "4xx": 7, "5xx": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), [("950us", 950e-6), ("12.5ms", 0.0125), ("2m", 120.0)])
def test_h2load_units(text: str, seconds: float) -> None:
    assert load.parse_h2load(H2LOAD.replace("1.53s", text))[1] == pytest.approx(seconds)


def test_h2load_without_summary() -> None:
    with pytest.raises(LoadError, match="isn't understood"):
        load.parse_h2load(H2LOAD.replace("status codes", "codes"))


def test_log_cut_short_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"1795380450615411\t200\t425\n1795380450615413\t-1\t461\n17953804506")
    assert load.read_log(log).tolist() == [[1795380450615411, 200, 425], [1795380450615413, -1, 461]]


@pytest.mark.parametrize("data", [b"", b"1\t200\n", b"17"])
def test_log_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(ValueError, match="log"):
        load.read_log(tmp_path / "log")
    with pytest.raises(ValueError, match="no log"):
        load.read_log(tmp_path / "none")


def even_log(rate: float, seconds: float, wait_us: int = 500) -> np.ndarray:
    n = int(rate * seconds)
    start = 1_000_000_000 + np.arange(n) * (1e6 / rate)
    return np.stack([start, np.full(n, 200), np.full(n, wait_us)], axis=1).astype(np.int64)


def test_even_arrivals_are_taken_as_they_are() -> None:
    found = load.summarize(even_log(1000, 4), 1000, 4000)
    assert (found.p50_us, found.p99_us, found.errors, found.non2xx) == (500, 500, 0, 0)
    assert found.rps == pytest.approx(1000, rel=0.01)
    assert found.late_us < 100
    assert found.answered == 4000
    assert found.requests == 3700  # the start is left out


def test_what_the_generator_starts_late_counts_as_waiting() -> None:
    """It stood still from second 2 to 3 and then sent at once what was due: a quarter of the requests waited."""
    log = even_log(1000, 4)
    held = (log[:, 0] >= 1_002_000_000) & (log[:, 0] < 1_003_000_000)
    log[held, 0] = 1_003_000_000
    found = load.summarize(log, 1000, 4000)
    waits = dict(zip(load.PERCENTILES, found.points, strict=True))
    assert found.max_us == pytest.approx(1e6 - load.LATE_US, rel=0.01)
    assert waits[load.PERCENTILES[0]] == 500
    assert found.p50_us == 500
    # 1,000 of the 3,700 counted waited, evenly from 0 to 1 s: one in ten longer than 0.63 s
    assert waits[load.PERCENTILES[10]] == pytest.approx(1e6 * (1 - 0.37), rel=0.03)


def test_failures_and_refusals_are_counted() -> None:
    log = even_log(1000, 4)
    log[100:110, 1] = -1
    log[200:203, 1] = 403
    log[300, 1] = 302
    found = load.summarize(log, 1000, 4100)
    assert found.errors == 110
    assert found.non2xx == 4


def test_nothing_answered_is_an_error() -> None:
    log = even_log(1000, 1)
    log[:, 1] = -1
    with pytest.raises(ValueError, match="no request was answered"):
        load.summarize(log, 1000, 1000)


# ---- how load is asked for ----


@pytest.mark.parametrize("rate", [10.0, 37.0, 200.0, 999.0, 10_000.0, 50_000.0])
def test_schedule_keeps_each_connection_slower_than_its_timer_and_spreads_them(rate: float) -> None:
    plan = load.schedule(rate)
    assert plan.connections * plan.rps_per_connection == pytest.approx(rate)
    assert plan.rps_per_connection <= 100
    tick_ms = 1000 / plan.rps_per_connection
    opened_in_ms = math.ceil(plan.connections / plan.opened_at_once) * plan.opened_every_ms
    assert tick_ms / 2 <= opened_in_ms <= tick_ms * 1.3


def test_missing_generator_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LoadError, match="apt-get install nghttp2-client"):
        load.find("h2load")


def test_a_generator_that_hangs_is_ended() -> None:
    out, status = load.run(["/bin/sh", "-c", "echo begun; exec sleep 60"], 0.3)
    assert (out, status) == ("begun\n", None)


def test_a_signal_whose_exception_got_lost_still_ends_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    stop = threading.Event()
    monkeypatch.setattr(load, "STOP", stop)
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        load.run(["/bin/sleep", "60"], 60)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("case", list(traffic.CASES))
def test_requests_are_different_and_well_formed(case: str, tmp_path: Path) -> None:
    requests = traffic.variants(case)
    assert requests == traffic.variants(case)
    traffic.write_raw(requests, tmp_path / "raw")
    data, at, found = (tmp_path / "raw").read_bytes(), 0, []
    while at < len(data):
        (n,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + n])
        at += 4 + n
    assert len(set(found)) > 0.9 * len(requests)
    for text in found[:50]:
        head, _, body = text.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0].endswith(" HTTP/1.1")
        fields = dict(line.split(": ", 1) for line in lines[1:])
        assert "x-forwarded-for" not in fields
        assert int(fields.get("content-length", 0)) == len(body)
        if case != "get":
            assert abs(len(body) / (1024 if case == "post_1k" else 16384) - 1) < 0.15
            json.loads(body)


def test_bare_configuration_differs_by_the_filter_alone(tmp_path: Path) -> None:
    plan = EnvoyPlan(1, 2, 3, tmp_path / "s", tmp_path / "log")
    with_it, bare = hosts.proxy_config(plan), hosts.proxy_config(plan, "nobody")
    chain = hosts.filters(with_it)
    assert set(chain) - set(hosts.filters(bare)) == {hosts.EXT_PROC}
    assert [c["name"] for c in bare["static_resources"]["clusters"]] == ["api"]
    mutations = chain["envoy.filters.http.header_mutation"]["mutations"]["request_mutations"]
    assert mutations[-1]["append"]["header"]["key"] == hosts.CLIENT_HEADER
    assert mutations == hosts.filters(bare)["envoy.filters.http.header_mutation"]["mutations"]["request_mutations"]


def test_sidecar_settings_are_valid(tmp_path: Path) -> None:
    import yaml

    from sidecar.config import load as load_settings

    path = tmp_path / "outrider.yaml"
    path.write_text(yaml.safe_dump(hosts.sidecar_settings("grpcio", tmp_path, 9902)))
    settings = load_settings(path)
    assert settings.latency.skip == ()
    assert settings.client.address_header == hosts.CLIENT_HEADER
    assert settings.detectors.request_flood.enabled


def test_a_build_without_the_native_transport_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"native\.http2 isn't built|not available in this build"):
        hosts.transport("native")
    assert hosts.transport("grpcio") == "grpcio"


def test_source_of_the_floor_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "broken.c"
    source.write_text("#include <nghttp2/none.h>\n")
    monkeypatch.setattr(hosts, "NULL_SOURCE", source)
    with pytest.raises(HostError, match=r"doesn't compile .*libnghttp2-dev"):
        hosts.build_null(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ---- rows and what is said about them ----


def test_rows_have_the_documented_keys_and_are_json() -> None:
    run = a_run(bare=[a_slice(2000)], native=[a_slice(1000)])
    run.slices["open", "native", "get", 100.0] = [a_slice(99)]
    rows = json.loads(json.dumps(run.rows()))
    assert all(set(row) >= KEYS for row in rows)
    closed = {row["host"]: row for row in rows if row["mode"] == "closed"}
    assert closed["native"]["rps_ratio"] == 0.5
    assert closed["native"]["cpu_us_sidecar"] == 20
    assert closed["native"]["rate"] is None
    (opened,) = (row for row in rows if row["mode"] == "open")
    assert (opened["rate"], opened["rps_ratio"], opened["kept_up"]) == (100, None, True)


def test_ratio_is_of_the_same_round() -> None:
    """The machine was half as fast in two rounds of three; host and bare both met it."""
    run = a_run(bare=[a_slice(r) for r in (2000, 1000, 1000)], native=[a_slice(r) for r in (1000, 500, 500)])
    assert run.ratio("rps", ("closed", "native", "get", 32), "bare") == 0.5
    assert run.ratio("rps", ("closed", "native", "get", 32), "grpcio") is None


def test_verdict_against_the_floor_and_grpcio() -> None:
    fine = a_run(null_native=[a_slice(1000, 1000)], native=[a_slice(950, 1100)], grpcio=[a_slice(300, 4000, 400)])
    said = {v.text: v.good for v in verdicts.verdicts(fine)}
    assert any("95% of the empty server's" in text and good for text, good in said.items())
    assert any("3.2 times" in text and good for text, good in said.items())
    assert any("20 us of CPU" in text and good for text, good in said.items())
    poor = a_run(null_native=[a_slice(1000, 1000)], native=[a_slice(950, 1200, 30)], grpcio=[a_slice(500)])
    assert [v.good for v in verdicts.verdicts(poor)][:3] == [False, False, False]


@pytest.mark.parametrize(
    ("counts", "words"),
    [({"refused": 3}, "3 requests were refused"), ({"unjudged": 2}, "unjudged"), ({"skipped": 5}, "5 stages")],
)
def test_what_spoils_figures_is_said(counts: dict[str, int], words: str) -> None:
    said = verdicts.verdicts(a_run(native=[a_slice(**counts)]))
    assert any(words in v.text and v.good is False for v in said)
    assert not any(words in v.text for v in verdicts.verdicts(a_run(native=[a_slice()])))


def test_an_unsteady_run_is_said_once() -> None:
    run = a_run(bare=[a_slice(2000), a_slice(1000)], native=[a_slice(1000), a_slice(500)])
    said = [v for v in verdicts.verdicts(run) if "varied" in v.text]
    assert [v.caution for v in said] == [True]
    assert "bare, get, 32 connections (1,000 to 2,000/s); native" in said[0].text


def test_non2xx_that_is_no_decision_is_said() -> None:
    run = a_run(native=[replace(a_slice(refused=3), sample=sample(non2xx=5))])
    assert any("2 answers were neither" in v.text for v in verdicts.verdicts(run))


def test_rates_come_from_the_floor_and_stop_beyond_a_hosts_ceiling() -> None:
    run = a_run(bare=[a_slice(20_000)], null_native=[a_slice(10_000)], grpcio=[a_slice(3000)])
    rates = proxy.rates_for(run, "get")
    assert rates == [1000, 2500, 5000, 8000]

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    everyone = [Named(name) for name in ("bare", "null_native", "grpcio")]
    chosen = {rate: [h.name for h in proxy.hosts_for(everyone, run, "get", rate, rates)] for rate in rates}  # type: ignore[arg-type]
    assert "grpcio" in chosen[5000]
    assert chosen[8000] == ["bare", "null_native"]
    assert proxy.rates_for(proxy.Run(replace(run.plan, rates=(30.0, 20.0)), {}, {}), "get") == [20, 30]


def test_each_round_starts_with_another_host() -> None:
    assert [proxy.order([1, 2, 3], turn) for turn in range(3)] == [[1, 2, 3], [2, 3, 1], [3, 1, 2]]  # type: ignore[list-item]


# ---- endurance ----


def a_soak(last_private: int = 38400) -> Soak:
    done = Soak("native", 1000, 256, ("get",), done=1000, seconds=2.0, counts=Counts(judged=1000))
    done.memory = [(i * 10, i / 50, 38400 if i < 90 else last_private, 14000) for i in range(1, 101)]
    return done


def test_soak_that_went_well() -> None:
    assert a_soak().problems() == []
    assert a_soak().as_json()["passed"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"done": 999}, "999 of 1,000"),
        ({"failed": 1}, "1 requests failed"),
        ({"non2xx": 4, "counts": Counts(judged=1000, refused=3)}, "1 answers weren't 2xx"),
        ({"counts": Counts(judged=1000, unjudged=1)}, "1 requests went past"),
        ({"counts": Counts(judged=990)}, "decided 990"),
        ({"memory": a_soak(39500).memory}, "grew by 1,100 KiB"),
    ],
)
def test_soak_that_did_not(change: dict[str, object], words: str) -> None:
    problems = replace(a_soak(), **change).problems()  # type: ignore[arg-type]
    assert len(problems) == 1
    assert words in problems[0]


def test_refusals_are_no_fault_of_a_soak() -> None:
    assert replace(a_soak(), non2xx=3, counts=Counts(judged=1000, refused=3)).problems() == []


# ---- what people see ----


def test_report_escapes_and_brings_everything_along() -> None:
    run = a_run(bare=[a_slice(2000)], native=[a_slice(1000)])
    for host in ("bare", "native"):
        run.slices["open", host, "get", 100.0] = [a_slice(99)]
    nasty = "<script>alert(1)</script>&\""
    page = report.render(
        run.rows(),
        {"date": nasty, "proxy": nasty},
        {"grpcio": nasty},
        [Verdict(nasty), Verdict(nasty, caution=True)],
        a_soak(),
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") >= 5
    assert not any(text in page for text in ("http://", "https://", "src=", "@import", "url("))
    assert page.count("<svg") == page.count("</svg>") == 6


def test_report_of_little() -> None:
    assert "<svg" not in report.render([], {})
    only = a_run(native=[a_slice(0.5, 0.0)]).rows()
    assert "<table>" in report.render(only, {})


def test_tables_show_each_host() -> None:
    from rich.console import Console

    run = a_run(bare=[a_slice(2000)], native=[a_slice(1000)])
    console = Console(width=130, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show.report(console, run.rows(), run.facts, {"grpcio": "no such luck"}, verdicts.verdicts(run))
    show.soak_report(console, a_soak(39500), run.facts)
    text = console.export_text()
    assert "native" in text
    assert "2,000" in text
    assert "no such luck" in text
    assert "failed" in text
    console.file.close()


def test_names_at_lines_ends_do_not_overlap() -> None:
    places = svg.spread([50.0, 51.0, 49.0, 200.0], 10, 210)
    assert sorted(range(4), key=lambda i: places[i]) == [2, 0, 1, 3]
    gaps = np.diff(sorted(places))
    assert gaps.min() >= svg.LABEL_GAP - 1e-9
    assert svg.spread([300.0], 10, 210) == [210]


def test_ticks() -> None:
    assert svg.log_ticks(90, 2100) == [100, 200, 500, 1000, 2000]
    assert svg.log_ticks(90, 120_000) == [100, 1000, 10_000, 100_000]
    assert svg.linear_ticks(5100) == [0, 1000, 2000, 3000, 4000, 5000]


# ---- the machine ----


def test_cpu_time_of_this_process_grows() -> None:
    before = measure.cpu_ns(os.getpid())
    sum(i * i for i in range(300_000))
    assert measure.cpu_ns(os.getpid()) > before > 0
    assert measure.cpu_ns(2**22 + 1) == 0


def test_memory_of_this_process() -> None:
    held = measure.memory(os.getpid())
    assert held.rss_kib >= held.private_kib > 1000
    assert measure.memory(2**22 + 1) == measure.Memory(0, 0, 0)


# ---- the command ----


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--host", "apache"], "apache"),
        (["--case", "put"], "put"),
        (["--rate", "0"], "0"),
        (["--connections", "0"], "0"),
        (["--soak", "--host", "bare"], "--soak takes one host"),
        (["--soak", "--rate", "50"], "takes no --rate"),
        (["--mode", "open", "--host", "nginx_bare"], "hosts of NGINX have a closed loop only (nginx_bare)"),
        (["--html", "/nowhere/at/all.html"], "there is no folder /nowhere/at"),
        (["nonsense"], "No such command"),
    ],
)
def test_mistakes(line: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["bench", *line])
    assert result.exit_code == 2
    assert words in result.output


def test_a_missing_tool_is_said_before_anything_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["bench", "--quick"])
    assert result.exit_code == 3
    assert "apt-get install wrk" in result.output


def test_a_benchmark_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from sidecar.commands import bench as module

    monkeypatch.setitem(module.SUBCOMMANDS, "models", ("bench.none", "x"))
    result = CliRunner().invoke(main, ["bench", "models"])
    assert result.exit_code == 1
    assert "bench.none isn't part of this installation" in result.output


def test_help_names_the_other_benchmarks() -> None:
    result = CliRunner().invoke(main, ["bench", "--help"])
    assert result.exit_code == 0
    for name in ("pipeline", "models", "budgets", "scaling", "--soak", "--html"):
        assert name in result.output
