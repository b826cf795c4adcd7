"""The text side: linear model, trees on top of it, their combination and calibration.

Everything that decides about thresholds is measured out of fold: the data are divided by site,
repository, payload file or whatever else a source names as its groups; each fold is scored by
a linear model and by trees that were trained on the other folds. The models that ship are then
trained on everything, with the thresholds found out of fold.
"""
from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.bundle import Combination, needed_subsets
from sidecar.train import calibrate, trees
from sidecar.train.calibrate import BenignSource
from sidecar.train.dataset import Dataset, LabelledRequest, LabelledText
from sidecar.train.linear import train_linear
from sidecar.train.trees import Outputs, TextTrees
from sidecar.train.typed import typed_texts

Floats = NDArray[np.floating]
Tell = Callable[[str, float], None]      # stage, share done 0..1

REFUSED = 0.9                     # score from which a text is refused by default (blocked)
FREQUENT_BYTES_MAX = 40
FREQUENT_GROUPS_MIN = 4           # sites, repositories, clients that send a value
FREQUENT_MAX = 2000
FREQUENT_STEP = 100
WINDOW_MARKS = b"\x02\x03"        # begin and end of a value (native/decode.pxd)
ATTACK_SHARE = 0.3                # weight of all attack rows against all benign rows in the trees
SAMPLE_ROWS = 4000
TEXTS_PER_FOLD = 4000             # benign texts, and attacks, put into requests of a fold
ATTACKS_PER_FOLD = 6000
REQUESTS_PER_SOURCE = 40_000      # benign requests of one source used for rows
SLICE_ROWS_MIN = 30
# how many times the stated rate a source may exceed it (see calibrate.BenignSource)
TOLERANCE_TEXTS = 10.0            # pasted questions and code, put into requests: not traffic as such
SUITE = float("inf")              # a rule set's tests of what must not fire: shown, but sets no threshold


class TooLittle(Exception):
    """Not enough of one class to train on."""


@dataclass(frozen=True)
class Rows:
    """Scored requests: features (n, TEXT_FEATURES) float32, labels, and where each row comes from."""
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    source: NDArray[Any]
    cls: NDArray[Any]
    fold: NDArray[np.int64]
    kind: NDArray[Any]            # "traffic", "texts", "suite" or "attack"

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextSide:
    linear: bytes                 # linear.bin
    trees: TextTrees
    combination: dict[str, Combination]
    knots: dict[str, list[tuple[float, float]]]
    benign: dict[str, Floats]     # source -> calibrated scores, out of fold
    attacks: dict[str, Floats]    # source/class -> the same
    roc: tuple[dict[str, Floats], dict[str, Floats]]    # raw outputs of benign traffic and of attacks
    nested: dict[str, float]      # source -> share refused, with thresholds from the other folds only
    counts: dict[str, tuple[int, int]]     # source -> benign, attack entries
    raw_linear: dict[str, float]  # slice -> share found by the linear score alone at its own threshold
    importance: list[tuple[str, float]]
    sample: NDArray[np.float32]   # some benign rows, to time the trees with


# ---------------------------------------------------------------- folds

def assign_folds(data: Dataset, folds: int, seed: int) -> dict[tuple[str, str], int]:
    """(source, group) -> fold: large groups first, each to the fold that has least of its source. What
    the grammars made trains in every fold and is scored in none."""
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    items: list[LabelledRequest | LabelledText] = [*data.requests, *data.texts]
    for item in items:
        if not item.source.endswith("_grammar"):
            sizes[item.source][item.group] += 1
    out = {}
    for source, groups in sizes.items():
        loads = [0] * folds
        ties = {g: hashlib.blake2b(f"{seed}/{source}/{g}".encode("utf-8", "surrogatepass")).digest()
                for g in groups}
        for group in sorted(groups, key=lambda g: (-groups[g], ties[g])):
            fold = min(range(folds), key=lambda f: (loads[f], ties[group][f % 64]))
            loads[fold] += groups[group]
            out[source, group] = fold
    return out


def fold_view(data: Dataset, folds: Mapping[tuple[str, str], int], fold: int) -> Dataset:
    """The dataset with one fold as its hold-out and everything else for training."""
    def split(item: Any) -> Any:
        own = folds.get((item.source, item.group))
        return replace(item, split="holdout" if own == fold else "train")

    view = Dataset([split(r) for r in data.requests], [split(t) for t in data.texts])
    view.texts += frequent_values(view)
    view.texts += typed_texts([t for t in view.texts if t.split == "train" and t.label == 0], fold)
    return view


def frequent_values(data: Dataset) -> list[LabelledText]:
    """Short values that training requests of several groups have in common ("false", "en-US", "1080").

    The linear model sees every distinct window once, so that a log's repetitions don't rule. What many
    sites send all day must weigh more than that: as a small source of its own it does."""
    from native.text import TextHost

    host = TextHost(None)
    groups: dict[bytes, set[tuple[str, str]]] = defaultdict(set)
    for r in data.requests:
        if r.split == "train" and r.label == 0:
            for _, text in host.values(r.record):
                if len(text) <= FREQUENT_BYTES_MAX:
                    groups[text.strip(WINDOW_MARKS)].add((r.source, r.group))
    common = sorted((t for t in groups if t and len(groups[t]) >= FREQUENT_GROUPS_MIN),
                    key=lambda t: (-len(groups[t]), t))[:FREQUENT_MAX]
    # sources weigh by the square root of their size: the more common a value, the smaller its source
    return [LabelledText(t.decode("utf-8", "replace"), 0, "frequent_grammar", str(rank // FREQUENT_STEP), "train",
                         "frequent") for rank, t in enumerate(common)]


def _kind(item: LabelledRequest, traffic: set[str]) -> str:
    if item.label == 1:
        return "attack"
    if "rule" in (item.record.get("meta") or {}):
        return "suite"
    return "traffic" if item.source in traffic else "texts"


def score(weights: bytes, items: Sequence[LabelledRequest], fold: int, traffic: set[str]) -> Rows:
    """Rows of those items that have any value to read."""
    from native.text import TextHost

    features, linear = TextHost(weights).score_all([item.record for item in items])
    read = np.isfinite(linear)
    kept = [item for item, ok in zip(items, read, strict=True) if ok]
    return Rows(np.asarray(features[read], np.float32), np.array([i.label for i in kept], np.int64),
                np.array([i.source for i in kept], object), np.array([i.cls for i in kept], object),
                np.full(len(kept), fold, np.int64), np.array([_kind(i, traffic) for i in kept], object))


def join(parts: Sequence[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Rows)))


def _thin(items: Iterable[LabelledRequest], rng: np.random.Generator, most: int) -> list[LabelledRequest]:
    """At most so many of each benign source."""
    by_source: dict[tuple[str, int], list[LabelledRequest]] = defaultdict(list)
    for item in items:
        by_source[item.source, item.label].append(item)
    out = []
    for (_, label), group in by_source.items():
        if label == 0 and len(group) > most:
            group = [group[i] for i in sorted(rng.choice(len(group), most, replace=False))]
        out += group
    return out


def row_weights(rows: Rows) -> Floats:
    """Sources count by the square root of their size; attacks together weigh ATTACK_SHARE of the benign."""
    out = np.zeros(len(rows))
    for label in (0, 1):
        for source in set(rows.source[rows.labels == label]):
            mine = (rows.labels == label) & (rows.source == source)
            out[mine] = 1 / np.sqrt(mine.sum())
    benign, attack = out[rows.labels == 0].sum(), out[rows.labels == 1].sum()
    out[rows.labels == 1] *= ATTACK_SHARE * benign / attack
    return np.asarray(out * (len(rows) / out.sum()))


# ---------------------------------------------------------------- slices

def benign_outputs(rows: Rows, margins: Floats, forest: Floats) -> list[Outputs]:
    """One slice per benign source and kind of row."""
    out = []
    for source in sorted(set(rows.source[rows.labels == 0])):
        for kind, tolerance in (("traffic", 1.0), ("texts", TOLERANCE_TEXTS), ("suite", SUITE)):
            mine = (rows.labels == 0) & (rows.source == source) & (rows.kind == kind)
            if mine.any():
                out.append(Outputs(source, rows.features[mine, 0], margins[mine], forest[mine], tolerance))
    return out


def attack_outputs(rows: Rows, margins: Floats, forest: Floats) -> list[Outputs]:
    """One slice per source and class of attacks; small classes of a source go together."""
    out = []
    for source in sorted(set(rows.source[rows.labels == 1])):
        mine = (rows.labels == 1) & (rows.source == source)
        sizes = Counter(rows.cls[mine])
        small = {cls for cls, n in sizes.items() if n < SLICE_ROWS_MIN}
        names = np.where(np.isin(rows.cls.astype(str), list(small)), "other", rows.cls.astype(str))
        for name in sorted(set(names[mine])):
            these = mine & (names == name)
            out.append(Outputs(f"{source}: {name}" if name else source, rows.features[these, 0], 
                               margins[these], forest[these]))
    return out


def calibrations(benign: Sequence[Outputs], combination: Mapping[str, Combination]
                 ) -> dict[str, list[tuple[float, float]]]:
    return {name: calibrate.knots(_sources(benign, c)) for name, c in combination.items()}


def _sources(benign: Sequence[Outputs], c: Combination) -> list[BenignSource]:
    """What thresholds are read off."""
    return [BenignSource(s.name, s.raw(c), s.tolerance) for s in benign if s.tolerance < SUITE]


def nested_rates(rows: Rows, margins: Floats, forest: Floats, c: Combination) -> dict[str, float]:
    """Share of each benign source that reaches REFUSED when its fold's threshold comes from the other
    folds: what a threshold is worth on sites that it wasn't set on."""
    refused: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for fold in sorted(set(rows.fold.tolist())):
        def part(mask: NDArray[np.bool_]) -> list[Outputs]:
            chosen = Rows(*(getattr(rows, f.name)[mask] for f in fields(rows)))
            return benign_outputs(chosen, margins[mask], forest[mask])

        others, own = part(rows.fold != fold), part(rows.fold == fold)
        pairs = calibrate.knots(_sources(others, c))
        level = next(x for x, y in pairs if y == REFUSED)
        for s in own:
            refused[s.name] += int((s.raw(c) >= level).sum())
            total[s.name] += len(s.linear)
    return {name: refused[name] / total[name] for name in total}


# ---------------------------------------------------------------- the whole side

def check(data: Dataset) -> None:
    """Both classes must come out of the files: what the grammars add can't stand in for either."""
    own = [t for t in data.texts if not t.source.endswith("_grammar")]
    attacks = sum(t.label == 1 for t in own)
    benign = sum(r.label == 0 for r in data.requests)
    if attacks < 2 * SLICE_ROWS_MIN or benign < 2 * calibrate.ROWS_MIN:
        raise TooLittle(
            f"the text side needs at least {2 * SLICE_ROWS_MIN} attack values and {2 * calibrate.ROWS_MIN} "
            f"benign requests; the files hold {attacks:,} and {benign:,}. Attacks are records with label 1 or "
            "payload lists, benign requests are records with label 0 or without a label")


def _part(tell: Tell, stage: str, most: float) -> Tell:
    """Progress of a step within a stage, as the first part of it."""
    return lambda _, share: tell(stage, most * share)


def train_text(data: Dataset, seed: int, folds: int, jobs: int, tell: Tell) -> TextSide:
    """Train, cross-validate and calibrate. Raises TooLittle."""
    check(data)
    rng = np.random.default_rng(seed)
    traffic = {r.source for r in data.requests}
    where = assign_folds(data, folds, seed)
    parts = []
    for fold in range(folds):
        stage = f"linear model, fold {fold + 1} of {folds}"
        tell(stage, 0.0)
        view = fold_view(data, where, fold)
        weights = train_linear(view, seed + fold, progress=_part(tell, stage, 0.8)).data
        items = view.labelled_requests("holdout", seed + fold, ATTACKS_PER_FOLD, TEXTS_PER_FOLD)
        parts.append(score(weights, _thin(items, rng, REQUESTS_PER_SOURCE // folds), fold, traffic))
        tell(stage, 1.0)
    rows = join(parts)
    if len(set(rows.labels.tolist())) < 2:
        raise TooLittle("after splitting, one class has no request with a value to read")
    weight = row_weights(rows)
    margins, forest = np.zeros(len(rows)), np.zeros(len(rows))
    for fold in range(folds):
        tell("trees, out of fold", fold / folds)
        own = rows.fold == fold
        if not own.any():
            continue
        model = trees.train(rows.features[~own], rows.labels[~own], weight[~own], seed + fold, jobs)
        margins[own], forest[own] = model.predict(rows.features[own])
    tell("trees, out of fold", 1.0)

    benign, attacks = benign_outputs(rows, margins, forest), attack_outputs(rows, margins, forest)
    best = trees.fit_combination([s for s in benign if s.tolerance < SUITE], attacks)
    combination = {name: trees.subset(best, name) for name in needed_subsets(True, {"xgboost", "forest"})}
    knots = calibrations(benign, combination)

    tell("final models", 0.0)
    everything = fold_view(data, where, -1)
    linear = train_linear(everything, seed, progress=_part(tell, "final models", 0.8)).data
    final = trees.train(rows.features, rows.labels, weight, seed, jobs)
    tell("final models", 1.0)

    from native.text import FEATURE_NAMES

    calm = rows.features[rows.labels == 0]
    level = {name: next(x for x, y in pairs if y == REFUSED) for name, pairs in knots.items()}
    counts: dict[str, tuple[int, int]] = {}
    entries: list[LabelledRequest | LabelledText] = [*data.requests, *data.texts]
    for item in entries:
        a, b = counts.get(item.source, (0, 0))
        counts[item.source] = (a + (item.label == 0), b + (item.label == 1))
    return TextSide(
        linear=linear, trees=final, combination=combination, knots=knots,
        benign={s.name: calibrate.apply(knots["all"], s.raw(best)) for s in benign},
        attacks={s.name: calibrate.apply(knots["all"], s.raw(best)) for s in attacks},
        roc=({s.name: s.raw(best) for s in benign if s.tolerance == 1.0}, {s.name: s.raw(best) for s in attacks}),
        nested=nested_rates(rows, margins, forest, best), counts=counts,
        raw_linear={s.name: float(np.mean(s.linear >= level["linear"])) for s in (*benign, *attacks)},
        importance=list(zip(FEATURE_NAMES, final.importance.tolist(), strict=True)),
        sample=calm[rng.permutation(len(calm))[:SAMPLE_ROWS]])
