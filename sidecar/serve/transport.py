"""What the transports have in common: what they serve, and what one server takes on.

native_transport is the fast one (libnghttp2, threads without the interpreter's lock); grpc_transport
is the portable one. Both drive the same ext_proc machine and pass the same tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
HEALTH_STREAMS_MAX = 64  # room for health checks beside max_streams
LAST_WORDS_S = 1.0  # for ending the streams that are still there when the grace period is over


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    max_message_bytes: of a message received. Keep it above the proxy's own buffer limit (1 MiB unless
    per_connection_buffer_limit_bytes says otherwise, and it overshoots): what is larger is an error, and so
    a way past us where the proxy fails open.
    max_streams: requests in progress, over all connections; more are refused with RESOURCE_EXHAUSTED.
    max_connections: further ones are closed at once (grpcio has no such limit).
    stream_idle_s: after this long without a message a stream is ended (within a quarter of it, at most a
    second later). It ends well, not with an error: a slow upstream is no fault, and a client that dribbles
    its body must not choose how we fail. Its request is decided on what is known. Envoy's
    request_timeout should be shorter, so that a body that dribbles on past this isn't let through unread.
    keepalive_s: a connection on which nothing moves is pinged this often, and given up when no
    answer comes within keepalive_timeout_s.
    """

    max_message_bytes: int = 4 << 20
    max_streams: int = 4096
    max_connections: int = 1024
    stream_idle_s: float = 60.0
    keepalive_s: float = 30.0
    keepalive_timeout_s: float = 10.0


@dataclass(frozen=True)
class Tls:
    """PEM texts: our certificate chain and key, and the authorities whose clients may connect (None: any client)."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None


class Transport(Protocol):
    """What serves the streams."""

    async def start(self) -> None:
        """Listens and serves. RuntimeError or OSError when the address cannot be had."""

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, takes no new streams, waits grace_s for those in progress, then ends them
        as idle ones are ended: decided on what is known, without an error."""

    def hurry(self) -> None:
        """While stop() waits: don't wait any longer."""

    def set_serving(self, serving: bool) -> None:
        """What the gRPC health service says from now on; requests are served in either case."""

    def stats(self) -> Mapping[str, float]:
        """The counters by metric name; those ending in _total only ever grow."""
