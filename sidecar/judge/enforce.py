"""From the shared decisions to the arena, where every worker of every proxy of this pod finds them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from native.arenafile import ArenaError
from sidecar.judge.types import Decision
from sidecar.serve.metrics import Tally

log = logging.getLogger("outrider.judge")

Kind = str  # of a key in the arena's blocklist: "client" or "payload"


class Blocklist(Protocol):
    def client_key(self, client: str) -> int: ...

    def block(self, key: int, seconds: float, action: str = ..., reason: int = ..., kind: str = ...) -> None: ...

    def unblock(self, key: int) -> bool: ...


class Closeable(Protocol):
    def close(self) -> None: ...


class Source(Protocol):
    def active(self, now: float | None = None) -> list[Decision]: ...

    def remaining_s(self, decision: Decision) -> float: ...

    def follow(
        self, on_change: Callable[[list[Decision]], None], on_gap: Callable[[], None]
    ) -> Closeable: ...


class Enforcer:
    """Holds the arena's blocklist to what the store says. Both callbacks come from the store's own thread."""

    def __init__(self, arena: Blocklist, source: Source, tally: Tally) -> None:
        self._arena, self._source, self._tally = arena, source, tally
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, str]] = {}  # what is in the arena because of us: decision -> key there, kind
        self._following: Closeable | None = None

    def start(self) -> None:
        # first listen, then read: what is decided in between comes twice rather than not at all
        self._following = self._source.follow(self.changed, self.resync)
        self.resync()

    def close(self) -> None:
        """The entries stay: they expire by themselves, and a restarted sidecar reads them again."""
        if self._following is not None:
            self._following.close()

    def changed(self, decisions: Sequence[Decision]) -> None:
        with self._lock:
            for decision in decisions:
                self._carry_out(decision)

    def resync(self) -> None:
        """Take over all that holds; drop what we have entered and nobody holds any more."""
        active = self._source.active()
        with self._lock:
            wanted = {decision.id for decision in active}
            for one in [one for one in self._held if one not in wanted]:
                self._drop(one)
            for decision in active:
                self._carry_out(decision)
        self._tally.add("blocklist_changes", "resynced")

    @property
    def held(self) -> int:
        return len(self._held)

    def _carry_out(self, decision: Decision) -> None:
        seconds = self._source.remaining_s(decision)
        if decision.undone or seconds <= 0:
            self._drop(decision.id)
            return
        kind = "payload" if decision.scope == "payload" else "client"
        try:
            # an address is known under another key in each arena, unless they share client.key_file
            if decision.scope == "address" and not decision.address:
                raise ValueError("it names no address")
            key = self._arena.client_key(decision.address) if decision.scope == "address" else decision.key
            self._arena.block(key, seconds, decision.action, kind=kind)
        except (ArenaError, ValueError) as error:  # no room around this key, or an action of a newer version
            self._tally.add("blocklist_changes", "refused")
            log.error("a decision can't be entered", extra={"decision": decision.id, "why": str(error)})
            return
        self._held[decision.id] = (key, kind)
        self._tally.add("blocklist_changes", "entered")

    def _drop(self, decision: str) -> None:
        held = self._held.pop(decision, None)
        if held is not None:
            self._arena.unblock(held[0])
            self._tally.add("blocklist_changes", "lifted")
