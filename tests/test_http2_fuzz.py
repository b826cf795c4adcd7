"""Bytes that no proxy would send, into the native transport: HTTP/2, gRPC and protobuf at once.

Whatever comes, the server neither crashes nor keeps anything: when the peer is gone no stream and no
byte is left, and another peer is served. `make fuzz` runs this under AddressSanitizer, with every read in
a block of memory of its exact size.
"""
from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("native.http2", reason="native.http2 isn't built: libnghttp2-dev is missing")

from tests.extproc_messages import BLOCK, BUFFERED, STREAMED, request_body, request_headers, response_headers
from tests.http2_peer import CHECK, PROCESS, WATCH, Peer, frame, serve

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
DATA, HEADERS, CONTINUATION = 0, 1, 9


def raw_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers_block(path: str, extra: Sequence[tuple[str, str]] = ()) -> bytes:
    block: bytes = Encoder().encode([(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "o"),
                                     ("content-type", "application/grpc"), ("te", "trailers"), *extra])
    return block


MESSAGES = [request_headers(), request_headers(end=False), request_headers([("x", "y" * 3000)], end=False),
            request_body(b"q" * 700, False), request_body(b"", True), response_headers("200"),
            response_headers("404")]
texts = st.lists(st.sampled_from(MESSAGES), min_size=0, max_size=5).map(lambda m: b"".join(map(frame, m)))
# a conversation as Envoy has it, before anything is done to it
opening = st.sampled_from([PROCESS, CHECK, WATCH, "/nothing"])


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Mostly valid: streams opened in order, messages in frames of any cut, ends of every kind."""
    out = [PREFACE, SETTINGS]
    for stream in range(1, 2 * draw(st.integers(1, 6)), 2):
        out.append(raw_frame(HEADERS, 4 | draw(st.sampled_from([0, 0, 0, 1])), stream, headers_block(draw(opening))))
        text = draw(texts)
        while text:
            n = draw(st.integers(1, len(text)))
            out.append(raw_frame(DATA, 1 if n == len(text) and draw(st.booleans()) else 0, stream, text[:n]))
            text = text[n:]
        match draw(st.integers(0, 4)):
            case 0:
                out.append(raw_frame(3, 0, stream, (8).to_bytes(4, "big")))  # RST_STREAM
            case 1:
                out.append(raw_frame(HEADERS, 5, stream, Encoder().encode([("x-trailer", "1")])))
            case 2:
                out.append(raw_frame(8, 0, draw(st.sampled_from([0, stream])), draw(st.binary(min_size=4, max_size=4))))
            case 3:
                out.append(raw_frame(6, 0, 0, bytes(8)))  # PING
    return b"".join(out)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Frames of any kind, flags, stream and payload, some of them with sensible insides."""
    out = [PREFACE, SETTINGS]
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.integers(0, 12))
        insides = st.binary(max_size=60)
        if kind == DATA:
            insides = st.one_of(insides, texts)
        elif kind in (HEADERS, CONTINUATION):
            insides = st.one_of(insides, opening.map(headers_block))
        out.append(raw_frame(kind, draw(st.integers(0, 255)), draw(st.integers(0, 9)), draw(insides)))
    return b"".join(out)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A conversation with bytes changed, left out, doubled."""
    data = bytearray(draw(conversations()))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                data[at] = draw(st.integers(0, 255))
            case 1:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 2:
                del data[at:at + draw(st.integers(1, 20))]
                data = data or bytearray(b"x")
            case _:
                data[at:at] = data[at:at + draw(st.integers(1, 200))]
    return bytes(data)


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(conversations(), damaged(), frames(), st.binary(max_size=400), st.binary(max_size=99).map(
    lambda b: PREFACE + b)), cuts=st.lists(st.integers(1, 400), max_size=20), mode=st.integers(0, 3), end=st.booleans())
def test_any_bytes(data: bytes, cuts: list[int], mode: int, end: bool) -> None:
    server = serve(streams=4, message_bytes=5000, memory_bytes=20_000)
    host = server.host
    host.body_mode = (0, BUFFERED, STREAMED, STREAMED)[mode]
    if mode == 3:
        host.refuse(BLOCK)
    mine, theirs = socket.socketpair()
    with mine:
        mine.setblocking(False)
        server.adopt(theirs.detach(), exact=True)
        try:
            for n in cuts:
                mine.send(data[:n])
                data = data[n:]
                server.step()
            mine.send(data)
        except OSError:
            pass  # it has hung up on us, or we talk too fast
        for _ in range(3):
            server.step()
        stats = server.stats()
        assert stats["streams"] <= 4
        assert stats["memory_bytes"] <= 20_000
        assert len(host.requests) <= stats["streams_opened"]
        if end:
            server.stop("closing")
            server.step()
            server.stop("expiring")
            server.step()
    server.step()
    server.step()
    stats = server.stats()
    assert stats["streams"] == stats["watchers"] == stats["memory_bytes"] == stats["connections"] == 0
    if not end:
        host.action = host.enforced = 0
        peer = Peer(server)
        try:
            assert peer.ask(request_headers())[0].HasField("request_headers")
        finally:
            Peer.made.pop().close()
