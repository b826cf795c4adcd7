"""The administration server: /metrics, /healthz, /readyz.

It runs in threads of its own, so that it answers while the event loop is busy, and it is bounded: so
many connections at a time, each with a timeout; what is beyond is closed.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from sidecar.serve.addresses import Address, explain
from sidecar.serve.errors import StartupError

CONNECTIONS_MAX = 32
TIMEOUT_S = 5.0

log = logging.getLogger("outrider.admin")

# a probe: whether all is well, and a word on it
Probe = Callable[[], tuple[bool, str]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "outrider"
    sys_version = ""
    timeout = TIMEOUT_S
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every second: nothing to log."""

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        status, kind, body = 200, "text/plain; charset=utf-8", b""
        if path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("accept", ""))
            try:
                body = encode(self.server.registry)
            except Exception:
                log.exception("metrics can't be read")
                status, kind, body = 500, "text/plain; charset=utf-8", b"metrics can't be read\n"
        elif path in ("/healthz", "/readyz"):
            fine, word = (self.server.health if path == "/healthz" else self.server.ready)()
            status, body = (200 if fine else 503), word.encode() + b"\n"
        elif path == "/":
            body = b"/metrics\n/healthz\n/readyz\n"
        else:
            status, body = 404, b"no such page\n"
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("cache-control", "no-store")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: Address, registry: CollectorRegistry, health: Probe, ready: Probe) -> None:
        self.registry, self.health, self.ready = registry, health, ready
        self.slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        self.address_family = found[0][0]
        super().__init__((str(found[0][4][0]), address.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("an administration request failed", exc_info=True)


class AdminServer:
    """Listens from construction on; StartupError when the address can't be had."""

    def __init__(self, address: Address, registry: CollectorRegistry, health: Probe, ready: Probe) -> None:
        try:
            self._server = _Server(address, registry, health, ready)
        except OSError as error:
            raise StartupError(f"admin.address: {explain(error, address.host, address.port)}") from error
        self.address = Address(None, address.host, int(self._server.server_address[1]))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="admin", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
