"""Hears of decisions: a blocking read of the stream of changes, from what was seen last."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from sidecar.judge.store.base import OnChange, OnGap, StoreError, log, overlaid, printable, tell, tell_gap
from sidecar.judge.store.redis_link import BLOCK_S, Client, Link
from sidecar.judge.types import WireError

COUNT = 256
NOWHERE = ("0-0", 0)


class Follower:
    """A gap is said where the numbers of the changes jump (the stream was trimmed, or Redis lost some), and after every
    lost connection: a replica that has become the primary may lack what the old one had said."""

    def __init__(
        self, link: Link, key: str, on_change: OnChange, on_gap: OnGap, counted: Callable[[str], None]
    ) -> None:
        self._link, self._key, self._on_change, self._on_gap, self._counted = link, key, on_change, on_gap, counted
        self._stop = threading.Event()
        self._place: tuple[str, int] | None = None  # entry and number of the change seen last
        with contextlib.suppress(StoreError):
            self._place = self._end()
        self._thread = threading.Thread(target=self._run, name="judge-store-follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._link.close()
        if self._thread is not threading.current_thread():
            self._thread.join(BLOCK_S * 3)

    def _end(self) -> tuple[str, int]:
        def ask(client: Client) -> Any:
            return client.xrevrange(self._key, count=1)

        last = self._link.ask(ask)
        return (last[0][0].decode(), int(last[0][1][b"n"])) if last else NOWHERE

    def _run(self) -> None:
        lost = self._place is None
        while not self._stop.is_set():
            try:
                if lost:
                    self._find_place()
                    lost = False
                    self._gap()
                self._read()
            except StoreError:
                lost = True
                self._stop.wait(self._link.breaker.open_s() or 0.05)

    def _find_place(self) -> None:
        end = self._end()
        if self._place is None or end[1] < self._place[1] or _order(end[0]) < _order(self._place[0]):
            self._place = end  # Redis has lost what was seen already

    def _read(self) -> None:
        assert self._place is not None
        id, number = self._place

        def ask(client: Client) -> Any:
            return client.xread({self._key: id}, count=COUNT, block=round(BLOCK_S * 1000))

        reply = self._link.ask(ask)
        if not reply:
            return
        changed, gap = [], False
        for entry, fields in reply[0][1]:
            gap = gap or int(fields[b"n"]) != number + 1
            id, number = entry.decode(), int(fields[b"n"])
            try:
                who = fields[b"w"].decode("utf-8", "replace")
                undone = fields[b"u"] == b"1"
                changed.append(overlaid(fields[b"b"], fields[b"a"].decode(), float(fields[b"x"]), undone, who))
            except (WireError, KeyError, ValueError) as error:
                log.error("a change is left out: %s", printable(str(error)))
        self._place = id, number
        tell(self._on_change, changed)
        if gap:
            self._gap()

    def _gap(self) -> None:
        self._counted("gaps")
        tell_gap(self._on_gap)


def _order(id: str) -> tuple[int, int]:
    ms, _, sequence = id.partition("-")
    return int(ms), int(sequence or 0)
