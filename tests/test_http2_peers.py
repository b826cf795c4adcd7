"""The native transport and peers that are clumsy, slow, silent or hostile."""
from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, PingReceived

pytest.importorskip("native.http2", reason="native.http2 isn't built: libnghttp2-dev is missing")

from native.extproc import RecordingHost
from native.http2 import Server
from sidecar.serve.native_transport import NativeTransport
from sidecar.serve.transport import SERVICE, Limits
from tests.extproc_messages import BLOCK, STREAMED, request_body, request_headers, response_headers
from tests.http2_peer import CHECK, LIMITS, PROCESS, WATCH, Peer, Served, dead, frame, serve, until

OK, INVALID, EXHAUSTED, UNIMPLEMENTED, UNAVAILABLE = 0, 3, 8, 12, 14
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while Peer.made:
        Peer.made.pop().close()


@pytest.fixture
def server() -> Served:
    return serve()


def fine(server: Served) -> None:
    """Another peer is served as if nothing were."""
    peer = Peer(server)
    assert peer.ask(request_headers())[0].HasField("request_headers")
    peer.close()
    server.step()


# ---- messages and frames


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 64, 1000])
def test_messages_cut_anyhow(server: Served, size: int) -> None:
    peer = Peer(server)
    stream = peer.open()
    text = b"".join(map(frame, (request_headers([("a", "x" * 300)], end=True), response_headers("404"))))
    for at in range(0, len(text), size):
        peer.say(stream, text[at:at + size])
        peer.flush()
        server.step()
    peer.h2.end_stream(stream)
    peer.flush()
    peer.read()
    assert [a.WhichOneof("response") for a in peer.answers(stream)] == ["request_headers", "response_headers"]
    assert peer.status(stream) == (OK, "")
    assert [r[1] for r in server.host.responses] == [404]
    assert server.stats()["memory_bytes"] == 0


def test_many_messages_in_one_frame(server: Served) -> None:
    server.host.body_mode = STREAMED
    peer = Peer(server)
    stream = peer.open()
    parts = [request_headers(end=False), *(request_body(b"%d," % i, i == 99) for i in range(100))]
    peer.say(stream, b"".join(map(frame, parts)), end=True)
    peer.flush()
    peer.read()
    assert len(peer.answers(stream)) == 101
    assert server.host.requests[0]["body"] == b"".join(b"%d," % i for i in range(100))
    assert peer.status(stream)[0] == OK


def test_a_long_message_over_many_frames(server: Served) -> None:
    server.host.body_mode = STREAMED
    server.host.limit_bytes = 1 << 20
    peer = Peer(server)
    stream = peer.open()
    body = bytes(range(256)) * 360  # 92 KB
    text = frame(request_headers(end=False)) + frame(request_body(body, True))
    for at in range(0, len(text), 10_000):
        peer.say(stream, text[at:at + 10_000])
    peer.flush()
    peer.read()
    assert len(peer.answers(stream)) == 2
    assert server.host.requests[0]["body"] == body
    assert server.stats()["memory_bytes"] == 0


@pytest.mark.parametrize(("data", "end", "status", "text"), [
    (frame(request_headers(), flag=1), False, UNIMPLEMENTED, "compressed"),
    (b"\0\xff\xff\xff\xff", False, EXHAUSTED, "message too large"),
    (frame(request_headers())[:-1], True, INVALID, "ended within a message"),
    (b"\0\0", True, INVALID, "ended within a message"),
    (frame(b"\xff\xff"), False, INVALID, "malformed protobuf"),
    (frame(b""), False, INVALID, "without a known part"),
])
def test_bad_messages(server: Served, data: bytes, end: bool, status: int, text: str) -> None:
    peer = Peer(server)
    stream = peer.open()
    peer.say(stream, data, end=end)
    peer.flush()
    peer.read()
    found = peer.status(stream)
    assert found[0] == status
    assert text in found[1]
    assert server.stats()["protocol_errors"] == 1
    assert server.stats()["streams"] == 0
    assert server.host.requests == []
    if not end:  # told to stop, without an error of HTTP/2's
        assert peer.resets[stream] == ErrorCodes.NO_ERROR
    # what is still said on it is ignored; the connection serves on
    assert peer.ask(request_headers())[0].HasField("request_headers")


@pytest.mark.parametrize(("what", "status"), [
    ({"path": "/x.Y/Z"}, UNIMPLEMENTED), ({"method": "GET"}, UNIMPLEMENTED), ({"kind": "text/html"}, UNIMPLEMENTED),
    ({"path": f"/{SERVICE}/Process2"}, UNIMPLEMENTED), ({"extra": [("x", "y" * 20_000)]}, EXHAUSTED)])
def test_bad_requests(server: Served, what: dict[str, object], status: int) -> None:
    peer = Peer(server)
    stream = peer.open(**what)  # type: ignore[arg-type]
    peer.flush()
    peer.read()
    assert peer.status(stream)[0] == status
    assert peer.headers[stream][b":status"] == b"200"
    assert server.stats()["streams_opened"] == 0
    fine(server)


def test_headers_that_never_end(server: Served) -> None:
    """CONTINUATION after CONTINUATION: ended by the library before it costs memory."""
    peer = Peer(server)
    block = peer.h2.encoder.encode([("x", "y" * 8000)], huffman=False)
    raw = len(block).to_bytes(3, "big") + b"\x01\x00\0\0\0\x01" + block
    more = len(block).to_bytes(3, "big") + b"\x09\x00\0\0\0\x01" + block
    try:
        peer.socket.sendall(raw)
        for _ in range(200):
            peer.socket.sendall(more)
            server.step()
    except OSError:
        pass
    until(server, lambda: dead(peer.socket))
    assert server.stats()["connections"] == 0
    fine(server)


# ---- health


def test_health(server: Served) -> None:
    peer = Peer(server)

    def check(name: bytes) -> int:
        stream = peer.open(CHECK)
        peer.say(stream, frame(health_pb2.HealthCheckRequest(service=name.decode())), end=True)
        peer.flush()
        peer.read()
        return stream

    for name in (b"", SERVICE.encode()):
        stream = check(name)
        assert [health_pb2.HealthCheckResponse.FromString(m).status for m in peer.messages(stream)] == [1]
        assert peer.status(stream)[0] == OK
    stream = check(b"who?")
    assert peer.status(stream)[0] == 5
    stream = peer.open(CHECK, end=True)
    peer.flush()
    peer.read()
    assert peer.status(stream) == (INVALID, "no message")
    watch = peer.open(WATCH)
    peer.say(watch, frame(b""), end=True)
    peer.flush()
    peer.read()
    server.set_serving(False)
    peer.read()
    server.set_serving(True)
    server.set_serving(True)
    peer.read()
    assert [m[1] for m in peer.messages(watch)] == [1, 2, 1]
    assert server.stats()["watchers"] == 1
    peer.h2.reset_stream(watch)
    peer.flush()
    peer.read()
    assert server.stats()["watchers"] == 0


def test_watchers_are_limited(server: Served) -> None:
    peers = [Peer(server), Peer(server)]
    for i in range(70):
        peer = peers[i % 2]
        stream = peer.open(WATCH)
        peer.say(stream, frame(b""))
        peer.flush()
        peer.read()
        assert (stream in peer.ended) == (i >= 64)
    assert server.stats()["watchers"] == 64


# ---- the peer doesn't read, doesn't speak, speaks slowly


def test_flow_control(server: Served) -> None:
    peer = Peer(server, window=0)
    stream = peer.open()
    peer.say(stream, frame(request_headers()) + frame(response_headers("200")), end=True)
    peer.flush()
    peer.read()
    assert peer.data[stream] == b""
    for n in (1, 4, 1):  # a byte or some at a time
        peer.h2.increment_flow_control_window(n, stream)
        peer.flush()
        peer.read()
    assert len(peer.data[stream]) == 6
    peer.h2.increment_flow_control_window(10_000, stream)
    peer.flush()
    peer.read()
    assert len(peer.answers(stream)) == 2
    assert peer.status(stream)[0] == OK


def test_stream_that_takes_nothing(server: Served) -> None:
    """Answers pile up behind a closed window: to a bound, then the stream is reset."""
    server.host.body_mode = STREAMED
    peer = Peer(server, window=0)
    stream = peer.open()
    peer.say(stream, frame(request_headers(end=False)))
    most = 0
    for _ in range(2000):
        peer.say(stream, b"".join([frame(request_body(b"x", False))] * 100))
        peer.flush()
        peer.read(1)
        most = max(most, server.stats()["memory_bytes"])
        if stream in peer.resets:
            break
    assert peer.resets[stream] == ErrorCodes.CANCEL
    assert server.stats()["streams_dropped"] == 1
    assert most <= 1 << 18
    assert server.stats()["memory_bytes"] == 0
    fine(server)


def test_answered_and_never_read() -> None:
    """Ended by us, but the peer's window keeps the status from it: it doesn't hold the stream for ever."""
    server = serve(idle_s=0.2)
    peer = Peer(server, window=0)
    stream = peer.open()
    peer.say(stream, frame(request_headers()), end=True)
    peer.flush()
    peer.read()
    until(server, lambda: server.stats()["streams_dropped"] == 1)
    peer.read()
    assert stream in peer.resets


def test_slow_reader() -> None:
    """A peer that writes and never reads: reading from it stops, it is dropped in time, others don't notice."""
    server = serve(keepalive_timeout_s=0.5, streams=5000, connections=10)
    peer = Peer(server, buffer_bytes=4096)
    sent = 0
    try:
        for _ in range(3000):
            stream = peer.open()
            peer.say(stream, frame(request_headers()))
            data = peer.h2.data_to_send()
            assert peer.socket.send(data) == len(data)
            sent += 1
            if sent % 10 == 0:
                server.step()
    except BlockingIOError:
        pass  # it doesn't read from us any more
    fine(server)
    assert len(server.host.requests) < sent
    assert server.stats()["memory_bytes"] <= 1 << 18
    until(server, lambda: server.stats()["connections_dropped"] == 1)
    until(server, lambda: dead(peer.socket))
    assert server.stats()["streams"] == 0
    fine(server)


@pytest.mark.parametrize("path", [PROCESS, CHECK, WATCH])
def test_ten_thousand_streams(path: str) -> None:
    """Each of 18 connections keeps to what was announced to it; together they open ten thousand and end none."""
    server = serve(streams=2000, connections=20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peers = [Peer(server) for _ in range(18)]
    opened = 0
    for peer in peers:
        for _ in range(560):
            stream = peer.open(path)
            if path == PROCESS:
                peer.say(stream, frame(request_headers(end=False)))
            opened += 1
        peer.flush()
        peer.read(3)
        assert not peer.closed
    assert opened > 10_000
    stats = server.stats()
    assert stats["streams"] == (2000 if path == PROCESS else 0)
    assert stats["streams_refused"] >= opened - 2000 - 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # most of it the peers' own
    for peer in peers:
        peer.close()
    for _ in range(5):
        server.step()
    assert server.stats()["streams"] == server.stats()["connections"] == 0
    fine(server)


def test_more_streams_than_were_announced(server: Served) -> None:
    """The connection that breaks its limit is ended, and counted; others are served."""
    peer = Peer(server)
    peer.h2._open_streams = lambda remainder: 0  # type: ignore[method-assign]
    for _ in range(400):
        stream = peer.open()
        peer.say(stream, frame(request_headers(end=False)))
    peer.flush()
    peer.read(3)
    assert peer.closed
    assert server.stats()["connections_dropped"] == 1
    assert server.stats()["streams"] == 0
    fine(server)


def test_a_byte_now_and_then() -> None:
    server = serve(keepalive_s=0.3, keepalive_timeout_s=0.3, idle_s=0.3)
    before_hello = Peer(server, shake_hands=False)
    in_a_message = Peer(server)
    stream = in_a_message.open()
    text = frame(request_headers())
    in_a_frame = Peer(server)
    begun = time.monotonic()
    at = 0
    ping = b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)
    while time.monotonic() - begun < 1.2:
        for peer, data in ((before_hello, PREFACE[at:at + 1]), (in_a_frame, ping[at:at + 1])):
            try:
                peer.socket.send(data)
            except OSError:
                peer.closed = True
        if stream not in in_a_message.ended:
            in_a_message.say(stream, text[at:at + 1])
            in_a_message.flush()
        in_a_message.read(1)
        at += 1
        fine(server)
        time.sleep(0.1)
    assert dead(before_hello.socket)
    assert before_hello.closed
    assert in_a_frame.closed
    # its stream ended well, and the connection, which answers pings, lives
    assert in_a_message.status(stream)[0] == OK
    assert not in_a_message.closed
    assert server.stats()["streams_idle_closed"] == 1
    assert server.stats()["connections_dropped"] == 2


def test_silent_connection_is_pinged() -> None:
    server = serve(keepalive_s=0.2, keepalive_timeout_s=0.3)
    good, deaf = Peer(server), Peer(server)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        good.read(1)
        time.sleep(0.02)
    assert any(isinstance(e, PingReceived) for e in good.events)
    assert not good.closed
    assert dead(deaf.socket)


def test_unfinished_messages_are_limited() -> None:
    """Each stream announces much and sends half of it."""
    server = serve(memory_bytes=500_000, streams=300)
    peer = Peer(server)
    streams = [peer.open() for _ in range(20)]
    peer.flush()
    peer.read()
    for stream in streams:
        peer.say(stream, b"\0" + (90_000).to_bytes(4, "big"))
        for _ in range(5):
            if stream not in peer.ended:
                peer.say(stream, bytes(9000))
                peer.flush()
                peer.read(1)
    stats = server.stats()
    assert stats["memory_bytes"] <= 500_000
    refused = [s for s in streams if s in peer.ended]
    assert 5 <= len(refused) == stats["streams_refused"] < 20
    assert {peer.status(s)[0] for s in refused} == {EXHAUSTED}
    fine(server)
    peer.close()
    server.step()
    assert server.stats()["memory_bytes"] == 0


def test_reset_storm(server: Served) -> None:
    """Envoy ends every stream by a reset: 20,000 on one connection mustn't look like an attack."""
    peer = Peer(server)
    for i in range(20_000):
        stream = peer.open()
        peer.say(stream, frame(request_headers()))
        peer.h2.reset_stream(stream)
        if i % 50 == 0:
            peer.flush()
            peer.read(1)
    peer.flush()
    peer.read(20)
    assert not peer.closed
    assert server.stats()["streams"] == 0
    assert server.stats()["streams_opened"] == 20_000
    assert len(server.host.requests) == 20_000
    assert peer.ask(request_headers())[0].HasField("request_headers")


@pytest.mark.parametrize("flood", [b"\0\0\x08\x06\0\0\0\0\0" + bytes(8), b"\0\0\0\x04\0\0\0\0\0"],
                         ids=["ping", "settings"])
def test_floods_without_reading(flood: bytes) -> None:
    """Every one wants an answer that nobody takes."""
    server = serve(keepalive_timeout_s=0.5)
    peer = Peer(server, buffer_bytes=4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    for _ in range(3000):
        try:
            sent += peer.socket.send(flood * 1000)
        except BlockingIOError:
            pass
        except OSError:
            break
        server.step()
    fine(server)
    until(server, lambda: server.stats()["connections_dropped"] == 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


# ---- ends


def test_goaway_of_the_peer(server: Served) -> None:
    server.host.body_mode = STREAMED
    peer = Peer(server)
    stream = peer.open()
    peer.say(stream, frame(request_headers(end=False)))
    peer.flush()
    peer.read()
    peer.socket.send(b"\0\0\x08\x07\0\0\0\0\0" + bytes(8))  # GOAWAY, no error
    peer.read()
    peer.socket.send(len(text := frame(request_body(b"x", True))).to_bytes(3, "big") + b"\0\1\0\0\0"
                     + bytes([stream]) + text)
    peer.read()
    assert len(peer.answers(stream)) == 2
    assert peer.status(stream)[0] == OK
    assert server.stats()["streams"] == 0


def test_half_closed_socket(server: Served) -> None:
    """All is said and the socket closed for writing at once: still answered."""
    peer = Peer(server)
    stream = peer.open()
    peer.say(stream, frame(request_headers()), end=True)
    peer.flush()
    peer.socket.shutdown(socket.SHUT_WR)
    peer.read(5)
    assert peer.answers(stream)[0].HasField("request_headers")
    assert peer.status(stream)[0] == OK
    assert peer.closed
    assert server.stats()["connections"] == 0


def test_cut_in_the_middle(server: Served) -> None:
    server.host.body_mode = STREAMED
    peer = Peer(server)
    for _ in range(5):
        stream = peer.open()
        peer.say(stream, frame(request_headers(end=False)))
    peer.flush()
    peer.read()
    assert server.stats()["streams"] == 5
    peer.close()
    until(server, lambda: server.stats()["connections"] == 0)
    assert server.stats()["streams"] == 0
    assert len(server.host.requests) == 5  # decided on what had come
    fine(server)


def test_connections_are_limited(server: Served) -> None:
    """Over a real listener, since it is there that they are counted."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen(64)
    listener.setblocking(False)
    host = RecordingHost()
    own = Server([host], listener.fileno(), **LIMITS)
    clients = []
    for _ in range(LIMITS["connections"] + 3):
        client = socket.socket(socket.AF_UNIX)
        client.connect(listener.getsockname())
        client.setblocking(False)
        clients.append(client)
        own.step(10)
    until(own, lambda: sum(map(dead, clients)) == 3)
    assert own.stats()["connections_refused"] == 3
    clients[0].close()
    until(own, lambda: own.stats()["connections"] == LIMITS["connections"] - 1)
    late = socket.socket(socket.AF_UNIX)
    late.connect(listener.getsockname())
    late.setblocking(False)
    until(own, lambda: own.stats()["connections_opened"] == LIMITS["connections"] + 1)
    assert not dead(late)
    for client in [*clients[1:], late]:
        client.close()
    listener.close()


def test_drain_of_one_connection() -> None:
    server = serve()
    server.host.body_mode = STREAMED
    idle, busy = Peer(server), Peer(server)
    stream = busy.open()
    busy.say(stream, frame(request_headers(end=False)))
    busy.flush()
    busy.read()
    server.stop("closing")
    busy.read()
    assert any(isinstance(e, ConnectionTerminated) for e in busy.events)
    # a stream that was on its way is served ...
    crossing = busy.open()
    busy.say(crossing, frame(request_headers()))
    busy.flush()
    busy.read()
    assert busy.answers(crossing)[0].HasField("request_headers")
    until(server, lambda: dead(idle.socket))
    # ... and the one in progress may end
    server.host.refuse(BLOCK)
    server.stop("expiring")
    busy.read(10)
    assert busy.answers(stream)[-1].HasField("immediate_response")
    assert busy.status(stream)[0] == OK
    until(server, lambda: server.stats()["connections"] == 0)
    assert not server.step()


def test_dead_at_once() -> None:
    server = serve()
    peer = Peer(server)
    peer.ask(request_headers())
    server.stop("dead")
    assert not server.step()
    assert dead(peer.socket)
    assert server.stats()["streams"] == 0


# ---- threads


async def test_connections_are_dealt_evenly(tmp_path: Path) -> None:
    hosts = [RecordingHost() for _ in range(4)]
    transport = NativeTransport(f"unix:{tmp_path / 'o.sock'}", hosts, Limits())
    await transport.start()
    channels = []
    try:
        for _ in range(12):
            channel = grpc.aio.insecure_channel(
                f"unix:{tmp_path / 'o.sock'}", options=[("grpc.use_local_subchannel_pool", 1)])
            channels.append(channel)
            call = pb_grpc.ExternalProcessorStub(channel).Process()
            await call.write(request_headers())
            assert (await call.read()).HasField("request_headers")
            call.cancel()
        assert [len(host.requests) for host in hosts] == [3, 3, 3, 3]
        assert transport.stats()["connections"] == 12
    finally:
        for channel in channels:
            await channel.close()
        await transport.stop(0.5)
    assert not any(t.name.startswith("outrider-io") for t in threading.enumerate())
    assert not (tmp_path / "o.sock").exists()


@pytest.mark.parametrize(("change", "text"), [
    ({"connections": 0}, "limit is 0"), ({"message_bytes": 1 << 30}, "64 MiB"), ({"idle_s": 0.0}, "10 ms")])
def test_limits_out_of_range(change: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        serve(**change)
    with pytest.raises(ValueError, match="1 to 64 threads"):
        Server([], -1, **LIMITS)
