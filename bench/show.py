"""The benchmark's tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import traffic
from bench.hosts import HOSTS
from bench.soak import Soak
from bench.verdicts import Verdict

STYLES = {
    "bare": "dim",
    "null_native": "cyan",
    "native": "bold green",
    "grpcio": "yellow",
    "envoy_plugin": "bold magenta",
    "nginx_bare": "dim",
    "nginx_plugin": "bold magenta",
    "nginx_auth_request": "yellow",
    "nginx_modsecurity": "red",
}
FACTS = ("date", "processor", "memory", "system", "proxy", "outrider", "peer", "load", "method", "took")
WIDTH = 138


def us(value: float) -> str:
    """Microseconds as people read them."""
    if value < 1000:
        return f"{value:.0f} us"
    return f"{value / 1000:.1f} ms" if value < 100_000 else f"{value / 1e6:.2f} s"


def console_for(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, WIDTH))


def facts_grid(facts: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name in FACTS:
        if name in facts:
            grid.add_row(Text(name, "dim"), Text(facts[name]))
    return grid


def report(
    console: Console,
    rows: Sequence[dict[str, Any]],
    facts: dict[str, str],
    missing: dict[str, str],
    said: Sequence[Verdict],
) -> None:
    console.print(facts_grid(facts))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for mode, title in (
        ("closed", "ceiling: as many requests as the connections carry"),
        ("open", "constant arrival rates: waiting counts"),
    ):
        for case in cases:
            found = [row for row in rows if row["mode"] == mode and row["case"] == case]
            if found:
                console.print()
                console.print(table(f"{traffic.TITLES[case]} - {title}", mode, found))
    console.print()
    for name, reason in missing.items():
        console.print(Text(f"not measured: {name} ({HOSTS[name]}): {reason}", "yellow"))
    for verdict in said:
        mark, style = {True: ("+", "green"), False: ("!", "red"), None: ("-", "")}[verdict.good]
        console.print(Text(f"{mark} {verdict.text}", "dim" if verdict.caution else style))


def table(title: str, mode: str, rows: Sequence[dict[str, Any]]) -> Table:
    out = Table(title=title, title_justify="left", title_style="bold")
    out.add_column("host", no_wrap=True)
    out.add_column("conns" if mode == "closed" else "asked/s", justify="right", no_wrap=True)
    columns = ("answered/s", "to bare", "p50", "p99", "p99.9", "proxy CPU", "sidecar CPU", "added", "MiB", "non-2xx")
    for column in columns:
        out.add_column(column, justify="right", no_wrap=True)
    before = None
    for row in rows:
        level = row["connections"] if mode == "closed" else row["rate"]
        if before is not None and before != (level, row["base"]):
            out.add_section()
        before = (level, row["base"])
        out.add_row(
            Text(row["host"], STYLES.get(row["host"], "")),
            f"{level:,.0f}",
            f"{row['rps']:,.0f}",
            f"{row['rps_ratio']:.2f}" if row["rps_ratio"] else "-",
            us(row["p50_us"]),
            us(row["p99_us"]),
            us(row["p999_us"]),
            f"{row['cpu_us_proxy']:.0f} us",
            f"{row['cpu_us_sidecar']:.1f} us" if row["cpu_us_sidecar"] else "-",
            f"{row['cpu_us_added']:.1f} us" if row["cpu_us_added"] is not None else "-",
            f"{row['rss_mib_sidecar']:.0f}" if row["rss_mib_sidecar"] else "-",
            f"{row['non2xx']:,}",
        )
    return out


def soak_report(console: Console, result: Soak, facts: dict[str, str]) -> None:
    console.print(facts_grid(facts))
    out = Table(title=f"{result.host}: {result.connections} connections", title_justify="left", title_style="bold")
    for column in ("requests", "seconds", "private MiB", "shared MiB (arena)"):
        out.add_column(column, justify="right")
    step = max(1, len(result.memory) // 10)
    shown = [point for i, point in enumerate(result.memory) if i % step == step - 1 or i in (0, len(result.memory) - 1)]
    for requests, seconds, private, shared in shown:
        out.add_row(f"{requests:,}", f"{seconds:,.1f}", f"{private / 1024:.2f}", f"{shared / 1024:.1f}")
    console.print()
    console.print(out)
    console.print(
        f"{result.done:,} requests answered, {result.non2xx:,} not 2xx, of which {result.counts.refused:,} decisions; "
        f"{result.counts.unjudged:,} unjudged, {result.failed:,} failed; private memory "
        f"{result.growth_kib / 1024:+.2f} MiB between the first and the last tenth",
        highlight=False,
    )
    problems = result.problems()
    for problem in problems:
        console.print(Text(f"! {problem}", "red"))
    console.print(Text("failed" if problems else "passed", "red" if problems else "green"))
