"""From raw model outputs to scores that compare across models.

A score is a statement about benign traffic: 0.5 is exceeded by 1% of benign requests, 0.8 by
0.1%, 0.9 by 0.05% (ANCHORS). Thresholds read off one site are several times off on another, and an
average over sites hides the one that suffers. So each benign source gives its own threshold and
the most demanding one counts: a score promises its rate for the worst source seen, not the mean.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidecar.bundle import ANCHORS

Floats = NDArray[np.floating]
ROWS_MIN = 50                     # a source with fewer benign rows has no say of its own
TAIL = 0.005
KNOTS_ABOVE = 6                   # knots beyond the last anchor, each halving the way to 1


class CalibrationError(Exception):
    """Too little benign data to calibrate on."""


@dataclass(frozen=True)
class BenignSource:
    """Raw outputs (n,) of one benign source, from models that haven't seen it.

    tolerance: how many times the stated rate this source may exceed it. 1 for traffic; more for material
    that no service receives as such (texts about attacks, pasted code), which would else rule alone."""
    name: str
    raw: Floats
    tolerance: float = 1.0


def upper_quantile(raw: Floats, rate: float) -> float:
    """The value that a share `rate` of raw exceeds.

    In the tail (rates up to TAIL) the same value counts once, however many rows repeat it: else one odd
    value that one client sends all day sets the threshold for all. Where fewer than five values would
    exceed it, the tail is taken to be exponential, fitted to the mean excess over the value that the
    top 20 exceed (peaks over threshold): one odd value then doesn't decide, and rates below 1/n get a value."""
    if rate > TAIL:
        return float(np.quantile(raw, 1.0 - rate))
    allowed = rate * len(raw)
    distinct = np.unique(raw.round(6))
    if allowed >= 5:
        return float(distinct[max(0, len(distinct) - 1 - int(allowed))])
    top = distinct[-min(len(distinct), 21):]
    base, excess = float(top[0]), top[1:] - top[0]
    if len(excess) == 0:
        return base
    value = base + float(np.mean(excess)) * max(0.0, float(np.log(len(excess) / allowed)))
    return min(value, float(top[-1])) if allowed >= 1 else value


def threshold(sources: Sequence[BenignSource], rate: float) -> float:
    """Raw output above which the stated rate holds in every source (in the pool, too)."""
    own = [s for s in sources if len(s.raw) >= ROWS_MIN]
    if not own:
        own = [BenignSource("all", np.concatenate([s.raw for s in sources]))] if sources else []
    if not own or sum(len(s.raw) for s in own) < ROWS_MIN:
        raise CalibrationError(f"fewer than {ROWS_MIN} benign rows to calibrate on; give more benign data")
    return max(upper_quantile(s.raw, min(0.5, rate * s.tolerance)) for s in own)


def knots(sources: Sequence[BenignSource]) -> list[tuple[float, float]]:
    """Calibration [(raw, score), ...]: strictly rising in float32, at most 16 knots."""
    if any(not np.isfinite(s.raw).all() for s in sources):
        raise CalibrationError("raw outputs that are not finite")
    points = [(threshold(sources, 0.5), 0.05)]
    points += [(threshold(sources, rate), score) for rate, score in ANCHORS]
    lowest = min(float(s.raw.min()) for s in sources if len(s.raw))
    points.insert(0, (min(lowest, points[0][0] - 1e-3), 0.0))
    (x0, _), (x1, score) = points[-2:]
    step = max(x1 - x0, 1e-3)
    for _ in range(KNOTS_ABOVE):
        x1, score = x1 + step, score + (1.0 - score) / 2
        points.append((x1, score))
    rising: list[tuple[float, float]] = []
    for x, y in points:
        x32 = float(np.float32(x))
        if rising and x32 <= rising[-1][0]:
            x32 = float(np.nextafter(np.float32(rising[-1][0]), np.float32(np.inf)))
        rising.append((x32, round(y, 6)))
    return rising


def apply(pairs: Sequence[tuple[float, float]], raw: Floats) -> Floats:
    """Scores (n,) of raw outputs: NumPy's form of `calibrate` in native/models.pxd."""
    x, y = zip(*pairs, strict=True)
    return np.where(np.isnan(raw), 0.0, np.interp(raw, x, y))


def stated(calibrations: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, object]]:
    """The manifest's thresholds: score, benign rate and raw output per calibration."""
    return [{"score": score, "benign_fpr": rate,
             "raw": {name: x for name, pairs in calibrations.items() for x, y in pairs if y == score}}
            for rate, score in ANCHORS]
