"""Whether a second worker of a proxy with Outrider inside adds its throughput: what both share must not hold them up.

    outrider bench scaling [--host nginx_plugin] [--seconds 3] [--rounds 3] [--json]

The same proxy with one worker and with two, each before an arena of its own, rounds alternating. The load generator
(wrk) needs CPU as well, on the same machine: so the requests are ones that cost the proxy much more than the generator,
and no upstream is asked. To NGINX go GETs with some 6 KB of query and cookie (it can't answer a POST by itself), to
Envoy POSTs with some 16 KB of JSON. What the generator leaves possible on this machine is said beside what was reached.

CPU per request says most: where two workers waited for each other, spinning, it would grow; where they slept, workers
would stand idle. With perf installed, what the two workers spend their time on is sampled, and shown by function.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import load, measure, traffic
from bench.hosts import CLIENT_HEADER, HOSTS, PLUGINS, EnvoyHost, Host, HostError
from bench.nginx_hosts import NginxHost
from bench.proxy import order, settle
from sidecar.demo.envoy import DemoError, filters
from sidecar.demo.stack import make_folder
from sidecar.demo.supervisor import end_with_parent

GOAL = 1.7  # times the throughput of one worker
WORKERS = (1, 2)
CONNECTIONS = 64
VARIANTS = 1000
LONG_VALUE = 700  # characters of each of the long values
EVENTS = ("cycles", "cpu-clock")  # the first that the machine can count
PERF_HZ = 499
PERF_TIMEOUT_S = 60
SYMBOLS = 10
FIGURES = ("rps", "p50_us", "p99_us", "cpu_proxy_us", "cpu_rest_us")  # of Taken
# Functions that wait or exclude others, by name; atomic instructions amid other functions have none to show. Clocks and
# blocks aren't meant, nor is a kernel's unlocking: a virtual machine's interrupts come in there.
LOCKING = re.compile(r"futex|mutex|(?<![bc])(?<!un)lock|atomic|cmpxchg|(^|_)cas(_|\d|$)|contend", re.I)
LOCKING_SHARE_MAX = 5.0  # % of all samples
OTHERS_MAX = 0.1  # cores


@dataclass
class Taken:
    """One slice."""

    rps: float
    p50_us: float
    p99_us: float
    cpu_proxy_us: float  # per request
    cpu_rest_us: float  # of generator and sidecar, per request
    errors: int
    unheard: int  # answers that Outrider heard nothing of
    others: float  # cores that processes which don't belong to the benchmark used meanwhile


@dataclass
class Scaling:
    """One proxy's slices by number of workers."""

    host: str
    slices: dict[int, list[Taken]] = field(default_factory=lambda: {n: [] for n in WORKERS})
    symbols: list[tuple[float, str]] = field(default_factory=list)  # share of the samples in %, function and library
    perf: str = ""  # the event that was sampled, or why none was

    def middle(self, workers: int, figure: str) -> float:
        return float(statistics.median(getattr(taken, figure) for taken in self.slices[workers]))

    @property
    def ratio(self) -> float:
        """Throughput of two workers to that of one: the median of each round's own."""
        pairs = zip(self.slices[2], self.slices[1], strict=True)
        return float(statistics.median(two.rps / one.rps if one.rps else 0.0 for two, one in pairs))

    def reachable(self, cores: int) -> float:
        """The ratio at which the machine's cores were used up, were a request to cost the same with two workers."""
        each_us = self.middle(1, "cpu_proxy_us") + self.middle(1, "cpu_rest_us")
        return min(2.0, cores * 1e6 / each_us / self.middle(1, "rps")) if each_us else 2.0

    @property
    def locking(self) -> list[tuple[float, str]]:
        """Those of the symbols that wait or lock."""
        return [(share, name) for share, name in self.symbols if LOCKING.search(name.partition("  ")[0])]

    @property
    def others(self) -> float:
        return float(statistics.median(taken.others for slices in self.slices.values() for taken in slices))

    def record(self, cores: int) -> dict[str, Any]:
        return {
            "host": self.host,
            "rps_ratio": round(self.ratio, 3),
            "rps_ratio_reachable": round(self.reachable(cores), 3),
            "goal": GOAL,
            "cores": cores,
            "connections": CONNECTIONS,
            "workers": [
                {
                    "workers": n,
                    **{key: round(self.middle(n, key), 2) for key in FIGURES},
                    "errors": sum(taken.errors for taken in taken_all),
                    "unheard": sum(taken.unheard for taken in taken_all),
                    "rounds": len(taken_all),
                }
                for n, taken_all in self.slices.items()
            ],
            "perf": self.perf,
            "symbols": [{"share": round(share / 100, 4), "symbol": name} for share, name in self.symbols],
            "locking": [name for _, name in self.locking],
            "cores_others": round(self.others, 2),
        }


def long_get(rng: random.Random) -> traffic.Request:
    """Some 6 KB of query and cookie, without a body."""

    def long_text() -> str:
        return "+".join(rng.choices(traffic.WORDS, k=LONG_VALUE // 7))

    query = "&".join(f"{name}={long_text()}" for name in ("q", "title", "about", "note", "tags"))
    fields = [(name, value) for name, value in traffic.headers(rng) if name != "cookie"]
    cookie = "; ".join(f"{name}={long_text()}" for name in ("seen", "cart", "recent"))
    return "GET", f"/api/v1/search?{query}", [*fields, ("cookie", cookie)], None


def answers_itself(config: dict[str, Any]) -> None:
    """Make Envoy's route answer from the configuration."""
    host = filters(config)["hcm"]["route_config"]["virtual_hosts"][0]
    host["routes"] = [{"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "{}\n"}}}]


class Pair:
    """One proxy with each number of workers, entered and left as one."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, make_folder()
        self.hosts: list[Host] = []

    def __enter__(self) -> Pair:
        taken: set[int] = set()
        try:
            for workers in WORKERS:
                folder = self.folder / f"{workers}"
                if self.name == "nginx_plugin":
                    host: Host = NginxHost(self.name, folder, 9, taken, workers, answer="empty_gif;")
                else:
                    host = EnvoyHost(self.name, folder, 9, taken, workers, change=answers_itself)
                self.hosts.append(host)
                host.start()
        except DemoError as error:
            self.close()
            raise HostError(str(error)) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for host in self.hosts:
            host.tell_to_stop()
        for host in self.hosts:
            host.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def write_requests(name: str, path: Path) -> None:
    rng = random.Random(f"outrider bench scaling {name}")
    make = long_get if name == "nginx_plugin" else traffic.post_16k
    traffic.write_raw(traffic.addressed([make(rng) for _ in range(VARIANTS)], CLIENT_HEADER), path)


def take(host: Host, every_pid: list[int], sent: Path, seconds: int) -> Taken:
    """every_pid: of both hosts. HostError when a process of the host has died."""
    assert host.sidecar is not None
    pids, sidecar, judged = host.proxy_pids(), host.sidecar.pid, host.counts().judged

    def spent() -> tuple[int, int, int]:
        ours = measure.own_cpu_ns()
        not_ours = measure.machine_cpu_ns() - ours - sum(map(measure.cpu_ns, every_pid))
        return sum(map(measure.cpu_ns, pids)), ours + measure.cpu_ns(sidecar), not_ours

    before, started = spent(), time.monotonic_ns()
    sample = load.closed(host.url, sent, CONNECTIONS, seconds)
    settle(host)
    after, ended = spent(), time.monotonic_ns()
    dead = host.dead()
    if dead is not None:
        raise HostError(f"{dead.name} ended while it was measured. Its log ends:\n{dead.tail()}")
    answered = max(1, sample.answered)
    proxy_us, rest_us = ((after[i] - before[i]) / 1000 / answered for i in (0, 1))
    others = max(0.0, (after[2] - before[2]) / (ended - started))
    unheard = max(0, sample.answered - (host.counts().judged - judged))
    failed = sample.errors + sample.non2xx
    return Taken(sample.rps, sample.p50_us, sample.p99_us, proxy_us, rest_us, failed, unheard, others)


def measure_host(name: str, seconds: int, rounds: int, profile: bool, say: Any) -> Scaling:
    """LoadError, HostError."""
    found = Scaling(name)
    with Pair(name) as pair:
        sent = pair.folder / "requests"
        write_requests(name, sent)
        for host in pair.hosts:
            load.closed(host.url, sent, CONNECTIONS, 1)
            settle(host)
        for turn in range(rounds):
            say(f"{HOSTS[name]}: round {turn + 1} of {rounds}")
            for host in order(pair.hosts, turn):
                every_pid = [pid for one in pair.hosts for pid in one.pids()]
                found.slices[host.workers].append(take(host, every_pid, sent, seconds))
        if profile:
            say(f"{HOSTS[name]}: sampling two workers")
            found.symbols, found.perf = sampled(pair.hosts[-1], sent, seconds, pair.folder)
        else:
            found.perf = "not asked for"
    return found


# ---- perf ------------------------------------------------------------------------------------------------


def sampled(host: Host, sent: Path, seconds: int, folder: Path) -> tuple[list[tuple[float, str]], str]:
    """The functions that the proxy spends most of its time in under load, and what was counted; without any, why."""
    perf = shutil.which("perf")
    if perf is None:
        return [], "perf isn't installed (Debian: apt-get install linux-perf)"
    said = ""
    for event in EVENTS:
        data = folder / f"perf-{event}"
        pids = ",".join(map(str, host.proxy_pids()))
        line = [perf, "record", "-q", "-e", event, "-F", str(PERF_HZ), "-o", str(data), "-p", pids]
        # perf counts until its own command ends
        recording = subprocess.Popen(
            [*line, "--", "sleep", str(seconds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,
        )
        try:
            time.sleep(0.1)
            if recording.poll() is None:
                load.closed(host.url, sent, CONNECTIONS, seconds)
            _, said = recording.communicate(timeout=PERF_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            said = "perf record didn't end"
        finally:
            if recording.poll() is None:
                recording.kill()
                recording.wait()
        settle(host)
        if recording.returncode == 0:
            symbols = read_symbols(perf, data)
            if symbols:
                return symbols, f"{event} at {PERF_HZ} Hz"
            said = "no samples"
    return [], f"perf can't sample here: {said.strip()[-300:]}"


def read_symbols(perf: str, data: Path) -> list[tuple[float, str]]:
    line = [perf, "report", "-i", str(data), "--stdio", "-q", "-t", "|", "--sort", "symbol,dso"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=PERF_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_symbols(done.stdout)


def parse_symbols(out: str) -> list[tuple[float, str]]:
    """The first SYMBOLS of perf's report with `|` between fields: share in %, and `function  library`."""
    found = []
    for text in out.splitlines():
        fields = [part.strip() for part in text.split("|")]
        share = re.fullmatch(r"([\d.]+)%?", fields[0])
        if share and len(fields) >= 3:
            symbol = re.sub(r"^\[.\] ", "", fields[1])  # [.] or [k]: whose it is, which the library says too
            found.append((float(share[1]), f"{symbol}  {fields[2]}"))
    return found[:SYMBOLS]


# ---- what people see -------------------------------------------------------------------------------------


def show(console: Console, results: list[Scaling], missing: dict[str, str], cores: int) -> None:
    table = Table(title=f"One worker and two, {CONNECTIONS} connections, {cores} cores", title_justify="left")
    for column in ("host", "workers", "answered/s", "to one", "p50", "p99", "proxy CPU", "generator + sidecar"):
        table.add_column(column, justify="left" if column == "host" else "right", no_wrap=True)
    for result in results:
        for n in WORKERS:
            table.add_row(
                result.host if n == WORKERS[0] else "",
                str(n),
                f"{result.middle(n, 'rps'):,.0f}",
                f"{result.ratio:.2f}" if n == 2 else "",
                f"{result.middle(n, 'p50_us') / 1000:.1f} ms",
                f"{result.middle(n, 'p99_us') / 1000:.1f} ms",
                f"{result.middle(n, 'cpu_proxy_us'):.1f} us",
                f"{result.middle(n, 'cpu_rest_us'):.1f} us",
            )
        table.add_section()
    console.print(table)
    for result in results:
        good, bound = result.ratio >= GOAL, result.reachable(cores)
        one, two = result.middle(1, "cpu_proxy_us"), result.middle(2, "cpu_proxy_us")
        console.print(
            Text(
                f"{'+' if good else '!'} {HOSTS[result.host]}: two workers do {result.ratio:.2f} times what one does "
                f"(goal: {GOAL}; with what the generator takes of {cores} cores, {bound:.2f} could be reached); "
                f"a request costs x{two / one if one else 0:.2f} of the CPU.",
                "green" if good else "red",
            )
        )
        if result.others > OTHERS_MAX:
            others = f"- {result.host}: other processes used {result.others:.2f} of the {cores} cores meanwhile"
            console.print(Text(f"{others}: this is no measurement.", "yellow"))
        for what, words in (("errors", "requests failed or were refused"), ("unheard", "answers without a decision")):
            count = sum(getattr(taken, what) for slices in result.slices.values() for taken in slices)
            if count:
                console.print(Text(f"! {result.host}: {count:,} {words}.", "red"))
        if not result.symbols:
            console.print(Text(f"- {result.host}: no functions to show: {result.perf}", "dim"))
            continue
        share = sum(share for share, _ in result.locking)
        names = "; ".join(name.replace("  ", " of ") for _, name in result.locking)
        told = f"{share:.1f}% is in such that wait or lock: {names}" if names else "none waits or locks"
        good = share <= LOCKING_SHARE_MAX
        console.print(
            Text(
                f"{'+' if good else '!'} Of the {len(result.symbols)} functions that two workers spend most time in, "
                f"{told} (by name; perf, {result.perf}):",
                "green" if good else "red",
            )
        )
        for share, name in result.symbols:
            console.print(Text(f"    {share:5.1f}%  {name}"), no_wrap=True, crop=True)
    for name, reason in missing.items():
        console.print(Text(f"not measured: {name} ({HOSTS[name]}): {reason}", "yellow"))


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--host", "hosts", multiple=True, type=click.Choice(PLUGINS), help="Only these (repeat); both if none.")
@click.option("--seconds", type=click.IntRange(1, 60), default=3, show_default=True, help="Of each slice.")
@click.option("--rounds", type=click.IntRange(1, 50), default=3, show_default=True)
@click.option("--perf/--no-perf", "profile", default=True, show_default=True, help="Sample two workers where perf is.")
@click.option("--json", "as_json", is_flag=True, help="One object per host instead of tables.")
def command(hosts: tuple[str, ...], seconds: int, rounds: int, profile: bool, as_json: bool) -> None:
    cores, progress = len(os.sched_getaffinity(0)), Console(stderr=True)
    if cores < max(WORKERS):
        raise click.ClickException("two workers need two cores: this process may use one")
    results, missing = [], {}
    for name in PLUGINS:
        if hosts and name not in hosts:
            continue
        try:
            load.find("wrk")
            results.append(measure_host(name, seconds, rounds, profile, lambda text: progress.print(text, style="dim")))
        except (HostError, DemoError) as error:
            if hosts:
                raise click.ClickException(f"{name}: {error}") from error
            missing[name] = str(error)
        except load.LoadError as error:
            raise click.ClickException(str(error)) from error
    if not results:
        raise click.ClickException("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    if as_json:
        print(json.dumps([result.record(cores) for result in results], indent=1))
    else:
        console = Console()
        show(Console(width=max(console.width, 120)), results, missing, cores)


if __name__ == "__main__":
    command()
