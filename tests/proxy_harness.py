"""What the tests with a real proxy share, whichever it is: settings, requests, and looking at the outcome."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from native import text
from sidecar import bundle
from sidecar.demo.show import Tail
from sidecar.demo.traffic import Case, Reply, send


class Running(Protocol):
    """A stack of demo API, sidecar and proxy."""

    ports: dict[str, int]
    decisions: Path
    access_log: Path


BLOCKED_RANGE = "203.0.113.0/24"
BLOCKED = "203.0.113.9"
FRIEND = "198.51.100.1"

# Refusals here come from lists and counts, so that these tests hold with whatever models are in use.
SETTINGS: dict[str, Any] = {
    "lists": {"block": [BLOCKED_RANGE]},
    "detectors": {"unusual_behaviour": {"enabled": False}, "request_flood": {"enabled": False}},
    "listen": {"stream_idle": "4s", "drain": "4s"},
    "routes": [
        {"name": "login", "path": "/login", "methods": ["POST"], "body": "buffered", "login": True},
        {"name": "observed", "path": "/echo", "methods": ["PUT"], "mode": "observe", "body": "none"},
        {"name": "upload", "path": "/upload", "body": "streamed", "body_limit": "16KiB"},
        {"name": "write", "path": "/**", "methods": ["POST"], "body": "buffered", "body_limit": "16KiB"},
    ],
}


def make_bundle(path: Path, score: float, marker: bytes = b"") -> Path:
    """A model bundle that gives every request this text score, by a linear model without weights; with a
    marker (folded text): 0.95 to requests that carry it, where `score` is for the others."""
    number, names = bundle.text_schema()
    trigram = np.zeros(text.N_TRIGRAMS)
    if marker:
        trigram[text.buckets(marker)[0]] = 100.0
    manifest = {
        "name": f"always {score}",
        "created": "2026-01-01T00:00:00Z",
        "text": {"number": number, "features": names, "sha256": bundle.schema_hash(number, names)},
        "behaviour": None,
        "trees": {},
        "combination": {"linear": {"linear": 1.0}},
        # some trigrams of the marker occur elsewhere too; all of them only in it
        "calibration": {
            "linear": {"knots": [(-1.0, score), (20.0, score), (30.0, 0.95 if marker else score)]}
        },
        "thresholds": [],
        "training": [],
        "metrics": {},
        "versions": {},
    }
    weights = text.weights_bytes(trigram, np.zeros(text.N_TOKEN_GRAMS), 0.0)
    bundle.write_bundle(path, manifest, {"linear.bin": weights})
    return path


def ask_port(
    port: int,
    target: str = "/",
    client: str = FRIEND,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    return send(port, Case("", True, method, target, headers or {}, body), client)


def echoed(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body[:300]
    value: dict[str, Any] = json.loads(reply.body)
    return value


def eventually(check: Callable[[], Any], what: str, timeout_s: float = 15.0) -> Any:
    """The first true result of check, polled; fails after the timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.05)


def metrics(stack: Running) -> dict[str, float]:
    """The sidecar's metrics; a name with labels as in the text format."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["admin"], timeout=5)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    }


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def raw_port(port: int, data: bytes, timeout_s: float = 10.0, end: bool = False) -> bytes:
    """Send bytes as they are and return all that comes until the peer closes or goes quiet."""
    out = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as peer:
        peer.sendall(data)
        if end:
            peer.shutdown(socket.SHUT_WR)
        try:
            while piece := peer.recv(65536):
                out += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return out


def access_lines(stack: Running) -> list[dict[str, Any]]:
    try:
        text = stack.access_log.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def tail_of(stack: Running) -> Tail:
    """New decisions from now on; waits until the earlier ones are written."""

    def caught_up() -> bool:
        seen = metrics(stack)
        written = seen['outrider_decision_log_lines_total{result="written"}']
        return written >= seen["outrider_events_total"]

    eventually(caught_up, "the decision log caught up")
    tail = Tail(stack.decisions)
    list(tail.new())
    return tail


def chunked(*pieces: bytes, trailers: bytes = b"", end: bool = True) -> bytes:
    out = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return out + (b"0\r\n" + trailers + b"\r\n" if end else b"")


def post(target: str, body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {target} HTTP/1.1",
        "host: shop",
        f"x-forwarded-for: {FRIEND}",
        "connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
