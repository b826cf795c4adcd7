"""Measure a judge on labelled records: detection at fixed false positive rates, calibration, speed, classes, what it
adds to the inline text model.

Three deciders are compared on the same requests: the inline text model alone (its score of the whole request), the
judge alone (on the value that the inline model finds worst, as the data plane hands it over), and both, where either
may flag and the thresholds share the false positives in halves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.judge.examples import CLASSES, Example, Maker, Score, Stories, escalation_of, worst_value
from sidecar.judge.render import WINDOW_CHARS, render
from sidecar.judge.scorer import Scorer, read_manifest
from sidecar.judge.train import Encoder, calibrated, reliability, threshold_at, worst_of
from sidecar.judge.types import LABELS
from sidecar.train.dataset import Dataset, Record, evenly, read_file, transplant

Floats = NDArray[np.floating[Any]]
RATES = (0.01, 0.005, 0.001)
TEXTS_MAX = 3000  # of one source


@dataclass(slots=True)
class Slice:
    """Requests of one source and label. inline: scores of the inline text model, high is hostile."""

    name: str
    hostile: bool
    examples: list[Example] = field(default_factory=list)
    inline: list[float] = field(default_factory=list)
    probabilities: Floats = field(default_factory=lambda: np.zeros((0, len(LABELS))))
    mass: Floats = field(default_factory=lambda: np.zeros(0))

    @property
    def malicious(self) -> Floats:
        return np.asarray(1.0 - self.probabilities[:, 0])


@dataclass(frozen=True, slots=True)
class Speed:
    windows: int
    seconds: float
    p50_ms: float
    p99_ms: float
    tokens_mean: float

    @property
    def per_second(self) -> float:
        return self.windows / self.seconds if self.seconds else 0.0


class Judge:
    """A judge folder, asked for calibrated probabilities of the worst window."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.scorer = Scorer(folder)
        self.encoder = Encoder(self.scorer.tokenizer, int(self.manifest["max_tokens"]))
        bias = self.manifest["calibration"]["bias"]
        self.bias = [float(bias[label]) for label in LABELS]
        self.temperature = float(self.manifest["calibration"]["temperature"])

    def ask(self, examples: Sequence[Example]) -> tuple[Floats, Floats]:
        """(probabilities, mass) per example."""
        texts: list[str] = []
        owner: list[int] = []
        for k, example in enumerate(examples):
            shown = render(
                example.escalation,
                int(self.manifest["entry_chars"]),
                int(self.manifest["windows_max"]),
                int(self.manifest.get("window_chars", WINDOW_CHARS)),
            )
            texts += shown
            owner += [k] * len(shown)
        raw = self.scorer.probabilities(self.encoder(texts))
        sure = calibrated(worst_of(raw[:, :-1], owner, len(examples)), self.temperature, self.bias)
        mass = np.ones(len(examples))
        np.minimum.at(mass, owner, raw[:, -1])
        return sure, mass

    def speed(self, examples: Sequence[Example], singles: int = 200) -> Speed:
        """Throughput of batches over all, latency of entries asked one by one."""
        tokens = self.encoder([entry for e in examples for entry in render(e.escalation)])
        self.scorer.probabilities(tokens[:32])
        started = time.perf_counter()
        self.scorer.probabilities(tokens)
        whole = time.perf_counter() - started
        took = []
        for row in tokens[:singles]:
            at = time.perf_counter()
            self.scorer.probabilities([row])
            took.append((time.perf_counter() - at) * 1000.0)
        return Speed(
            len(tokens),
            whole,
            float(np.percentile(took, 50)),
            float(np.percentile(took, 99)),
            float(np.mean([len(t) for t in tokens])),
        )


# ---------------------------------------------------------------- what is measured


def _add(
    into: dict[tuple[str, bool], Slice],
    name: str,
    record: Record,
    hostile: bool,
    cls: str,
    linear: Callable[..., Any],
    score: Score,
    maker: Maker,
) -> None:
    row = into.setdefault((name, hostile), Slice(name, hostile))
    place, text = worst_value(record, score)
    e = escalation_of(maker.rng, record, place, text, maker.story(False))
    # a class that the map lacks is still hostile; which label it should get isn't known
    label = CLASSES.get(cls, "other_injection") if hostile else "benign"
    row.examples.append(Example(e, label, name, cls))
    row.inline.append(float(np.nan_to_num(linear([record]), nan=-99.0)[0]))


def slices_of(data: Dataset, whole: Sequence[Path], told: Stories, host: Any, seed: int = 0) -> list[Slice]:
    """The hold-out of `data` and all of the record files in `whole`, as slices. Payloads go into held-out benign
    requests, those of `whole` too where they are attacks without a request of their own (wcp_attack)."""
    maker = Maker(data, "holdout", told, seed)
    found: dict[tuple[str, bool], Slice] = {}
    for r in data.benign("holdout"):
        if r.source != "user_agents":
            _add(found, r.source, r.record, False, "", host.linear, host.text_scores, maker)
    for label in (0, 1):
        by_source: dict[str, list[Any]] = {}
        for t in data.values("holdout", label):
            if not label or t.cls in CLASSES:
                by_source.setdefault(t.source, []).append(t)
        for source, texts in by_source.items():
            for t in evenly(maker.rng, texts, TEXTS_MAX):
                record = transplant(maker.rng, maker.rng.choice(maker.hosts), t.text)
                _add(found, source, record, bool(label), t.cls, host.linear, host.text_scores, maker)
    for path in whole:
        for e in read_file(path):
            if e.get("label") in (0, 1):
                _add(
                    found,
                    path.name.split(".")[0],
                    e,
                    bool(e["label"]),
                    str(e.get("cls") or ""),
                    host.linear,
                    host.text_scores,
                    maker,
                )
    for example in told.examples:
        row = found.setdefault(("simulated", example.label != "benign"), Slice("simulated", example.label != "benign"))
        row.examples.append(example)
        row.inline.append(
            float("-inf") if not example.escalation.text else float(host.text_scores([example.escalation.text])[0])
        )
    return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]


# ---------------------------------------------------------------- figures


def auc(benign: Floats, hostile: Floats) -> float:
    """The chance that a hostile request scores above a benign one; ties count half."""
    ordered = np.sort(benign)
    below = np.searchsorted(ordered, hostile, "left")
    upto = np.searchsorted(ordered, hostile, "right")
    return float((below + upto).mean() / 2 / max(1, len(benign)))


def above(scores: Floats, threshold: float) -> NDArray[np.bool_]:
    return np.asarray(scores > threshold)


def cut(benign: Floats, rate: float) -> float:
    """The score that at most this share of the benign requests exceeds."""
    return threshold_at(benign, rate)


def split_cuts(inline: Floats, judge: Floats, rate: float) -> tuple[float, float]:
    """Thresholds for `either flags` at this false positive rate in all: half of it to the inline model, to the judge
    what then is left."""
    first = cut(inline, rate / 2)
    room = int(len(inline) * rate) - int(above(inline, first).sum())
    rest = np.sort(judge[~above(inline, first)])
    return first, float(rest[max(0, len(rest) - 1 - room)]) if len(rest) else 1.0


def compare(slices: Sequence[Slice], rates: Sequence[float] = RATES) -> dict[str, Any]:
    """Shares flagged per slice by inline, judge and either, at thresholds measured on the benign slices together. The
    simulated slices stay out of the thresholds: their texts say nothing."""
    benign = [s for s in slices if not s.hostile and s.name != "simulated"]
    inline = np.concatenate([np.asarray(s.inline) for s in benign])
    judge = np.concatenate([s.malicious for s in benign])
    out: dict[str, Any] = {"benign": len(inline), "rates": {}}
    for rate in rates:
        one, two = cut(inline, rate), cut(judge, rate)
        a, b = split_cuts(inline, judge, rate)
        rows = {}
        for s in slices:
            x, y = np.asarray(s.inline), s.malicious
            rows[f"{s.name} {'attack' if s.hostile else 'benign'}"] = {
                "requests": len(x),
                "inline": round(float(above(x, one).mean()), 4),
                "judge": round(float(above(y, two).mean()), 4),
                "either": round(float((above(x, a) | above(y, b)).mean()), 4),
            }
        out["rates"][f"{rate:g}"] = {"thresholds": {"inline": one, "judge": two, "either": [a, b]}, "slices": rows}
    hostile = [s for s in slices if s.hostile and s.name != "simulated"]
    out["auc"] = {
        s.name: {"inline": round(auc(inline, np.asarray(s.inline)), 4), "judge": round(auc(judge, s.malicious), 4)}
        for s in hostile
    }
    return out


def classes(slices: Sequence[Slice], threshold: float) -> dict[str, dict[str, Any]]:
    """Per label, over all slices: how many are flagged at the threshold and how many are given this very label."""
    p = np.concatenate([s.probabilities for s in slices])
    named = [e.label for s in slices for e in s.examples]
    out: dict[str, dict[str, Any]] = {}
    for k, label in enumerate(LABELS):
        here = np.array([name == label for name in named])
        if here.any():
            out[label] = {
                "requests": int(here.sum()),
                "flagged": round(float((1 - p[here, 0] >= threshold).mean()), 4),
                "same_label": round(float((p[here].argmax(1) == k).mean()), 4),
            }
    return out


def evaluate(
    folder: Path, slices: Sequence[Slice], tell: Callable[[str, float], None] = lambda stage, share: None
) -> dict[str, Any]:
    """Ask the judge about all slices and put the figures together; fills in the slices' probabilities."""
    judge = Judge(folder)
    for k, s in enumerate(slices):
        tell("judging", k / len(slices))
        s.probabilities, s.mass = judge.ask(s.examples)
    malicious = np.concatenate([s.malicious for s in slices])
    hostile = np.concatenate([np.full(len(s.examples), s.hostile) for s in slices])
    error, bins = reliability(malicious, hostile)
    thresholds = judge.manifest["thresholds"]["malicious"]
    few = [e for s in slices for e in s.examples[:100]]
    speed = judge.speed(few)
    shipped = {
        rate: {
            f"{s.name} {'attack' if s.hostile else 'benign'}": round(float((s.malicious >= t).mean()), 4)
            for s in slices
        }
        for rate, t in thresholds.items()
    }
    return {
        "judge": judge.manifest.get("name", folder.name),
        **compare(slices),
        "as_shipped": {"thresholds": thresholds, "shares": shipped},
        "calibration": {"ece": error, "bins": bins},
        "classes": classes(slices, float(thresholds["0.01"])),
        "mass_min": round(float(min(s.mass.min() for s in slices)), 4),
        "speed": {
            "windows_per_second": round(speed.per_second, 1),
            "p50_ms": round(speed.p50_ms, 2),
            "p99_ms": round(speed.p99_ms, 2),
            "tokens_mean": round(speed.tokens_mean, 1),
        },
    }


# ---------------------------------------------------------------- plots


def plots(slices: Sequence[Slice], out: Path) -> list[Path]:
    """roc.png (low false positive rates) and reliability.png. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    benign = [s for s in slices if not s.hostile and s.name != "simulated"]
    hostile = [s for s in slices if s.hostile and s.name != "simulated"]
    sides: dict[str, Callable[[Slice], Floats]] = {
        "inline": lambda s: np.asarray(s.inline),
        "judge": lambda s: s.malicious,
    }
    figure, axis = plt.subplots(figsize=(7, 4.5))
    rates = np.geomspace(2e-4, 0.1, 60)
    for s, colour in zip(hostile, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
        quiet = {name: np.concatenate([side(b) for b in benign]) for name, side in sides.items()}
        for name, style in (("inline", "--"), ("judge", "-")):
            shares = [above(sides[name](s), cut(quiet[name], r)).mean() for r in rates]
            axis.plot(rates, shares, style, color=colour, label=f"{s.name}, {name}")
        both = [split_cuts(quiet["inline"], quiet["judge"], r) for r in rates]
        axis.plot(
            rates,
            [(above(np.asarray(s.inline), a) | above(s.malicious, b)).mean() for a, b in both],
            ":",
            color=colour,
            label=f"{s.name}, either",
        )
    axis.set(
        xscale="log",
        xlabel="false positive rate",
        ylabel="attacks flagged",
        ylim=(0, 1.02),
        title="Detection on sources left out",
    )
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    roc = out / "roc.png"
    figure.tight_layout()
    figure.savefig(roc, dpi=120)
    plt.close(figure)
    figure, axis = plt.subplots(figsize=(4.5, 4.5))
    for name, chosen in (("all", slices), ("text", [*benign, *hostile])):
        _, bins = reliability(
            np.concatenate([s.malicious for s in chosen]),
            np.concatenate([np.full(len(s.examples), s.hostile) for s in chosen]),
        )
        axis.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o-", label=name)
    axis.plot([0, 1], [0, 1], "k:", lw=1)
    axis.set(xlabel="said: probability that it is hostile", ylabel="share that was", title="Reliability")
    axis.legend()
    figure.tight_layout()
    reliable = out / "reliability.png"
    figure.savefig(reliable, dpi=120)
    plt.close(figure)
    return [roc, reliable]
