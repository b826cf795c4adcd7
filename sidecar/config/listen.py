"""Settings of the ext_proc listener."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sidecar.config.section import RESTART, Section
from sidecar.config.types import Address, Duration, FilePath, Integer, Size


class Listen(Section):
    """Where proxies reach Outrider: Envoy its ext_proc service, NGINX its auth_request server."""

    address: Address = Field(
        "127.0.0.1:9901",
        json_schema_extra=RESTART,
        description=(
            "unix:/absolute/path for a UNIX socket (fastest, and only processes that share the folder "
            "reach it), or "
            "address:port. Without listen.tls_cert_file there is no encryption: keep TCP to the loopback or to the pod."
        ),
        examples=["unix:/run/outrider/outrider.sock", "127.0.0.1:9901", "[::1]:9901"],
    )
    auth_request: Address | None = Field(
        None,
        json_schema_extra=RESTART,
        description=(
            "Where NGINX asks with auth_request (HTTP/1.1, headers only), for those who can't load a module into it; "
            "as listen.address; null for nowhere. See envoy/nginx-auth-request.conf. Bodies go unread there, and the "
            "service's answers unseen. Whoever reaches it says who its clients are: NGINX only."
        ),
        examples=["unix:/run/outrider/auth.sock", "127.0.0.1:9904"],
    )
    transport: Literal["auto", "native", "grpcio"] = Field(
        "auto",
        json_schema_extra=RESTART,
        description=(
            "What speaks gRPC: native is Outrider's own on libnghttp2, some twenty times cheaper per request; "
            "grpcio is the portable one, and the one for TLS; auto takes native where it was built and there is no TLS."
        ),
    )
    threads: Integer = Field(
        0,
        ge=0,
        le=64,
        json_schema_extra=RESTART,
        description=(
            "Threads of the native transport. 0: one for each core that this process may use, at most 4. Each "
            "connection of Envoy's (one per worker, usually) belongs to one thread."
        ),
    )
    max_connections: Integer = Field(
        1024,
        ge=1,
        le=65536,
        json_schema_extra=RESTART,
        description="Most connections of proxies at once, to each address; further ones are closed (not by grpcio).",
    )
    max_message_bytes: Annotated[int, Size("16KiB", "64MiB")] = Field(
        4 << 20,
        alias="max_message",
        json_schema_extra=RESTART,
        description=(
            "Largest message accepted from Envoy; a larger one ends its stream with an error, which is a way past "
            "Outrider where Envoy fails open: keep it above what Envoy buffers."
        ),
    )
    max_streams: Integer = Field(
        4096,
        ge=1,
        le=65536,
        json_schema_extra=RESTART,
        description=(
            "Most requests in progress at once; further ones are refused with an error, so Envoy's "
            "failure_mode_allow applies."
        ),
    )
    stream_idle_s: Annotated[float, Duration("100ms", "1h", "s", whole=False)] = Field(
        60.0,
        alias="stream_idle",
        json_schema_extra=RESTART,
        description="A stream (for auth_request: a connection) on which nothing arrives for this long is closed.",
    )
    drain_s: Annotated[float, Duration("0s", "10m", "s", whole=False)] = Field(
        10.0,
        alias="drain",
        json_schema_extra=RESTART,
        description="How long requests in progress may take to finish after a stop signal.",
    )
    tls_cert_file: FilePath | None = Field(
        None,
        json_schema_extra=RESTART,
        description="Certificate chain (PEM) to serve with TLS, over the grpcio transport. Read at the start.",
        examples=["/etc/outrider/tls/tls.crt"],
    )
    tls_key_file: FilePath | None = Field(
        None,
        json_schema_extra=RESTART,
        description="Private key (PEM) of listen.tls_cert_file.",
        examples=["/etc/outrider/tls/tls.key"],
    )
    tls_client_ca_file: FilePath | None = Field(
        None,
        json_schema_extra=RESTART,
        description=(
            "Certificates (PEM) of the authorities whose clients may connect; with it every client must show a "
            "certificate. null takes any client."
        ),
        examples=["/etc/outrider/tls/ca.crt"],
    )
