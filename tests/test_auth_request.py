"""The auth_request server on the wire, and that it judges headers as ext_proc does. With a real NGINX:
tests/nginx/test_nginx_auth_request.py."""
from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from extproc_messages import request_headers
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.serve import auth_request
from sidecar.serve.auth_request import AuthServer

SQL = "/search?q=%27%20OR%201%3D1%20UNION%20SELECT%20password%20FROM%20users--"


# ---- the wire


class Judge:
    """Refuses /no, fails at /broken, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bytes, bytes, list[tuple[bytes, bytes]], bytes]] = []

    def decide(self, method: bytes, target: bytes, authority: bytes, headers: list[tuple[bytes, bytes]],
               peer: bytes) -> Any:
        self.asked.append((method, target, authority, headers, peer))
        if target == b"/broken":
            raise RuntimeError("no")
        refused = target == b"/no"
        return SimpleNamespace(status=429 if refused else 0, retry_after_s=30 if refused else 0, told=refused,
                               action="throttle", score=0.89996, id="00000000000000ff")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[AuthServer]:
    server = AuthServer("127.0.0.1:0", Judge(), connections_max=4, idle_s=0.5)
    await server.start()
    yield server
    await server.stop()


def question(target: bytes = b"/", *more: bytes, line: bytes = b"GET /outrider HTTP/1.1", real: bytes = b"192.0.2.1",
             method: bytes = b"GET") -> bytes:
    return b"\r\n".join([line, b"Host: shop.example", b"X-Original-Method: " + method, b"X-Original-URI: " + target,
                         b"X-Real-IP: " + real, *more, b"", b""])


async def ask(server: AuthServer, data: bytes, *, end: bool = False) -> bytes:
    """All that comes until the server closes, or after `end` of ours."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        if end:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


async def test_the_wire_of_a_pass_and_a_refusal(server: AuthServer) -> None:
    got = await ask(server, question() + question(b"/no", b"Connection: close"))
    assert got == (
        b"HTTP/1.1 204 No Content\r\n\r\n"
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nX-Outrider-Status: 429\r\nRetry-After: 30\r\n"
        b"X-Outrider-Action: throttle\r\nX-Outrider-Score: 0.9000\r\nX-Outrider-Id: 00000000000000ff\r\n"
        b"Connection: close\r\n\r\n")
    method, target, authority, headers, peer = server.judge.asked[0]  # type: ignore[attr-defined]
    assert (method, target, authority, peer) == (b"GET", b"/", b"shop.example", b"192.0.2.1")
    assert headers == [(b"x-real-ip", b"192.0.2.1")]


async def test_requests_in_single_bytes(server: AuthServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for byte in question(b"/no", b"Accept: a", b"ACCEPT: b"):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).startswith(b"HTTP/1.1 403 ")
    assert server.judge.asked[0][3][:2] == [(b"accept", b"a"), (b"accept", b"b")]  # type: ignore[attr-defined]
    writer.close()


@pytest.mark.parametrize(("data", "status", "why"), [
    (b"\x16\x03\x01\x02\x00\x01\x00", 400, b"not HTTP"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, b"not HTTP"),
    (question(b"/", b"Bad Name: x"), 400, b"not HTTP"),
    (question(b"/", b"X: a\x00b"), 400, b"not HTTP"),
    (question(b"/", b"Content-Length: 5") + b"hello", 413, b"no body"),
    (question(b"/", b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n", 413, b"no body"),
    (question(b"/", b"Connection: upgrade", b"Upgrade: websocket"), 400, b"another protocol"),
    (question(line=b"POST / HTTP/1.1"), 405, b"is a GET"),
    (question(line=b"HEAD / HTTP/1.1"), 405, b"is a GET"),
    (question(b""), 400, b"no x-original-uri"),
    (question(method=b""), 400, b"no x-original-method"),
    (question(real=b""), 400, b"no x-real-ip"),
    (question(b"/", b"x-original-uri: /other"), 400, b"x-original-uri is there twice"),
    (question(b"/", b"X-REAL-IP: 10.0.0.1"), 400, b"x-real-ip is there twice"),
    (question(b"/", b"Host: other"), 400, b"host is there twice"),
    (b"GET / HTTP/1.1\r\n\r\n", 400, b"no x-original-method"),
    (question(b"/", b"X: " + b"a" * (65 << 10)), 431, b"bytes of headers"),
    (question(b"/" + b"a" * (65 << 10)), 431, b"bytes of headers"),
    (b"GET /" + b"a" * (200 << 10), 431, b"bytes of headers"),
    (question(b"/", *[b"A: b"] * 300), 431, b"256 of them"),
    (question(b"/broken"), 500, b"deciding failed"),
])
async def test_what_is_no_subrequest_gets_an_error_and_the_connection_ends(
    server: AuthServer, data: bytes, status: int, why: bytes
) -> None:
    got = await ask(server, data)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), got
    assert b"Connection: close" in head
    assert why in body
    assert len(body) == int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
    assert server.counts["faults_total"] == 1
    assert server.counts["internal_errors_total"] == (status == 500)
    # others are served on
    assert (await ask(server, question(b"/", b"Connection: close"))).startswith(b"HTTP/1.1 204 ")


class Pipe(asyncio.Transport):
    """Where a peer's answers go; it has no socket."""

    def __init__(self) -> None:
        super().__init__()
        self.out = b""
        self.ended = False

    def write(self, data: Any) -> None:
        assert not self.ended, "written after the last answer"
        self.out += data

    def write_eof(self) -> None:
        self.ended = True


PIECES = (b"GET /o HTTP/1.1\r\n", b"X-Original-Method: GET\r\n", b"X-Original-URI: /\r\n", b"X-Real-IP: ::1\r\n",
          b"Host: a\r\n", b"Content-Length: 0\r\n", b"Content-Length: 3\r\n", b"\r\n", b"\n", b": ", b" folded\r\n",
          b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"Connection: close\r\n", b"A" * 3000,
          question(), question(b"/no"), question(b"/broken"), question()[:50], question()[50:],
          b"Upgrade: h2c\r\nConnection: upgrade\r\n")


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=40)), max_size=40))
def test_any_bytes_in_any_pieces(pieces: list[bytes]) -> None:
    """Each whole answer is one of ours, nothing follows the last, nothing escapes, and what is kept is bounded."""
    server = AuthServer("127.0.0.1:0", Judge())
    peer, pipe = auth_request._Peer(server), Pipe()
    peer.connection_made(pipe)
    for piece in pieces:
        peer.data_received(piece)
        assert peer.size <= auth_request.HEAD_BYTES_MAX + len(piece)
    heads = re.findall(rb"HTTP/1\.1 (\d+) [A-Za-z ]+\r\n", pipe.out)
    assert set(heads) <= {b"204", b"403", b"400", b"405", b"413", b"431", b"500"}
    faults = [head for head in heads if head not in (b"204", b"403")]
    assert len(faults) == server.counts["faults_total"] <= 1
    assert not faults or heads[-1] == faults[0]
    assert len(heads) - len(faults) == server.counts["requests_total"]
    assert peer.closing == pipe.ended
    peer.connection_lost(None)
    assert not server.peers


async def test_many_requests_at_once_are_cut_off(server: AuthServer) -> None:
    got = await ask(server, question() * 100)
    assert got.count(b" 204 ") == auth_request.AT_ONCE_MAX
    assert b" 400 " in got


async def test_connections_beyond_the_limit_are_closed(server: AuthServer) -> None:
    held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(4)]
    for _, writer in held:
        writer.write(question())
    for reader, _ in held:
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    with_nothing = await asyncio.wait_for(_read(reader), 20)
    assert with_nothing == b""
    assert server.stats()["connections_refused_total"] == 1
    for _, other in [*held, (reader, writer)]:
        other.close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize("sent", [b"", question(), question()[:-4]], ids=["nothing", "a request", "part of one"])
async def test_idle_and_slow_connections_are_dropped(
    server: AuthServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(auth_request, "HEAD_TIMEOUT_S", 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent)
    assert (await asyncio.wait_for(_read(reader), 20)).count(b" 204 ") == (sent == question())
    assert server.stats()["connections_dropped_total"] == 1
    writer.close()


async def test_a_peer_that_reads_nothing_is_dropped(server: AuthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth_request, "WRITE_TIMEOUT_S", 0.5)
    server.idle_s = 30
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)    # else several pieces come as one
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(peer, ("127.0.0.1", server.port))
        while not server.peers:
            await asyncio.sleep(0.01)
        (ours,) = server.peers
        ours.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(10_000):
            if ours.blocked:
                break
            await loop.sock_sendall(peer, question(b"/no") * 8)
            await asyncio.sleep(0.001)
        assert ours.blocked
        held = ours.transport.get_write_buffer_size()
        await loop.sock_sendall(peer, question(b"/no") * 8)    # not even read
        while server.peers:
            assert ours.transport.get_write_buffer_size() == held
            await asyncio.sleep(0.01)
    assert server.stats()["connections_dropped_total"] == 1


async def test_a_drain_ends_connections_with_their_next_answer(server: AuthServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(question())
    assert b"Connection" not in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    server.drain()
    writer.write(question())
    assert b"\r\nConnection: close\r\n" in await asyncio.wait_for(reader.read(), 20)
    writer.close()


async def test_a_taken_address_is_told(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = AuthServer(f"unix:{path}", Judge())
    await first.start()
    assert path.stat().st_mode & 0o777 == 0o660
    with pytest.raises(OSError, match="in use"):
        await AuthServer(f"unix:{path}", Judge()).start()
    await first.stop()
    assert not path.exists()


# ---- the judge


def test_headers_are_judged_like_those_of_ext_proc(tmp_path: Path) -> None:
    """The same requests through the ext_proc machine and through this: the same actions, scores, clients, reasons."""
    from native.extproc import ExtProcStream
    from native.subrequest import HeaderJudge
    from sidecar.config import Settings
    from sidecar.core import open_core

    wanted = Settings.model_validate({"arena": {"clients": 1024}, "client": {"trusted_hops": 1},
                                        "lists": {"block": ["198.51.100.0/24"]},
                                        "decision_log": {"path": "-", "actions": ["allow", "tag", "block"]}})
    core = open_core(wanted, private=True)
    requests: list[tuple[str, str, list[tuple[str, str]]]] = [
        ("GET", "/a?q=1", [("user-agent", "curl/8"), ("x-forwarded-for", "192.0.2.1, 10.0.0.1")]),
        ("GET", "/a?q=1", [("x-forwarded-for", "198.51.100.1, 10.0.0.1")]),
        ("GET", "/a?q=1", [("x-forwarded-for", "nonsense, 10.0.0.1")]),
        ("GET", "/a", []),
        ("GET", SQL, [("x-api-key", "k"), ("cookie", "a=b; c=d")]),
        ("DELETE", "/a#' UNION SELECT password FROM users--", []),
        ("GET", "/a", [("referer", "<script>alert(document.cookie)</script>")]),
        ("GET", "/?u=http://10.0.0.1/latest/meta-data/", [("x-outrider-score", "0")]),
    ]

    def compared(records: list[dict[str, Any]]) -> list[Any]:
        return [(r["action"], r["score"], r["scores"]["text"], r["client"], bool(r["principal_key"]),
                 r["path"], r["method"], r["authority"], r["place"], [reason["name"] for reason in r["reasons"]])
                for r in records]

    engine = core.engine()
    for method, path, headers in requests:
        stream = ExtProcStream(engine.host_address(), engine)
        pseudo = ((":method", method), (":path", path), (":authority", "shop.example"))
        message = request_headers([*headers, ("x-real-ip", "10.9.9.9:4711")], pseudo=pseudo)
        message.attributes["envoy.filters.http.ext_proc"].fields["source.address"].string_value = "10.9.9.9:4711"
        assert stream.message(message.SerializeToString())
        stream.close()
    over_ext_proc = core.arena.drain(100)
    core.close()

    core = open_core(wanted, private=True)
    engine = core.engine()
    judge = HeaderJudge(engine.host_address(), engine)
    rulings = [judge.decide(method.encode(), path.encode(), b"shop.example",
                            [(n.encode(), v.encode()) for n, v in [*headers, ("x-real-ip", "10.9.9.9:4711")]],
                            b"10.9.9.9:4711")
               for method, path, headers in requests]
    records = core.arena.drain(100)
    assert compared(records) == compared(over_ext_proc)
    assert [ruling.id for ruling in rulings] == [f"{record['id']:016x}" for record in records]
    assert [ruling.status for ruling in rulings][:2] == [0, 403]
    assert rulings[4].status == 403
    with pytest.raises(ValueError, match="method and a target"):
        judge.decide(b"", b"/", b"", [], b"")
    core.close()


def test_what_is_only_observed_passes_and_is_told(tmp_path: Path) -> None:
    from native.subrequest import HeaderJudge
    from sidecar.config import Settings
    from sidecar.core import open_core

    wanted = Settings.model_validate({"arena": {"clients": 1024}, "service": {"mode": "observe"}})
    core = open_core(wanted, private=True)
    engine = core.engine()
    judge = HeaderJudge(engine.host_address(), engine)
    found = judge.decide(b"GET", SQL.encode(), b"shop.example", [], b"192.0.2.1")
    assert (found.status, found.told, found.action) == (0, True, "tag")
    plain = judge.decide(b"GET", b"/a", b"shop.example", [], b"192.0.2.1")
    assert (plain.status, plain.told, plain.action) == (0, False, "allow")
    core.close()
