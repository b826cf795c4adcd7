"""How long decisions take, route by route, out of the arena's counts; and whether the budgets hold."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from native.arenafile import HISTOGRAM_BOUNDS_US, LATENCY_BOUNDS_US, ArenaFile

OVERRUNS_MAX = 0.01  # of the decisions: more, and the p99 is over the budget
COUNTS = ("actions", "skipped", "shed")


@dataclass(frozen=True)
class Snapshot:
    """The counts of all routes at one time. routes: as ArenaFile.routes(); created: which arena it was."""

    created: float
    taken: float
    routes: tuple[Mapping[str, Any], ...]


def take(arena: ArenaFile) -> Snapshot:
    """The counts as they are now."""
    return Snapshot(arena.created, time.time(), tuple(arena.routes()))


def between(before: Snapshot, after: Snapshot) -> Snapshot:
    """What happened from the one to the other. Routes are matched by name; one that is new counts from its begin."""
    old = {route["name"]: route for route in before.routes}
    return Snapshot(
        after.created, after.taken, tuple(_minus(route, old.get(route["name"])) for route in after.routes)
    )


def _minus(route: Mapping[str, Any], old: Mapping[str, Any] | None) -> Mapping[str, Any]:
    # a name that went and came again counts anew: fewer requests than before
    if old is None or old["requests"] > route["requests"]:
        return route
    out = dict(route)
    for name in ("requests", "spent_s", "texts_in_part", "overruns", "sheds", "taken_back"):
        out[name] = max(route[name] - old[name], 0)
    for name in COUNTS:
        out[name] = {key: max(n - old[name].get(key, 0), 0) for key, n in route[name].items()}
    out["latency"] = _counts_minus(route["latency"], old["latency"])
    out["stages"] = {key: _counts_minus(counts, old["stages"][key]) for key, counts in route["stages"].items()}
    return out


def _counts_minus(now: Sequence[int], before: Sequence[int]) -> list[int]:
    return [max(a - b, 0) for a, b in zip(now, before, strict=True)]


def quantile_us(counts: Sequence[int], bounds_us: Sequence[float], q: float) -> float | None:
    """The q-quantile (0 < q <= 1) in us, straight between a bucket's bounds; inf where it lies in the last bucket,
    which has none; None without counts."""
    total = sum(counts)
    if total == 0:
        return None
    wanted = q * total
    running, low = 0, 0.0
    for index, count in enumerate(counts):
        if index >= len(bounds_us):
            return math.inf
        high = float(bounds_us[index])
        if count and running + count >= wanted:
            return low + (high - low) * (wanted - running) / count
        running += count
        low = high
    return math.inf


@dataclass(frozen=True)
class StageTimes:
    """One stage of one route: how often it ran, and how long that took."""

    name: str
    runs: int
    p50_us: float | None
    p99_us: float | None
    p999_us: float | None


@dataclass(frozen=True)
class RouteTimes:
    """One route. Shares are of its requests, 0..1; quantiles in us: None without requests, inf beyond 10 ms.

    skipped: by stage, for whatever reason, what is shed included; `text` leaves out those texts that were read up to
    their deadline: they are texts_in_part. shed_now: the stages that the route does without at present."""

    name: str
    path: str
    budget_us: int
    requests: int
    mean_us: float | None
    p50_us: float | None
    p99_us: float | None
    p999_us: float | None
    overruns: int
    skipped: Mapping[str, float]
    shed: Mapping[str, float]
    texts_in_part: float
    shed_now: tuple[str, ...]
    sheds: int
    taken_back: int
    stages: tuple[StageTimes, ...]

    @property
    def over(self) -> float:
        """Share of the requests that overran."""
        return self.overruns / self.requests if self.requests else 0.0

    @property
    def holds(self) -> bool | None:
        """Whether at least 99% kept to the budget (counted, not read off the histogram). None: no budget, or no
        requests."""
        if not self.budget_us or not self.requests:
            return None
        return self.overruns <= self.requests * OVERRUNS_MAX

    def record(self) -> dict[str, Any]:
        """For JSON; a quantile beyond the last bound is null, as one without requests is."""
        return {
            "route": self.name,
            "path": self.path,
            "requests": self.requests,
            "budget_us": self.budget_us or None,
            "mean_us": _number(self.mean_us),
            "p50_us": _number(self.p50_us),
            "p99_us": _number(self.p99_us),
            "p999_us": _number(self.p999_us),
            "overruns": self.overruns,
            "over_share": round(self.over, 6),
            "holds": self.holds,
            "skipped": {name: round(share, 6) for name, share in self.skipped.items()},
            "shed": {name: round(share, 6) for name, share in self.shed.items()},
            "texts_in_part": round(self.texts_in_part, 6),
            "shed_now": list(self.shed_now),
            "sheds": self.sheds,
            "taken_back": self.taken_back,
            "stages": {
                stage.name: {
                    "runs": stage.runs,
                    "p50_us": _number(stage.p50_us),
                    "p99_us": _number(stage.p99_us),
                    "p999_us": _number(stage.p999_us),
                }
                for stage in self.stages
            },
        }


def _number(us: float | None) -> float | None:
    return None if us is None or math.isinf(us) else round(us, 2)


def times(route: Mapping[str, Any]) -> RouteTimes:
    """Of one route of a snapshot."""
    n = int(route["requests"])
    of = n or 1
    latency, part = route["latency"], int(route["texts_in_part"])
    skipped = {name: count / of for name, count in route["skipped"].items() if count}
    if "text" in skipped:
        whole = max(int(route["skipped"]["text"]) - part, 0) / of
        skipped = {name: whole if name == "text" else share for name, share in skipped.items()}
        skipped = {name: share for name, share in skipped.items() if share}
    p50, p99, p999 = (quantile_us(latency, LATENCY_BOUNDS_US, q) for q in (0.5, 0.99, 0.999))
    return RouteTimes(
        name=route["name"],
        path=route["path"],
        budget_us=route["budget_us"],
        requests=n,
        mean_us=route["spent_s"] * 1e6 / n if n else None,
        p50_us=p50,
        p99_us=p99,
        p999_us=p999,
        overruns=route["overruns"],
        skipped=skipped,
        shed={name: count / of for name, count in route["shed"].items() if count},
        texts_in_part=part / of,
        shed_now=tuple(route["shed_now"]),
        sheds=route["sheds"],
        taken_back=route["taken_back"],
        stages=tuple(
            StageTimes(
                name,
                sum(counts),
                *(quantile_us(counts, HISTOGRAM_BOUNDS_US, q) for q in (0.5, 0.99, 0.999)),
            )
            for name, counts in route["stages"].items()
        ),
    )
