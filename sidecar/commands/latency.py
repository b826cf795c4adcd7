"""`outrider latency`: how long decisions take on each route, and whether the budgets hold."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sidecar.records import printable
from sidecar.units import UnitError, format_duration, parse_duration

if TYPE_CHECKING:
    from sidecar.latency import RouteTimes, Snapshot

EXIT_OVER, EXIT_NOTHING = 1, 2
WATCH_EVERY_S = 2.0
SPAN_US = (100_000, 3_600_000_000)  # of --for
ROWS_MAX = 256  # a policy has no more routes
WIDTH_MIN = 110
SHORT = {"random_forest": "forest", "text_in_part": "text in part"}


class Span(click.ParamType[float]):
    """A duration with its unit, kept in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            us = parse_duration(value)
        except UnitError as error:
            self.fail(printable(str(error)), param, ctx)
        if not SPAN_US[0] <= us <= SPAN_US[1]:
            self.fail(f"{format_duration(us)} is not between 100ms and 1h", param, ctx)
        return us / 1e6


@click.command(name="latency", short_help="Show how long decisions take on each route, and whether budgets hold.")
@click.option("-c", "--config", metavar="FILE", help="The sidecar's configuration: it names the arena.")
@click.option("--arena", metavar="PATH", help="The arena itself, instead of a configuration.")
@click.option("--route", "wanted", multiple=True, metavar="NAME", help="Only this route; may be repeated.")
@click.option("--stages", is_flag=True, help="Also a line for each stage.")
@click.option(
    "--for", "span_s", type=Span(), metavar="TIME", help="Measure for so long (10s) instead of since the start."
)
@click.option("--watch", is_flag=True, help="Show it anew every two seconds, or every --for, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output; with --watch one per line.")
@click.option("--check", is_flag=True, help="End with status 1 where a route's p99 is over its budget.")
def command(
    config: str | None,
    arena: str | None,
    wanted: tuple[str, ...],
    stages: bool,
    span_s: float | None,
    watch: bool,
    as_json: bool,
    check: bool,
) -> None:
    """Show how long decisions take on each route, and whether the budgets hold.

    Reads the counts that the data plane keeps in the arena of a running (or stopped) sidecar and changes nothing.
    A budget holds where at most 1% of a route's decisions took longer. "Skipped" says which stages were left out
    for lack of time, and of how many requests; a text "in part" was read until its time was up. "Shed" are the
    stages that a route does without at present because its p99 was over the budget.

    \b
    outrider latency -c outrider.yaml
    outrider latency --arena /dev/shm/outrider.arena --for 10s --stages
    outrider latency -c outrider.yaml --for 30s --check        in a pipeline

    Exit status: 0; 1 with --check where a budget doesn't hold; 2 where there is nothing to read: wrong usage, no
    arena or, with --check, no traffic.
    """
    if (config is None) == (arena is None):
        raise click.UsageError("name the configuration (-c FILE) or the arena (--arena PATH)")
    if watch and check:
        raise click.UsageError("--check says its verdict at the end, --watch has none")
    path = arena if arena is not None else _arena_of(str(config))
    try:
        if watch:
            _watch(path, wanted, stages, span_s, as_json)
            return
        routes, since = _measure(path, wanted, span_s)
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        if as_json:
            click.echo(json.dumps(_json(routes, since, span_s), indent=1))
        else:
            console = _console()
            console.print(table_of(routes, stages, _since(since, span_s)))
            if not any(route.requests for route in routes):
                console.print(Text("No traffic yet: nothing was decided on in this time.", style="yellow"))
    except OSError as error:  # status 1 is for budgets that don't hold
        _stop(f"can't write: {error.strerror}")
    if check:
        _verdict(routes)


def _verdict(routes: Sequence[RouteTimes]) -> None:
    """Status 1 and who is over, 2 where nobody was asked."""
    over = [route for route in routes if route.holds is False]
    for route in over:
        click.echo(
            f"{printable(route.name)}: {route.over:.2%} of {route.requests:,} decisions took longer than "
            f"{format_duration(route.budget_us)}, at most 1% may",
            err=True,
        )
    if over:
        sys.exit(EXIT_OVER)
    if not any(route.holds for route in routes):
        _stop("no route with a budget had any traffic: there is nothing to check")


def _stop(why: str) -> NoReturn:
    click.echo(f"outrider latency: {why}", err=True)
    sys.exit(EXIT_NOTHING)


def _arena_of(config: str) -> str:
    from sidecar.config import ConfigError, loads
    from sidecar.config.load import read

    try:
        return str(loads(read(config), config).arena.path)
    except ConfigError as error:
        _stop(str(error))


# ---- measuring


def _take(path: str) -> Snapshot:
    """Opened anew each time: a sidecar that is started again may have put another arena in its place."""
    from native.arenafile import ArenaError, ArenaFile
    from sidecar.latency import take

    try:
        return take(ArenaFile.open(path))
    except ArenaError as error:
        why = printable(str(error), 600)
        if not os.path.exists(path):
            why = f"{printable(path, 300)}: there is no arena (is the sidecar running, and is this its configuration?)"
        elif "layout version" in why or "record sizes" in why:
            why = f"{why.partition(' (')[0]}: this outrider is not the version that runs the sidecar"
        _stop(why)


def _measure(path: str, wanted: Sequence[str], span_s: float | None) -> tuple[list[RouteTimes], float]:
    """The routes' figures and since when (unix seconds) they count."""
    from sidecar.latency import between

    first = _take(path)
    if span_s is None:
        return _chosen(first, wanted), first.created
    _chosen(first, wanted)  # a misspelt name is said before the waiting
    time.sleep(span_s)
    return _chosen(between(first, _same(first, _take(path))), wanted), first.taken


def _same(before: Snapshot, after: Snapshot) -> Snapshot:
    if after.created != before.created:
        _stop("the arena was replaced while this was measured (the sidecar was started again): measure once more")
    return after


def _chosen(snapshot: Snapshot, wanted: Sequence[str]) -> list[RouteTimes]:
    from sidecar.latency import times

    routes = [times(route) for route in snapshot.routes[:ROWS_MAX]]
    if not routes:
        _stop("the arena has no policy yet: the sidecar has not finished starting")
    names = {route.name for route in routes}
    missing = [name for name in wanted if name not in names]
    if missing:
        known = ", ".join(printable(name) for name in sorted(names)[:20])
        _stop(f"no route is called {printable(missing[0])} (there are: {known})")
    return [route for route in routes if not wanted or route.name in wanted]


def _watch(path: str, wanted: Sequence[str], stages: bool, span_s: float | None, as_json: bool) -> None:
    every_s = span_s or WATCH_EVERY_S
    try:
        if as_json:
            while True:
                started = time.monotonic()
                routes, since = _measure(path, wanted, span_s)
                click.echo(json.dumps(_json(routes, since, span_s)))
                time.sleep(max(0.0, every_s - (time.monotonic() - started)))
        with Live(console=_console(), auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                started = time.monotonic()
                routes, since = _measure(path, wanted, span_s)
                live.update(table_of(routes, stages, _since(since, span_s)), refresh=True)
                time.sleep(max(0.0, every_s - (time.monotonic() - started)))
    except (KeyboardInterrupt, BrokenPipeError):
        return


# ---- showing


def _console() -> Console:
    console = Console()
    # a pipe or a log has no width of its own
    return console if console.is_terminal else Console(width=max(console.width, WIDTH_MIN))


def _since(since: float, span_s: float | None) -> str:
    try:
        moment = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        moment = "an unknown time"  # the arena's header is damaged there
    return f"{format_duration(round(span_s * 1e6))} from {moment} UTC" if span_s else f"since {moment} UTC"


def _json(routes: Sequence[RouteTimes], since: float, span_s: float | None) -> dict[str, object]:
    return {"since": round(since, 3), "seconds": span_s, "routes": [route.record() for route in routes]}


def duration(us: float | None) -> str:
    """With three digits: 4.12 us, 63.1 us, 1.20 ms; beyond the last bound > 10 ms."""
    if us is None:
        return "-"
    if math.isinf(us):
        return "> 10 ms"
    if us < 1000:
        return f"{us:.2f} us" if us < 10 else f"{us:.1f} us" if us < 100 else f"{us:.0f} us"
    return f"{us / 1000:.2f} ms"


def share(part: float) -> str:
    """As a percentage that is 0 only for nothing and 100 only for all."""
    if part == 0:
        return "0%"
    if part < 0.0001:
        return "< 0.01%"
    if part > 0.9999 and part != 1:
        return "> 99.99%"
    return "100%" if part == 1 else f"{part:.2%}" if part < 0.1 else f"{part:.1%}"


def left_out(route: RouteTimes) -> str:
    """The skipped stages with their shares, the most skipped first."""
    rows = [(part, SHORT.get(name, name)) for name, part in route.skipped.items()]
    if route.texts_in_part:
        rows.append((route.texts_in_part, "text in part"))
    return "\n".join(f"{name} {share(part)}" for part, name in sorted(rows, reverse=True)) or "-"


def table_of(routes: Sequence[RouteTimes], stages: bool, title: str) -> RenderableType:
    """One row per route, and one per stage below where `stages`."""
    table = Table(title=f"Decisions by route, {title}", title_justify="left")
    for column in ("route", "requests", "budget", "p50", "p99", "p99.9", "over budget", "skipped", "shed now"):
        left = column in ("route", "skipped", "shed now")
        table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for route in routes:
        style = {True: "green", False: "bold red", None: ""}[route.holds]
        table.add_row(
            Text(printable(route.name, 64)),
            f"{route.requests:,}",
            format_duration(route.budget_us) if route.budget_us else "none",
            duration(route.p50_us),
            Text(duration(route.p99_us), style=style),
            duration(route.p999_us),
            Text(f"{route.overruns:,} ({share(route.over)})" if route.budget_us else "-", style=style),
            left_out(route),
            Text("\n".join(SHORT.get(name, name) for name in route.shed_now) or "-", style="yellow"),
        )
    return Group(table, _stage_table(routes)) if stages else table


def _stage_table(routes: Sequence[RouteTimes]) -> Table:
    table = Table(title="By stage, where it ran", title_justify="left")
    for column in ("route", "stage", "runs", "p50", "p99", "p99.9"):
        table.add_column(column, justify="left" if column in ("route", "stage") else "right", overflow="fold")
    for route in routes:
        name = printable(route.name, 64)
        for stage in route.stages:
            if stage.runs:
                table.add_row(
                    Text(name),
                    SHORT.get(stage.name, stage.name),
                    f"{stage.runs:,}",
                    *(duration(us) for us in (stage.p50_us, stage.p99_us, stage.p999_us)),
                )
                name = ""
    return table
