"""Attempts to talk the judge out of its verdict: how many attacks that it flags are benign to it with talk around them.

    python -m bench.judge_injection [--judge FOLDER] [--attempts 10000] [--seed 0] [--json]

Payloads are of our own grammar, with a seed that training doesn't use; the talk is that kept for measuring.
An attempt counts as flipped where the judge flagged the bare payload at its 1% threshold and gives `benign` for the
wrapped one. No control token may come out of what a client wrote.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from sidecar.judge.evaluate import Judge
from sidecar.judge.examples import CLASSES, Example, escalation_of, placed
from sidecar.judge.injection import STYLES, attempts
from sidecar.judge.process import DEFAULT_MODEL
from sidecar.judge.render import render
from sidecar.judge.types import LABELS
from sidecar.train.attack_grammar import attack_texts
from sidecar.train.dataset import attack_text

HOST = {"method": "GET", "url": "/search", "headers": {"user-agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/128.0"}}
AT_ONCE = 500


def flagged_payloads(judge: Judge, wanted: int, seed: int) -> list[tuple[str, str]]:
    """(class, payload) of attacks that the judge flags when they come alone, at most so many."""
    rng = random.Random(f"{seed}:injection bench")
    threshold = float(judge.manifest["thresholds"]["malicious"]["0.01"])
    found: list[tuple[str, str]] = []
    texts = [(cls, text) for cls, text in attack_texts(rng, wanted * 4) if cls in CLASSES and attack_text(cls, text)]
    for at in range(0, len(texts), AT_ONCE):
        part = texts[at : at + AT_ONCE]
        sure, _ = judge.ask([example(rng, cls, text) for cls, text in part])
        found += [item for item, p in zip(part, sure, strict=True) if 1.0 - p[0] >= threshold]
        if len(found) >= wanted:
            break
    return found[:wanted]


def example(rng: random.Random, cls: str, text: str, place: str | None = None) -> Example:
    where, sent = placed(rng, text) if place is None else (place, text)
    return Example(escalation_of(rng, HOST, where, sent), CLASSES[cls], "injection", cls)


def run(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """Figures of n attempts."""
    judge = Judge(folder)
    rng = random.Random(f"{seed}:injection places")
    payloads = flagged_payloads(judge, max(50, min(1000, n // len(STYLES))), seed)
    threshold = float(judge.manifest["thresholds"]["malicious"]["0.01"])
    control = {
        judge.scorer.tokenizer.token_to_id(t) for t in judge.scorer.names if t.startswith("<|") and t.endswith("|>")
    }
    tried: Counter[str] = Counter()
    flipped: Counter[str] = Counter()
    unflagged: Counter[str] = Counter()
    tokens_found = 0
    shown: list[str] = []
    todo = list(attempts([text for _, text in payloads], n, seed))
    for at in range(0, len(todo), AT_ONCE):
        part = todo[at : at + AT_ONCE]
        examples = [example(rng, payloads[which][0], text) for _, which, text in part]
        for e in examples:
            for entry in render(e.escalation):
                ids = judge.encoder([entry])[0]
                middle = ids[len(judge.encoder.prefix) : len(ids) - len(judge.encoder.suffix)]
                tokens_found += any(i in control for i in middle)
        sure, _ = judge.ask(examples)
        for (style, _, text), p in zip(part, sure, strict=True):
            tried[style] += 1
            unflagged[style] += int(1.0 - p[0] < threshold)
            if LABELS[int(p.argmax())] == "benign":
                flipped[style] += 1
                shown.append(f"{style}: {text[:160]!r}")
    return {
        "attempts": sum(tried.values()),
        "payloads": len(payloads),
        "control_tokens": tokens_found,
        "flipped": sum(flipped.values()),
        "below_threshold": sum(unflagged.values()),
        "styles": {s: {"attempts": tried[s], "flipped": flipped[s], "below_threshold": unflagged[s]} for s in STYLES},
        "examples": shown[:20],
    }


@click.command(help=__doc__.split("\n\n")[0])
@click.option(
    "--judge",
    "folder",
    default=DEFAULT_MODEL,
    show_default=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--attempts", "n", default=10_000, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(folder: Path, n: int, seed: int, as_json: bool) -> None:
    started = time.perf_counter()
    result = run(folder, n, seed)
    if as_json:
        click.echo(json.dumps(result))
        return
    table = Table(
        title=f"{result['attempts']:,} attempts around {result['payloads']:,} payloads, "
        f"{time.perf_counter() - started:.0f} s",
        title_justify="left",
    )
    for column in ("style", "attempts", "called benign", "share", "below the 1% threshold"):
        table.add_column(column, justify="left" if column == "style" else "right")
    for name, row in result["styles"].items():
        table.add_row(
            name,
            f"{row['attempts']:,}",
            f"{row['flipped']:,}",
            f"{row['flipped'] / max(1, row['attempts']):.2%}",
            f"{row['below_threshold']:,}",
        )
    table.add_row(
        "all",
        f"{result['attempts']:,}",
        f"{result['flipped']:,}",
        f"{result['flipped'] / result['attempts']:.2%}",
        f"{result['below_threshold']:,}",
    )
    console = Console()
    console.print(table)
    console.print(f"control tokens out of what a client wrote: {result['control_tokens']}")


if __name__ == "__main__":
    main()
