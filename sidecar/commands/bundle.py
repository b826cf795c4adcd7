"""`outrider bundle`: look at, verify, measure and prepare model bundles."""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.bundle import (
    Bundle,
    BundleError,
    checkpoints_of,
    engine_plan,
    load_bundle,
    prepare_runtime,
    rewrite_manifest,
)
from sidecar.compilers import CompileError
from sidecar.engines import ENGINES, cpu_name, describe
from sidecar.engines import measure as measured

SHOWN = 200                       # characters of a text out of a manifest: it may come from anywhere


def printable(value: object) -> Text:
    """A text from a manifest for the terminal: no control characters, no markup, cut."""
    return Text("".join(c if c.isprintable() else "?" for c in str(value)[:SHOWN]))


def load(path: str, *, schemas: bool) -> Bundle:
    try:
        return load_bundle(path, schemas=schemas)
    except BundleError as e:
        fail(e)


def fail(error: Exception) -> NoReturn:
    click.echo("refused: " + "".join(c if c.isprintable() else "?" for c in str(error)), err=True)
    sys.exit(1)


@click.group(short_help="Inspect, verify, measure or prepare a model bundle.")
def command() -> None:
    """Look at, verify, measure or prepare a model bundle. PATH is its folder, or the word default.

    \b
    outrider bundle show default
    outrider bundle verify ./my-bundle
    outrider bundle measure ./my-bundle
    outrider bundle compile ./my-bundle --cache /var/cache/outrider
    """


@command.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def show(path: str, as_json: bool) -> None:
    """What a bundle is made of: schemas, files, thresholds, training data.

    Bundles made for other features are shown, too; `verify` says whether this build can use one."""
    bundle = load(path, schemas=False)
    m = bundle.manifest
    if as_json:
        click.echo(json.dumps(m.model_dump(mode="json"), indent=1))
        return
    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    rows = [("name", m.name), ("created", m.created), ("sha256", bundle.sha256),
            ("text side", f"schema {m.text.number}, {len(m.text.features)} features" if m.text else "none"),
            ("behaviour side",
             f"schema {m.behaviour.number}, {len(m.behaviour.features)} features" if m.behaviour else "none"),
            ("size", f"{sum(f.bytes for f in m.files.values()) / 1024:,.0f} KiB in {len(m.files)} files"),
            *((f"made with {name}", version) for name, version in sorted(m.versions.items()))]
    for key, value in rows:
        facts.add_row(key, printable(value))
    console.print(facts)
    console.print(engine_table(bundle))
    if m.thresholds:
        names = sorted({name for t in m.thresholds for name in t.raw})
        table = Table("score", "benign requests above", *names, title="Thresholds (raw outputs)")
        for t in m.thresholds:
            table.add_row(f"{t.score:g}", f"{100 * t.benign_fpr:g}%",
                          *(f"{t.raw[n]:.3f}" if n in t.raw else "-" for n in names))
        console.print(table)
    if m.training:
        table = Table("name", "side", "licence", "benign", "attack", title="Training data")
        for s in m.training:
            table.add_row(printable(s.name), s.side, printable(s.licence), f"{s.benign:,}", f"{s.attack:,}")
        console.print(table)


def engine_table(bundle: Bundle) -> Table:
    """What scores each tree model on this machine, and what was measured where."""
    m = bundle.manifest
    table = Table("model", "engine here", "packed", "compiled", title=f"Trees (engine: {m.engine})")
    if m.measured:
        table.caption = Text("us per row on ") + printable(m.measured.cpu)
    for slot, choice in engine_plan(m).items():
        us = {str(k): v for name, value in (m.measured.us if m.measured else {}).items() if name == slot
              for k, v in value.items()}
        table.add_row(slot, choice.first, *(f"{us[e]:.3g} us" if e in us else "-" for e in ENGINES))
    return table


@command.command()
@click.argument("path")
@click.option("--engine", type=click.Choice(["auto", *ENGINES]), default=None,
              help="Set the manifest's engine as well.")
def measure(path: str, engine: str | None) -> None:
    """Time packed and compiled trees on this machine and write the figures into the manifest.

    The rows are made up near the trees' thresholds, where compiled branches can't be predicted; `outrider train`
    takes benign rows of its data.

    With `engine: auto` the faster of the two is used on this kind of processor, and packed trees elsewhere.
    Without a C compiler only packed trees are timed. The bundle's hash changes."""
    bundle = load(path, schemas=True)
    try:
        us = measured(checkpoints_of(bundle), {})
        changes: dict[str, object] = {"measured": {"cpu": cpu_name(), "us": us}}
        bundle = rewrite_manifest(bundle, **changes, **({"engine": engine} if engine else {}))
    except (BundleError, CompileError) as e:
        fail(e)
    Console().print(engine_table(bundle))


@command.command()
@click.argument("path")
def verify(path: str) -> None:
    """Check hashes, manifest and feature schemas; status 0 when this build can use the bundle."""
    bundle = load(path, schemas=True)
    click.echo(f"good: {bundle.path} ({bundle.sha256[:16]})")


@command.command(name="compile")
@click.argument("path")
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), default=None,
              help="Cache folder. Default: $XDG_CACHE_HOME/outrider or ~/.cache/outrider.")
def compile_(path: str, cache: Path | None) -> None:
    """Prepare a bundle in the cache, ahead of the first start; prints the runtime folder.

    Packs its trees or compiles them, as the manifest's engine says."""
    bundle = load(path, schemas=True)
    started = time.monotonic()
    try:
        folder = prepare_runtime(bundle, cache)
    except BundleError as e:
        fail(e)
    click.echo(folder)
    made = ", ".join(f"{slot} {engine}" for slot, engine in describe(folder).items())
    click.echo(f"ready in {time.monotonic() - started:.1f} s: {made}", err=True)
