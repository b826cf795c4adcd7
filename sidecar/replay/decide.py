"""Records through the core, as a proxy would have sent them: the request, and later its response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.reasons import sentence
from sidecar.records import RequestRecord

if TYPE_CHECKING:
    from sidecar.config import Settings
    from sidecar.core import Core

REFUSALS = frozenset({"throttle", "challenge", "block"})
RESPONSE_MS_MAX = 60_000.0  # a response is taken as arrived after this long
PENDING_MAX = 65_536  # responses that are still to come


def open_offline(
    config: str | Path | None = None, bundle: str | Path | None = None, load_models: bool = True
) -> Core:
    """A private core for files. Latency budgets are off: on a file nothing waits, and the result must not
    depend on how busy this machine is. Raises ConfigError, BundleError, ArenaError, ModelError."""
    from sidecar.config import Settings, load
    from sidecar.core import open_core

    settings: Settings = Settings() if config is None else load(config)
    changes: dict[str, Any] = {"latency": settings.latency.model_copy(update={"budget_us": 0})}
    changes["routes"] = tuple(route.model_copy(update={"budget_us": None}) for route in settings.routes)
    if bundle is not None:
        changes["models"] = settings.models.model_copy(update={"bundle": str(bundle)})
    return open_core(settings.model_copy(update=changes), private=True, load_models=load_models)


@dataclass(slots=True)
class Decided:
    """A record and what was decided on it."""

    record: RequestRecord
    action: str
    enforced: str
    score: float
    verdict: Any
    with_client: bool  # False: the text alone was judged

    @property
    def refused(self) -> bool:
        return self.action in REFUSALS


class Decider:
    """Sends records to one engine. What it is refused the service never sees, so a refused record's
    response is left out where the decision is enforced; other responses arrive when they did."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._engine = core.engine()
        self._pending: list[tuple[float, int, Any, int, float | None]] = []
        self._number = 0
        self.routes = [route.name for route in core.settings.effective_routes()]

    def decide(self, records: Iterable[RequestRecord]) -> Iterator[Decided]:
        for record in records:
            yield self.one(record)
        self._deliver(float("inf"))

    def one(self, record: RequestRecord) -> Decided:
        ts = record.ts
        # windows need to know who and when; without either only the text can be judged
        known = ts is not None and (record.client is not None or record.principal is not None)
        if known and ts is not None:
            self._deliver(ts)
            verdict = self._engine.decide(
                record.method, record.url, record.headers, record.body, record.client, record.principal, ts
            )
        else:
            verdict = self._engine.decide(
                record.method, record.url, record.headers, record.body, anonymous=True
            )
        decided = Decided(record, verdict.action, verdict.enforced, float(verdict.score), verdict, known)
        if known and ts is not None and record.status is not None and decided.enforced not in REFUSALS:
            taken = record.response_ms
            due = ts if taken is None else ts + min(taken, RESPONSE_MS_MAX) / 1000.0
            self._number += 1
            heappush(self._pending, (due, self._number, verdict, record.status, taken))
            if len(self._pending) > PENDING_MAX:
                self._respond()
        return decided

    def output(self, decided: Decided) -> dict[str, Any]:
        """The decision record: the request's own id, time and client, its route by name, and each reason with
        its sentence, as in the decision log."""
        out: dict[str, Any] = decided.verdict.record()
        record = decided.record
        if record.id is not None:
            out["id"] = record.id
        out["ts"] = record.ts
        out["client"] = record.client
        route = out.get("route")
        if isinstance(route, int) and 0 <= route < len(self.routes):
            out["route"] = self.routes[route]
        out["reasons"] = [{**reason, "text": sentence(reason, out)} for reason in out["reasons"]]
        return out

    def _deliver(self, now: float) -> None:
        pending = self._pending
        while pending and pending[0][0] <= now:
            self._respond()

    def _respond(self) -> None:
        due, _, verdict, status, taken = heappop(self._pending)
        self._engine.respond(verdict, status, taken, due)
