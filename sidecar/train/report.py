"""The training report: one HTML page with plots as PNG files beside it."""
from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
LEVELS = ("tag", "throttle", "block")
SCORES = (0.5, 0.8, 0.9)          # default thresholds of the three
BENIGN, ATTACK = "#3b6ea5", "#c0392b"


@dataclass
class SliceRow:
    """One line of the table: share of a slice's requests at or above each default threshold."""
    name: str
    label: int
    rows: int
    shares: tuple[float, ...]


@dataclass
class Report:
    """What the report shows; scores are calibrated, 0..1, from models that haven't seen the rows."""
    title: str
    benign: Mapping[str, Floats]
    attacks: Mapping[str, Floats]
    # raw outputs for the ROC: scores saturate far beyond the block threshold
    roc: tuple[Mapping[str, Floats], Mapping[str, Floats]] = field(default_factory=lambda: ({}, {}))
    behaviour_roc: tuple[Mapping[str, Floats], Mapping[str, Floats]] = field(default_factory=lambda: ({}, {}))
    importance: Sequence[tuple[str, float]] = ()
    behaviour_benign: Mapping[str, Floats] = field(default_factory=dict)
    behaviour_attacks: Mapping[str, Floats] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    sources: Sequence[Mapping[str, Any]] = ()


def slice_table(benign: Mapping[str, Floats], attacks: Mapping[str, Floats]) -> list[SliceRow]:
    return [SliceRow(name, label, len(scores), tuple(float(np.mean(scores >= s)) for s in SCORES))
            for label, part in ((0, benign), (1, attacks)) for name, scores in part.items() if len(scores)]


def _distributions(path: Path, benign: Mapping[str, Floats], attacks: Mapping[str, Floats],
                   what: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4))
    bins = [i / 60 for i in range(61)]
    for name, part, colour in (("benign", benign, BENIGN), ("attack", attacks, ATTACK)):
        scores = np.concatenate(list(part.values())) if part else np.empty(0)
        if len(scores):
            axes.hist(scores, bins=bins, weights=np.full(len(scores), 100 / len(scores)), alpha=0.6,
                      color=colour, label=f"{name} ({len(scores):,})")
    for level, score in zip(LEVELS, SCORES, strict=True):
        axes.axvline(score, color="black", linewidth=0.8, linestyle="--")
        axes.text(score, axes.get_ylim()[1], f" {level}", va="top", fontsize=8)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set(xlabel="score", ylabel="% of requests", 
             title=f"{what}: scores of requests the models haven't seen")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _roc(path: Path, benign: Mapping[str, Floats], attacks: Mapping[str, Floats], what: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    rates = np.logspace(-4, -0.5, 60)
    # the worst source's threshold at each rate: what a stated rate means here
    levels = np.array([max(float(np.quantile(s, 1 - r)) for s in benign.values() if len(s)) for r in rates])
    for name, scores in sorted(attacks.items(), key=lambda item: -len(item[1]))[:14]:
        axes.plot(rates, [float(np.mean(scores > level)) for level in levels],
                  label=f"{name[:40]} ({len(scores):,})", linewidth=1.4)
    axes.set_xscale("log")
    axes.set(xlabel="false positives of the worst source of benign traffic", ylabel="attacks found", ylim=(0, 1.02),
             title=f"{what}: ROC at low false-positive rates")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _importance(path: Path, importance: Sequence[tuple[str, float]]) -> None:
    from matplotlib import pyplot as plt

    top = sorted(importance, key=lambda item: -item[1])[:25][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(top) + 1.2))
    axes.barh([name for name, _ in top], [value for _, value in top], color=BENIGN)
    axes.set(xlabel="share of the gain (mean of XGBoost and random forest)",
             title="Features of the tree models")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rows(rows: Sequence[SliceRow]) -> str:
    out = []
    for row in rows:
        cells = "".join(f"<td>{100 * share:.3g}%</td>" for share in row.shares)
        out.append(f"<tr class='{'attack' if row.label else 'benign'}'><td>{html.escape(row.name)}</td>"
                   f"<td>{'attack' if row.label else 'benign'}</td><td>{row.rows:,}</td>{cells}</tr>")
    heads = "".join(f"<th>{level} (&ge; {score})</th>" for level, score in zip(LEVELS, SCORES, strict=True))
    return f"<table><tr><th>slice</th><th></th><th>requests</th>{heads}</tr>{''.join(out)}</table>"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse}}td,th{{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}}
.attack td:first-child{{color:#c0392b}}.benign td:first-child{{color:#3b6ea5}}img{{max-width:100%}}</style>
<h1>{title}</h1>{body}</html>
"""


def write_report(folder: Path, report: Report) -> Path:
    """Write report.html and its plots into folder (made if need be); returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in report.facts)
    body = [f"<table>{facts}</table>"]
    for key, what, benign, attacks, roc in (
            ("text", "Text", report.benign, report.attacks, report.roc),
            ("behaviour", "Behaviour", report.behaviour_benign, report.behaviour_attacks, report.behaviour_roc)):
        if not benign:
            continue
        _distributions(folder / f"{key}-scores.png", benign, attacks, what)
        body.append(f"<h2>{what}</h2><p>Every row was scored by models trained without its source. Benign "
                    "lines show false positives, attack lines what was found.</p>")
        body.append(_rows(slice_table(benign, attacks)))
        body.append(f"<p><img src='{key}-scores.png' alt='score distributions'></p>")
        if roc[0] and roc[1]:
            _roc(folder / f"{key}-roc.png", *roc, what)
            body.append(f"<p><img src='{key}-roc.png' alt='ROC at low false-positive rates'></p>")
        if key == "text" and report.importance:
            _importance(folder / "importance.png", report.importance)
            body.append("<p><img src='importance.png' alt='feature importance'></p>")
    if report.sources:
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(source.get(key, '')))}</td>"
                             for key in ("name", "side", "licence", "benign", "attack")) + "</tr>"
            for source in report.sources)
        body.append("<h2>Training data</h2><table><tr><th>name</th><th>side</th><th>licence</th>"
                    f"<th>benign</th><th>attack</th></tr>{lines}</table>")
    page = folder / "report.html"
    page.write_text(PAGE.format(title=html.escape(report.title), body="\n".join(body)), encoding="utf-8")
    return page
