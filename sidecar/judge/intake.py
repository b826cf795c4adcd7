"""From the arena's escalations to the queue: a thread that takes them out, redacts them, asks once about each shape.

The data plane has already chosen and bounded what is escalated (escalation in the settings). Nothing here waits for a
model, and a queue that is full or out of reach costs escalations, never a decision.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sidecar.judge import redact
from sidecar.judge.types import Escalation
from sidecar.serve.metrics import Tally

BATCH_MAX = 64
IDLE_WAIT_S = 0.005  # of the time from request to verdict; an empty look costs a microsecond
SHAPES_MAX = 65536
CLIENTS_MAX = 16384
RECENT_MAX = 8

log = logging.getLogger("outrider.judge")

Record = Mapping[str, Any]


class Ring(Protocol):
    def drain_escalations(self, max_n: int) -> list[dict[str, Any]]: ...


class Queue(Protocol):
    def put(self, escalations: Sequence[Escalation]) -> int: ...

    def now(self) -> float: ...


@dataclass(frozen=True)
class Plan:
    """pod: makes decision ids unique among pods. again_s: a shape is asked about once in this time, again_benign_s:
    after a benign verdict."""

    service: str
    pod: str
    again_s: float
    again_benign_s: float


class Shapes:
    """When each shape may be asked about again; the least recent is forgotten first. Safe from any thread."""

    def __init__(self, most: int = SHAPES_MAX) -> None:
        self._most = most
        self._until: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, shape: str, now: float, again_s: float) -> bool:
        """Is it to be asked about now? Then it isn't again before so many seconds have gone by."""
        with self._lock:
            if self._until.get(shape, 0.0) > now:
                return False
            self._set(shape, now + again_s)
            return True

    def put_off(self, shape: str, until: float) -> None:
        with self._lock:
            self._set(shape, max(until, self._until.get(shape, 0.0)))

    def forget(self, shape: str) -> None:
        """It was taken, but not asked about."""
        with self._lock:
            self._until.pop(shape, None)

    def _set(self, shape: str, until: float) -> None:
        self._until[shape] = until
        self._until.move_to_end(shape)
        if len(self._until) > self._most:
            self._until.popitem(last=False)


class Intake:
    def __init__(self, ring: Ring, queue: Queue, plan: Plan, tally: Tally, clock: Callable[[], float]) -> None:
        """clock: unix seconds of this machine, for what is compared with itself only."""
        self._ring, self._queue, self._plan, self._tally, self._clock = ring, queue, plan, tally, clock
        self.shapes = Shapes()
        self._recent: OrderedDict[int, deque[str]] = OrderedDict()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._complained = float("-inf")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="escalations", daemon=True)
        self._thread.start()

    def configure(self, plan: Plan) -> None:
        self._plan = plan

    def close(self) -> None:
        """Stop, after queueing what waits in the ring."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        self._take()

    def benign(self, e: Escalation) -> None:
        """A judge found nothing in it: its shape can wait longer. Whatever the data plane decides stays as it is."""
        self.shapes.put_off(redact.shape_of(e), self._clock() + self._plan.again_benign_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._take() < BATCH_MAX:
                self._stop.wait(IDLE_WAIT_S)

    def _take(self) -> int:
        try:
            return self.pump()
        except Exception:
            if self._clock() - self._complained >= 60.0:
                self._complained = self._clock()
                log.exception("escalations can't be queued (said once a minute at most)")
            self._tally.add("escalations", "failed")
            self._stop.wait(0.1)
            return 0

    def pump(self) -> int:
        """One batch: the number of records taken out of the ring."""
        records = self._ring.drain_escalations(BATCH_MAX)
        if not records:
            return 0
        wanted: list[tuple[Escalation, str]] = []
        now = self._clock()
        for record in records:
            e = redact.redact(self._escalation(record))
            shape = redact.shape_of(e)
            if self.shapes.take(shape, now, self._plan.again_s):
                wanted.append((e, shape))
        self._tally.add("escalations", "repeated", len(records) - len(wanted))
        taken = self._queue.put([e for e, _ in wanted]) if wanted else 0
        self._tally.add("escalations", "queued", taken)
        self._tally.add("escalations", "shed", len(wanted) - taken)
        if taken < len(wanted):
            for _, shape in wanted:
                self.shapes.forget(shape)  # which ones were shed isn't known: ask again about all
        return len(records)

    def _escalation(self, record: Record) -> Escalation:
        client = int(record["client_key"]) or int(record["principal_key"])
        text = record["text"]
        e = Escalation(
            id=f"{self._plan.pod}:{record['id']}",
            ts=float(record["ts"]),
            service=self._plan.service,
            method=record["method"],
            path=str(record["path"]) + (f"?{record['query']}" if record.get("query") else ""),
            why=record["why"],
            client=record["client"],
            client_key=int(record["client_key"]),
            principal_key=int(record["principal_key"]),
            payload_key=int(record["payload_key"]),
            authority=record["authority"],
            user_agent=record["user_agent"],
            route=str(record["route"]),
            place=record["place"],
            text=text.decode("utf-8", "backslashreplace"),
            body_type=record["body_type"],
            score=float(record["score"]),
            score_text=float(record["score_text"]),
            score_behaviour=float(record["score_behaviour"]),
            reasons=tuple(record["reasons"]),
            story=dict(record["behaviour"]),
            recent=tuple(self._recent.get(client, ())),
        )
        if client:
            self._remember(client, f"{e.method} {record['path']}")
        return e

    def _remember(self, client: int, shape: str) -> None:
        self._recent.setdefault(client, deque(maxlen=RECENT_MAX)).append(shape[:128])
        self._recent.move_to_end(client)
        if len(self._recent) > CLIENTS_MAX:
            self._recent.popitem(last=False)


