"""How much of each attack source is refused, and how much benign traffic, at one shipped threshold.

    python bench/detection.py --data DIR [--weights linear.bin] [--json] [--missed N]

Without --weights a linear model is trained on the training split of the files in DIR and its block
threshold calibrated on the calibration split. What is printed comes from the hold-out: sites,
repositories, payload files and question boards that neither step has seen; gotestwaf, CSIC 2010 and the
Apache log are never trained on. Payloads are measured inside benign hold-out requests. The text part's
linear score alone decides here; the trees behind it come on top.
"""
from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from native.text import TextHost

from sidecar.train.dataset import Dataset, LabelledText, evenly, load, read_file, transplant
from sidecar.train.linear import calibrate_threshold, train_linear

TRAINING = ("wcp_benign.jsonl.gz", "api_benign.jsonl.gz", "benign_texts.jsonl.gz", "wcp_attack.jsonl.gz",
            "payloads.jsonl.gz", "crs_regression.jsonl.gz", "user_agents.jsonl.gz", "httpparams_train.csv.gz")
MEASURED = ("gotestwaf.jsonl.gz", "log_apache_2015.jsonl.gz", "csic2010.jsonl.gz",
            "log_webbot_sessions.jsonl.gz")
# share of refused requests each row must reach: benign at most, attacks at least
TARGETS = {"wcp_benign benign": 0.002, "api_benign benign": 0.002, "log_apache_2015 benign": 0.002,
           "benign_texts benign": 0.01, "gotestwaf benign": 0.10, "gotestwaf attack": 0.70}


class Row:
    """Scores of one source and label."""

    def __init__(self, name: str, label: int, records: list[dict[str, Any]], notes: list[str]) -> None:
        self.name, self.label, self.records, self.notes = name, label, records, notes

    @property
    def key(self) -> str:
        return f"{self.name} {'attack' if self.label else 'benign'}"


def slices(data: Dataset, folder: Path, seed: int) -> list[Row]:
    """Everything measured, as requests."""
    rng = random.Random(seed)
    hosts = [r.record for r in data.benign("holdout") if r.source in ("wcp_benign", "api_benign")]
    by_source: dict[tuple[str, int], tuple[list[dict[str, Any]], list[str]]] = defaultdict(lambda: ([], []))
    for r in data.benign("holdout"):
        by_source[r.source, 0][0].append(r.record)
        by_source[r.source, 0][1].append(r.group)
    for label in (0, 1):
        texts: dict[str, list[LabelledText]] = defaultdict(list)
        for t in data.values("holdout", label):
            texts[t.source].append(t)
        for source, items in texts.items():
            for t in evenly(rng, items, 3000):
                by_source[source, label][0].append(transplant(rng, rng.choice(hosts), t.text))
                by_source[source, label][1].append(f"{t.cls}: {t.text[:200]}")
    for name in MEASURED:
        path = folder / name
        if not path.exists():
            continue
        source = name.split(".")[0]
        for e in read_file(path):
            label = e.get("label", 0)
            if label in (0, 1):
                by_source[source, label][0].append(e)
                by_source[source, label][1].append(str(e.get("cls") or ""))
    order = sorted(by_source, key=lambda k: (k[1], k[0]))
    return [Row(source, label, *by_source[source, label]) for source, label in order]


@click.command()
@click.option("--data", "folder", required=True,
              type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--weights", help="A trained linear.bin.",
              type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threshold", type=float, help="Block threshold of the linear score; calibrated if not given.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--missed", type=int, default=0, help="Show so many errors of each slice.")
@click.option("--only", default="", help="Show errors only of slices whose name starts so.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(folder: Path, weights: Path | None, threshold: float | None, seed: int, missed: int, only: str,
         as_json: bool) -> None:
    """Measure detection of the text part on hold-out data."""
    started = time.perf_counter()
    data = load([folder / f for f in TRAINING if (folder / f).exists()], seed)
    trained_s = 0.0
    if weights is None:
        t = time.perf_counter()
        host = TextHost(train_linear(data, seed).data)
        trained_s = time.perf_counter() - t
    else:
        host = TextHost(weights)
    if threshold is None:
        threshold = calibrate_threshold(host, data, seed=seed)
    out: dict[str, Any] = {"threshold": threshold, "training_s": round(trained_s, 1), "slices": {}}
    table = Table(title=f"Refused at linear score >= {threshold:.3f}", title_justify="left")
    for column in ("source", "requests", "refused", "share", "target", "share at 1% / 0.1% of wcp_benign"):
        table.add_column(column, justify="left" if column == "source" else "right")
    rows = slices(data, folder, seed)
    scored = {row.key: host.linear(row.records) for row in rows}
    reference = np.nan_to_num(scored["wcp_benign benign"], nan=-99.0)
    marks = [float(np.quantile(reference, q)) for q in (0.99, 0.999)]
    console = Console()
    errors: list[str] = []
    for row in rows:
        scores = np.nan_to_num(scored[row.key], nan=-99.0)
        hit = scores >= threshold
        share = float(hit.mean())
        target = TARGETS.get(row.key)
        good = target is None or (share >= target if row.label else share <= target)
        at = [float((scores >= m).mean()) for m in marks]
        result: dict[str, Any] = {"requests": len(scores), "refused": int(hit.sum()), "share": share,
                                  "at_wcp": at}
        if row.name == "gotestwaf" and row.label:
            total, found = Counter(row.notes), Counter(n for n, h in zip(row.notes, hit, strict=True) if h)
            result["classes"] = {c: [found[c], n] for c, n in total.most_common()}
        out["slices"][row.key] = result
        bound = "" if target is None else f"{'>=' if row.label else '<='} {target:.1%}"
        table.add_row(row.key, str(len(scores)), str(int(hit.sum())),
                      f"[{'green' if good else 'red'}]{share:.2%}[/]", bound, f"{at[0]:.1%} / {at[1]:.1%}")
        if missed and row.key.startswith(only):
            wrong = np.flatnonzero(hit != bool(row.label))
            for k in random.Random(seed).sample(list(wrong), min(missed, len(wrong))):
                e = host.explain(row.records[k])
                errors.append(f"{row.key} {scores[k]:.2f} {row.notes[k][:130]!r} @ {e['place']}: "
                              f"{e['excerpt'][:110]!r}")
    out["seconds"] = round(time.perf_counter() - started, 1)
    if as_json:
        click.echo(json.dumps(out))
        return
    console.print(table)
    classes = Table(title="gotestwaf by class: refused / cases", title_justify="left")
    classes.add_column("class")
    classes.add_column("refused", justify="right")
    for name, (found, n) in out["slices"].get("gotestwaf attack", {}).get("classes", {}).items():
        classes.add_row(name, f"{found} / {n}")
    console.print(classes)
    for line in errors:
        console.print(escape(line), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
