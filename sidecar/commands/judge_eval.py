"""`outrider judge eval`: what a judge finds on labelled records, and what it adds to the inline text model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
MEASURED = ("wcp_attack.jsonl.gz", "gotestwaf.jsonl.gz")  # whole sources that the judge that ships never saw


@click.command(short_help="Measure judges on labelled records: detection, calibration, speed.")
@click.option("--judge", "folder", type=FOLDER, help="The judge's folder. Default: the one that ships.")
@click.option("--default-data", required=True, type=FOLDER, metavar="DIR", help="The sets that it was trained from.")
@click.option("--plots", type=FOLDER, metavar="DIR", help="Folder for roc.png and reliability.png.")
@click.option("--json", "as_json", is_flag=True, help="All figures as JSON.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
def command(folder: Path | None, default_data: Path, plots: Path | None, as_json: bool, seed: int) -> None:
    """Detection at fixed false-positive rates on sources left out of training: the inline text model alone (trained
    anew without them), the judge alone, either of them; then calibration, classes and speed. Some minutes.

    \b
    outrider judge eval --default-data ../shared/data --plots ./plots
    """
    from rich.console import Console
    from rich.table import Table

    from native.text import TextHost
    from sidecar.commands.judge import fail
    from sidecar.judge.evaluate import evaluate, slices_of
    from sidecar.judge.evaluate import plots as draw
    from sidecar.judge.examples import stories
    from sidecar.judge.process import DEFAULT_MODEL
    from sidecar.judge.train import DEFAULT_SOURCES, JudgeTrainingError, read, scenarios
    from sidecar.train.dataset import load
    from sidecar.train.linear import train_linear

    try:
        data = read([default_data / name for name in DEFAULT_SOURCES], seed, 60_000)
        whole = [default_data / name for name in MEASURED if (default_data / name).is_file()]
    except JudgeTrainingError as error:
        fail(error)
    with tempfile.TemporaryDirectory() as scratch:
        linear = Path(scratch) / "linear.bin"
        train_linear(data, seed).write(linear)
        host = TextHost(linear)
        for path in whole[:1]:  # payloads without requests of their own: put into held-out benign ones
            data.texts += [dataclasses.replace(t, split="holdout") for t in load([path], seed, 0).texts]
        slices = slices_of(data, whole[1:], stories(scenarios(seed + 3, 1), 2, 3000), host)
        found = evaluate(folder or DEFAULT_MODEL, slices)
        drawn = draw(slices, plots) if plots is not None else []
    if as_json:
        click.echo(json.dumps(found))
        return
    console = Console()
    for rate, by in found["rates"].items():
        table = Table("source", "inline", "judge", "either", title=f"found at {rate} false positives", box=None)
        for name, row in by["slices"].items():
            table.add_row(name, *(f"{row[which]:.1%}" for which in ("inline", "judge", "either")))
        console.print(table)
    console.print(f"AUC {found['auc']}; calibration error {found['calibration']['ece']}; speed {found['speed']}")
    for path in drawn:
        console.print(f"drawn: {path}")
