"""What is in a request is found wherever it stands and however it is sent, and a refused one never reaches the service,
through whichever proxy. The models here know one thing only: a marker."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from contract_hosts import MARKER, PROXIES, ProxyStack, ask, raw, start
from proxy_harness import FRIEND, chunked, post, tail_of

FORM = {"content-type": "application/x-www-form-urlencoded"}
JSON = {"content-type": "application/json"}
KIB = 1024


@pytest.fixture(scope="module", params=PROXIES)
def stack(request: pytest.FixtureRequest, marked_settings: dict[str, Any]) -> Iterator[ProxyStack]:
    with start(request.param, marked_settings) as running:
        yield running


@pytest.fixture
def client(request: pytest.FixtureRequest) -> str:
    """An address of each test's own."""
    number = sum(request.node.name.encode()) * 7919 % 65521
    return f"198.18.{number >> 8 & 255}.{number & 255}"


PERCENT = "".join(f"%{ord(c):02x}" for c in MARKER)
MULTIPART = (
    '--b\r\ncontent-disposition: form-data; name="note"; filename="n.txt"\r\ncontent-type: text/plain\r\n\r\n'
    f"hello {MARKER}\r\n--b--\r\n"
)

FOUND: dict[str, dict[str, Any]] = {
    "query": {"target": f"/search?q={MARKER}"},
    "query, encoded": {"target": f"/search?q={PERCENT}"},
    "query, encoded twice": {"target": "/search?q=" + PERCENT.replace("%", "%25")},
    "path": {"target": f"/items/{MARKER}"},
    "path, encoded": {"target": f"/items/{PERCENT}"},
    "user agent": {"target": "/items", "headers": {"user-agent": MARKER}},
    "cookie": {"target": "/items", "headers": {"cookie": f"sid=5f2a; theme=a {MARKER} b"}},
    "referer": {"target": "/items", "headers": {"referer": f"http://x.example/?a={MARKER}"}},
    "JSON": {
        "target": "/echo",
        "method": "POST",
        "headers": JSON,
        "body": json.dumps({"a": [{"b": MARKER}]}).encode(),
    },
    "JSON, escaped": {
        "target": "/echo",
        "method": "POST",
        "headers": JSON,
        "body": b'{"a":"' + "".join(f"\\u{ord(c):04x}" for c in MARKER).encode() + b'"}',
    },
    "form": {"target": "/echo", "method": "POST", "headers": FORM, "body": f"a=1&b={PERCENT}".encode()},
    "multipart": {
        "target": "/echo",
        "method": "POST",
        "body": MULTIPART.encode(),
        "headers": {"content-type": "multipart/form-data; boundary=b"},
    },
    "XML": {
        "target": "/echo",
        "method": "POST",
        "headers": {"content-type": "application/xml"},
        "body": f"<a><b c='1'>{MARKER}</b></a>".encode(),
    },
    "plain body": {
        "target": "/echo",
        "method": "POST",
        "headers": {"content-type": "text/plain"},
        "body": MARKER.encode(),
    },
    "behind padding": {
        "target": "/echo",
        "method": "POST",
        "headers": JSON,
        "body": json.dumps({"pad": "chairs and tables. " * 600, "b": MARKER}).encode(),
    },
    "streamed": {
        "target": "/upload",
        "method": "PUT",
        "headers": JSON,
        "body": json.dumps({"a": MARKER}).encode(),
    },
    "streamed, then much": {
        "target": "/upload",
        "method": "PUT",
        "headers": JSON,
        "body": json.dumps({"a": MARKER, "pad": "x" * 500_000}).encode(),
    },
}


@pytest.mark.parametrize("where", list(FOUND))
def test_it_is_found(stack: ProxyStack, client: str, where: str) -> None:
    tail = tail_of(stack)
    assert ask(stack, client=client, **FOUND[where]).status == 403
    (record,) = tail.wait()
    assert record["action"] == "block"
    assert record["place"]
    assert record["place"] in record["reasons"][0]["text"]


@pytest.mark.parametrize("where", list(FOUND))
def test_without_it_the_same_request_passes(stack: ProxyStack, client: str, where: str) -> None:
    shape = json.loads(
        json.dumps({k: v for k, v in FOUND[where].items() if k != "body"})
        .replace(MARKER, "chair")
        .replace(PERCENT, "chair")
        .replace(PERCENT.replace("%", "%25"), "c")
    )
    if "body" in FOUND[where]:
        shape["body"] = (
            FOUND[where]["body"].replace(MARKER.encode(), b"chair").replace(PERCENT.encode(), b"chair")
        )
        if where == "JSON, escaped":
            shape["body"] = b'{"a":"\\u0063"}'
    assert ask(stack, client=client, **shape).status in (200, 404)


@pytest.mark.parametrize("target", ["/echo", "/upload"])
@pytest.mark.parametrize("trailers", [b"", b"x-checksum: abc\r\n"])
@pytest.mark.parametrize("cut", [1, 7, 40])
def test_in_chunks_with_and_without_trailers(
    stack: ProxyStack, client: str, target: str, trailers: bytes, cut: int
) -> None:
    """The marker stands across the border of two chunks; a trailer ends the body without saying so."""
    body = b'{"text": "a note: ' + MARKER.encode() + b'"}'
    at = body.index(MARKER.encode()) + min(cut, len(MARKER) - 1)
    data = post(
        target,
        chunked(body[:at], body[at:], trailers=trailers),
        "transfer-encoding: chunked",
        "content-type: application/json",
    ).replace(FRIEND.encode(), client.encode())
    assert raw(stack, data).startswith(b"HTTP/1.1 403")


def test_what_is_refused_never_reaches_the_service(stack: ProxyStack) -> None:
    before = json.loads(ask(stack, "/items/5/comments").body)
    refused = ask(
        stack, "/items/5/comments", "198.18.1.1", "POST", json.dumps({"text": MARKER}).encode(), JSON
    )
    assert refused.status == 403
    passed = ask(
        stack, "/items/5/comments", "198.18.1.2", "POST", json.dumps({"text": "fine"}).encode(), JSON
    )
    assert passed.status == 201
    assert json.loads(ask(stack, "/items/5/comments").body) == [*before, "fine"]


def test_beyond_the_limit_it_is_not_seen_and_the_decision_says_so(stack: ProxyStack) -> None:
    """body_limit is 16 KiB here: what an operator who lowers it gives up."""
    tail = tail_of(stack)
    body = json.dumps({"pad": "chairs and tables. " * 3000, "b": MARKER}).encode()
    assert ask(stack, "/echo", "198.18.2.1", "POST", body, JSON).status == 200
    (record,) = tail.wait()
    assert "part" in json.dumps(record)


def test_a_client_that_waits_to_be_asked_for_its_body(stack: ProxyStack) -> None:
    """Expect: 100-continue."""
    for marker, status in ((b"chair", b"200"), (MARKER.encode(), b"403")):
        body = b'{"a": "' + marker + b'"}'
        head = post(
            "/echo",
            b"",
            f"content-length: {len(body)}",
            "content-type: application/json",
            "expect: 100-continue",
        )
        with socket.create_connection(("127.0.0.1", stack.port), timeout=10) as peer:
            peer.sendall(head)
            assert peer.recv(4096).startswith(b"HTTP/1.1 100")
            peer.sendall(body)
            assert peer.recv(4096).split(b" ")[1] == status


def test_requests_one_after_the_other_on_one_connection(stack: ProxyStack) -> None:
    """Pipelined: each is decided for itself, and a refusal doesn't end the connection. (The refused one is the last
    that is sent ahead: behind an answer of its own, Envoy leaves what was sent ahead until more comes.)"""
    lines = "host: shop\r\nx-forwarded-for: 198.18.3.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", stack.port), timeout=10) as peer:
        answers = peer.makefile("rb")
        for targets, statuses in (
            (["/items/1", f"/search?q={MARKER}"], [200, 403]),
            (["/items/3", "/items/4"], [200, 200]),
        ):
            peer.sendall("".join(f"GET {target} HTTP/1.1\r\n{lines}" for target in targets).encode())
            for status in statuses:
                assert answers.readline().split(b" ")[1] == str(status).encode()
                length = 0
                while (line := answers.readline().strip().lower()) != b"":
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                assert len(answers.read(length)) == length
