"""outrider check: everything that is wrong with a configuration, or what it amounts to."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.config import ConfigError, Problem, Settings, loads
from sidecar.config.load import read
from sidecar.config.problems import printable
from sidecar.config.settings import EffectiveRoute
from sidecar.config.tree import TEXT_BYTES_MAX
from sidecar.units import format_duration, format_size

EXCERPT_MAX = 100  # characters of a line shown around a mistake


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--elsewhere",
    is_flag=True,
    help="The file is for another machine: don't look for folders, the key file and the bundle here.",
)
def command(config: str, as_json: bool, elsewhere: bool) -> None:
    """Check the configuration file CONFIG (- for standard input) and say everything that is wrong with it.

    \b
    Exit code: 0 good, 1 bad, 2 wrong usage.
    \b
    outrider check outrider.yaml
    outrider check --elsewhere deploy/outrider.yaml     in a pipeline
    outrider check --json - < outrider.yaml             for programs
    """
    source = "standard input" if config == "-" else config
    content = b""
    try:
        content = sys.stdin.buffer.read(TEXT_BYTES_MAX + 1) if config == "-" else read(config)
        settings = loads(content, source, environment=not elsewhere)
    except ConfigError as error:
        if as_json:
            click.echo(
                json.dumps(
                    {
                        "ok": False,
                        "source": printable(source),
                        "more": error.more,
                        "problems": [problem.record() for problem in error.problems],
                    },
                    indent=2,
                )
            )
        else:
            _print_problems(error, content)
        sys.exit(1)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "ok": True,
                    "source": printable(source),
                    "problems": [],
                    "settings": json.loads(settings.model_dump_json(by_alias=True)),
                    "routes": [_route_record(route) for route in settings.effective_routes()],
                },
                indent=2,
            )
        )
    else:
        _print_summary(settings, source)


def _print_problems(error: ConfigError, content: bytes) -> None:
    # the line ends that YAML knows, so that numbers and lines agree
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", content.decode("utf-8", "replace").removeprefix("\ufeff"))
    for problem in error.problems:
        subject = click.style(problem.path, bold=True) + ": " if problem.path else ""
        click.echo(f"{click.style(problem.where, fg='cyan')}: {subject}{click.style(problem.what, fg='red')}")
        for line in _excerpt(problem, lines):
            click.echo(line)
        click.echo(f"  {click.style('remedy:', fg='green')} {problem.remedy}\n")
    found = len(error.problems) + error.more
    more = f" ({error.more} not shown)" if error.more else ""
    click.echo(f"{found} problem{'s' if found != 1 else ''} found{more}", err=True)


def _excerpt(problem: Problem, lines: list[str]) -> list[str]:
    """The line with a caret under the mistake; whatever could steer a terminal stands escaped."""
    if problem.line is None or problem.column is None or problem.line > len(lines):
        return []
    line = lines[problem.line - 1]
    start = max(0, problem.column - 1 - EXCERPT_MAX // 2)
    shown = printable(line[start : start + EXCERPT_MAX])
    before = printable(line[start : problem.column - 1])
    number = str(problem.line)
    return [f"  {number} | {shown}", f"  {' ' * len(number)} | {' ' * len(before)}^"]


def _route_record(route: EffectiveRoute) -> dict[str, Any]:
    return {
        "index": route.index,
        "name": route.name,
        "path": route.path,
        "methods": list(route.methods),
        "mode": route.mode,
        "budget": format_duration(route.budget_us),
        "body": route.body,
        "body_limit": format_size(route.body_limit_bytes),
        "thresholds": route.thresholds.model_dump(),
        "exempt": route.exempt,
        "login": route.login,
    }


def _print_summary(settings: Settings, source: str) -> None:
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 140

    def say(name: str, value: str) -> None:
        console.print(Text(f"  {name:<14}", style="bold") + Text(value), soft_wrap=True)

    console.print(Text.assemble((f"{printable(source)} is good", "green")), soft_wrap=True)
    say("service", f"{settings.service.name}, mode {settings.service.mode}, fail {settings.service.failure}")
    say("listen", f"{settings.listen.address} ({settings.listen.transport})")
    say("admin", settings.admin.address or "none")
    arena = settings.arena
    say("arena", f"{arena.path}: {arena.clients} clients, {arena.events} events, {arena.blocklist} blocked")
    client = settings.client
    hops = (
        f"{client.trusted_hops} hops of {client.address_header}" if client.trusted_hops else "Envoy's address"
    )
    sources = [
        f"cookie {source.cookie}"
        if source.kind == "cookie"
        else f"claim {source.jwt_claim}"
        if source.kind == "jwt_claim"
        else "basic"
        if source.kind == "basic"
        else f"header {source.header}"
        for source in client.principal
    ]
    say("client", f"{hops}; principal: {', '.join(sources) or 'none'}")
    on = [name for name, detector in settings.detectors if getattr(detector, "enabled", False)]
    say("detectors", ", ".join(on) or "none")
    say("lists", f"{len(settings.lists.allow)} allowed, {len(settings.lists.block)} blocked ranges")
    say("models", settings.models.bundle)
    say("decision log", f"{settings.decision_log.path or 'none'}")

    table = Table(title="routes, tried from 1 on; 0 is for the rest", title_justify="left")
    for heading in (
        "#",
        "name",
        "methods",
        "path",
        "mode",
        "budget",
        "body",
        "tag",
        "throttle",
        "challenge",
        "block",
        "notes",
    ):
        table.add_column(heading, overflow="fold")
    for route in settings.effective_routes():
        scores = route.thresholds
        notes = [word for word, true in (("exempt", route.exempt), ("login", route.login)) if true]
        body = route.body if route.body == "none" else f"{route.body} {format_size(route.body_limit_bytes)}"
        cells = [str(route.index), route.name, " ".join(route.methods) or "all", route.path]
        if route.exempt:
            cells += ["-"] * 7
        else:
            cells += [
                route.mode,
                format_duration(route.budget_us),
                body,
                *(
                    "never" if score is None else f"{score:g}"
                    for score in (scores.tag, scores.throttle, scores.challenge, scores.block)
                ),
            ]
        table.add_row(*(Text(printable(cell)) for cell in [*cells, " ".join(notes)]))
    console.print(table)
