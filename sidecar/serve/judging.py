"""What of the judge lives in the sidecar: escalations go to the queue, decisions come into the arena, a judge beside
it is kept alive. Nothing of it stands in a request's way, and none of it failing stops the sidecar.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sidecar.config import Settings
from sidecar.judge.child import JudgeChild
from sidecar.judge.enforce import Enforcer
from sidecar.judge.intake import Intake, Plan
from sidecar.judge.process import store_settings
from sidecar.judge.store import Store, open_store
from sidecar.judge.types import LABELS
from sidecar.serve.metrics import Tally

if TYPE_CHECKING:
    from sidecar.core import Core

LOOK_EVERY_S = 1.0
LOOK_MAX = 512

log = logging.getLogger("outrider.judge")


def pod_name() -> str:
    """Makes ids of escalations unique among pods, and among the restarts of one."""
    return f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}"


def plan_of(settings: Settings, pod: str) -> Plan:
    judge = settings.judge
    return Plan(settings.service.name, pod, judge.again_s, judge.again_benign_s)


class Judging:
    """StoreError where judge_store can't be used at all."""

    def __init__(self, core: Core, settings: Settings, config: Path) -> None:
        self.tally = Tally()
        self.pod = pod_name()
        self.store: Store = open_store(store_settings(settings))
        self.intake = Intake(core.arena, self.store, plan_of(settings, self.pod), self.tally, time.time)
        self.enforcer = Enforcer(core.arena, self.store, self.tally)
        self.child = JudgeChild(config, self.tally) if settings.judge.local else None

    def start(self) -> None:
        self.enforcer.start()
        self.intake.start()

    async def run(self) -> None:
        """Keeps the judge alive and learns from it what can wait; until cancelled."""
        work = [self._follow_benign()]
        if self.child is not None:
            work.append(self.child.run())
        await asyncio.gather(*work)

    def configure(self, settings: Settings) -> None:
        self.intake.configure(plan_of(settings, self.pod))

    def close(self) -> None:
        self.intake.close()
        self.enforcer.close()
        self.store.close()

    async def _follow_benign(self) -> None:
        seen: set[str] = set()
        newest = ""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                # mostly there is nothing new, and reading all of them takes a while
                (first, *_) = await asyncio.to_thread(self.store.judgements, 1) or (None,)
                if first is None or first.escalation.id == newest:
                    continue
                newest = first.escalation.id
                kept = await asyncio.to_thread(self.store.judgements, LOOK_MAX)
            except Exception as error:  # the store counts its own; what can wait is a matter of load only
                log.debug("judgements can't be read", extra={"why": str(error)})
                continue
            now_seen = set()
            for judged in kept:
                now_seen.add(judged.escalation.id)
                if judged.escalation.id not in seen and judged.judgement.label == "benign":
                    self.intake.benign(judged.escalation)
            seen = now_seen


class JudgeMetrics(Collector):
    """Of the intake, the store, the enforcer and the judge beside. Labels are ours alone."""

    def __init__(self, judging: Judging) -> None:
        self._judging = judging

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        j = self._judging
        counts = j.tally.all()

        def labelled(
            name: str, label: str, values: Iterable[str], text: str, source: Mapping[tuple[str, str], int]
        ) -> Metric:
            family = CounterMetricFamily(f"outrider_{name}", text, labels=[label])
            for value in values:
                family.add_metric([value], source.get((name, value), 0))
            return family

        yield labelled(
            "escalations",
            "outcome",
            ("queued", "repeated", "shed", "failed"),
            "Escalations: queued for a judge, left out since their shape was asked about lately, or lost: the queue or "
            "the client's share of it was full (shed), or something broke (failed).",
            counts,
        )
        yield labelled(
            "blocklist_changes",
            "change",
            ("entered", "lifted", "refused", "resynced"),
            "What became of shared decisions in this pod's arena; resynced: all of them read anew.",
            counts,
        )
        yield GaugeMetricFamily("outrider_blocklist_held", "Shared decisions that hold here.", value=j.enforcer.held)
        for name, value in j.store.stats().items():
            if name in ("up", "depth", "lag_s", "spool_depth"):
                yield GaugeMetricFamily(f"outrider_judge_store_{name}", "A figure of the queue.", value=float(value))
            else:
                yield CounterMetricFamily(f"outrider_judge_store_{name}", "A counter of the queue.", value=float(value))
        if j.child is not None:
            yield from self._child(j.child, counts)

    def _child(self, child: JudgeChild, counts: Mapping[tuple[str, str], int]) -> Iterable[Metric]:
        yield GaugeMetricFamily("outrider_judge_ready", "1 while the judge beside takes work.", value=child.ready)
        yield CounterMetricFamily(
            "outrider_judge_restarts", "Times that the judge beside ended.", value=counts.get(("judge_restarts", ""), 0)
        )
        said = {
            (metric, label): n
            for metric, rows in dict(child.status.get("counts", {})).items()
            for label, n in dict(rows).items()
        }
        judged = CounterMetricFamily(
            "outrider_judged", "Escalations judged, by the label that counts; late: they had waited too long.",
            labels=["label"],
        )  # fmt: skip
        for label in (*LABELS, "abstained", "late"):
            judged.add_metric([label], said.get(("judged", label), 0))
        yield judged
        yield CounterMetricFamily(
            "outrider_judged_flagged", "Those taken for attacks.", value=said.get(("judged_flagged", ""), 0)
        )
        errors = CounterMetricFamily("outrider_judge_errors", "What went wrong while judging.", labels=["where"])
        for where in ("model", "store"):
            errors.add_metric([where], said.get(("judge_errors", where), 0))
        yield errors
        info = GaugeMetricFamily(
            "outrider_judge_model_info", "1; the labels say what judges, and where it got to run.",
            labels=["name", "hash", "device", "compute_type"],
        )  # fmt: skip
        for model in child.status.get("models", ()):
            info.add_metric([str(model[name]) for name in ("name", "hash", "device", "compute_type")], 1)
        yield info
