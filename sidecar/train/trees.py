"""The text side's tree models: XGBoost and a random forest on the linear score and the lexical
features of the worst window, and how their outputs are put together.

Both are kept small: with the Isolation Forest they share about a third of the pipeline's 15 us.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.bundle import Combination
from sidecar.train.calibrate import BenignSource, threshold

Floats = NDArray[np.floating]

XGBOOST = {"n": 80, "max_depth": 5}
FOREST = {"n_estimators": 40, "max_depth": 8}
PROBABILITY_CLIP = 0.001          # as in native/models.pxd


@dataclass(frozen=True)
class TextTrees:
    """Treelite models, float32, one output each: margin and probability."""
    xgboost: Any
    forest: Any
    importance: Floats            # (features,), share of the gain, mean of both; sums to 1

    def predict(self, rows: Floats) -> tuple[Floats, Floats]:
        """(margins (n,), probabilities (n,)) for rows (n, features)."""
        return margin(self.xgboost, rows), margin(self.forest, rows)


def margin(model: Any, rows: Floats) -> Floats:
    """Raw output (n,) by Treelite's interpreter."""
    import treelite

    x = np.ascontiguousarray(rows, np.float32)
    return np.asarray(treelite.gtil.predict(model, x, pred_margin=True), np.float64).reshape(len(x))


def train(rows: Floats, labels: NDArray[np.integer], weights: Floats, seed: int, jobs: int = 2) -> TextTrees:
    """Train both on rows (n, features) float32; column 0 is the linear score, out of fold.

    XGBoost may only rise with the linear score: where it is extreme, the trees can't turn it around."""
    import treelite
    import xgboost
    from sklearn.ensemble import RandomForestRegressor

    from sidecar.compilers import to_float32

    monotone = "(" + ",".join(["1"] + ["0"] * (rows.shape[1] - 1)) + ")"
    booster = xgboost.train(
        {"objective": "binary:logistic", "max_depth": XGBOOST["max_depth"], "eta": 0.15,
         "min_child_weight": 5.0, "lambda": 4.0, "subsample": 0.7, "colsample_bytree": 0.7,
         "tree_method": "hist", "nthread": jobs, "seed": seed, "verbosity": 0,
         "monotone_constraints": monotone},
        xgboost.DMatrix(rows, labels, weight=weights), XGBOOST["n"])
    # a regressor on 0 and 1 splits as a classifier by Gini does, and has one number per leaf
    forest = RandomForestRegressor(
        **FOREST, max_features=0.33, max_samples=min(1.0, 60_000 / len(rows)), min_samples_leaf=10,
        n_jobs=jobs, random_state=seed).fit(rows, labels.astype(np.float64), sample_weight=weights)
    gain = np.zeros(rows.shape[1])
    for name, value in booster.get_score(importance_type="total_gain").items():
        gain[int(name[1:])] = value
    gain /= max(gain.sum(), 1e-12)
    return TextTrees(treelite.frontend.from_xgboost(booster),
                     to_float32(treelite.sklearn.import_model(forest)), (gain + forest.feature_importances_) / 2)


def combine(c: Combination, linear: Floats, xgboost: Floats, forest: Floats) -> Floats:
    """Combined raw output (n,): NumPy's form of models_text_raw in native/models.pxd."""
    p = np.clip(forest, PROBABILITY_CLIP, 1 - PROBABILITY_CLIP)
    return c.bias + c.linear * linear + c.xgboost * xgboost + c.forest * np.log(p / (1 - p))


def subset(c: Combination, name: str) -> Combination:
    """What is left of a combination where only these models ran; the linear score alone is not weighted."""
    if name == "linear":
        return Combination(linear=1.0)
    return Combination(linear=c.linear, bias=c.bias,
                       xgboost=c.xgboost if name in ("linear+xgboost", "all") else 0.0,
                       forest=c.forest if name in ("linear+forest", "all") else 0.0)


@dataclass(frozen=True)
class Outputs:
    """Out-of-fold outputs of one slice (a source of benign requests, or a class of attacks)."""
    name: str
    linear: Floats
    xgboost: Floats
    forest: Floats
    tolerance: float = 1.0

    def raw(self, c: Combination) -> Floats:
        return combine(c, self.linear, self.xgboost, self.forest)


def fit_combination(benign: Sequence[Outputs], attacks: Sequence[Outputs],
                    rates: Sequence[float] = (0.001, 0.0005)) -> Combination:
    """The weights that find the most attacks (mean over slices, so that the large ones don't rule) at the
    thresholds that the worst benign source dictates. Among near equals the simplest wins: ties within half a
    point go to the earlier one in the grid, which starts at twice the linear score plus the margin."""
    grid = [Combination(linear=a, xgboost=b, forest=c) for a, b, c in itertools.product(
        (2.0, 1.0, 3.0, 5.0), (1.0, 0.5), (0.0, 0.5, 1.0))]
    best, best_value = grid[0], -1.0
    for c in grid:
        sources = [BenignSource(s.name, s.raw(c), s.tolerance) for s in benign]
        value = 0.0
        for rate in rates:
            level = threshold(sources, rate)
            value += float(np.mean([np.mean(s.raw(c) >= level) for s in attacks]))
        if value > best_value + 0.005 * len(rates):
            best, best_value = c, value
    return best
