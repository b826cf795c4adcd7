"""Bodies and malformed requests through a real Envoy: what is known is decided on, nothing breaks."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import time
from collections.abc import Iterator

import pytest
from harness import FRIEND, ask, chunked, echoed, eventually, metrics, post, raw, resident_bytes, tail_of

from sidecar.demo.stack import Stack

JSON = {"content-type": "application/json"}
MIB = 1 << 20


def open_streams(stack: Stack) -> float:
    return metrics(stack)["outrider_transport_streams_active"]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(stack: Stack) -> Iterator[None]:
    """After each test: the sidecar is the same process, still decides, and holds no stream."""
    pid = stack.sidecar.pid
    yield
    assert stack.sidecar.running()
    assert stack.sidecar.pid == pid
    assert ask(stack, "/items/1").status == 200
    eventually(lambda: open_streams(stack) == 0, "all streams closed")


@pytest.mark.parametrize("size", [0, 1, 1000, 16 << 10, (16 << 10) + 1, 100_000, 200_000, 900_000])
def test_a_buffered_body_arrives_whole(stack: Stack, size: int) -> None:
    body = b"a" * size
    seen = echoed(ask(stack, "/echo", method="POST", body=body))
    assert seen["body_bytes"] == size
    assert seen["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert seen["headers"]["x-outrider-action"] == "allow"


@pytest.mark.parametrize("size", [0, 1, 16 << 10, (16 << 10) + 1, 300_000, 5 * MIB])
def test_a_streamed_body_arrives_whole(stack: Stack, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    seen = echoed(ask(stack, "/upload", method="PUT", body=body))
    assert seen["body_bytes"] == size
    assert seen["body_sha256"] == hashlib.sha256(body).hexdigest()


def test_over_the_limit_the_first_part_is_decided_on(stack: Stack) -> None:
    tail = tail_of(stack)
    assert ask(stack, "/echo", method="POST", body=b"b" * 300_000).status == 200
    (record,) = tail.wait()
    assert record["action"] == "allow"
    name = "outrider_bodies_in_part_total"
    before = metrics(stack)[name]
    ask(stack, "/echo", method="POST", body=b"b" * 300_000)
    assert metrics(stack)[name] == before + 1


@pytest.mark.parametrize("target", ["/echo", "/upload"])
@pytest.mark.parametrize("trailers", [b"", b"x-checksum: abc\r\nx-more: 1\r\n"])
def test_chunks_with_and_without_trailers(stack: Stack, target: str, trailers: bytes) -> None:
    tail = tail_of(stack)
    pieces = [b'{"text": "', b"c" * 5000, b'"}']
    answer = raw(
        stack,
        post(
            target,
            chunked(*pieces, trailers=trailers),
            "transfer-encoding: chunked",
            "content-type: application/json",
        ),
    )
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["body_bytes"] == 5012
    assert len(tail.wait()) == 1


def test_a_hundred_megabytes_pass_without_being_held(stack: Stack) -> None:
    ask(stack, "/upload", method="PUT", body=b"w" * MIB)  # what is set up once is set up now
    sidecar, envoy = resident_bytes(stack.sidecar.pid), resident_bytes(stack.envoy.pid)
    piece = b"\x00\xff<>'\"" * 16384
    total = 100 * MIB // len(piece) * len(piece)
    digest = hashlib.sha256()
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["envoy"], timeout=120)
    try:
        connection.putrequest("PUT", "/upload")
        connection.putheader("x-forwarded-for", FRIEND)
        connection.putheader("content-length", str(total))
        connection.endheaders()
        for _ in range(total // len(piece)):
            connection.send(piece)
            digest.update(piece)
        response = connection.getresponse()
        seen = json.loads(response.read())
    finally:
        connection.close()
    assert response.status == 200
    assert (seen["body_bytes"], seen["body_sha256"]) == (total, digest.hexdigest())
    assert resident_bytes(stack.sidecar.pid) - sidecar < 32 * MIB
    assert resident_bytes(stack.envoy.pid) - envoy < 64 * MIB


def test_huge_headers(stack: Stack) -> None:
    assert ask(stack, "/items", headers={"x-large": "h" * 50_000}).status == 200
    assert ask(stack, "/items", headers={f"x-{n}": "v" * 400 for n in range(80)}).status == 200
    assert ask(stack, "/items?q=" + "q" * 50_000).status == 200


def refused_by_envoy(answer: bytes) -> bool:
    """A status of Envoy's own, or no answer: what the codec refuses is closed before a filter has had
    its say on the answer."""
    return answer == b"" or answer.split(b" ")[1] in (b"400", b"431")


@pytest.mark.parametrize(
    "lines",
    [
        b"x-large: " + b"h" * 70_000 + b"\r\n",
        b"".join(b"x-%d: v\r\n" % n for n in range(150)),
        b"x-nul: a\x00b\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"transfer-encoding: chunked, chunked\r\n",
        b"no colon\r\n",
    ],
    ids=["large", "many", "nul", "two-lengths", "encodings", "no-colon"],
)
def test_headers_beyond_envoys_limits_never_reach_the_service(stack: Stack, lines: bytes) -> None:
    assert refused_by_envoy(raw(stack, b"GET /items HTTP/1.1\r\nhost: shop\r\n" + lines + b"\r\n"))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 50_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"a":"' + b"\\u0000" * 2000 + b'"}',
        b"\x00" * 5000,
        b'{"name": "\xff\xfe\xc3\x28\xed\xa0\x80"}',
        b'{"name": "' + "\U0001f600\u202e".encode() * 500 + b'"}',
        b'{"a": 1e99999, "b": -0, "c": NaN',
        b"\xef\xbb\xbf{}",
        bytes(range(256)) * 60,
    ],
    ids=["brackets", "deep", "escapes", "nuls", "bad-utf8", "emoji", "cut", "bom", "all-bytes"],
)
@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/x-www-form-urlencoded",
        "application/xml",
        "multipart/form-data; boundary=x",
        "text/plain",
    ],
)
def test_hostile_bodies_are_decided_on(stack: Stack, body: bytes, kind: str) -> None:
    tail = tail_of(stack)
    seen = echoed(ask(stack, "/echo", method="POST", body=body, headers={"content-type": kind}))
    assert seen["body_sha256"] == hashlib.sha256(body).hexdigest()
    (record,) = tail.wait()
    assert record["action"] == "allow"


@pytest.mark.parametrize(
    "target",
    [
        "/items?q=%00%00",
        "/items?q=%ff%fe%c3%28",
        "/search?q=%u0041%zz%",
        "/items?" + "&".join(f"k{n}=v" for n in range(3000)),
        "/search?q=" + "%25" * 3000,
    ],
)
def test_hostile_targets_are_decided_on(stack: Stack, target: str) -> None:
    tail = tail_of(stack)
    assert ask(stack, target).status in (200, 400)
    assert len(tail.wait()) == 1


def test_a_nul_in_a_path_is_refused_by_envoy(stack: Stack) -> None:
    assert refused_by_envoy(raw(stack, b"GET /items\x00/1 HTTP/1.1\r\nhost: shop\r\n\r\n"))


@pytest.mark.parametrize("target", ["/echo", "/upload"])
def test_a_body_cut_short(stack: Stack, target: str) -> None:
    for _ in range(5):
        raw(stack, post(target, b'{"a": 1', "content-length: 1000"), timeout_s=2, end=True)
        with socket.create_connection(("127.0.0.1", stack.ports["envoy"]), timeout=5) as peer:
            peer.sendall(post(target, b"7f\r\n{", "transfer-encoding: chunked"))
            # closing with unread data sends a reset
    eventually(lambda: open_streams(stack) == 0, "the streams of broken clients closed")


def test_clients_that_never_end_hold_nobody_up(stack: Stack) -> None:
    """Silent after half a body: others are served meanwhile, and the silent ones are let go."""
    silent = []
    try:
        for target in ("/echo", "/upload") * 10:
            peer = socket.create_connection(("127.0.0.1", stack.ports["envoy"]), timeout=30)
            peer.sendall(post(target, chunked(b"x" * 100, end=False), "transfer-encoding: chunked"))
            silent.append(peer)
        eventually(lambda: open_streams(stack) >= 10, "the silent streams opened")
        begun = time.monotonic()
        for number in range(20):
            assert ask(stack, f"/items/{number % 5 + 1}").status == 200
        assert time.monotonic() - begun < 10
        # listen.stream_idle is 4 s here
        eventually(lambda: open_streams(stack) == 0, "silent streams let go", 20)
    finally:
        for peer in silent:
            peer.close()
