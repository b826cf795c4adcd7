"""What a store of escalations and decisions is; sqlite.py and redis.py are the two that there are.

All calls block, may come from any thread, and take at most about twice settings.timeout (claim: plus wait_s). What put
took is in the store until it is settled, dead-lettered or older than settings.deadline. Delivery is at least once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self, get_args

import orjson

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.types import NAME_CHARS_MAX, SCOPES, WIRE_BYTES_MAX, Decision, Escalation, Judgement, Label

log = logging.getLogger("outrider.judge.store")

ACTIONS = {"throttle": 1, "challenge": 2, "block": 3}  # by strength
CLAIM_MAX = 1024
DEAD_MAX = 1000
ERROR_CHARS_MAX = 500
NOTE_CHARS_MAX = 1000
DECISION_BYTES_MAX = 16 * 1024
HOLD_S_MAX = 366 * 86400.0
PAGE = 256
COUNTERS = (
    "put",  # escalations taken
    "shed",  # not taken: no room, no room for this client, too large, or the store can't write
    "claimed",
    "reclaimed",  # of those claimed: again, because their judge had died or failed
    "settled",
    "failed",
    "expired",  # older than the deadline
    "dead",
    "decisions",  # that changed what holds
    "refused",  # decisions for which there was no room, or which an operator had undone
    "reconnects",
    "errors",
    "gaps",  # times that a follower had to read everything again
    "spooled",  # put aside while Redis couldn't be reached
    "replaced",  # damaged files moved aside
)


class StoreError(Exception):
    """The store can't do it; says what to do."""


class StoreUnavailable(StoreError):
    """Not at the moment (unreachable, full, locked, loading): try again later."""


class Closeable(Protocol):
    def close(self) -> None: ...


OnChange = Callable[[list[Decision]], None]
OnGap = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Claimed:
    """deliveries: how often it was handed out, this time included."""

    escalation: Escalation
    receipt: str
    deliveries: int


@dataclass(frozen=True, slots=True)
class Dead:
    """An escalation that was given up. at: unix seconds. escalation None: it couldn't be read."""

    id: str
    at: float
    error: str
    deliveries: int
    escalation: Escalation | None


@dataclass(frozen=True, slots=True)
class Judged:
    at: float
    judgement: Judgement
    escalation: Escalation


@dataclass(frozen=True, slots=True)
class Feedback:
    """What an operator says an event really was. escalation None: it was no longer kept when they said so."""

    event: str
    label: Label
    who: str
    note: str
    at: float
    escalation: Escalation | None
    judgement: Judgement | None


class Store(ABC):
    def __init__(self, settings: JudgeStore) -> None:
        self.settings = settings
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._counting = threading.Lock()
        self._pid = os.getpid()

    # the queue

    @abstractmethod
    def put(self, escalations: Sequence[Escalation]) -> int:
        """How many were taken, for good; the others are shed and counted. One that waits already (same id) counts as
        taken. Never raises for the store's troubles."""

    @abstractmethod
    def claim(self, consumer: str, max_n: int, wait_s: float) -> list[Claimed]:
        """At least one as soon as there is one, nobody else gets them; [] after wait_s. A store that can't be reached
        has none. consumer: a name of its own for every judge process."""

    @abstractmethod
    def settle(
        self, receipts: Sequence[str], decisions: Sequence[Decision] = (), judgements: Sequence[Judgement] = ()
    ) -> None:
        """Decisions are written, judgements kept, and only then the work is done with. May be repeated. Raises
        StoreUnavailable: repeat it, or leave the work to another."""

    @abstractmethod
    def fail(self, receipt: str, error: str) -> None:
        """To be tried again after settings.abandon, or given up after settings.deliveries_max tries."""

    @abstractmethod
    def depth(self) -> int:
        """How many wait or are being judged."""

    @abstractmethod
    def dead(self, limit: int = 100) -> list[Dead]:
        """Newest first."""

    @abstractmethod
    def retry_dead(self, ids: Sequence[str]) -> int:
        """Back into the queue, as if new; how many there were and had room."""

    # decisions

    @abstractmethod
    def decide(self, decision: Decision, *, replace: bool = True) -> bool:
        """Whether it changed anything. replace: it takes the place of whatever holds for its scope and key (an
        operator's); otherwise, as for those of settle, it may only extend or strengthen what holds, and nothing for
        what was undone as long as that would have held."""

    @abstractmethod
    def undo(self, id: str, who: str) -> Decision | None:
        """Ends a decision, by its id or that of an earlier one for the same scope and key, and keeps judges from
        deciding the same until it would have run out. None: there is none of that id that holds."""

    @abstractmethod
    def active(self, now: float | None = None) -> list[Decision]:
        """All that hold at a time (unix seconds by the store's clock; None: now); at most settings.decisions_max."""

    @abstractmethod
    def get(self, id: str) -> Decision | None:
        """Also one that was undone, until it would have run out."""

    @abstractmethod
    def follow(self, on_change: OnChange, on_gap: OnGap) -> Closeable:
        """From now on on_change hears of every decision made or undone (one may come twice), on_gap that some may have
        been missed: read active() then. Both are called in one thread of the store's. To miss nothing at the start:
        follow, then active()."""

    # for people

    @abstractmethod
    def judgements(self, limit: int = 100) -> list[Judged]:
        """Newest first."""

    @abstractmethod
    def feedback(self, event_id: str, label: Label, who: str, note: str = "") -> bool:
        """Keeps what an operator says. Whether the escalation itself could be kept with it."""

    @abstractmethod
    def export_feedback(self) -> Iterator[Feedback]:
        """Oldest first."""

    @abstractmethod
    def now(self) -> float:
        """Unix seconds by the store's clock."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _state(self) -> dict[str, float]:
        """depth and lag_s; raises StoreError."""

    def remaining_s(self, decision: Decision) -> float:
        """How long it still holds; the same in every pod, however wrong the pod's own clock is."""
        return 0.0 if decision.undone else max(0.0, decision.expires - self.now())

    def stats(self) -> dict[str, int | float]:
        """COUNTERS since this process opened the store, and of the store: up (0 or 1), depth, lag_s (age of the oldest
        escalation). Where it can't be reached, depth and lag_s are 0."""
        with self._counting:
            found: dict[str, int | float] = dict(self._counts)
        found.update(up=1, depth=0, lag_s=0.0)
        try:
            found.update(self._state())
        except StoreError:
            found["up"] = 0
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, name: str, by: int = 1) -> None:
        if by:
            with self._counting:
                self._counts[name] += by

    def counted(self, name: str) -> int:
        with self._counting:
            return self._counts[name]

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError("this store was opened before a fork: open it in the process that uses it")

    def _wires(self, escalations: Sequence[Escalation]) -> list[tuple[str, str, bytes]]:
        """(client, id, JSON) of each that can travel; the others are shed."""
        found = []
        for escalation in escalations:
            with contextlib.suppress(TypeError, ValueError):  # lone surrogates, numbers of more than 64 bits
                wire = wire_of(escalation)
                if len(wire[2]) <= WIRE_BYTES_MAX:
                    found.append(wire)
        self._count("shed", len(escalations) - len(found))
        return found


def wire_of(escalation: Escalation) -> tuple[str, str, bytes]:
    """Client, id and JSON. Raises TypeError or ValueError."""
    return str(escalation.client_key or escalation.principal_key), escalation.id, escalation.to_wire()


def share_of(room: int, per_client_max: int) -> int:
    """How many escalations one client may have in a queue with this much room."""
    return max(1, min(per_client_max, room // 8))


def checked(decision: Decision, now: float) -> bytes:
    """The JSON of a decision fit for a store. Raises StoreError."""
    if decision.scope not in SCOPES or not 0 <= decision.key < 1 << 64:
        raise StoreError(f"a decision on {decision.scope!r} {decision.key}: scopes are {SCOPES}, keys have 64 bits")
    if decision.action not in ACTIONS:
        raise StoreError(f"a decision to {decision.action!r}: actions are {', '.join(ACTIONS)}")
    if not 0 < len(decision.id) <= NAME_CHARS_MAX:
        raise StoreError(f"a decision's id has 1 to {NAME_CHARS_MAX} characters")
    if not math.isfinite(decision.expires) or decision.expires > now + HOLD_S_MAX:
        raise StoreError(f"a decision until {decision.expires}: at most {HOLD_S_MAX / 86400:.0f} days")
    try:
        wire = replace(decision, undone=False).to_wire()
    except (TypeError, ValueError) as error:
        raise StoreError(f"the decision can't be written as JSON: {error}") from None
    if len(wire) > DECISION_BYTES_MAX:
        raise StoreError(f"the decision has {len(wire)} bytes as JSON: at most {DECISION_BYTES_MAX}")
    return wire


def overlaid(wire: bytes, action: str, expires: float, undone: bool, who: str) -> Decision:
    """A decision as it holds: what is stored beside its JSON counts. Raises WireError."""
    decision = Decision.from_wire(wire)
    more = {**decision.provenance, "undone_by": who} if undone else decision.provenance
    return replace(decision, action=action, expires=expires, undone=undone, provenance=more)


def checked_label(label: str, who: str) -> None:
    """Raises StoreError."""
    if label not in get_args(Label):
        raise StoreError(f"{label!r} is no label: they are {', '.join(get_args(Label))}")
    if not who:
        raise StoreError("feedback needs the name of who gives it")


def printable(text: str, most: int = ERROR_CHARS_MAX) -> str:
    """Of an error message, what may stand in a log: one line, cut."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def tell(on_change: OnChange, decisions: list[Decision]) -> None:
    """A follower's mistake must not end its following."""
    try:
        on_change(decisions)
    except Exception:
        log.exception("a follower could not take %d decisions", len(decisions))


def tell_gap(on_gap: OnGap) -> None:
    try:
        on_gap()
    except Exception:
        log.exception("a follower could not read the decisions again")


def feedback_wire(
    event: str, label: str, who: str, note: str, at: float, escalation: bytes | None, judgement: bytes | None
) -> bytes:
    return orjson.dumps(
        {
            "event": event[:NAME_CHARS_MAX],
            "label": label,
            "who": printable(who, NAME_CHARS_MAX),
            "note": printable(note, NOTE_CHARS_MAX),
            "at": at,
            "escalation": orjson.Fragment(escalation) if escalation else None,
            "judgement": orjson.Fragment(judgement) if judgement else None,
        }
    )


def feedback_of(wire: bytes) -> Feedback:
    """Raises ValueError."""
    made = orjson.loads(wire)
    escalation, judgement = made["escalation"], made["judgement"]
    return Feedback(
        event=made["event"],
        label=made["label"],
        who=made["who"],
        note=made["note"],
        at=made["at"],
        escalation=Escalation.from_wire(orjson.dumps(escalation)) if escalation else None,
        judgement=Judgement.from_wire(orjson.dumps(judgement)) if judgement else None,
    )
