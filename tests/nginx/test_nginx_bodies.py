"""Bodies through NGINX: held or read along, in memory or spilled, whole or cut short."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from h2_client import pseudo
from nginx_stack import PROXIED, NginxStack
from proxy_harness import (
    FRIEND,
    ask_port,
    chunked,
    echoed,
    eventually,
    metrics,
    post,
    raw_port,
    resident_bytes,
    tail_of,
)

from sidecar.demo.supervisor import free_port

MIB = 1 << 20
FLAT = PROXIED.replace("\n", " ")
# /small spills beyond 1 KiB, /upload is read along while the service gets it, /gathered is when NGINX has all of it
SERVER = f"""
client_body_buffer_size 64k;
location /small/ {{ client_body_buffer_size 1k; rewrite ^ /echo break; {FLAT} }}
location /single/ {{ client_body_in_single_buffer on; rewrite ^ /echo break; {FLAT} }}
location /file/ {{ client_body_in_file_only clean; rewrite ^ /echo break; {FLAT} }}
location /unbuffered/ {{ proxy_request_buffering off; rewrite ^ /echo break; {FLAT} }}
location /upload {{ proxy_request_buffering off; {FLAT} }}
location /gathered/ {{ rewrite ^ /upload break; {FLAT} }}
location /at-once/ {{ proxy_request_buffering off; proxy_pass http://at_once; proxy_http_version 1.1; }}
location /limited/ {{ client_max_body_size 1k; rewrite ^ /echo break; {FLAT} }}
location /files/ {{ root FOLDER; }}
"""
# what ends its answers before it has read anything
HTTP = """
upstream at_once { server 127.0.0.1:AT_ONCE; }
server { listen 127.0.0.1:AT_ONCE; location / { return 200 "answered at once\n"; } }
"""
ROUTES = [
    {"name": "read", "path": "/upload", "body": "streamed", "body_limit": "16KiB"},
    {"name": "gathered", "path": "/gathered/**", "body": "streamed", "body_limit": "16KiB"},
    {"name": "at-once", "path": "/at-once/**", "body": "streamed", "body_limit": "16KiB"},
    {"name": "files", "path": "/files/**", "body": "streamed", "body_limit": "16KiB"},
    {"name": "held", "path": "/**", "body": "buffered", "body_limit": "16KiB"},
]
HELD = ["/echo", "/small/x", "/single/x", "/file/x", "/unbuffered/x"]
READ = ["/upload", "/gathered/x"]


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., NginxStack]) -> Iterator[NginxStack]:
    # one client sends all of this: what it is known for must not decide
    made = make_stack({"routes": ROUTES, "detectors": {"scanning": {"enabled": False}}})
    made.http = HTTP.replace(":AT_ONCE", f":{free_port(0, set(made.ports.values()))}")
    made.server = SERVER.replace("FOLDER", str(made.folder))
    (made.folder / "files").mkdir()
    (made.folder / "files" / "page.txt").write_text("a page\n")
    made.write_config()
    with made as running:
        yield running


@pytest.fixture(autouse=True)
def workers_live_on(stack: NginxStack) -> Iterator[None]:
    workers = stack.workers()
    yield
    assert ask_port(stack.ports["nginx"], "/items/1").status == 200
    assert stack.workers() == workers
    log = stack.error_log.read_text(encoding="utf-8", errors="replace")
    assert not [line for line in log.splitlines() if "[alert]" in line or "[emerg]" in line or "[crit]" in line]


def filled(size: int) -> bytes:
    return b"a word and " * (size // 11) + b"z" * (size % 11)


@pytest.mark.parametrize("target", HELD + READ)
@pytest.mark.parametrize("size", [0, 1, 900, 1500, 16 << 10, (16 << 10) + 1, 300_000])
def test_a_body_arrives_whole(stack: NginxStack, target: str, size: int) -> None:
    tail = tail_of(stack)
    body = filled(size)
    seen = echoed(ask_port(stack.ports["nginx"], target, method="POST", body=body))
    assert (seen["body_bytes"], seen["body_sha256"]) == (size, hashlib.sha256(body).hexdigest())
    (record,) = tail.wait()
    assert record["body"] == ("none" if size == 0 else "part" if size > 16 << 10 else "whole")


@pytest.mark.parametrize("target", HELD + READ)
@pytest.mark.parametrize("before", [0, 900, 8000, 15_000])
@pytest.mark.parametrize("after", [0, 100_000])
def test_an_attack_is_found_within_the_limit(
    stack: NginxStack, target: str, before: int, after: int, marker: bytes
) -> None:
    body = filled(before) + b" " + marker + b" " + filled(after)
    reply = ask_port(stack.ports["nginx"], target, method="POST", body=body)
    assert reply.status == 403
    assert json.loads(reply.body)["title"] == "Request refused"


@pytest.mark.parametrize("target", HELD + READ)
def test_beyond_the_limit_it_is_not_looked_for(stack: NginxStack, target: str, marker: bytes) -> None:
    name = "outrider_bodies_in_part_total"
    before = metrics(stack)[name]
    body = filled(40_000) + marker
    seen = echoed(ask_port(stack.ports["nginx"], target, method="POST", body=body))
    assert seen["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert metrics(stack)[name] == before + 1


@pytest.mark.parametrize("target", HELD + READ)
@pytest.mark.parametrize("trailers", [b"", b"x-checksum: abc\r\nx-more: 1\r\n"])
@pytest.mark.parametrize("hostile", [False, True])
def test_chunks_and_trailers(stack: NginxStack, target: str, trailers: bytes, hostile: bool, marker: bytes) -> None:
    pieces = [b"a", b"b" * 5000, marker if hostile else b"harmless", b"c"]
    data = post(target, chunked(*pieces, trailers=trailers), "transfer-encoding: chunked")
    answer = raw_port(stack.ports["nginx"], data)
    assert answer.startswith(b"HTTP/1.1 403" if hostile else b"HTTP/1.1 200"), answer[:200]
    if not hostile:
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["body_bytes"] == sum(map(len, pieces))


@pytest.mark.parametrize("target", HELD + READ)
@pytest.mark.parametrize("hostile", [False, True])
def test_http2(stack: NginxStack, target: str, hostile: bool, marker: bytes) -> None:
    def pieces() -> Iterator[bytes]:
        for n in range(20):
            yield marker if hostile and n == 3 else filled(2000)

    with httpx.Client(http1=False, http2=True, base_url=f"http://127.0.0.1:{stack.ports['h2']}") as client:
        for content in (pieces(), b"".join(pieces())):
            reply = client.post(target, content=content)
            assert reply.status_code == (403 if hostile else 200)
            if not hostile:
                assert reply.json()["body_bytes"] == 40_000
        # the connection is in order: another stream goes through
        assert client.get("/items/1").status_code == 200


@pytest.mark.parametrize("target", HELD + READ)
def test_a_client_that_waits_for_100(stack: NginxStack, target: str, marker: bytes) -> None:
    for body, status in ((b"a body", b"200"), (marker, b"403")):
        with socket.create_connection(("127.0.0.1", stack.ports["nginx"]), timeout=10) as peer:
            peer.sendall(post(target, b"", f"content-length: {len(body)}", "expect: 100-continue"))
            assert peer.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            peer.sendall(body)
            assert peer.recv(1000).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("target", HELD + READ)
def test_what_follows_a_refused_part_is_no_request(stack: NginxStack, target: str, marker: bytes) -> None:
    """A body refused before its end must not leave its rest to be taken for the next request."""
    smuggled = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
    head = post(target, b"", f"content-length: {100_000 + len(smuggled)}").replace(b"connection: close\r\n", b"")
    with socket.create_connection(("127.0.0.1", stack.ports["nginx"]), timeout=3) as peer:
        peer.sendall(head + marker + b" " * (20_000 - len(marker)))
        answer = peer.recv(4000)
        assert answer.startswith(b"HTTP/1.1 403")
        try:
            peer.sendall(b" " * 80_000 + smuggled * 3)
            while piece := peer.recv(4000):
                answer += piece
        except OSError:
            pass  # closed on us: as good
    assert answer.count(b"HTTP/1.1") == 1
    assert "/smuggled" not in stack.access_log.read_text(encoding="utf-8")


@pytest.mark.parametrize("target", HELD + READ)
def test_the_connection_is_kept_where_the_body_came_with_the_headers(
    stack: NginxStack, target: str, marker: bytes
) -> None:
    refused = post(target, marker, f"content-length: {len(marker)}").replace(b"connection: close\r\n", b"")
    answer = raw_port(stack.ports["nginx"], refused * 3 + post("/echo", b"hi", "content-length: 2"))
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"403"] * 3 + [b"200"]


@pytest.mark.parametrize("target", HELD)
def test_the_connection_is_kept_where_the_body_was_held(stack: NginxStack, target: str, marker: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["nginx"], timeout=10)
    try:
        for body, status in [(filled(12_000) + b" " + marker, 403), (filled(12_000), 200)] * 2:
            connection.request("POST", target, body)
            response = connection.getresponse()
            response.read()
            assert response.status == status
            assert connection.sock is not None
    finally:
        connection.close()


@pytest.mark.parametrize("target", HELD + READ)
def test_a_client_that_leaves(stack: NginxStack, target: str) -> None:
    """Decided on the first part, so that its client's record knows of it; nothing stays behind."""
    tail = tail_of(stack)
    with socket.create_connection(("127.0.0.1", stack.ports["nginx"]), timeout=10) as peer:
        peer.sendall(post(target, b"a part", "content-length: 10000"))
    (record,) = tail.wait()
    assert record["body"] == "part"


def test_nginxs_own_refusals_stay(stack: NginxStack) -> None:
    port = stack.ports["nginx"]
    before = tail_of(stack)
    assert ask_port(port, "/limited/x", method="POST", body=filled(5000)).status == 413
    too_much = raw_port(port, post("/limited/x", chunked(b"a" * 600, b"b" * 600), "transfer-encoding: chunked"))
    assert too_much.startswith(b"HTTP/1.1 413")
    malformed = raw_port(port, post("/echo", b"zz\r\nnot a chunk", "transfer-encoding: chunked"))
    assert malformed.startswith(b"HTTP/1.1 400")
    # the first is refused before anyone is asked
    assert [record["body"] for record in before.wait(2)] == ["part", "part"]


def test_an_answer_before_the_body_is_decided_on_the_first_part(stack: NginxStack, marker: bytes) -> None:
    """The service answers while its request is still coming: what has come is judged, and counts."""
    port = stack.ports["nginx"]
    for body, status in ((b"a harmless part", b"200"), (marker, b"403")):
        tail = tail_of(stack)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
            peer.sendall(post("/at-once/x", body, "content-length: 5000"))
            answer = peer.recv(4000)
        assert answer.startswith(b"HTTP/1.1 " + status), answer
        assert (b"answered at once" in answer) is (status == b"200")
        assert (b"Request refused" in answer) is (status == b"403")
        (record,) = tail.wait()
        assert record["body"] == "part"


def test_a_grpc_call_that_is_answered_before_its_end(stack: NginxStack, marker: bytes) -> None:
    headers = [*pseudo("POST", "/at-once/x"), ("content-type", "application/grpc"), ("te", "trailers")]
    for message, status, body in ((b"harmless", None, b"answered at once\n"), (marker, "7", b"")):
        client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        client.initiate_connection()
        client.send_headers(1, headers)
        client.send_data(1, message)
        events: list[h2.events.Event] = []
        with socket.create_connection(("127.0.0.1", stack.ports["h2"]), timeout=10) as peer:
            peer.sendall(client.data_to_send())  # in one piece: the message is there before the service can answer
            while not any(isinstance(event, h2.events.StreamEnded) for event in events):
                events += client.receive_data(peer.recv(4000))
        (response,) = [event for event in events if isinstance(event, h2.events.ResponseReceived)]
        seen = dict(response.headers)
        assert (seen[":status"], seen.get("grpc-status")) == ("200", status)
        assert b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived)) == body


def test_a_body_that_nobody_reads(stack: NginxStack, marker: bytes) -> None:
    tail = tail_of(stack)
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["nginx"], timeout=10)
    try:
        connection.request("GET", "/files/page.txt", marker + filled(50_000), {"x-forwarded-for": FRIEND})
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"a page\n")
    finally:
        connection.close()
    (record,) = tail.wait()
    assert record["action"] == "allow"


def test_a_hundred_megabytes_pass_without_being_held(stack: NginxStack) -> None:
    (worker,) = stack.workers()
    ask_port(stack.ports["nginx"], "/upload", method="PUT", body=b"w" * MIB)  # what is set up once is set up now
    before = resident_bytes(worker)
    piece = b"\x00\xff<>'\"" * 16384
    count = 60 * MIB // len(piece)
    digest = hashlib.sha256()
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["nginx"], timeout=120)
    try:
        connection.putrequest("PUT", "/upload")
        connection.putheader("content-length", str(count * len(piece)))
        connection.endheaders()
        for _ in range(count):
            connection.send(piece)
            digest.update(piece)
        seen = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    assert (seen["body_bytes"], seen["body_sha256"]) == (count * len(piece), digest.hexdigest())
    assert resident_bytes(worker) - before < 4 * MIB


def test_temporary_files_go(stack: NginxStack, marker: bytes) -> None:
    for target in ("/small/x", "/file/x"):
        for body in (filled(200_000), filled(9000) + marker):
            ask_port(stack.ports["nginx"], target, method="POST", body=body)
    folder = stack.folder / "client_body"
    eventually(lambda: not [p for p in Path(folder).rglob("*") if p.is_file()], "the files were removed")
