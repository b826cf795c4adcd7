"""What the tests with a real Envoy share beyond those with any proxy (proxy_harness): requests and load."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from proxy_harness import (
    BLOCKED,
    BLOCKED_RANGE,
    FRIEND,
    SETTINGS,
    access_lines,
    ask_port,
    chunked,
    echoed,
    eventually,
    make_bundle,
    metrics,
    post,
    raw_port,
    resident_bytes,
    tail_of,
)

from sidecar.demo.stack import Stack
from sidecar.demo.traffic import Reply

__all__ = [
    "BLOCKED",
    "BLOCKED_RANGE",
    "FRIEND",
    "SETTINGS",
    "Load",
    "access_lines",
    "ask",
    "chunked",
    "echoed",
    "eventually",
    "make_bundle",
    "metrics",
    "post",
    "raw",
    "resident_bytes",
    "tail_of",
]


def ask(
    stack: Stack,
    target: str = "/",
    client: str = FRIEND,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    return ask_port(stack.ports["envoy"], target, client, method, body, headers)


def raw(stack: Stack, data: bytes, timeout_s: float = 10.0, end: bool = False) -> bytes:
    """Send bytes to Envoy as they are and return all that comes until it closes or goes quiet."""
    return raw_port(stack.ports["envoy"], data, timeout_s, end)


@dataclass
class Load:
    """Requests from a few threads until stopped, at most `most` each."""

    stack: Stack
    threads: int = 4
    most: int = 4000
    client: str = FRIEND
    statuses: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.threads)]

    def _work(self) -> None:
        for number in range(self.most):
            if self._stop.is_set():
                return
            try:
                status = str(ask(self.stack, f"/items?page=1&limit=3&n={number}", self.client).status)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            with self._lock:
                self.statuses[status] += 1
            time.sleep(0.005)

    def seen(self) -> Counter[str]:
        with self._lock:
            return Counter(self.statuses)

    def reset(self) -> None:
        with self._lock:
            self.statuses.clear()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
