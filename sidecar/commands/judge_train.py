"""`outrider judge train`: the small embedded judge from labelled records."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(short_help="Train the small embedded judge from labelled records.")
@click.option("--data", "data", multiple=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE...",
              help="Labelled request records, payload lists or CSV, as for outrider train; may be repeated.")
@click.option("--default-data", type=FOLDER, metavar="DIR", help="Train the judge that ships, from the sets in DIR.")
@click.option("--leave-out", multiple=True, metavar="NAME", help="A source that is measured and not trained on.")
@click.option("--out", required=True, type=FOLDER, metavar="FOLDER", help="The new judge's folder.")
@click.option("--name", default="", help="Name in the manifest. Default: the folder's.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option("--minutes", default=20.0, show_default=True, type=click.FloatRange(0.1, 99), help="At most.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
def command(data: tuple[Path, ...], default_data: Path | None, leave_out: tuple[str, ...], out: Path, name: str,
            seed: int, minutes: float, threads: int) -> None:  # fmt: skip
    """A Llama of about a million parameters, int8, with its calibration. Needs the `train` extra (torch, transformers).

    \b
    outrider judge train --default-data ../shared/data --out ./judge
    outrider judge train --data ours.jsonl.gz --out ./judge
    """
    import dataclasses

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from sidecar.commands.judge import fail
    from sidecar.commands.train import Bars
    from sidecar.judge.train import DEFAULT_SOURCES, JudgeTrainingError, Shape, train

    if bool(data) == (default_data is not None):
        fail("give either --data or --default-data")
    sources = [default_data / file for file in DEFAULT_SOURCES] if default_data is not None else list(data)
    shape = dataclasses.replace(Shape(), minutes_max=minutes)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            manifest = train(
                sources, out, seed=seed, shape=shape, licences=DEFAULT_SOURCES if default_data is not None else None,
                leave_out=leave_out, name=name, threads=threads, tell=Bars(progress).tell,
            )  # fmt: skip
    except JudgeTrainingError as error:
        fail(error)
    thresholds, ece = manifest["thresholds"]["malicious"], manifest["calibration"]["ece"]
    click.echo(f"{out}: thresholds {thresholds}, calibration error {ece}")
