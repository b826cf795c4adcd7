"""A judge at work: takes escalations out of the queue, asks the models, and writes what follows before it acknowledges.

Runs in a process of its own: beside the sidecar (judge.local) or on a machine with a GPU (outrider judge serve).
Killed at any point it loses nothing: what it had claimed is claimed again by another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.judge.model import JudgeModel
from sidecar.judge.render import render
from sidecar.judge.store import Store
from sidecar.judge.types import Decision, Escalation, Judgement
from sidecar.judge.verdicts import History, Rules, Verdict, reach
from sidecar.serve.metrics import Tally

CLAIM_WAIT_S = 1.0
AGAIN_WAIT_S = 1.0  # after the store has failed

log = logging.getLogger("outrider.judge")


@dataclass(frozen=True)
class Plan:
    """deadline_s: what waited longer isn't judged. thresholds: by model hash."""

    name: str
    batch: int
    deadline_s: float
    rules: Rules
    thresholds: Mapping[str, float]


class Worker:
    def __init__(
        self,
        store: Store,
        models: Sequence[JudgeModel],
        plan: Plan,
        tally: Tally,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store, self._models, self._plan, self._tally, self._clock = store, models, plan, tally, clock
        self._history = History()

    def run(self, stopping: threading.Event) -> None:
        """Until told to stop; a batch that was begun is finished."""
        while not stopping.is_set():
            try:
                self.step(CLAIM_WAIT_S)
            except Exception:
                self._tally.add("judge_errors", "store")
                log.exception("the queue failed; trying again")
                stopping.wait(AGAIN_WAIT_S)

    def step(self, wait_s: float) -> int:
        """One batch: how many were claimed."""
        claimed = self._store.claim(self._plan.name, self._plan.batch, wait_s)
        if not claimed:
            return 0
        now = self._store.now()
        late = [c for c in claimed if now - c.escalation.ts > self._plan.deadline_s]
        if late:
            self._tally.add("judged", "late", len(late))
            self._store.settle([c.receipt for c in late], [], [])
        fresh = [c for c in claimed if now - c.escalation.ts <= self._plan.deadline_s]
        if not fresh:
            return len(claimed)
        opinions = self._ask([c.escalation for c in fresh])
        receipts: list[Any] = []
        judgements: list[Judgement] = []
        decisions: dict[str, Decision] = {}
        for c, said in zip(fresh, opinions, strict=True):
            if isinstance(said, str):
                self._tally.add("judge_errors", "model")
                self._store.fail(c.receipt, said)
                continue
            verdict: Verdict = reach(
                c.escalation, said, self._plan.thresholds, self._plan.rules, self._history, now, self._plan.name
            )
            receipts.append(c.receipt)
            judgements.append(verdict.judgement)
            decisions.update((decision.id, decision) for decision in verdict.decisions)
            self._tally.add("judged", verdict.judgement.label or "abstained")
            if verdict.flagged:
                self._tally.add("judged_flagged")
        if receipts:
            self._store.settle(receipts, list(decisions.values()), judgements)
            self._tally.add("decisions_made", n=len(decisions))
        return len(claimed)

    def _ask(self, escalations: Sequence[Escalation]) -> list[list[Judgement] | str]:
        """By escalation: one judgement per model, or what went wrong. A model that fails costs its own opinion only."""
        prompts = [render(e) for e in escalations]
        found: list[list[Judgement]] = [[] for _ in escalations]
        errors = ["no model"] * len(escalations)
        for model in self._models:
            begun = self._clock()
            answers = model.judge(prompts)
            took_ms = round((self._clock() - begun) * 1e3, 3)
            for i, (e, answer) in enumerate(zip(escalations, answers, strict=True)):
                if answer.error:
                    errors[i] = answer.error
                else:
                    found[i].append(answer.judgement(e.id, model.hash, took_ms))
        return [one or errors[i] for i, one in enumerate(found)]
