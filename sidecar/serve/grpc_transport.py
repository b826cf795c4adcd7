"""ext_proc over gRPC: grpcio moves the bytes, the native machine reads and writes the messages.

One gRPC stream is one HTTP request. A fault ends its stream with a gRPC error, so that the
proxy's own failure mode decides what happens to the request; it is never turned into a refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from native.extproc import ProtocolError, counts
from sidecar.serve.transport import HEALTH_STREAMS_MAX, LAST_WORDS_S, SERVICE, Limits, Tls

DETAILS_MAX = 200  # characters of an error's text that are sent
TRACEBACK_EVERY_S = 10.0  # a fault that hits every request must not fill the disk

log = logging.getLogger("outrider.transport")


class Stream(Protocol):
    """native.extproc.ExtProcStream, or a stand-in."""

    def message(self, data: bytes, /) -> bytes | None: ...
    def expire(self) -> bytes | None: ...
    def close(self) -> None: ...


class _Active:
    """A stream in progress: who handles it, when it last heard something."""

    __slots__ = ("expired", "heard", "task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.heard = time.monotonic()
        self.expired = False


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The health service, with watchers that can be sent away: they would hold up every drain."""

    def __init__(self) -> None:
        super().__init__()
        self._watching: set[asyncio.Task[Any]] = set()
        self._closing = False

    async def Watch(self, request: Any, context: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._watching.add(task)
        try:
            await super().Watch(request, context)
        except asyncio.CancelledError:
            if not self._closing:
                raise
            task.uncancel()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "shutting down")
        finally:
            self._watching.discard(task)

    def send_away(self) -> None:
        self._closing = True
        for task in self._watching:
            task.cancel()


class GrpcTransport:
    """Serves Process on one address, `unix:/path` or `host:port` (port 0: any, see `port`).

    stream_factory makes a native stream for each gRPC stream; MemoryError from it refuses the
    stream. All of it runs on the event loop that called start(). The counters are plain
    attributes, read at any time.
    """

    def __init__(
        self,
        address: str,
        stream_factory: Callable[[], Stream],
        limits: Limits | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self.stream_factory = stream_factory
        self.limits = limits or Limits()
        self._tls = tls
        self.port = 0
        self.streams_opened = 0
        self.streams_refused = 0
        self.streams_idle_closed = 0
        self.protocol_errors = 0
        self.internal_errors = 0
        self.messages = 0
        self._active: set[_Active] = set()
        self._hurried = asyncio.Event()
        self._server: Any = None
        self._health: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last_traceback = -TRACEBACK_EVERY_S

    @property
    def streams_active(self) -> int:
        return len(self._active)

    def stats(self) -> Mapping[str, float]:
        """The counters by metric name; those ending in _total only ever grow."""
        native = counts()
        return {
            "streams_active": self.streams_active,
            "streams_opened_total": self.streams_opened,
            "streams_refused_total": self.streams_refused,
            "streams_idle_closed_total": self.streams_idle_closed,
            "protocol_errors_total": self.protocol_errors,
            "internal_errors_total": self.internal_errors,
            "messages_total": self.messages,
            "headers_dropped_total": native["headers_dropped"],
            "bodies_cut_total": native["bodies_cut"],
            "late_decisions_total": native["late_decisions"],
            "buffers_exhausted_total": native["no_buffer"],
            "buffer_bytes": native["buffer_bytes"],
        }

    async def start(self) -> None:
        """Listens and serves. RuntimeError when the address cannot be had."""
        limits = self.limits
        streams = limits.max_streams + HEALTH_STREAMS_MAX
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=streams,
            options=[
                ("grpc.max_receive_message_length", limits.max_message_bytes),
                ("grpc.max_concurrent_streams", streams),
                ("grpc.max_metadata_size", 16384),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", round(limits.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                # a proxy may ping too, but not so often that answering is work
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        handler = grpc.stream_stream_rpc_method_handler(self._process)
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, {"Process": handler})]
        )
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._tls is None:
            self.port = self._server.add_insecure_port(self.address)
        else:
            credentials = grpc.ssl_server_credentials(
                [(self._tls.key, self._tls.certificate)],
                root_certificates=self._tls.client_ca,
                require_client_auth=self._tls.client_ca is not None,
            )
            self.port = self._server.add_secure_port(self.address, credentials)
        if self.port == 0:
            why = "" if self._tls is None else " with TLS (is it free, and are certificate and key PEM and a pair?)"
            raise RuntimeError(f"cannot listen on {self.address}{why}")
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        self._spawn(self._watch_idle())

    def set_serving(self, serving: bool) -> None:
        """What the gRPC health service says from now on; requests are served in either case."""
        self._spawn(self._set_health(serving))

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, takes no new streams, waits grace_s for those in progress, then ends them
        as it ends idle ones: decided on what is known, without an error."""
        if self._server is None:
            return
        server, self._server = self._server, None
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(0)  # watchers are told before they are sent away
        self._health.send_away()
        # one call only: grpcio crashes when a server is stopped while it stops
        stopping = asyncio.create_task(server.stop(grace_s + LAST_WORDS_S))
        hurried = asyncio.create_task(self._hurried.wait())
        await asyncio.wait([stopping, hurried], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        self._expire(list(self._active))
        await stopping
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hurry(self) -> None:
        self._hurried.set()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _set_health(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in ("", SERVICE):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def _watch_idle(self) -> None:
        """Ends idle streams. A sweep costs the requests nothing, a timer per message would."""
        limit_s = self.limits.stream_idle_s
        while True:
            await asyncio.sleep(min(1.0, limit_s / 4))
            oldest = time.monotonic() - limit_s
            idle = [a for a in self._active if a.heard < oldest and not a.expired]
            self.streams_idle_closed += len(idle)
            self._expire(idle)

    def _expire(self, streams: list[_Active]) -> None:
        for active in streams:
            active.expired = True
            active.task.cancel()

    async def _process(self, _requests: Any, context: Any) -> None:
        """One stream, from its first message to its end."""
        if len(self._active) >= self.limits.max_streams:
            self.streams_refused += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")
        try:
            stream = self.stream_factory()
        except MemoryError:
            self.streams_refused += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")
        except Exception as error:
            await self._fail(context, error)
        task = asyncio.current_task()
        assert task is not None
        active = _Active(task)
        self._active.add(active)
        self.streams_opened += 1
        try:
            try:
                await self._converse(stream, active, context)
            except asyncio.CancelledError:
                if not active.expired:
                    raise
                task.uncancel()
                last = stream.expire()
                if last is not None:
                    await context.write(last)
        except ProtocolError as error:
            self.protocol_errors += 1
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:DETAILS_MAX])
        except grpc.aio.BaseError:
            raise  # the peer is gone, or an abort of ours
        except Exception as error:
            await self._fail(context, error)
        finally:
            self._active.discard(active)
            self._close(stream)

    async def _converse(self, stream: Stream, active: _Active, context: Any) -> None:
        while True:
            data = await context.read()
            if data is grpc.aio.EOF:
                return
            active.heard = time.monotonic()
            self.messages += 1
            answer = stream.message(data)
            if answer is not None:
                await context.write(answer)

    async def _fail(self, context: Any, error: Exception) -> None:
        """INTERNAL to the proxy, whose failure mode then applies; what happened goes to the log only."""
        self.internal_errors += 1
        now = time.monotonic()
        if now - self._last_traceback >= TRACEBACK_EVERY_S:
            self._last_traceback = now
            log.error("a stream failed", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    def _close(self, stream: Stream) -> None:
        # closing may still ask the engine for a decision on an unfinished request
        with contextlib.suppress(Exception):
            stream.close()
