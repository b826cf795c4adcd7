"""How much of each attack source is refused, and how much benign traffic, at the thresholds as shipped.

    python -m bench.detection [--data DIR] [--bundle FOLDER] [--json] [--missed N]
    python -m bench.detection --linear [--weights linear.bin]

Each request goes through the whole core with the default settings, by itself (no client, no time). What is printed
comes from the hold-out: sites, repositories, payload files and question boards that training has not seen;
gotestwaf, CSIC 2010 and the log of web bots are never trained on. Payloads and benign texts are measured inside
benign hold-out requests. With --linear only the linear model decides, trained anew on the training split and its
threshold calibrated on the calibration split.
"""
from __future__ import annotations

import base64
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from native.text import TextHost
from sidecar.config import Settings
from sidecar.core import DEFAULT_BUNDLE, open_core
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


Judge = Callable[[list[dict[str, Any]]], tuple[np.ndarray, np.ndarray]]
REFUSED = ("throttle", "challenge", "block")


def whole_core(bundle: Path) -> Judge:
    """(scores, refused) of records, as the product would decide with its default settings."""
    settings = Settings.model_validate({"models": {"bundle": str(bundle)}})
    core = open_core(settings, private=True)
    engine = core.engine()

    def judge(records: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        scores = np.zeros(len(records))
        refused = np.zeros(len(records), bool)
        for i, record in enumerate(records):
            body = record.get("body") or ""
            raw = base64.b64decode(body) if record.get("body_enc") == "b64" else body.encode("utf-8", "surrogateescape")
            verdict = engine.decide(record["method"], record["url"], record.get("headers"), raw, anonymous=True)
            scores[i], refused[i] = verdict.score, verdict.action in REFUSED
        return scores, refused

    return judge


def linear_alone(host: TextHost, threshold: float) -> Judge:
    def judge(records: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        scores = np.nan_to_num(host.linear(records), nan=-99.0)
        return scores, scores >= threshold

    return judge


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--data", "folder", default=os.environ.get("OUTRIDER_DATA", "../shared/data"), show_default=True,
              type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bundle", default=DEFAULT_BUNDLE, show_default=True,
              type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--linear", is_flag=True, help="The linear model alone.")
@click.option("--weights", help="A trained linear.bin (with --linear).",
              type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threshold", type=float, help="Block threshold of the linear score; calibrated if not given.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--missed", type=int, default=0, help="Show so many errors of each slice.")
@click.option("--only", default="", help="Show errors only of slices whose name starts so.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(folder: Path, bundle: Path, linear: bool, weights: Path | None, threshold: float | None, seed: int,
         missed: int, only: str, as_json: bool) -> None:
    started = time.perf_counter()
    data = load([folder / f for f in TRAINING if (folder / f).exists()], seed)
    out: dict[str, Any] = {"slices": {}}
    if linear:
        host = TextHost(weights) if weights else TextHost(train_linear(data, seed).data)
        out["threshold"] = calibrate_threshold(host, data, seed=seed) if threshold is None else threshold
        judge, title = linear_alone(host, out["threshold"]), f"Refused at linear score >= {out['threshold']:.3f}"
    else:
        host = TextHost(bundle / "linear.bin")
        out["bundle"] = str(bundle)
        judge, title = whole_core(bundle), "Refused, thresholds as shipped"
    table = Table(title=title, title_justify="left")
    for column in ("source", "requests", "refused", "share", "target", "share at 1% / 0.1% of wcp_benign"):
        table.add_column(column, justify="left" if column == "source" else "right")
    rows = slices(data, folder, seed)
    scored = {row.key: judge(row.records) for row in rows}
    reference = scored["wcp_benign benign"][0]
    marks = [float(np.quantile(reference, q)) for q in (0.99, 0.999)]
    console = Console()
    errors: list[str] = []
    for row in rows:
        scores, hit = scored[row.key]
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
