"""ext_proc over gRPC on libnghttp2: threads that serve without the interpreter's lock.

Python listens, starts the threads and steers them; a request never comes here. The first thread
accepts and deals each connection to the thread with the fewest. Importing this module needs
native.http2, which is built where libnghttp2 is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from native.http2 import Server, library_version
from sidecar.serve.addresses import Listener, parse
from sidecar.serve.transport import LAST_WORDS_S, Limits

BACKLOG = 512
POLL_S = 0.02

log = logging.getLogger("outrider.transport")


class NativeTransport:
    """Serves ext_proc on one address, `unix:/path` or `host:port` (port 0: any, see `port`).

    hosts: one object with host_address() for each thread (native.engine.Engine).
    """

    def __init__(self, address: str, hosts: Sequence[Any], limits: Limits | None = None) -> None:
        self.address = address
        self.limits = limits or Limits()
        self.port = 0
        self._hosts = hosts
        self._server: Server | None = None
        self._listener: Listener | None = None
        self._hurried = False
        self._threads: list[threading.Thread] = []

    async def start(self) -> None:
        limits = self.limits
        listener = self._listener = Listener(parse(self.address), BACKLOG)
        self.port = listener.port
        try:
            self._server = Server(
                self._hosts,
                listener.socket.fileno(),
                connections=limits.max_connections,
                streams=limits.max_streams,
                message_bytes=limits.max_message_bytes,
                idle_s=limits.stream_idle_s,
                keepalive_s=limits.keepalive_s,
                keepalive_timeout_s=limits.keepalive_timeout_s,
            )
        except (MemoryError, OSError) as error:
            listener.socket.close()
            self._listener = None
            listener.remove()
            raise RuntimeError(f"no memory or descriptors for {len(self._hosts)} threads: {error}") from error
        for i in range(len(self._hosts)):
            thread = threading.Thread(target=self._server.run, args=(i,), name=f"outrider-io-{i}", daemon=True)
            thread.start()
            self._threads.append(thread)
        log.info("native transport", extra={"threads": len(self._hosts), "nghttp2": library_version()})

    def set_serving(self, serving: bool) -> None:
        if self._server is not None:
            self._server.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        server = self._server
        if server is None or self._listener is None:
            return
        listener, self._listener = self._listener, None
        server.set_serving(False)
        # before the listener goes: whoever connects now should find nothing, not a socket that nobody serves
        listener.remove()
        server.stop("closing")
        with contextlib.suppress(OSError):
            # who connects from now on is refused at once, rather than left waiting in the queue
            listener.socket.shutdown(socket.SHUT_RDWR)
        if not await self._ended(grace_s):
            server.stop("expiring")
            if not await self._ended(LAST_WORDS_S):
                server.stop("dead")
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._threads.clear()
        listener.socket.close()

    def hurry(self) -> None:
        self._hurried = True

    async def _ended(self, within_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + within_s
        while any(thread.is_alive() for thread in self._threads):
            if asyncio.get_running_loop().time() >= deadline or (self._hurried and within_s > LAST_WORDS_S):
                return False
            await asyncio.sleep(POLL_S)
        return True

    def stats(self) -> Mapping[str, float]:
        native = self._server.stats() if self._server is not None else {}
        if not native:
            return {}
        return {
            "streams_active": native["streams"],
            "streams_opened_total": native["streams_opened"],
            "streams_refused_total": native["streams_refused"],
            "streams_idle_closed_total": native["streams_idle_closed"],
            "streams_dropped_total": native["streams_dropped"],
            "protocol_errors_total": native["protocol_errors"],
            "internal_errors_total": native["internal_errors"],
            "messages_total": native["messages"],
            "headers_dropped_total": native["headers_dropped"],
            "bodies_cut_total": native["bodies_cut"],
            "late_decisions_total": native["late_decisions"],
            "buffers_exhausted_total": native["no_buffer"],
            "buffer_bytes": native["buffer_bytes"] + native["memory_bytes"],
            "connections": native["connections"],
            "connections_opened_total": native["connections_opened"],
            "connections_refused_total": native["connections_refused"],
            "connections_dropped_total": native["connections_dropped"],
            "threads": len(self._hosts),
        }
