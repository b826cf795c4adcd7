"""The proxy benchmark: hosts compared in one interleaved run.

Noise of a machine comes in stretches, so slices of a few seconds alternate between hosts, over several rounds, and
medians over rounds are compared; the spread over rounds is printed beside them. First the ceiling (closed loop),
then constant arrival rates, the same for all hosts of Envoy, chosen from the ceiling of the floor. Each host is
compared with its own proxy alone.
"""

from __future__ import annotations

import datetime
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import load, measure, traffic
from bench.hosts import CLIENT_HEADER, Counts, Host, HostError, base_of, envoy_version, is_nginx
from bench.load import Sample
from bench.rig import Rig
from sidecar.serve.app import version

RATE_SHARES = (0.1, 0.25, 0.5, 0.8)  # of the floor's ceiling
RATE_TOO_HIGH = 1.0  # of a host's own ceiling: the first rate beyond it is run, those above aren't
OPEN_RATE_MIN = 20.0
OTHERS_MAX = 0.05  # cores
WARM_UP, WARM_UP_TIMEOUT_S = 1000, 60.0  # requests per host and case
WARM_UP_S, WARM_UP_CONNECTIONS = 1, 4  # where they can't be counted
SLICE_TURNS, SLICE_S_MAX = 4, 10  # a slice lasts until each connection can have had so many answers, within reason
SETTLE_S, SETTLE_STEP_S, SETTLED_SHARE = 10.0, 0.02, 0.1  # idle: a tenth of a core
KEPT_UP = 0.95  # of the rate asked for

Say = Callable[[str], None]
Key = tuple[str, str, str, float]  # mode, host, case, connections or rate


@dataclass(frozen=True)
class Plan:
    hosts: tuple[str, ...]
    cases: tuple[str, ...]
    connections: tuple[int, ...]
    rates: tuple[float, ...]  # empty: chosen from the ceiling
    duration_s: int  # of a closed slice; one at a constant rate takes half, at least a second
    rounds: int
    workers: int
    closed: bool = True
    opened: bool = True


@dataclass
class Slice:
    """One host, case and load in one round, with what it cost."""

    sample: Sample
    cpu_proxy_us: float  # per request
    cpu_sidecar_us: float
    memory: measure.Memory
    counts: Counts
    others: float = 0.0  # cores that processes which don't belong to the benchmark used meanwhile


@dataclass
class Run:
    """All slices of a run by (mode, host, case, connections or rate)."""

    plan: Plan
    facts: dict[str, str]
    missing: dict[str, str]
    slices: dict[Key, list[Slice]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    proxies: dict[str, str] = field(default_factory=dict)  # version by host

    def pairs(self, key: Key, other: str) -> list[tuple[Slice, Slice]]:
        """A host's slices and the other's of the same rounds: what disturbs a round disturbs both. Empty where the
        other wasn't measured so."""
        mode, _, case, level = key
        return list(zip(self.slices.get(key, ()), self.slices.get((mode, other, case, level), ()), strict=False))

    def ratio(self, figure: str, key: Key, other: str) -> float | None:
        """How a figure of Sample relates to the other host's: the median of each round's own ratio."""
        ratios = [
            getattr(a.sample, figure) / getattr(b.sample, figure)
            for a, b in self.pairs(key, other)
            if getattr(b.sample, figure) > 0
        ]
        return statistics.median(ratios) if ratios else None

    def cpu_added_us(self, key: Key) -> float | None:
        """CPU per request of proxy and sidecar, less that of the proxy alone: the median of each round's own
        difference. None for the proxy alone, or where it wasn't measured."""
        if key[1] == base_of(key[1]):
            return None
        added = [a.cpu_proxy_us + a.cpu_sidecar_us - b.cpu_proxy_us for a, b in self.pairs(key, base_of(key[1]))]
        return statistics.median(added) if added else None

    def rows(self) -> list[dict[str, Any]]:
        """One per host, case and load, closed loop first; the keys are the JSON output's."""
        out = []
        for (mode, host, case, level), slices in self.slices.items():
            rows, key = summary(slices), (mode, host, case, level)
            ratio, slower = self.ratio("rps", key, base_of(host)), self.ratio("p50_us", key, base_of(host))
            added = self.cpu_added_us(key)
            out.append(
                {
                    "host": host,
                    "base": base_of(host),
                    "proxy": self.proxies.get(host, self.facts["proxy"]),
                    "case": case,
                    "mode": mode,
                    "connections": int(level) if mode == "closed" else load.schedule(level).connections,
                    "rate": None if mode == "closed" else level,
                    "workers": self.plan.workers,
                    "rps_ratio": round(ratio, 4) if ratio is not None else None,
                    "p50_ratio": round(slower, 4) if slower is not None else None,
                    "cpu_us_added": round(added, 2) if added is not None else None,
                    # a queue that only grew, or answers of the proxy's own: what it shows is overload
                    "kept_up": mode == "closed"
                    or (rows["rps"] > KEPT_UP * level and rows["non2xx"] <= rows["refused"]),
                    **rows,
                }
            )
        return sorted(out, key=lambda row: (row["mode"], self.plan.cases.index(row["case"]), row["rate"] or 0))


def summary(slices: Sequence[Slice]) -> dict[str, Any]:
    """Medians over rounds; counts are sums."""

    def middle(values: Iterable[float], digits: int = 1) -> float:
        return round(statistics.median(values), digits)

    samples = [s.sample for s in slices]
    counts = sum((s.counts for s in slices), Counts())
    return {
        "rps": middle(s.rps for s in samples),
        "rps_low": round(min(s.rps for s in samples), 1),
        "rps_high": round(max(s.rps for s in samples), 1),
        "p50_us": middle(s.p50_us for s in samples),
        "p99_us": middle(s.p99_us for s in samples),
        "p999_us": middle(s.p999_us for s in samples),
        "max_us": max(s.max_us for s in samples),
        "cpu_us_proxy": middle((s.cpu_proxy_us for s in slices), 2),
        "cpu_us_sidecar": middle((s.cpu_sidecar_us for s in slices), 2),
        "rss_mib_sidecar": round(max(s.memory.rss_kib for s in slices) / 1024, 1),
        "requests": sum(s.answered for s in samples),
        "non2xx": sum(s.non2xx for s in samples),
        "errors": sum(s.errors for s in samples),
        "judged": counts.judged,
        "refused": counts.refused,
        "tagged": counts.tagged,
        "unjudged": counts.unjudged,
        "stages_skipped": counts.skipped,
        "cores_others": middle((s.others for s in slices), 2),
        "rounds": len(slices),
        "points": [middle(values) for values in zip(*(s.points for s in samples), strict=True)],
    }


class Inputs:
    """The files the generators read, written once."""

    def __init__(self, folder: Path, cases: Iterable[str]) -> None:
        self.folder = folder
        self.requests = {case: traffic.variants(case) for case in cases}
        for case, requests in self.requests.items():
            traffic.write_raw(requests, self.raw(case))

    def raw(self, case: str, addressed: bool = False) -> Path:
        """For wrk. addressed: each with its client's address, for proxies that don't write one."""
        path = self.folder / f"{case}{'.addressed' if addressed else ''}.requests"
        if addressed and not path.exists():
            traffic.write_raw(traffic.addressed(self.requests[case], CLIENT_HEADER), path)
        return path

    def opened(self, case: str, url: str, turn: int) -> tuple[Path, list[tuple[str, str]], Path | None]:
        """For h2load: addresses, headers and a body. It sends one set of headers and one body per run, so each turn
        takes others."""
        requests = self.requests[case]
        uris, request = self.folder / "uris", requests[turn % len(requests)]
        traffic.write_uris(requests, url, uris)
        body = None
        if request[3] is not None:
            body = self.folder / "body"
            body.write_text(request[3], encoding="utf-8")
        return uris, traffic.sent_headers(request), body


def take(host: Host, every_pid: Sequence[int], work: Callable[[], Sample]) -> Slice:
    """Run one slice and account for it; every_pid: the rig's. HostError when a process of the host has died."""
    sidecar = host.sidecar.pid if host.sidecar else 0
    parts = (host.proxy_pids(), [sidecar] if sidecar else [])

    def spent() -> tuple[list[int], int, int]:
        ours = measure.own_cpu_ns() + sum(measure.cpu_ns(pid) for pid in every_pid)
        return [sum(measure.cpu_ns(pid) for pid in pids) for pids in parts], measure.machine_cpu_ns(), ours

    counts, handled = host.counts(), host.handled()
    (before, machine_before, ours_before), started = spent(), time.monotonic_ns()
    sample = work()
    settle(host)
    (after, machine_after, ours_after), ended = spent(), time.monotonic_ns()
    others = max(0.0, (machine_after - machine_before - (ours_after - ours_before)) / (ended - started))
    dead = host.dead()
    if dead is not None:
        raise HostError(f"{dead.name} ended while it was measured. Its log ends:\n{dead.tail()}")
    # what the generator left unanswered at its end was worked on as well; of 50 answers in a slice that is many
    worked_on = max(1, sample.answered, (host.handled() or 0) - (handled or 0))
    cpu = [(b - a) / 1000 / worked_on for a, b in zip(before, after, strict=True)]
    held = measure.memory(sidecar) if sidecar else measure.Memory(0, 0, 0)
    return Slice(sample, cpu[0], cpu[1], held, host.counts() - counts, others)


def settle(host: Host) -> None:
    """Wait until the proxy has done what the generator left behind, SETTLE_S at most: else the next host's slice would
    share its cores with it, and this one's account lack it."""
    until, pids = time.monotonic() + SETTLE_S, host.proxy_pids()
    used = sum(measure.cpu_ns(pid) for pid in pids)
    while time.monotonic() < until:
        time.sleep(SETTLE_STEP_S)
        before, used = used, sum(measure.cpu_ns(pid) for pid in pids)
        if used - before < SETTLED_SHARE * SETTLE_STEP_S * 1e9:
            return


def facts(plan: Plan, hosts: Sequence[Host] = ()) -> dict[str, str]:
    tools = load.generator_versions()
    proxies = dict.fromkeys([host.version() for host in hosts] or [envoy_version()])
    closed_only = any(not host.opens for host in hosts) and plan.opened
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **measure.machine(),
        "proxy": ", ".join(proxies),
        **({} if version().endswith("unknown") else {"outrider": version()}),
        **{name: text for host in hosts for name, text in host.facts().items()},
        "load": f"wrk {tools['wrk']} (closed loop), h2load {tools['h2load']} (open loop)",
        "method": (
            f"{plan.rounds} round{'s' if plan.rounds > 1 else ''}, slices of {plan.duration_s} s (half of it at "
            f"constant rates, up to {SLICE_S_MAX} s for a host that is slow), hosts alternating; medians over rounds; "
            f"each proxy with {plan.workers} worker{'s' if plan.workers > 1 else ''}; everything on one machine"
            + ("; NGINX in the closed loop only, as h2load sends all of a run in one client's name" * closed_only)
        ),
    }


def measure_all(rig: Rig, plan: Plan, say: Say) -> Run:
    """The whole plan on a rig that is up. LoadError, HostError."""
    inputs = Inputs(rig.folder, plan.cases)
    run = Run(plan, facts(plan, rig.hosts), dict(rig.missing))
    run.proxies = {host.name: host.version() for host in rig.hosts}
    threads = max(1, (os.cpu_count() or 1) // 4)
    say("warming up")
    pace: dict[tuple[str, str], float] = {}  # answers per second while warming up
    for host in rig.hosts:
        for case in plan.cases:
            if host.opens:
                load.counted(*inputs.opened(case, host.url, 0), WARM_UP, min(plan.connections), WARM_UP_TIMEOUT_S)
            else:
                done = load.closed(host.url, inputs.raw(case, addressed=True), WARM_UP_CONNECTIONS, WARM_UP_S)
                pace[host.name, case] = done.rps
                settle(host)
    if plan.closed or not plan.rates:
        closed_rounds(rig, plan, inputs, run, threads, pace, say)
    if plan.opened and any(host.opens for host in rig.hosts):
        open_rounds(rig, plan, inputs, run, say)
    others = statistics.median(s.others for slices in run.slices.values() for s in slices)
    if others > OTHERS_MAX:
        run.notes.append(
            f"Other processes used {others:.2f} of the machine's {os.cpu_count()} cores meanwhile: trust the ratios, "
            "and not too far."
        )
    return run


def slice_s(plan: Plan, connections: int, rps: float) -> int:
    """The plan's, or what a host that answers so many requests per second needs."""
    needed = math.ceil(SLICE_TURNS * connections / rps) if rps > 0 else SLICE_S_MAX
    return max(plan.duration_s, min(SLICE_S_MAX, needed))


def closed_rounds(
    rig: Rig, plan: Plan, inputs: Inputs, run: Run, threads: int, pace: dict[tuple[str, str], float], say: Say
) -> None:
    for turn in range(plan.rounds):
        for case in plan.cases:
            for connections in plan.connections:
                say(f"ceiling: round {turn + 1} of {plan.rounds}, {traffic.TITLES[case]}, {connections} connections")
                for host in order(rig.hosts, turn):

                    def work(host: Host = host, case: str = case, connections: int = connections) -> Sample:
                        sent = inputs.raw(case, addressed=is_nginx(host.name))
                        lasts_s = slice_s(plan, connections, pace.get((host.name, case), math.inf))
                        return load.closed(host.url, sent, connections, lasts_s, threads)

                    run.slices["closed", host.name, case, connections].append(take(host, rig.pids(), work))


def order(hosts: Sequence[Host], turn: int) -> list[Host]:
    """Each round starts with another host: none always runs after the same one."""
    first = turn % len(hosts) if hosts else 0
    return [*hosts[first:], *hosts[:first]]


def rates_for(run: Run, case: str) -> list[float]:
    """The plan's, or shares of the floor's ceiling (without it: of the best host behind ext_proc, or of any)."""
    if run.plan.rates:
        return sorted(run.plan.rates)
    ceilings = {
        host: statistics.median(s.sample.rps for s in slices)
        for (mode, host, of, _), slices in run.slices.items()
        if mode == "closed" and of == case and not is_nginx(host)
    }
    guarded = [rps for host, rps in ceilings.items() if host != "bare"]
    ceiling = ceilings.get("null_native") or max(guarded or ceilings.values(), default=0.0)
    return sorted({max(OPEN_RATE_MIN, two_digits(share * ceiling)) for share in RATE_SHARES})


def two_digits(value: float) -> float:
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(value / step) * step


def hosts_for(hosts: Sequence[Host], run: Run, case: str, rate: float, rates: Sequence[float]) -> list[Host]:
    """Those that may bear the rate, and those for which it is the first beyond their ceiling."""
    out = []
    for host in hosts:
        found = [s for (mode, name, of, _), s in run.slices.items() if (mode, name, of) == ("closed", host.name, case)]
        ceiling = max((statistics.median(x.sample.rps for x in s) for s in found), default=math.inf)
        below = [r for r in rates if r < rate]
        if not below or below[-1] < ceiling * RATE_TOO_HIGH:
            out.append(host)
    return out


def open_rounds(rig: Rig, plan: Plan, inputs: Inputs, run: Run, say: Say) -> None:
    for turn in range(plan.rounds):
        for case in plan.cases:
            rates = rates_for(run, case)
            for rate in rates:
                say(f"arrivals: round {turn + 1} of {plan.rounds}, {traffic.TITLES[case]}, {rate:,.0f} requests/s")
                able = [host for host in rig.hosts if host.opens]
                for host in order(hosts_for(able, run, case, rate, rates), turn):

                    def work(host: Host = host, case: str = case, rate: float = rate) -> Sample:
                        uris, fields, body = inputs.opened(case, host.url, turn)  # noqa: B023
                        duration_s = max(1.0, plan.duration_s / 2)
                        return load.opened(uris, fields, body, rate, duration_s, rig.folder / "h2load.log")

                    run.slices["open", host.name, case, rate].append(take(host, rig.pids(), work))


def run_plan(plan: Plan, required: set[str], say: Say) -> Run:
    """Starts everything, measures, ends everything."""
    for program in ("wrk", "h2load"):
        load.find(program)
    started = time.monotonic()
    say("starting the upstream, proxies and sidecars")
    with Rig(list(plan.hosts), required, plan.workers) as rig:
        run = measure_all(rig, plan, say)
    run.facts["took"] = f"{time.monotonic() - started:.0f} s"
    return run

