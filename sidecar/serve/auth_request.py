"""An HTTP/1.1 server for NGINX's auth_request: for those who can't load a module into their NGINX.

NGINX sends a subrequest with the headers of each request before it goes on, and goes on where the answer is 2xx. What
the location has to set (envoy/nginx-auth-request.conf has it all): X-Original-Method, X-Original-URI, X-Real-IP, Host.

The answers:

    204   pass; X-Outrider-Action, -Score and -Id where answers.headers says so
    403   refuse; X-Outrider-Status is what the client is to be answered with, Retry-After where it is throttled
    4xx   the subrequest isn't one: NGINX makes a 500 of it, and the log says what is wrong
    500   deciding failed: NGINX refuses, unless its configuration says otherwise

There is no body and no response half: texts in bodies go unread, and login failures, missing pages and refusals by the
service aren't seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Protocol

import httptools

from sidecar.serve import addresses

HEAD_BYTES_MAX = 64 << 10  # of a request: its line and all headers
NAMES_MAX = 256  # headers of one request; NGINX's buffers hold fewer
AT_ONCE_MAX = 16  # requests in one piece of what arrives: NGINX waits for each answer
HEAD_TIMEOUT_S = 10.0  # from a request's first byte to its last
WRITE_TIMEOUT_S = 10.0  # for a peer that doesn't read
LINGER_S = 2.0  # for the peer's end after our last answer: closed at once, it might be lost with what is still coming
SWEEP_EVERY_S = 1.0
COMPLAIN_EVERY_S = 60.0
BACKLOG = 512

REASONS = {
    400: b"Bad Request",
    405: b"Method Not Allowed",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
}
# headers of the subrequest that say what the request was, and those that belong to the connection only
ORIGINAL = {b"x-original-method": "method", b"x-original-uri": "target", b"x-real-ip": "peer", b"host": "authority"}
OF_THE_CONNECTION = frozenset((b"connection", b"keep-alive", b"content-length"))

log = logging.getLogger("outrider.auth_request")


class Ruling(Protocol):
    """What native.subrequest.Ruling has."""

    status: int
    retry_after_s: int
    told: bool
    action: str
    score: float
    id: str


class Judge(Protocol):
    def decide(
        self, method: bytes, target: bytes, authority: bytes, headers: list[tuple[bytes, bytes]], peer: bytes
    ) -> Ruling: ...


def answer_to(ruling: Ruling, last: bool) -> bytes:
    """The whole answer. last: the connection ends after it."""
    lines = ["HTTP/1.1 403 Forbidden", "Content-Length: 0"] if ruling.status else ["HTTP/1.1 204 No Content"]
    if ruling.status:
        lines.append(f"X-Outrider-Status: {ruling.status}")
        if ruling.retry_after_s:
            lines.append(f"Retry-After: {ruling.retry_after_s}")
    if ruling.told:
        lines += [
            f"X-Outrider-Action: {ruling.action}",
            # rounded as towards Envoy's upstreams
            f"X-Outrider-Score: {int(ruling.score * 10000 + 0.5) / 10000:.4f}",
            f"X-Outrider-Id: {ruling.id}",
        ]
    if last:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


class Fault(Exception):
    """This is no subrequest that can be answered: a status, and what is wrong with it (no word of a client's)."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class _Peer(asyncio.Protocol):
    """One connection of NGINX's. The parser calls the on_ methods; what they find wrong waits in `fault`, since an
    exception would be taken for a mistake of the parser's."""

    def __init__(self, server: AuthServer) -> None:
        self.server = server
        self.parser = httptools.HttpRequestParser(self)
        self.fault: Fault | None = None
        self.closing = False
        self.fed = 0  # bytes since the last whole request
        self.done = 0  # whole requests in the piece at hand
        self.since = time.monotonic()  # of what is awaited now
        self.blocked = False
        self.clear()

    def clear(self) -> None:
        self.original: dict[str, bytes] = {}
        self.headers: list[tuple[bytes, bytes]] = []
        self.size = 0

    # ---- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if not self.server.admit(self):
            self.closing = True
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self.server.peers.discard(self)

    def pause_writing(self) -> None:
        self.blocked, self.since = True, time.monotonic()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.blocked, self.since = False, time.monotonic()
        self.transport.resume_reading()

    def overdue(self, now: float, idle_s: float) -> bool:
        if self.blocked:
            return now - self.since > WRITE_TIMEOUT_S
        return now - self.since > (LINGER_S if self.closing else HEAD_TIMEOUT_S if self.fed else idle_s)

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        if self.fed == 0:
            self.since = time.monotonic()
        self.fed += len(data)
        self.done = 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fault = self.fault or Fault(400, "a subrequest asks for another protocol")
        except httptools.HttpParserError:
            self.fault = self.fault or Fault(400, "not HTTP/1.1")
        if self.fault is None and self.fed > HEAD_BYTES_MAX:
            self.fault = Fault(431, f"more than {HEAD_BYTES_MAX} bytes of headers")
        if self.fault is not None:
            self.refuse(self.fault)

    def eof_received(self) -> bool:
        return False  # closed by the transport once all is written

    def refuse(self, fault: Fault) -> None:
        self.server.complain(fault)
        body = f"{fault}\n".encode()
        head = (
            f"Content-Length: {len(body)}\r\nContent-Type: text/plain\r\nCache-Control: no-store\r\n"
            "Connection: close\r\n\r\n"
        ).encode()
        self.write(b"HTTP/1.1 %d %s\r\n" % (fault.status, REASONS[fault.status]) + head + body, last=True)

    def write(self, answer: bytes, last: bool) -> None:
        self.transport.write(answer)
        if last:
            self.closing, self.since = True, time.monotonic()
            self.transport.write_eof()

    # ---- what the parser finds

    def on_message_begin(self) -> None:
        self.clear()
        self.fed = self.fed or 1  # the beginning of a head came in the same piece as the end of the one before

    def on_url(self, url: bytes) -> None:
        self.size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.size += len(name) + len(value)
        if self.fault is not None:
            return
        name = name.lower()
        if self.size > HEAD_BYTES_MAX or len(self.headers) >= NAMES_MAX:
            self.fault = Fault(431, f"more than {HEAD_BYTES_MAX} bytes of headers, or {NAMES_MAX} of them")
        elif name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0"):
            self.fault = Fault(413, "a subrequest has no body (proxy_pass_request_body off; and no Content-Length)")
        elif name in ORIGINAL:
            if ORIGINAL[name] in self.original:
                self.fault = Fault(400, f"{name.decode()} is there twice")
            self.original[ORIGINAL[name]] = value
        elif name not in OF_THE_CONNECTION:
            self.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.fault = self.fault or Fault(413, "a subrequest has no body")

    def on_message_complete(self) -> None:
        if self.fault is not None or self.closing:
            return
        self.done += 1
        self.fed = 0
        self.since = time.monotonic()
        if self.done > AT_ONCE_MAX:
            self.fault = Fault(400, f"more than {AT_ONCE_MAX} requests without waiting for an answer")
            return
        try:
            self.write(*self.answer())
        except Fault as fault:
            self.fault = fault
        except Exception:
            log.exception("a decision failed")
            self.server.counts["internal_errors_total"] += 1
            self.fault = Fault(500, "deciding failed")

    def answer(self) -> tuple[bytes, bool]:
        if self.parser.get_method() != b"GET":
            raise Fault(405, "a subrequest is a GET")
        if self.parser.should_upgrade():
            raise Fault(400, "a subrequest asks for another protocol (pass no Upgrade header)")
        for name, field in ORIGINAL.items():
            if not self.original.get(field) and field != "authority":  # HTTP/1.0 has none
                raise Fault(400, f"no {name.decode()}: the location has to set it with proxy_set_header")
        original = self.original
        ruling = self.server.judge.decide(
            original["method"],
            original["target"],
            original.get("authority", b""),
            # named by client.address_header it counts as any other; set by NGINX, it is harmless as a text
            [*self.headers, (b"x-real-ip", original["peer"])],
            original["peer"],
        )
        counts = self.server.counts
        counts["requests_total"] += 1
        counts["refusals_total"] += 1 if ruling.status else 0
        last = self.server.draining or not self.parser.should_keep_alive()
        return answer_to(ruling, last), last


class AuthServer:
    """Serves subrequests on one address, `unix:/path` or `host:port` (port 0: any, see `port`), on the event loop.

    connections_max: further ones are closed at once. idle_s: how long a connection may rest between requests."""

    def __init__(self, address: str, judge: Judge, connections_max: int = 1024, idle_s: float = 60.0) -> None:
        self.address, self.judge = address, judge
        self.connections_max, self.idle_s = connections_max, idle_s
        self.port = 0
        self.draining = False
        self.peers: set[_Peer] = set()
        self.counts = dict.fromkeys(
            (
                "requests_total",
                "refusals_total",
                "faults_total",
                "internal_errors_total",
                "connections_opened_total",
                "connections_refused_total",
                "connections_dropped_total",
            ),
            0,
        )
        self._listener: addresses.Listener | None = None
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._complained = float("-inf")
        self._stopped = False

    async def start(self) -> None:
        """OSError where the address can't be had."""
        self._listener = addresses.Listener(addresses.parse(self.address), BACKLOG)
        self.port = self._listener.port
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Peer(self), sock=self._listener.socket, backlog=BACKLOG
        )
        if self._listener.path is not None:
            with contextlib.suppress(OSError):
                os.chmod(self._listener.path, addresses.SOCKET_MODE)
        self._sweeper = asyncio.create_task(self._sweep())

    def drain(self) -> None:
        """Answer on, but end each connection with its next answer."""
        self.draining = True

    async def stop(self) -> None:
        """Every request that was here whole has its answer; what is on its way to us is cut off."""
        self._stopped = self.draining = True
        if self._server is None or self._listener is None:
            return
        # before the listener goes: whoever connects now should find nothing
        self._listener.remove()
        self._server.close()
        for peer in list(self.peers):
            peer.closing = True
            peer.transport.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        # a peer that reads nothing isn't waited for
        deadline = time.monotonic() + 1.0
        while self.peers and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for peer in list(self.peers):
            peer.transport.abort()
        self._server = None

    def admit(self, peer: _Peer) -> bool:
        if self._stopped or len(self.peers) >= self.connections_max:
            self.counts["connections_refused_total"] += 1
            return False
        self.counts["connections_opened_total"] += 1
        self.peers.add(peer)
        return True

    def complain(self, fault: Fault) -> None:
        self.counts["faults_total"] += 1
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_EVERY_S:
            self._complained = now
            log.warning(
                "a subrequest can't be answered (said once a minute at most)",
                extra={"status": fault.status, "why": str(fault)},
            )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = time.monotonic()
            for peer in [peer for peer in self.peers if peer.overdue(now, self.idle_s)]:
                self.counts["connections_dropped_total"] += 1
                self.peers.discard(peer)
                peer.transport.abort()

    def stats(self) -> Mapping[str, float]:
        return {**self.counts, "connections": len(self.peers)}
