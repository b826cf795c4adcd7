"""Small real models and bundles for the tests of loading, compiling and training."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import treelite
import xgboost
from sklearn.ensemble import IsolationForest, RandomForestRegressor

from native import text
from sidecar import bundle
from sidecar.compilers import to_float32

BEHAVIOUR = (7, [f"window_{i}" for i in range(12)])      # a schema of the tests' own
KNOTS = [(-2.0, 0.0), (0.0, 0.5), (3.0, 0.9)]


@dataclass(frozen=True)
class Trained:
    xgboost: Any
    forest: Any                   # float32
    isolation: Any                # float32
    forest_wide: Any              # as scikit-learn trained them, float64
    isolation_wide: Any


def train(seed: int = 0, trees: int = 12) -> Trained:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3000, len(text.FEATURE_NAMES))).astype(np.float32)
    rows[rng.random(rows.shape) < 0.05] = np.nan
    labels = (np.nan_to_num(rows[:, 0]) + np.nan_to_num(rows[:, 1] * rows[:, 2]) > 0).astype(int)
    booster = xgboost.train({"objective": "binary:logistic", "max_depth": 4, "verbosity": 0, "seed": seed,
                             "nthread": 1}, xgboost.DMatrix(rows, labels), trees)
    forest = treelite.sklearn.import_model(RandomForestRegressor(
        n_estimators=trees, max_depth=6, random_state=seed).fit(np.nan_to_num(rows), labels))
    isolation = treelite.sklearn.import_model(IsolationForest(
        n_estimators=trees, max_samples=64,
        random_state=seed).fit(rng.normal(size=(2000, len(BEHAVIOUR[1])))))
    return Trained(treelite.frontend.from_xgboost(booster), to_float32(forest), to_float32(isolation),
                   forest, isolation)


def schema(number: int, names: list[str]) -> dict[str, Any]:
    return {"number": number, "features": names, "sha256": bundle.schema_hash(number, names)}


def manifest(**changes: Any) -> dict[str, Any]:
    out = {
        "name": "test", "created": "2026-01-01T00:00:00Z", "text": schema(*bundle.text_schema()),
        "behaviour": schema(*BEHAVIOUR), "trees": {n: f"{n}.treelite.gz" for n in bundle.TREES},
        "combination": {name: {"linear": 2.0, "xgboost": 1.0 if name in ("all", "linear+xgboost") else 0.0,
                               "forest": 0.5 if name in ("all", "linear+forest") else 0.0, "bias": 0.1}
                        for name in bundle.SUBSETS},
        "calibration": {name: {"knots": KNOTS} for name in (*bundle.SUBSETS, "behaviour")},
        "thresholds": [], "training": [], "metrics": {}, "versions": {}}
    return {**out, **changes}


def files(models: Trained, seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    weights = text.weights_bytes(rng.normal(size=text.N_TRIGRAMS), rng.normal(size=text.N_TOKEN_GRAMS), -1.0)
    return {"linear.bin": weights, **{
        f"{name}.treelite.gz": bundle.pack_checkpoint(getattr(models, name).serialize_bytes())
        for name in bundle.TREES}}


def write(path: Path, models: Trained, **changes: Any) -> bundle.Bundle:
    return bundle.write_bundle(path, manifest(**changes), files(models))
