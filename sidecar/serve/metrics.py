"""/metrics: what the arena, the transport and this process have counted, in Prometheus' words.

The arena counts; this module only names. Counters live in the arena's file, so they go on where they
were when the sidecar is restarted, and hold what all processes have decided that have it open: the sidecar and the
plugins in proxies. No label holds anything that a client chose.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

# the arena's counters that belong to one metric: prefix -> (metric, label, help)
FAMILIES: dict[str, tuple[str, str, str]] = {
    "action": ("outrider_decisions", "action", "Decisions by the action that scores and policy asked for."),
    "enforced": ("outrider_enforced", "action", "Decisions by the action that was carried out."),
    "skipped": ("outrider_stages_skipped", "stage", "Stages left out for lack of budget."),
    "unjudged": (
        "outrider_unjudged",
        "outcome",
        "Requests that a proxy's plugin passed (open) or refused (closed), with no arena or policy to decide by; "
        "known here once it has attached.",
    ),
}
# the others: name -> (metric, help); one that isn't named here is shown under its own name
SINGLES: dict[str, tuple[str, str]] = {
    "requests": ("outrider_requests", "Requests decided."),
    "responses": ("outrider_responses", "Requests whose response half was seen."),
    "budget_overruns": ("outrider_budget_overruns", "Decisions that took longer than their budget."),
    "events": ("outrider_events", "Decision records handed to the control plane."),
    "events_dropped": ("outrider_events_dropped", "Decision records lost because the ring was full."),
    "events_given_up": (
        "outrider_events_given_up",
        "Decision records lost because whoever wrote them ended before they were whole.",
    ),
    "proxies_attached": (
        "outrider_proxies_attached",
        "Times that a proxy's process has opened the arena to decide by itself.",
    ),
    "clients_claimed": ("outrider_clients_claimed", "Client entries taken for a new client."),
    "clients_evicted": ("outrider_clients_evicted", "Client entries taken from another client."),
    "clients_contended": ("outrider_clients_contended", "Updates let go because an entry was held too long."),
    "bodies_in_part": ("outrider_bodies_in_part", "Decisions on the first part of a body."),
    "texts_cut": ("outrider_texts_cut", "Requests of which a limit left some text unread."),
    "headers_dropped": ("outrider_headers_dropped", "Request headers beyond the limit, not looked at."),
    "no_models": ("outrider_decisions_without_models", "Decisions taken while no models were loaded."),
    "locks_stolen": ("outrider_locks_stolen", "Entries freed from a holder that died or slept."),
    "held": ("outrider_held", "Requests of clients that an earlier detection still holds."),
    "stages_shed": ("outrider_stages_shed", "Stages left out because their route had shed them."),
    "escalated": ("outrider_escalated", "Requests handed to the control plane for the judge."),
    "escalations_limited": (
        "outrider_escalations_limited",
        "Requests not shown to the judge for the client's or the service's rate.",
    ),
    "escalations_dropped": ("outrider_escalations_dropped", "Requests for the judge lost because their ring was full."),
    "escalations_given_up": (
        "outrider_escalations_given_up",
        "Requests for the judge lost because whoever wrote them ended before they were whole.",
    ),
    "texts_in_part": ("outrider_texts_in_part", "Texts read until the time was up."),
}

OPTIONAL = ("behaviour", "text", "xgboost", "random_forest")  # stages that may be left out


def histogram(
    name: str,
    text: str,
    label: str,
    rows: Mapping[str, Sequence[int]],
    bounds_us: Sequence[float],
    sums_s: Mapping[str, float] | None = None,
) -> HistogramMetricFamily:
    """Bucket counts (one more than bounds: the last has no upper bound) as a histogram in seconds.

    An empty label: the one row is the metric itself. Without sums the sum is estimated from the
    buckets' middles, since Prometheus wants one; the quantiles don't depend on it.
    """
    family = HistogramMetricFamily(name, text, labels=[label] if label else [])
    for row, counts in rows.items():
        buckets: list[tuple[str, float]] = []
        running, estimate, low = 0, 0.0, 0.0
        for index, count in enumerate(counts):
            running += count
            last = index >= len(bounds_us)
            high = low * 2 if last else float(bounds_us[index])
            estimate += count * (low + high) / 2 * 1e-6
            buckets.append(("+Inf" if last else repr(float(bounds_us[index]) / 1e6), running))
            low = high
        if len(counts) <= len(bounds_us):
            buckets.append(("+Inf", running))
        family.add_metric([row] if label else [], buckets, sum_value=(sums_s or {}).get(row, estimate))
    return family


class Tally:
    """This process's own counters by (name, label value); safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, name: str, label: str = "", n: int = 1) -> None:
        with self._lock:
            self._counts[name, label] = self._counts.get((name, label), 0) + n

    def get(self, name: str, label: str = "") -> int:
        with self._lock:
            return self._counts.get((name, label), 0)

    def all(self) -> dict[tuple[str, str], int]:
        with self._lock:
            return dict(self._counts)


# the process's counters: name -> (label name or "", help); each is created at zero with these labels
OWN: dict[str, tuple[str, tuple[str, ...], str]] = {
    "config_reloads": ("result", ("applied", "refused", "unchanged"), "Reloads of the configuration."),
    "model_reloads": ("result", ("applied", "refused"), "Loads of a model bundle while serving."),
    "decision_log_lines": ("result", ("written", "failed"), "Lines of the decision log."),
}


class Outrider(Collector):
    """Collects at each scrape.

    counters/histograms/routes: the arena's; bounds_us: upper bounds of the histograms' buckets;
    transport, auth_request: their own counters (names ending in _total are counters, others gauges); gauges: name ->
    (help, value).
    """

    def __init__(
        self,
        counters: Callable[[], Mapping[str, int]],
        histograms: Callable[[], Mapping[str, Sequence[int]]],
        bounds_us: Sequence[float],
        transport: Callable[[], Mapping[str, float]],
        tally: Tally,
        gauges: Callable[[], Mapping[str, tuple[str, float]]],
        version: str,
        mode: Callable[[], str],
        routes: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
        auth_request: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.counters, self.histograms, self.bounds_us = counters, histograms, bounds_us
        self.transport, self.tally, self.gauges = transport, tally, gauges
        self.version, self.mode, self.routes = version, mode, routes
        self.auth_request = auth_request

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering mustn't read the arena."""
        return []

    def collect(self) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "outrider_build_info", "1; the labels say what is running.", labels=["version", "python", "mode"]
        )
        info.add_metric([self.version, platform.python_version(), self.mode()], 1)
        yield info
        yield from self._arena()
        yield from self._routes()
        yield from self._transport()
        yield from self._own()
        for name, (text, value) in self.gauges().items():
            yield GaugeMetricFamily(f"outrider_{name}", text, value=value)

    def _arena(self) -> Iterable[Metric]:
        grouped: dict[str, CounterMetricFamily] = {}
        for name, value in self.counters().items():
            prefix, _, rest = name.partition("_")
            if rest and prefix in FAMILIES:
                metric, label, text = FAMILIES[prefix]
                family = grouped.setdefault(prefix, CounterMetricFamily(metric, text, labels=[label]))
                family.add_metric([rest], value)
            else:
                metric, text = SINGLES.get(name, (f"outrider_{name}", "A counter of the data plane."))
                yield CounterMetricFamily(metric, text, value=value)
        yield from grouped.values()
        rows = dict(self.histograms())
        total = {"total": rows.pop("total")} if "total" in rows else {}
        yield histogram(
            "outrider_stage_duration_seconds",
            "Time of each stage of a decision.",
            "stage",
            rows,
            self.bounds_us,
        )
        if total:
            yield histogram(
                "outrider_decision_duration_seconds",
                "Time of a whole decision.",
                "",
                total,
                self.bounds_us,
            )

    def _routes(self) -> Iterable[Metric]:
        """What the operator named a route by is its label; there are at most 256."""
        routes = self.routes()
        if not routes:
            return
        stages = ("route", "stage")
        overruns = CounterMetricFamily(
            "outrider_route_budget_overruns", "Decisions that took longer than the route's budget.", labels=["route"]
        )
        in_part = CounterMetricFamily(
            "outrider_route_texts_in_part", "Texts read until the time was up.", labels=["route"]
        )
        skipped = CounterMetricFamily(
            "outrider_route_stages_skipped",
            "Stages left out for lack of budget; text also where it was read in part.",
            labels=stages,
        )
        shed = CounterMetricFamily(
            "outrider_route_stages_shed", "Those of them that the route had shed.", labels=stages
        )
        actions = CounterMetricFamily(
            "outrider_route_decisions",
            "Decisions by the action that scores and policy asked for.",
            labels=["route", "action"],
        )
        level = GaugeMetricFamily(
            "outrider_route_shed_level",
            "How far along latency.skip the route has given stages up, 0 for not at all.",
            labels=["route"],
        )
        budget = GaugeMetricFamily(
            "outrider_route_budget_seconds", "Time for one decision, 0 for none.", labels=["route"]
        )
        for route in routes:
            name = route["name"]
            overruns.add_metric([name], route["overruns"])
            in_part.add_metric([name], route["texts_in_part"])
            level.add_metric([name], route["shed_level"])
            budget.add_metric([name], route["budget_us"] / 1e6)
            for action, count in route["actions"].items():
                actions.add_metric([name, action], count)
            for stage in OPTIONAL:
                skipped.add_metric([name, stage], route["skipped"][stage])
                shed.add_metric([name, stage], route["shed"][stage])
        yield histogram(
            "outrider_route_decision_duration_seconds",
            "Time of a whole decision, by route.",
            "route",
            {route["name"]: route["decisions"] for route in routes},
            self.bounds_us,
            {route["name"]: route["spent_s"] for route in routes},
        )
        yield from (overruns, in_part, skipped, shed, actions, level, budget)

    def _transport(self) -> Iterable[Metric]:
        for server, stats, text in (
            ("transport", self.transport(), "A figure of the ext_proc transport."),
            ("auth_request", self.auth_request(), "A figure of the auth_request server."),
        ):
            for name, value in stats.items():
                if name.endswith("_total"):
                    yield CounterMetricFamily(f"outrider_{server}_{name}", text, value=value)
                else:
                    yield GaugeMetricFamily(f"outrider_{server}_{name}", text, value=value)

    def _own(self) -> Iterable[Metric]:
        counts = self.tally.all()
        for name, (label, values, text) in OWN.items():
            family = CounterMetricFamily(f"outrider_{name}", text, labels=[label])
            for value in values:
                family.add_metric([value], counts.get((name, value), 0))
            yield family


def make_registry(collector: Collector) -> CollectorRegistry:
    """A registry of our own: the library's default one holds whatever else was imported."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(namespace="outrider", registry=registry)
    return registry
