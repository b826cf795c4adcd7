"""The behaviour side: window features by replaying logs through the core, and the Isolation Forest.

An Isolation Forest says that behaviour is unusual, not that it is hostile, and what is usual differs
from one service to the next. Its score is therefore capped below the score from which requests are
throttled: alone it tags and escalates; refusing on behaviour is for the detectors with stated limits.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sidecar.train.calibrate import BenignSource, knots

Floats = NDArray[np.floating]

TREES = 64
SAMPLES = 256
ROWS_PER_SOURCE = 40_000          # used for training, of each source
CALIBRATION_ROWS = 10_000         # of each source
CEILING = 0.79                    # below the default throttle threshold


class Record(Protocol):
    """What is read of a sidecar.records.RequestRecord."""

    method: str
    url: str
    headers: list[tuple[str, str]]
    body: bytes | None
    client: str | None
    principal: str | None
    ts: float | None
    status: int | None
    response_ms: float | None
    label: int | None
    cls: str | None


@dataclass(frozen=True)
class Rows:
    """Window features (n, BEHAVIOUR_FEATURES) float32 in the order of time, labels (n,) 0 or 1, classes."""
    features: Floats
    labels: NDArray[np.integer]
    classes: list[str]
    without_time: int


def behaviour_rows(records: Iterable[Record], progress: Callable[[int], None] | None = None) -> Rows:
    """Replay records through the core with their own timestamps; one row per request.

    Records without a time or without a client are left out and counted: they have no past. A record
    without a label counts as benign."""
    from native.arenafile import ArenaFile
    from native.engine import Engine
    from sidecar.config import Settings
    from sidecar.policy import compile_policy

    kept: list[Record] = []
    left_out = 0
    for record in records:
        if record.ts is None or record.client is None:
            left_out += 1
        else:
            kept.append(record)
    kept.sort(key=lambda r: r.ts or 0.0)
    features, labels, classes = [], [], []
    with tempfile.TemporaryDirectory(prefix="outrider-train-") as scratch:
        # the mapping outlives the folder; it goes with its last user
        arena = ArenaFile.create(str(Path(scratch) / "arena"), clients=262144, key=bytes(16))
        arena.write_policy(compile_policy(Settings()))
        engine: Any = Engine(arena, keep_features=True)
        for number, r in enumerate(kept):
            decision = engine.decide(r.method, r.url, r.headers, body=r.body, client=r.client,
                                     principal=r.principal, ts=r.ts)
            features.append(np.array(decision.behaviour, np.float32))
            labels.append(1 if r.label == 1 else 0)
            classes.append(r.cls or ("attack" if r.label == 1 else "benign"))
            if r.status is not None:
                engine.respond(decision, r.status, response_ms=r.response_ms, ts=r.ts)
            if progress is not None and number % 512 == 0:
                progress(number)
    matrix = np.vstack(features) if features else np.empty((0, 0), np.float32)
    return Rows(matrix, np.asarray(labels, np.int64), classes, left_out)


def train_isolation(sources: Sequence[Floats], seed: int, jobs: int = 2) -> Any:
    """A float32 Treelite Isolation Forest from the benign rows of each source, equally many of each."""
    import treelite
    from sklearn.ensemble import IsolationForest

    from sidecar.compilers import to_float32

    rng = np.random.default_rng(seed)
    size = min(ROWS_PER_SOURCE, max(len(s) for s in sources))
    parts = [s[rng.choice(len(s), size, replace=len(s) < size)] for s in sources if len(s)]
    forest = IsolationForest(n_estimators=TREES, max_samples=SAMPLES, n_jobs=jobs, random_state=seed)
    return to_float32(treelite.sklearn.import_model(forest.fit(np.vstack(parts))))


def anomaly(model: Any, rows: Floats) -> Floats:
    """Raw output (n,) as the data plane gives it: 2^(-mean depth / ratio), 0..1, high = unusual."""
    from sidecar.train.trees import margin

    ratio = float(model.get_header_accessor().get_field("ratio_c")[0])
    return np.asarray(np.exp2(-margin(model, rows) / ratio))


@dataclass(frozen=True)
class BehaviourSide:
    model: Any
    knots: list[tuple[float, float]]
    out_of_fold: dict[str, Floats]          # source -> raw outputs of its benign rows, unseen by the model
    attacks: dict[str, Floats]              # class -> raw outputs


def fit(sources: dict[str, Rows], seed: int, jobs: int = 2) -> BehaviourSide:
    """Train on all sources; calibrate on outputs of models that were trained without the source.

    With one source only, halves in time stand in for sources."""
    benign = {name: rows.features[rows.labels == 0] for name, rows in sources.items()}
    benign = {name: rows for name, rows in benign.items() if len(rows)}
    if len(benign) == 1:
        (name, rows), = benign.items()
        half = len(rows) // 2
        benign = {f"{name} (first half)": rows[:half], f"{name} (second half)": rows[half:]}
    unseen: dict[str, Floats] = {}
    for name, rows in benign.items():
        others = [r for n, r in benign.items() if n != name]
        unseen[name] = anomaly(train_isolation(others, seed, jobs), rows)
    model = train_isolation(list(benign.values()), seed, jobs)
    attacks: dict[str, list[Floats]] = {}
    for rows in sources.values():
        hostile = rows.labels == 1
        if hostile.any():
            raw = anomaly(model, rows.features[hostile])
            names = [c for c, bad in zip(rows.classes, hostile, strict=True) if bad]
            for cls in sorted(set(names)):
                attacks.setdefault(cls, []).append(raw[np.asarray(names) == cls])
    # the mean over sources, unlike the text side: each service has its own idea of usual, and a model
    # that hasn't seen a service is no judge of its rarest clients
    rng = np.random.default_rng(seed)
    pairs = knots([BenignSource("all", np.concatenate(
        [raw[rng.choice(len(raw), CALIBRATION_ROWS, replace=len(raw) < CALIBRATION_ROWS)]
         for raw in unseen.values()]))])
    return BehaviourSide(model, [(x, min(y, CEILING)) for x, y in pairs], unseen,
                         {cls: np.concatenate(parts) for cls, parts in attacks.items()})
