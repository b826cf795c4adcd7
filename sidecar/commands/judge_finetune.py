"""`outrider judge finetune`: LoRA on labelled escalations, merged and converted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import orjson

FOLDER = click.Path(file_okay=False, path_type=Path)


def labelled(path: Path) -> Iterator[tuple[list[str], str]]:
    """Entries and labels out of what `outrider judge export` wrote; ValueError naming the line that is none."""
    from sidecar.judge.render import render
    from sidecar.judge.types import LABELS, Escalation, WireError

    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                given = orjson.loads(line)
                e = given["escalation"]
                if e is None:
                    continue  # feedback on a request that was no longer known
                if given["label"] not in LABELS:
                    raise ValueError(f"{given['label']!r} is no label")
                yield render(Escalation.from_wire(orjson.dumps(e))), given["label"]
            except (orjson.JSONDecodeError, KeyError, TypeError, WireError, ValueError) as error:
                raise ValueError(f"{path}:{number}: {error}: write it with `outrider judge export`") from None


@click.command(short_help="Fine-tune a Llama on labelled records (LoRA), and convert it.")
@click.argument("source", type=FOLDER)
@click.option("--data", required=True, type=click.Path(dir_okay=False, exists=True, path_type=Path), metavar="FILE",
              help="Labelled escalations: what `outrider judge export` writes.")
@click.option("--out", required=True, type=FOLDER, metavar="FOLDER", help="The judge's folder; one there is replaced.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--epochs", default=1.0, show_default=True, type=click.FloatRange(0.01, 100))
@click.option("--rank", default=16, show_default=True, type=click.IntRange(1, 256))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
def command(source: Path, data: Path, out: Path, device: str, epochs: float, rank: int, seed: int) -> None:
    """SOURCE: the folder of a Llama-3.x-Instruct as transformers saves it; it isn't changed. A tenth of the records is
    kept back to calibrate with. Needs the `train` extra (torch, transformers, peft).

    \b
    outrider judge export -c outrider.yaml > ours.jsonl
    outrider judge finetune ./Llama-3.2-1B-Instruct --data ours.jsonl --out /var/lib/outrider/ours
    """
    from sidecar.commands.judge import fail
    from sidecar.judge.finetune import Settings, finetune
    from sidecar.judge.folder import ModelError

    try:
        finetune(source, labelled(data), out, settings=Settings(epochs=epochs, rank=rank, seed=seed), device=device)
    except (ModelError, ValueError) as error:
        fail(error)
    click.echo(f"{out}: made")
