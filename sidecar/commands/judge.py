"""`outrider judge`: serve one, see and undo what it decided, teach it, make and measure models."""

from __future__ import annotations

import importlib
import ipaddress
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sidecar.config import Settings
    from sidecar.judge.store import Store

# subcommands with heavy imports: name -> (module in sidecar.commands, help)
LAZY = {
    "train": ("judge_train", "Train the small embedded judge from labelled records."),
    "eval": ("judge_eval", "Measure judges on labelled records: detection, calibration, speed."),
    "convert": ("judge_convert", "Make a judge out of a Llama-3.x-Instruct model's folder."),
    "finetune": ("judge_finetune", "Fine-tune a Llama on labelled records (LoRA), and convert it."),
}
ROWS_MAX = 10_000


class JudgeGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LAZY])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in LAZY:
            command: click.Command = importlib.import_module(f"sidecar.commands.{LAZY[name][0]}").command
            return command
        return super().get_command(ctx, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, LAZY[name][1]) for name in LAZY]
        rows += [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.command(cls=JudgeGroup, short_help="Judge escalations with a language model; see, undo and teach its verdicts.")
def command() -> None:
    """The judge: a language model that reads what the inline models can't settle.

    \b
    outrider judge list -c outrider.yaml                 what holds now, and why
    outrider judge undo ID -c outrider.yaml              lift one, on every pod
    outrider judge feedback EVENT benign -c ...          tell it what was right
    outrider judge serve -c outrider.yaml                judge for other sidecars (on a GPU machine)
    """


config = click.option(
    "-c", "--config", "path", type=click.Path(path_type=Path), required=True, help="The configuration file (YAML)."
)


def clean(value: object, most: int = 200) -> Text:
    """For the terminal: no control characters, no markup, cut. The request is hostile data."""
    return Text("".join(c if c.isprintable() and c.isascii() else "?" for c in str(value)[:most]))


def fail(error: object) -> NoReturn:
    click.echo("outrider judge: " + "".join(c if c.isprintable() else "?" for c in str(error)), err=True)
    sys.exit(1)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Settings, Store]]:
    from sidecar.judge.process import store_settings
    from sidecar.judge.store import StoreError, open_store
    from sidecar.serve.app import read_settings
    from sidecar.serve.errors import StartupError

    try:
        settings = read_settings(path)
    except StartupError as error:
        fail(error)
    try:
        with open_store(store_settings(settings)) as store:
            yield settings, store
    except StoreError as error:
        fail(error)


@command.command()
@config
def serve(path: Path) -> None:
    """Judge for all sidecars that share judge_store.

    Runs until SIGTERM or Ctrl-C. Any number may run, on any machine; each takes from the same queue. A judge that is
    killed loses nothing: what it was at is taken by another.

    Exit status: 0 stopped as told; 2 wrong configuration; 4 a model is refused.
    """
    import logging

    from sidecar.judge.folder import ModelError
    from sidecar.judge.process import EXIT_MODELS, stopped_by_signals, work
    from sidecar.judge.store import StoreError
    from sidecar.serve import logs
    from sidecar.serve.app import read_settings
    from sidecar.serve.errors import EXIT_CONFIG, StartupError

    try:
        settings = read_settings(path)
    except StartupError as error:
        click.echo(f"outrider judge serve: {error}", err=True)
        sys.exit(error.status)
    logs.set_up(settings.log.level, settings.log.format)
    stopping = stopped_by_signals()
    log = logging.getLogger("outrider.judge")
    said = 0

    def tell(status: Any) -> None:
        nonlocal said
        judged = sum(status["counts"].get("judged", {}).values())
        if judged // 1000 > said:
            said = judged // 1000
            log.info("judging", extra={"judged": judged, **status["store"]})

    try:
        work(settings, stopping, tell)
    except ModelError as error:
        click.echo(f"outrider judge serve: {error}", err=True)
        sys.exit(EXIT_MODELS)
    except StoreError as error:
        click.echo(f"outrider judge serve: {error}", err=True)
        sys.exit(EXIT_CONFIG)


@command.command("list")
@config
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with the whole provenance.")
def list_(path: Path, as_json: bool) -> None:
    """What holds now: scope, what it is about, why, for how long, and by whose verdict."""
    with opened(path) as (_, store):
        decisions = sorted(store.active(), key=lambda d: d.decided, reverse=True)[:ROWS_MAX]
        if as_json:
            for d in decisions:
                click.echo(d.to_wire().decode())
            return
        table = Table("id", "scope", "what", "why", "sure", "left", "by", box=None, pad_edge=False)
        for d in decisions:
            table.add_row(
                clean(d.id, 16),
                d.scope,
                clean(d.shown, 60),
                clean(d.label, 24),
                f"{d.confidence:.3f}",
                f"{store.remaining_s(d):,.0f} s",
                clean(d.provenance.get("who", "?"), 40),
            )
        Console().print(table)
        Console().print(f"{len(decisions)} hold; {store.depth()} escalations wait")


@command.command()
@config
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--by", "who", default="operator", show_default=True, help="Who undoes it, for the record.")
def undo(path: Path, ids: tuple[str, ...], who: str) -> None:
    """Lift decisions, on every pod. The same verdict may be reached again: tell the judge with `feedback`."""
    missed = 0
    with opened(path) as (_, store):
        for one in ids:
            if store.undo(one, who):
                click.echo(f"{one}: undone")
            else:
                missed += 1
                click.echo(f"{one}: there is no such decision, or it holds no more", err=True)
    sys.exit(1 if missed else 0)


@command.command()
@config
@click.argument("event")
@click.argument("label")
@click.option("--by", "who", default="operator", show_default=True, help="Who says so.")
@click.option("--note", default="", help="Why, in a few words.")
def feedback(path: Path, event: str, label: str, who: str, note: str) -> None:
    """Say what EVENT (as in `list --json`: provenance.event) really was: benign or a class of attack. Kept as training
    data, see `export`."""
    from sidecar.judge.types import LABELS

    if label not in LABELS:
        fail(f"{label!r} is no label: use one of {', '.join(LABELS)}")
    with opened(path) as (_, store):
        whole = store.feedback(event, label, who, note)
    click.echo("kept" if whole else "kept, without the request itself: it is no longer known here")


@command.command()
@config
def export(path: Path) -> None:
    """Feedback and what it is about, one JSON object per line: what `judge finetune` and `judge train` read."""
    with opened(path) as (_, store):
        for record in store.export_feedback():
            click.echo(orjson.dumps(asdict(record)).decode())


@command.command()
@config
@click.argument("address")
@click.option("--for", "seconds", type=click.IntRange(1, 30 * 86400), default=3600, show_default=True, help="Seconds.")
@click.option("--action", type=click.Choice(["throttle", "challenge", "block"]), default="block", show_default=True)
@click.option("--by", "who", default="operator", show_default=True)
def block(path: Path, address: str, seconds: int, action: str, who: str) -> None:
    """Enter ADDRESS by hand, on every pod."""
    from sidecar.judge.types import Decision
    from sidecar.judge.verdicts import address_decision, decision_id

    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        fail(f"{address!r} is no address: write 192.0.2.7 or 2001:db8::7 (ranges go into lists.block)")
    key = address_decision(parsed)
    with opened(path) as (_, store):
        now = store.now()
        store.decide(
            Decision(
                decision_id("address", key), "address", key, action, "operator", 1.0, now, now + seconds,
                shown=str(parsed), provenance={"who": who}, address=str(parsed),
            )
        )  # fmt: skip
    click.echo(f"{decision_id('address', key)}: {action} {parsed} for {seconds} s")


@command.command()
@config
@click.option("--retry", is_flag=True, help="Queue them again.")
def dead(path: Path, retry: bool) -> None:
    """Escalations that no judge could settle, with the last error."""
    with opened(path) as (_, store):
        letters = store.dead(ROWS_MAX)
        table = Table("event", "what", "error", box=None, pad_edge=False)
        for letter in letters:
            e = letter.escalation
            what = f"{e.method} {e.path}" if e is not None else "unreadable"
            table.add_row(clean(letter.id, 40), clean(what, 60), clean(letter.error, 100))
        Console().print(table)
        if retry:
            click.echo(f"{store.retry_dead([letter.id for letter in letters])} queued again")
