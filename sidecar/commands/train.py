"""`outrider train`: data files in, a calibrated model bundle out, ready to be scored with."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

FILES = click.Path(dir_okay=False, path_type=Path)


class Bars:
    """One progress bar per stage, as the stages come."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def tell(self, stage: str, share: float) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=1.0)
        self.progress.update(self.tasks[stage], completed=share)


@click.command(short_help="Train and calibrate a model bundle from logs.")
@click.option("--data", "data", multiple=True, type=FILES, metavar="FILE...",
              help="Data for the text side; may be repeated. Request records, payload lists, texts, CSV; see below.")
@click.option("--behaviour-data", "behaviour", multiple=True, type=FILES, metavar="FILE...",
              help="Logs with times and clients for the behaviour side; any format that replay reads.")
@click.option("--default-data", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Train the bundle that ships, from the sets in DIR and the traffic simulator.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="BUNDLE",
              help="Folder of the new bundle; a bundle that is there is replaced.")
@click.option("--name", default="", help="Name in the manifest. Default: the folder's.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1),
              help="The same data and seed give the same models.")
@click.option("--folds", default=4, show_default=True, type=click.IntRange(2, 20),
              help="Parts for cross-validation by site, repository or payload file.")
@click.option("--grammar-texts", default=60_000, show_default=True, type=click.IntRange(0, 1_000_000),
              help="Generated benign and hostile texts that are added.")
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Folder for report.html and its plots. Default: BUNDLE/report.")
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Cache of prepared models. Default: $XDG_CACHE_HOME/outrider.")
@click.option("--engine", default="auto", show_default=True, type=click.Choice(["auto", "packed", "compiled"]),
              help="What scores the trees. auto times both here, where there is a C compiler, and takes the faster.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1, 256), help="Threads to train with.")
@click.argument("more", nargs=-1, type=FILES, metavar="[FILE...]")
def command(data: tuple[Path, ...], behaviour: tuple[Path, ...], default_data: Path | None, out: Path, name: str,
            seed: int, folds: int, grammar_texts: int, report: Path | None, cache: Path | None,
            engine: Literal["auto", "packed", "compiled"], jobs: int, more: tuple[Path, ...]) -> None:
    """Train and calibrate a model bundle from logs.

    Files are told apart by their content. The text side wants benign requests and attacks: request records
    (JSON Lines, label 0 or 1), access logs, payload lists, texts, CSV with payload,length,attack_type,label.
    The behaviour side wants logs with times and clients. Either side may be left out.

    \b
    outrider train --data benign.jsonl.gz --data attacks.jsonl.gz --out ./bundle
    outrider train --data benign.jsonl.gz attacks.jsonl.gz --behaviour-data access.log --out ./bundle
    outrider bundle show ./bundle

    Thresholds are measured on groups (sites, repositories, payload files) that the models haven't seen:
    give data from more than one.
    """
    # what is imported here takes seconds: not for --help
    from sidecar.bundle import BundleError
    from sidecar.train.pipeline import Plan, TrainingError, default_plan, train

    console = Console(stderr=True)
    options = {"seed": seed, "folds": folds, "grammar_texts": grammar_texts, "report": report, "cache": cache,
               "engine": engine, "jobs": jobs}
    try:
        if default_data is not None:
            if data or behaviour or more:
                raise click.UsageError("--default-data stands alone: it names all its files itself")
            plan = default_plan(default_data, out, **options)
        elif not data and not behaviour and not more:
            raise click.UsageError("give --data, --behaviour-data or --default-data")
        else:
            plan = Plan(out=out, data=(*data, *more), behaviour=behaviour, name=name, seed=seed, folds=folds,
                        grammar_texts=grammar_texts, report=report, cache=cache, engine=engine, jobs=jobs)
        with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console,
                      disable=not console.is_terminal) as progress:
            outcome = train(plan, Bars(progress).tell)
    except (TrainingError, BundleError) as e:
        click.echo("not trained: " + "".join(c if c.isprintable() else "?" for c in str(e)), err=True)
        sys.exit(1)
    table = Table("slice", "", "requests", "tag (0.5)", "throttle (0.8)", "block (0.9)",
                  title="Shares at or above the default thresholds, on groups the models haven't seen")
    for side in ("text", "behaviour"):
        for row in outcome.bundle.manifest.metrics.get(side, []):
            table.add_row(Text(str(row["slice"])[:60]), "attack" if row["label"] else "benign", f"{row['rows']:,}",
                          *(f"{100 * row[f'at_{s}']:.3g}%" for s in (0.5, 0.8, 0.9)))
    Console().print(table)
    click.echo(f"bundle   {outcome.bundle.path}\nreport   {outcome.report}\nruntime  {outcome.runtime}")
