"""Where escalations wait while Redis can't be reached: a SQLite file as on one box, delivered later by a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.store.base import Claimed, StoreError, log, printable, wire_of
from sidecar.judge.store.sqlite import SqliteStore

BATCH = 64
WAIT_S = 1.0
RETRY_S = 5.0  # for what Redis had no room for, or what another process took and died with
Wire = tuple[str, str, bytes]


class Spool:
    """push delivers a batch and says which were taken; open_s how long that is hopeless. The file is opened when it is
    first needed: judges that only take work need none."""

    def __init__(
        self, settings: JudgeStore, push: Callable[[Sequence[Wire]], list[bool]], open_s: Callable[[], float]
    ) -> None:
        self._settings = settings.model_copy(
            update={"backend": "sqlite", "abandon_s": RETRY_S, "deliveries_max": 1 << 31}
        )
        self._push, self._open_s = push, open_s
        self._lock = threading.Lock()
        self._store: SqliteStore | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._refused = False
        assert settings.path is not None
        if os.path.exists(settings.path):
            self._opened()

    def put(self, wires: Sequence[Wire]) -> int:
        """How many were taken."""
        store = self._opened()
        if store is None:
            return 0
        try:
            return sum(store.push(wires))
        except StoreError as error:
            self._complain(error)
            return 0

    def depth(self) -> int:
        store = self._store
        try:
            return store.depth() if store is not None and not self._stop.is_set() else 0
        except StoreError:
            return 0

    def lost(self) -> int:
        """How many waited here for longer than the deadline."""
        return int(self._store.counted("expired")) if self._store is not None else 0

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            store, thread = self._store, self._thread
        if store is not None:
            store.close()
        if thread is not None:
            thread.join(self._settings.timeout_s * 2 + WAIT_S)

    def _opened(self) -> SqliteStore | None:
        with self._lock:
            if self._store is None and not self._stop.is_set():
                try:
                    self._store = SqliteStore(self._settings)
                except StoreError as error:
                    self._complain(error)
                    return None
                self._thread = threading.Thread(target=self._run, name="judge-store-spool", daemon=True)
                self._thread.start()
            return self._store

    def _complain(self, error: StoreError) -> None:
        if not self._refused:
            self._refused = True
            log.error("escalations are shed while Redis can't be reached: %s", printable(str(error)))

    def _run(self) -> None:
        store = self._store
        assert store is not None
        held: list[Claimed] = []
        while not self._stop.is_set():
            if self._stop.wait(self._open_s()):
                return
            held = held or store.claim(f"spool-{os.getpid()}", BATCH, WAIT_S)
            if not held:
                continue
            try:
                taken = self._push([wire_of(one.escalation) for one in held])
                store.settle([one.receipt for one, fits in zip(held, taken, strict=True) if fits])
            except StoreError:
                self._stop.wait(0.05)
                continue
            held = []
