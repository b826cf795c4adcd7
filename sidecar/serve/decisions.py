"""The decision log: takes records out of the arena's event ring and writes those that are asked for.

A thread of its own empties the ring, also when nothing is to be written, so that it always holds the
latest. A log that can't be written costs its lines, never a decision: it is counted, and said once a
minute.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sidecar.serve.logs import dump
from sidecar.serve.metrics import Tally

BATCH_MAX = 1024
IDLE_WAIT_S = 0.1
COMPLAIN_EVERY_S = 60.0
FILE_MODE = 0o640
_MASK64 = (1 << 64) - 1

log = logging.getLogger("outrider.decisions")

Record = dict[str, Any]


class Ring(Protocol):
    def drain(self, max_n: int) -> list[Record]: ...


@dataclass(frozen=True)
class Plan:
    """What is written where. path: None nowhere, "-" standard output. routes: names by index."""

    path: str | None
    actions: frozenset[str]
    sample: float
    service: str
    routes: tuple[str, ...] = ()


def sampled(number: int, share: float) -> bool:
    """Whether the record with this number belongs to the share; the same number always gives the same
    answer, so that all pods' and all restarts' logs agree."""
    mixed = (number * 0x9E3779B97F4A7C15) & _MASK64
    mixed ^= mixed >> 29
    return ((mixed * 0xBF58476D1CE4E5B9) & _MASK64) < share * (_MASK64 + 1)


class DecisionLog:
    """sentence: makes a reason readable, (reason, record) -> text."""

    def __init__(
        self,
        ring: Ring,
        plan: Plan,
        tally: Tally,
        sentence: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
    ) -> None:
        self._ring, self._plan, self._tally, self._sentence = ring, plan, tally, sentence
        self._lock = threading.Lock()  # the open file and the plan
        self._fd = -1
        self._opened: str | None = None
        self._complained = float("-inf")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    def configure(self, plan: Plan) -> None:
        """Take over new settings; the file is opened anew if its path changed."""
        with self._lock:
            self._plan = plan

    def reopen(self) -> None:
        """After rotation: the next line goes to a file newly opened under the path."""
        with self._lock:
            self._close()

    def close(self) -> None:
        """Stop, after writing what waits in the ring."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        self.pump()
        with self._lock:
            self._close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                taken = self.pump()
            except Exception:
                log.exception("the decision log failed")
                taken = 0
            if taken < BATCH_MAX:
                self._stop.wait(IDLE_WAIT_S)

    def pump(self) -> int:
        """One batch: the number of records taken from the ring."""
        records = self._ring.drain(BATCH_MAX)
        if not records:
            return 0
        with self._lock:
            lines = [self.line(r) for r in records if self._wanted(r)] if self._plan.path is not None else []
            if lines:
                self._write(lines)
        return len(records)

    def _wanted(self, record: Record) -> bool:
        action = str(record.get("action", ""))
        if action not in self._plan.actions:
            return False
        # of allowed requests the data plane already made a choice (policy: allow_sample)
        return action == "allow" or sampled(int(record.get("id", 0)), self._plan.sample)

    def line(self, record: Record) -> str:
        """The record as one line of JSON, each reason with its sentence."""
        out = {"service": self._plan.service, **record}
        route = record.get("route")
        if isinstance(route, int) and route < len(self._plan.routes):
            # records of before a reload may name a route that stands elsewhere now
            out["route"] = self._plan.routes[route]
        out["reasons"] = [
            {**reason, "text": self._sentence(reason, record)} for reason in record.get("reasons", [])
        ]
        return dump(_finite(out)) + "\n"

    def _write(self, lines: list[str]) -> None:
        try:
            if self._plan.path == "-":
                sys.stdout.write("".join(lines))
                sys.stdout.flush()
            else:
                self._open()
                data = memoryview("".join(lines).encode("ascii"))
                while data:
                    data = data[os.write(self._fd, data) :]
            self._tally.add("decision_log_lines", "written", len(lines))
        except (OSError, ValueError) as error:
            self._close()
            self._tally.add("decision_log_lines", "failed", len(lines))
            now = time.monotonic()
            if now - self._complained > COMPLAIN_EVERY_S:
                self._complained = now
                log.error(
                    "the decision log can't be written",
                    extra={"path": self._plan.path, "reason": getattr(error, "strerror", None) or str(error)},
                )

    def _open(self) -> None:
        path = self._plan.path
        assert path is not None
        if self._fd >= 0 and self._opened == path:
            return
        self._close()
        self._fd = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, FILE_MODE
        )
        self._opened = path

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._opened = -1, None


def _finite(value: Any) -> Any:
    """NaN and infinities (a model that wasn't run) as null: JSON has no word for them."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
