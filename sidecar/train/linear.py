"""Train the hashed n-gram model of the text part, and measure it."""
from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from native import text as native_text  # type: ignore[attr-defined,unused-ignore]
from native import trainer  # type: ignore[attr-defined,unused-ignore]
from sidecar.train.dataset import Dataset, LabelledRequest, LabelledText, Split, embed, evenly

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """Float weights as trained; `data` is the quantised weights file."""

    trigram: NDArray[np.float32]
    token: NDArray[np.float32]
    bias: float

    @property
    def data(self) -> bytes:
        result: bytes = native_text.weights_bytes(self.trigram, self.token, self.bias)
        return result

    def write(self, path: Path) -> None:
        """Write the weights file."""
        path.write_bytes(self.data)


@dataclass(slots=True)
class _Bags:
    """Windows of many examples, joined: CSR over windows, bags over CSR rows."""

    indices: list[NDArray[np.uint32]]
    lengths: list[NDArray[np.int64]]
    bag_windows: list[NDArray[np.int64]]
    labels: list[NDArray[np.uint8]]
    weights: list[NDArray[np.float32]]


def _take(indptr: NDArray[np.int64], indices: NDArray[np.uint32],
          rows: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """CSR rows: their indices joined, and their lengths."""
    lengths = (indptr[1:] - indptr[:-1])[rows]
    if not len(rows):
        return np.empty(0, np.uint32), lengths
    starts = np.repeat(indptr[:-1][rows] - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return indices[np.arange(int(lengths.sum())) + starts], lengths


def _add_benign(bags: _Bags, w: dict[str, Any], weight: float, cap: int, rng: np.random.Generator) -> int:
    """Every distinct window is an example of its own, at most cap of them. One seen often counts by the
    square root of how often; the whole counts weight * sqrt(windows)."""
    _, rows, seen = np.unique(w["hashes"], return_index=True, return_counts=True)
    rows = rows.astype(np.int64)
    if len(rows) > cap:
        kept = rng.choice(len(rows), cap, replace=False)
        rows, seen = rows[kept], seen[kept]
    share = np.sqrt(seen)
    indices, lengths = _take(w["indptr"], w["indices"], rows)
    n = len(rows)
    if n:
        bags.indices.append(indices)
        bags.lengths.append(lengths)
        bags.bag_windows.append(np.ones(n, np.int64))
        bags.labels.append(np.zeros(n, np.uint8))
        bags.weights.append((weight * np.sqrt(n) * share / share.sum()).astype(np.float32))
    return n


def _add_attacks(bags: _Bags, w: dict[str, Any], weight: float) -> None:
    """One bag per text: only its highest window teaches."""
    owner = w["owner"].astype(np.int64)
    if not len(owner):
        return
    rows = np.arange(len(owner), dtype=np.int64)
    indices, lengths = _take(w["indptr"], w["indices"], rows)
    counts = np.bincount(owner)
    counts = counts[counts > 0]
    n = len(counts)
    bags.indices.append(indices)
    bags.lengths.append(lengths)
    bags.bag_windows.append(counts.astype(np.int64))
    bags.labels.append(np.ones(n, np.uint8))
    bags.weights.append(np.full(n, weight / np.sqrt(n), np.float32))


def _fillers(records: list[LabelledRequest], rng: random.Random, n: int = 4000) -> list[str]:
    """Benign query values, to embed payloads in."""
    out: list[str] = ["1", "abc", "test", "42"]
    for r in rng.sample(records, min(len(records), n)):
        query = str(r.record["url"]).partition("?")[2]
        out += [v for _, v in parse_qsl(query, errors="surrogateescape") if 0 < len(v) < 40]
    return out


def _attack_variants(texts: list[LabelledText], fillers: list[str], rng: random.Random) -> list[str]:
    """Half of the payloads as they are, half inside benign values."""
    return [t.text if rng.random() < 0.5 else embed(rng, t.text, rng.choice(fillers)) for t in texts]


def train_linear(data: Dataset, seed: int = 0, *, epochs: int = 6, rate: float = 0.15,
                 attack_share: float = 0.3, window_cap: int = 120_000, attack_cap: int = 8000,
                 own_weight: float = 1.0, splits: tuple[Split, ...] = ("train",),
                 progress: Progress | None = None) -> LinearWeights:
    """AdaGrad logistic regression on the hashed windows of the splits' benign requests, benign texts and
    attack texts. Sources count by the square root of their size; all attacks together weigh
    attack_share of all benign. ValueError where a label has no examples."""
    def tell(stage: str, share: float) -> None:
        if progress is not None:
            progress(stage, share)

    rng = random.Random(f"{seed}:linear")
    nrng = np.random.default_rng(seed)
    host = native_text.TextHost(None, windows_max=4096, values_max=4096)
    benign = _Bags([], [], [], [], [])
    attack = _Bags([], [], [], [], [])
    requests = [r for s in splits for r in data.benign(s)]
    by_source: dict[str, list[LabelledRequest]] = defaultdict(list)
    for r in requests:
        by_source[r.source].append(r)
    for k, (_, recorded) in enumerate(sorted(by_source.items())):
        tell("benign requests", k / len(by_source))
        _add_benign(benign, host.windows([r.record for r in recorded]), 1.0, window_cap, nrng)
    texts: dict[tuple[int, str, str], list[LabelledText]] = defaultdict(list)
    for s in splits:
        for label in (0, 1):
            for t in data.values(s, label):
                texts[label, t.source, t.group].append(t)
    fillers = _fillers(requests, rng)
    for k, ((label, source, _), rows) in enumerate(sorted(texts.items())):
        tell("texts", k / len(texts))
        weight = own_weight if source.endswith("_grammar") else 1.0
        if label == 0:
            _add_benign(benign, host.text_windows([t.text for t in rows]), weight, window_cap, nrng)
        else:
            chosen = evenly(rng, rows, attack_cap)
            _add_attacks(attack, host.text_windows(_attack_variants(chosen, fillers, rng)), weight)
    if not benign.labels or not attack.labels:
        raise ValueError("training needs benign requests or texts and attack texts")
    total = sum(float(w.sum()) for w in benign.weights)
    count = sum(len(w) for w in benign.weights)
    attacks = sum(float(w.sum()) for w in attack.weights)
    benign.weights = [w * (count / total) for w in benign.weights]
    attack.weights = [w * (attack_share * count / attacks) for w in attack.weights]
    parts = (benign, attack)
    lengths = np.concatenate([x for p in parts for x in p.lengths])
    windows = np.concatenate([x for p in parts for x in p.bag_windows])
    w, bias = trainer.fit(
        np.concatenate([x for p in parts for x in p.indices]),
        np.concatenate(([0], np.cumsum(lengths))), np.concatenate(([0], np.cumsum(windows))),
        np.concatenate([x for p in parts for x in p.labels]),
        np.concatenate([x for p in parts for x in p.weights]),
        native_text.N_TRIGRAMS + native_text.N_TOKEN_GRAMS, epochs=epochs, rate=rate, seed=seed,
        progress=lambda e: tell("epochs", e / epochs))
    return LinearWeights(w[:native_text.N_TRIGRAMS], w[native_text.N_TRIGRAMS:], float(bias))


def threshold_at(scores: NDArray[np.float32], rate: float) -> float:
    """The smallest threshold that at most `rate` of the scores reach (NaN never does)."""
    finite = np.sort(scores[np.isfinite(scores)])
    allowed = int(rate * len(scores))
    if not len(finite):
        return float("inf")
    if allowed >= len(finite):
        return float(finite[0])
    return float(np.nextafter(finite[len(finite) - 1 - allowed], np.float32(np.inf)))


def calibrate_threshold(host: Any, data: Dataset, request_rate: float = 0.001, text_rate: float = 0.005,
                        margin: float = 0.5, seed: int = 0) -> float:
    """The block threshold: no calibration source of benign requests is refused more often than
    request_rate, benign texts put into requests not more often than text_rate; plus a margin, since
    thresholds move between sources."""
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rates: dict[str, float] = {}
    for r in data.labelled_requests("calibrate", seed, attacks_max=0):
        if r.label == 0 and "rule" not in (r.record.get("meta") or {}):
            by_source[r.source].append(r.record)
    for t in data.values("calibrate", 0):
        rates[t.source] = text_rate
    if not by_source:
        raise ValueError("no benign requests to calibrate on")
    return margin + max(threshold_at(host.linear(rows), rates.get(source, request_rate))
                        for source, rows in by_source.items())
