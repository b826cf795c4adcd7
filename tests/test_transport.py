"""The contract of both transports, with real gRPC clients over real sockets."""
from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from native.extproc import ExtProcStream, RecordingHost
from sidecar.serve.grpc_transport import GrpcTransport
from sidecar.serve.transport import SERVICE, Limits, Tls, Transport
from tests.extproc_messages import BLOCK, STREAMED, request_body, request_headers, response_headers

QUICK = Limits(max_message_bytes=100_000, max_streams=5, stream_idle_s=0.4)


try:
    from sidecar.serve.native_transport import NativeTransport
except ImportError:  # built without libnghttp2
    NativeTransport = None  # type: ignore[assignment,misc]

KINDS = ["grpcio", pytest.param("native", marks=pytest.mark.skipif(
    NativeTransport is None, reason="native.http2 isn't built: libnghttp2-dev is missing"))]


def make(kind: str, address: str, limits: Limits | None, host: RecordingHost) -> Any:
    if kind == "native":
        return NativeTransport(address, [host, host], limits)
    return GrpcTransport(address, lambda: ExtProcStream(host.host_address(), host), limits)


class Rig:
    """A transport on a UNIX socket, its host, and a client of it."""

    def __init__(self, folder: Path, limits: Limits, transport: Callable[[str, RecordingHost], Transport]) -> None:
        self.host = RecordingHost()
        self.address = f"unix:{folder / 'o.sock'}"
        self.transport = transport(self.address, self.host)

    async def open(self) -> None:
        await self.transport.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.raw = self.channel.stream_stream(f"/{SERVICE}/Process")
        self.process = pb_grpc.ExternalProcessorStub(self.channel).Process
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def close(self) -> None:
        await self.channel.close()
        await self.transport.stop(0)

    def count(self, name: str) -> float:
        return self.transport.stats()[name]

    async def settled(self, active: int = 0) -> None:
        """Until that many streams are left."""
        async with asyncio.timeout(5):
            while self.count("streams_active") != active:
                await asyncio.sleep(0.01)

    async def checked(self, service: str = "") -> int:
        return (await self.health.Check(health_pb2.HealthCheckRequest(service=service))).status


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def rig(tmp_path: Path, kind: str) -> AsyncIterator[Rig]:
    made = Rig(tmp_path, QUICK, lambda address, host: make(kind, address, QUICK, host))
    await made.open()
    yield made
    await made.close()


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(5):
        return await call.code(), await call.details()


async def test_a_whole_request(rig: Rig) -> None:
    call = rig.process()
    await call.write(request_headers([("a", "b")], end=True))
    assert (await call.read()).HasField("request_headers")
    await call.write(response_headers("201"))
    assert (await call.read()).HasField("response_headers")
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert (await failure(call))[0] is grpc.StatusCode.OK
    await rig.settled()
    assert rig.count("streams_opened_total") == 1
    assert rig.count("messages_total") == 2
    assert [r[1] for r in rig.host.responses] == [201]
    stats = rig.transport.stats()
    assert stats["streams_opened_total"] == 1
    assert stats["streams_active"] == stats["protocol_errors_total"] == stats["internal_errors_total"] == 0


async def test_refusal(rig: Rig) -> None:
    rig.host.refuse(BLOCK)
    call = rig.process()
    await call.write(request_headers())
    assert (await call.read()).immediate_response.status.code == 403
    call.cancel()
    await rig.settled()


@pytest.mark.parametrize(("message", "text"), [
    (b"\xff\xff\xff", "malformed protobuf"), (b"", "without a known part"),
    (request_body(b"x", True).SerializeToString(), "before request headers")])
async def test_malformed_message(rig: Rig, message: bytes, text: str) -> None:
    call = rig.raw()
    await call.write(message)
    code, details = await failure(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details
    await rig.settled()
    assert rig.count("protocol_errors_total") == 1
    assert rig.host.requests == []
    # the connection serves on
    again = rig.process()
    await again.write(request_headers())
    assert (await again.read()).HasField("request_headers")
    again.cancel()


async def test_too_large_message(rig: Rig) -> None:
    call = rig.process()
    await call.write(request_headers([("a", "x" * QUICK.max_message_bytes)]))
    assert (await failure(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    await rig.settled()
    assert rig.host.requests == []


async def test_client_that_never_ends_its_stream(rig: Rig) -> None:
    rig.host.body_mode = STREAMED
    begun = time.monotonic()
    call = rig.process()
    await call.write(request_headers(end=False))
    assert (await call.read()).HasField("mode_override")
    for _ in range(3):  # busy, then silent
        await asyncio.sleep(0.2)
        await call.write(request_body(b"x", False))
        await call.read()
    assert await call.read() is grpc.aio.EOF
    assert (await failure(call))[0] is grpc.StatusCode.OK
    assert time.monotonic() - begun > 0.9
    await rig.settled()
    assert rig.count("streams_idle_closed_total") == 1
    # decided on what had come
    assert [r["body"] for r in rig.host.requests] == [b"xxx"]


async def test_client_that_says_nothing(rig: Rig) -> None:
    call = rig.process()
    await call.wait_for_connection()
    assert (await failure(call))[0] is grpc.StatusCode.OK
    await rig.settled()
    assert rig.count("streams_idle_closed_total") == 1


async def test_dribbling_client_is_refused_on_what_came(rig: Rig) -> None:
    rig.host.body_mode = STREAMED
    rig.host.refuse(BLOCK)
    call = rig.process()
    await call.write(request_headers(end=False))
    assert (await call.read()).HasField("mode_override")
    await call.write(request_body(b"evil", False))
    await call.read()
    assert (await call.read()).immediate_response.status.code == 403
    assert (await failure(call))[0] is grpc.StatusCode.OK
    await rig.settled()
    assert [r["body"] for r in rig.host.requests] == [b"evil"]


async def test_reset_in_the_middle(rig: Rig) -> None:
    rig.host.body_mode = STREAMED
    call = rig.process()
    await call.write(request_headers(end=False))
    await call.read()
    await rig.settled(1)
    call.cancel()
    await rig.settled()
    assert len(rig.host.requests) == 1


async def test_lost_connection(rig: Rig) -> None:
    calls = [rig.process() for _ in range(3)]
    for call in calls:
        await call.write(request_headers(end=False))
        await call.read()
    await rig.settled(3)
    await rig.channel.close()
    await rig.settled()


async def test_streams_are_limited(rig: Rig) -> None:
    calls = [rig.process() for _ in range(QUICK.max_streams)]
    for call in calls:
        await call.write(request_headers(end=False))
        await call.read()
    one_more = rig.process()
    assert (await failure(one_more))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rig.count("streams_refused_total") == 1
    # health is still answered
    assert await rig.checked() == health_pb2.HealthCheckResponse.SERVING
    calls[0].cancel()
    await rig.settled(QUICK.max_streams - 1)
    again = rig.process()
    await again.write(request_headers())
    assert (await again.read()).HasField("request_headers")


async def test_unknown_method(rig: Rig) -> None:
    call = rig.channel.unary_unary("/envoy.service.auth.v3.Authorization/Check")(b"")
    assert (await failure(call))[0] is grpc.StatusCode.UNIMPLEMENTED


async def ask(call: Any) -> Any:
    await call.write(request_headers())
    return await call.read()


class Broken:
    """A stream that fails in every way."""

    def message(self, data: bytes) -> bytes | None:
        raise RuntimeError(f"secret {data!r}")

    def expire(self) -> bytes | None:
        raise RuntimeError("expired")

    def close(self) -> None:
        raise RuntimeError("again")


def broken_factory() -> Any:
    raise RuntimeError("no stream")


def full_factory() -> Any:
    raise MemoryError


@pytest.mark.parametrize(("factory", "expected"), [
    (Broken, grpc.StatusCode.INTERNAL), (broken_factory, grpc.StatusCode.INTERNAL),
    (full_factory, grpc.StatusCode.RESOURCE_EXHAUSTED)])
async def test_failure_is_an_error_and_never_an_answer(
        tmp_path: Path, factory: Any, expected: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path, QUICK, lambda address, _: GrpcTransport(address, factory, QUICK))
    await rig.open()
    try:
        for _ in range(3):
            call = rig.process()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(call)
            assert caught.value.code() is expected
            assert "secret" not in str(caught.value.details())
        await rig.settled()
        if expected is grpc.StatusCode.INTERNAL:
            assert rig.count("internal_errors_total") == 3
            assert len([r for r in caplog.records if r.name == "outrider.transport"]) == 1
    finally:
        await rig.close()


async def test_failure_when_idle_is_an_error(tmp_path: Path) -> None:
    rig = Rig(tmp_path, QUICK, lambda address, _: GrpcTransport(address, Broken, QUICK))
    await rig.open()
    try:
        call = rig.process()
        await call.wait_for_connection()
        assert (await failure(call))[0] is grpc.StatusCode.INTERNAL
        assert rig.count("internal_errors_total") == 1
    finally:
        await rig.close()


async def test_health_and_drain(rig: Rig) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert await rig.checked() == await rig.checked(SERVICE) == serving
    watch = rig.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == serving
    rig.transport.set_serving(False)
    assert (await watch.read()).status == not_serving
    assert await rig.checked() == not_serving
    # requests are served all the same, and those in progress may end
    call = rig.process()
    await call.write(request_headers(end=False))
    assert (await call.read()).HasField("request_headers")
    stopping = asyncio.create_task(rig.transport.stop(5))
    await asyncio.sleep(0.1)
    assert not stopping.done()
    await call.write(response_headers("200"))
    assert (await call.read()).HasField("response_headers")
    await call.done_writing()
    assert (await failure(call))[0] is grpc.StatusCode.OK
    begun = time.monotonic()
    await stopping  # though the watcher still watches
    assert time.monotonic() - begun < 2
    late = rig.process()
    assert (await failure(late))[0] is grpc.StatusCode.UNAVAILABLE


async def test_drain_has_an_end(rig: Rig) -> None:
    rig.host.body_mode = STREAMED
    call = rig.process()
    await call.write(request_headers(end=False))
    await call.read()
    rig.host.refuse(BLOCK)
    begun = time.monotonic()
    await rig.transport.stop(0.2)
    assert 0.1 < time.monotonic() - begun < 2
    # decided on what had come, and ended well
    assert (await call.read()).HasField("immediate_response")
    assert (await failure(call))[0] is grpc.StatusCode.OK
    assert rig.count("streams_active") == 0
    await rig.transport.stop(1)  # once more is fine


async def test_hurried_while_it_drains(rig: Rig) -> None:
    call = rig.process()
    await call.write(request_headers(end=False))
    await call.read()
    stopping = asyncio.create_task(rig.transport.stop(30))
    await asyncio.sleep(0.1)
    assert not stopping.done()
    begun = time.monotonic()
    rig.transport.hurry()
    await stopping
    assert time.monotonic() - begun < 5
    assert (await failure(call))[0] is grpc.StatusCode.OK


@pytest.mark.skipif(NativeTransport is None, reason="native.http2 isn't built: libnghttp2-dev is missing")
async def test_only_its_own_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "o.sock"
    old, new = (make("native", f"unix:{path}", None, RecordingHost()) for _ in range(2))
    await old.start()
    path.unlink()
    await new.start()
    await old.stop(0)
    assert path.exists()
    await new.stop(0)
    assert not path.exists()


async def test_a_draining_listener_refuses(kind: str) -> None:
    host = RecordingHost()
    transport = make(kind, "127.0.0.1:0", None, host)
    await transport.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{transport.port}") as channel:
        call = pb_grpc.ExternalProcessorStub(channel).Process()
        await call.write(request_headers(end=False))
        await call.read()
        stopping = asyncio.create_task(transport.stop(5))
        await asyncio.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", transport.port)
        call.cancel()
    await stopping


async def test_tcp_and_a_taken_port(kind: str) -> None:
    host = RecordingHost()
    transport = make(kind, "127.0.0.1:0", None, host)
    await transport.start()
    try:
        assert transport.port > 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{transport.port}") as channel:
            call = pb_grpc.ExternalProcessorStub(channel).Process()
            await call.write(request_headers())
            assert isinstance(await call.read(), pb.ProcessingResponse)
            call.cancel()
        other = make(kind, f"127.0.0.1:{transport.port}", None, host)
        with pytest.raises((RuntimeError, OSError)):
            await other.start()
    finally:
        await transport.stop(0)


async def test_bytes_that_are_no_http2(rig: Rig) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), preface + b"\xff" * 1000):
        def talk(data: bytes = junk) -> None:
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(3)
                s.connect(rig.address.removeprefix("unix:"))
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                while s.recv(4096):
                    pass
        await asyncio.to_thread(talk)
    assert await rig.checked() == health_pb2.HealthCheckResponse.SERVING
    assert rig.count("streams_opened_total") == 0


async def test_many_requests_at_once(tmp_path: Path, kind: str) -> None:
    rig = Rig(tmp_path, Limits(), lambda address, host: make(kind, address, None, host))
    await rig.open()
    try:
        async def one(i: int) -> None:
            call = rig.process()
            await call.write(request_headers([("n", str(i))]))
            assert (await call.read()).HasField("request_headers")
            if i % 2:
                call.cancel()
            else:
                await call.done_writing()
                assert await call.read() is grpc.aio.EOF

        async with asyncio.timeout(30):
            await asyncio.gather(*(one(i) for i in range(300)))
        await rig.settled()
        assert rig.count("streams_opened_total") == 300
        assert len(rig.host.requests) == 300
        assert rig.count("internal_errors_total") == 0
    finally:
        await rig.close()


def pem(blobs: Any) -> bytes:
    return b"".join(blob.bytes() for blob in (blobs if isinstance(blobs, list) else [blobs]))


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls(mutual: bool) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    ours, client, foreign = (ca.issue_cert("localhost") for ca in (authority, authority, stranger))
    root = authority.cert_pem.bytes()
    host = RecordingHost()
    tls = Tls(pem(ours.cert_chain_pems), pem(ours.private_key_pem), root if mutual else None)
    assert b"PRIVATE" in tls.key
    assert "PRIVATE" not in repr(tls)
    transport = GrpcTransport("127.0.0.1:0", lambda: ExtProcStream(host.host_address(), host), None, tls)
    await transport.start()

    async def reached(certificate: Any) -> bool:
        chain, key = (None, None) if certificate is None else (
            pem(certificate.cert_chain_pems), pem(certificate.private_key_pem))
        credentials = grpc.ssl_channel_credentials(root, key, chain)
        async with grpc.aio.secure_channel(f"localhost:{transport.port}", credentials) as channel:
            call = pb_grpc.ExternalProcessorStub(channel).Process(timeout=5)
            try:
                await call.write(request_headers())
                return isinstance(await call.read(), pb.ProcessingResponse)
            except grpc.aio.AioRpcError:
                return False

    try:
        assert await reached(client)
        assert await reached(None) != mutual
        assert await reached(foreign) != mutual
        async with grpc.aio.insecure_channel(f"127.0.0.1:{transport.port}") as channel:
            call = pb_grpc.ExternalProcessorStub(channel).Process(timeout=5)
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(call)
    finally:
        await transport.stop(0)


async def test_tls_that_is_no_pem() -> None:
    host = RecordingHost()
    tls = Tls(b"no certificate", b"no key")
    transport = GrpcTransport("127.0.0.1:0", lambda: ExtProcStream(host.host_address(), host), None, tls)
    with pytest.raises((RuntimeError, ValueError)):
        await transport.start()
    await transport.stop(0)
