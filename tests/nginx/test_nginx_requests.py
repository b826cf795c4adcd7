"""What a client and the service see of decisions: headers, refusals, redirections inside NGINX, variables."""

from __future__ import annotations

import gzip
import http.client
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from nginx_stack import PROXIED, NginxStack
from proxy_harness import BLOCKED, FRIEND, access_lines, ask_port, echoed, eventually, metrics, post, raw_port, tail_of

from sidecar.demo.supervisor import free_port
from sidecar.demo.traffic import Reply

# Pages of NGINX's own, and one that answers as a service would that writes our headers.
SERVER = """
location = /named { error_page 403 @refused; PROXIED }
location @refused { return 200 "the operator's\\n"; }
location /page/ { error_page 403 /refused.html; PROXIED }
location = /refused.html { return 403 "a page of the operator's\\n"; }
location /elsewhere/ { error_page 403 =302 https://help.example/; PROXIED }
location /others/ { error_page 404 500 502 /refused.html; recursive_error_pages on; PROXIED }
location /lying/ { proxy_pass http://lying; }
location /lying.Grpc/ { grpc_pass grpc://lying_h2; }
location /tries/ { try_files /nowhere @service; }
location @service { rewrite ^ /echo break; PROXIED }
location /rewritten/ { rewrite ^ /echo last; }
location /moved/ { error_page 404 = @service; proxy_pass http://api; proxy_intercept_errors on; }
location /plain/ { outrider off; rewrite ^ /echo break; PROXIED }
location /plain-first/ { outrider off; error_page 418 = @service; return 418; }
location /mirrored/ { mirror /mirror; rewrite ^ /echo break; PROXIED }
location = /mirror { internal; proxy_pass http://api/items; }
location /asked/ { auth_request /auth; rewrite ^ /echo break; PROXIED }
location = /auth {
    internal; proxy_pass http://api/items; proxy_pass_request_body off; proxy_set_header Content-Length "";
}
location /asking/ { outrider off; auth_request /auth; rewrite ^ /echo break; PROXIED }
location /hop/ { set_real_ip_from 127.0.0.1; real_ip_header X-Hop; rewrite ^ /echo break; PROXIED }
location /static/ { root FOLDER; }
location /guarded/ { auth_basic realm; auth_basic_user_file /dev/null; PROXIED }
""".replace("PROXIED", PROXIED.replace("\n", " "))

HTTP = """
gzip on; gzip_min_length 10; gzip_proxied any; gzip_types application/json application/problem+json text/plain;
underscores_in_headers on;
upstream lying { server 127.0.0.1:LYING; }
upstream lying_h2 { server 127.0.0.1:LYING_H2; }
server {
    listen 127.0.0.1:LYING;
    listen 127.0.0.1:LYING_H2 http2;
    add_trailer X-Outrider-Score forged; add_trailer x-checksum kept;
    add_header X-Outrider-Id forged; add_header x-outrider-anything forged; add_header x-other kept;
    location / { return 200 "from the service\\n"; }
}
"""


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., NginxStack]) -> Iterator[NginxStack]:
    made = make_stack()
    taken = set(made.ports.values())
    made.http = HTTP.replace(":LYING_H2", f":{free_port(0, taken)}").replace(":LYING", f":{free_port(0, taken)}")
    made.server = SERVER.replace("FOLDER", str(made.folder))
    (made.folder / "static" / "folder").mkdir(parents=True)
    (made.folder / "static" / "page.txt").write_text("a page of a folder\n" * 10)
    made.write_config()
    with made as running:
        yield running


def ask(stack: NginxStack, *args: Any, **options: Any) -> Reply:
    return ask_port(stack.ports["nginx"], *args, **options)


def decided(stack: NginxStack, before: float) -> bool:
    """Whether exactly one more request has been decided."""
    return decisions(stack) == before + 1


def decisions(stack: NginxStack) -> float:
    return sum(n for name, n in metrics(stack).items() if name.startswith("outrider_decisions_total{"))


# ---- headers


@pytest.mark.parametrize("before", [0, 1, 18, 19, 20, 21, 40])
@pytest.mark.parametrize("after", [0, 1, 10, 12, 25])
def test_a_clients_headers_of_our_name_never_arrive(stack: NginxStack, before: int, after: int) -> None:
    """Wherever they stand among the others; NGINX keeps headers in lists of 20."""
    lines = [
        *(f"x-before-{n}: {n}" for n in range(before)),
        "x-outrider-action: allow-me",
        "X-Outrider-Id: ffffffffffffffff",
        "x-between: 1",
        "x_outrider_score: 0",
        *(f"x-after-{n}: {n}" for n in range(after)),
        "x-outrider-anything: 1",
    ]
    answer = raw_port(stack.ports["nginx"], post("/echo", b"hello", "content-length: 5", *lines))
    seen = json.loads(answer.split(b"\r\n\r\n", 1)[1])["headers"]
    ours = {name: value for name, value in seen.items() if "outrider" in name}
    assert sorted(ours) == ["x-outrider-action", "x-outrider-id", "x-outrider-score"]
    assert ours["x-outrider-action"] == "allow"
    assert ours["x-outrider-id"] != "f" * 16
    # what is said first, NGINX keeps the names of behind the list: written over, it would pass this one on
    assert "connection" not in seen
    expected = {f"x-before-{n}": str(n) for n in range(before)} | {f"x-after-{n}": str(n) for n in range(after)}
    assert {name: value for name, value in seen.items() if name in expected or name == "x-between"} == {
        **expected,
        "x-between": "1",
    }


def test_only_headers_of_our_name(stack: NginxStack) -> None:
    """HTTP/1.0 without any other: the list becomes empty, and is filled with what we say."""
    answer = raw_port(stack.ports["nginx"], b"GET /echo HTTP/1.0\r\nx-outrider-id: f\r\nx-outrider-a: b\r\n\r\n")
    seen = json.loads(answer.split(b"\r\n\r\n", 1)[1])["headers"]
    assert seen["x-outrider-action"] == "allow"
    assert "x-outrider-a" not in seen


def test_headers_of_our_name_from_the_service_are_removed(stack: NginxStack) -> None:
    reply = ask(stack, "/lying/")
    assert reply.status == 200
    assert reply.headers["x-other"] == "kept"
    assert not [name for name in reply.headers if "outrider" in name]


def test_where_outrider_is_off_nothing_is_touched(stack: NginxStack) -> None:
    before = decisions(stack)
    seen = echoed(ask(stack, "/plain/", BLOCKED, headers={"x-outrider-id": "kept"}))
    assert seen["headers"]["x-outrider-id"] == "kept"
    assert decisions(stack) == before


def test_subrequests_are_left_alone(stack: NginxStack) -> None:
    """Where Outrider is off, but not in the location that NGINX itself asks."""
    before = decisions(stack)
    assert ask(stack, "/asking/x", BLOCKED).status == 200
    assert decisions(stack) == before


def test_the_client_is_who_the_location_says(stack: NginxStack) -> None:
    request = "GET /hop/x HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-hop: %s\r\n\r\n"
    for client, status in ((BLOCKED, b"403"), (FRIEND, b"200")):
        assert raw_port(stack.ports["nginx"], (request % client).encode())[9:12] == status


# ---- refusals


def test_a_refusal_is_outriders(stack: NginxStack) -> None:
    reply = ask(stack, "/echo", BLOCKED)
    assert reply.status == 403
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    assert json.loads(reply.body)["status"] == 403
    assert b"nginx" not in reply.body


def test_a_refusal_of_head_has_no_body(stack: NginxStack) -> None:
    length = ask(stack, "/echo", BLOCKED).headers["content-length"]
    request = f"HEAD /echo HTTP/1.1\r\nhost: a\r\nx-forwarded-for: {BLOCKED}\r\n"
    answer = raw_port(stack.ports["nginx"], (request + "\r\n" + request + "connection: close\r\n\r\n").encode())
    assert answer.count(b"HTTP/1.1 403 ") == 2
    assert f"content-length: {length}".encode() in answer.lower()
    assert answer.endswith(b"\r\n\r\n")
    assert b"problem" in answer
    assert b"refused" not in answer.lower()


def test_the_connection_goes_on_after_a_refusal(stack: NginxStack) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["nginx"], timeout=10)
    try:
        for client, status in [(BLOCKED, 403), (FRIEND, 200)] * 3:
            for body in (None, b"a body"):
                connection.request("POST" if body else "GET", "/echo", body, {"x-forwarded-for": client})
                if connection.sock:
                    port = connection.sock.getsockname()[1]
                response = connection.getresponse()
                response.read()
                assert response.status == status
                assert connection.sock is not None, "kept"
                assert connection.sock.getsockname()[1] == port
    finally:
        connection.close()


def test_pipelined_requests_are_answered_in_order(stack: NginxStack) -> None:
    wanted = [(FRIEND, b""), (BLOCKED, b""), (BLOCKED, b"a body"), (FRIEND, b"another"), (BLOCKED, b""), (FRIEND, b"")]
    data = b"".join(
        b"%s /echo HTTP/1.1\r\nhost: a\r\nx-forwarded-for: %s\r\ncontent-length: %d\r\n%s\r\n%s"
        % (
            b"POST" if body else b"GET",
            client.encode(),
            len(body),
            b"connection: close\r\n" if n == len(wanted) - 1 else b"",
            body,
        )
        for n, (client, body) in enumerate(wanted)
    )
    answer = raw_port(stack.ports["nginx"], data)
    statuses = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200 if client == FRIEND else 403 for client, _ in wanted]


def test_an_error_page_of_the_operators_comes_first(stack: NginxStack) -> None:
    named = ask(stack, "/named", BLOCKED)
    assert (named.status, named.body) == (403, b"the operator's\n")
    reply = ask(stack, "/page/x", BLOCKED)
    assert (reply.status, reply.body) == (403, b"a page of the operator's\n")
    moved = ask(stack, "/elsewhere/", BLOCKED)
    assert (moved.status, moved.headers["location"]) == (302, "https://help.example/")
    other = ask(stack, "/others/", BLOCKED)
    assert (other.status, json.loads(other.body)["title"]) == (403, "Request refused")


def test_refusals_and_answers_are_compressed_alike(stack: NginxStack) -> None:
    for client in (BLOCKED, FRIEND):
        reply = ask(stack, "/echo", client, headers={"accept-encoding": "gzip"})
        assert reply.headers["content-encoding"] == "gzip"
        assert json.loads(gzip.decompress(reply.body))


def test_http2(stack: NginxStack) -> None:
    with httpx.Client(http1=False, http2=True, base_url=f"http://127.0.0.1:{stack.ports['h2']}") as client:
        for _ in range(3):
            refused = client.get("/echo", headers={"x-forwarded-for": BLOCKED})
            assert (refused.http_version, refused.status_code) == ("HTTP/2", 403)
            assert refused.json()["title"] == "Request refused"
            passed = client.post("/echo", content=b"hello", headers={"x-outrider-id": "f", "x-forwarded-for": FRIEND})
            assert passed.status_code == 200
            assert passed.json()["body_bytes"] == 5
            assert len(passed.json()["headers"]["x-outrider-id"]) == 16
        assert client.head("/echo", headers={"x-forwarded-for": BLOCKED}).status_code == 403


def test_a_grpc_refusal_is_trailers_only(stack: NginxStack) -> None:
    with httpx.Client(http1=False, http2=True, base_url=f"http://127.0.0.1:{stack.ports['h2']}") as client:
        headers = {"content-type": "application/grpc", "te": "trailers", "x-forwarded-for": BLOCKED}
        for content in (b"", b"\0\0\0\0\x02hi"):
            reply = client.post("/shop.Orders/Get", headers=headers, content=content)
            assert reply.status_code == 200
            assert reply.headers["content-type"] == "application/grpc"
            assert reply.headers["grpc-status"] == "7"
            assert reply.content == b""
            assert "content-length" not in reply.headers
    (line, *_) = [line for line in access_lines(stack) if line["path"] == "/shop.Orders/Get"]
    assert (line["status"], line["enforced"]) == ("200", "block")
    again = ask(stack, "/x", BLOCKED, "POST", b"abc", {"content-type": "application/grpc"})
    assert (again.status, again.headers["grpc-status"], again.body) == (200, "7", b"")


def frames(stack: NginxStack, target: str, client: str) -> str:
    """What an HTTP/2 client receives, as nghttp tells it."""
    nghttp = shutil.which("nghttp")
    if nghttp is None:
        pytest.skip("nghttp isn't installed (Debian: apt-get install nghttp2-client)")
    line = [nghttp, "-v", "-H", "content-type: application/grpc", "-H", f"x-forwarded-for: {client}"]
    url = f"http://127.0.0.1:{stack.ports['h2']}{target}"
    return subprocess.run([*line, url], capture_output=True, text=True, timeout=30, check=True).stdout


def test_grpc_frames_end_with_the_headers(stack: NginxStack) -> None:
    seen = frames(stack, "/a.B/C", BLOCKED)
    assert "END_STREAM" in seen.split("grpc-status: 7", 1)[1]
    assert "recv DATA" not in seen


def test_trailers_of_our_name_from_the_service_are_removed(stack: NginxStack) -> None:
    seen = frames(stack, "/lying.Grpc/Get", FRIEND).lower()
    assert "x-checksum: kept" in seen
    assert "outrider" not in seen.split("recv (", 1)[1]


# ---- one decision per request


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/echo", 200),
        ("/tries/x", 200),
        ("/rewritten/x", 200),
        ("/moved/x", 200),
        ("/plain-first/x", 200),
        ("/mirrored/x", 200),
        ("/asked/x", 200),
        ("/static/page.txt", 200),
        ("/static/nothing", 404),
        ("/static/folder", 301),
        ("/guarded/", 401),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_request_is_decided_once(stack: NginxStack, target: str, status: int, method: str) -> None:
    tail = tail_of(stack)
    body = b"a body" if method == "POST" else None
    reply = ask(stack, target, method=method, body=body)
    assert reply.status == (405 if target == "/static/page.txt" and body else status)
    (record,) = tail.wait()
    assert record["action"] == "allow"
    assert record["path"] == target
    if reply.status == 200 and target != "/static/page.txt":
        assert int(echoed(reply)["headers"]["x-outrider-id"], 16) == record["id"]


@pytest.mark.parametrize(
    "target", ["/tries/x", "/rewritten/x", "/plain-first/x", "/mirrored/x", "/asked/x", "/static/page.txt"]
)
def test_a_refused_one_too(stack: NginxStack, target: str) -> None:
    before = decisions(stack)
    reply = ask(stack, target, BLOCKED)
    assert reply.status == 403
    assert json.loads(reply.body)["title"] == "Request refused"
    eventually(lambda: decided(stack, before), "one decision")


def test_the_status_reaches_the_core(stack: NginxStack) -> None:
    """Failed logins are counted by what the service answers: the demo refuses at the tenth."""
    client = "198.51.100.77"
    statuses = [
        ask(stack, "/login", client, "POST", json.dumps({"user": "ada", "password": f"no{n}"}).encode()).status
        for n in range(14)
    ]
    assert statuses[:10] == [401] * 10
    assert statuses[-1] == 403
    assert ask(stack, "/login", client, "POST", b"{}").status == 403


# ---- what isn't plain


@pytest.mark.parametrize(
    ("request_line", "path"),
    [
        ("GET /ec%68o?a=b%20c HTTP/1.1", "/ec%68o"),
        ("GET http://elsewhere.example/echo?x HTTP/1.1", "/echo"),
        ("GET http://elsewhere.example?x HTTP/1.1", "/"),
        ("GET /./items/../echo?x=1 HTTP/1.1", "/./items/../echo"),
        ("GET //echo HTTP/1.1", "//echo"),
    ],
)
def test_the_target_is_what_the_client_sent(stack: NginxStack, request_line: str, path: str) -> None:
    tail = tail_of(stack)
    raw_port(stack.ports["nginx"], f"{request_line}\r\nhost: shop.example:8080\r\nconnection: close\r\n\r\n".encode())
    (record,) = tail.wait()
    assert record["path"] == path
    assert record["authority"] == ("elsewhere.example" if "elsewhere" in request_line else "shop.example:8080")


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET http://host?query HTTP/1.1\r\nhost: host\r\nconnection: close\r\n\r\n",
        b"GET http://host HTTP/1.1\r\nhost: host\r\nconnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: host\r\nconnection: close\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /\r\n",
        b"GET / HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n",
        b"CONNECT host:443 HTTP/1.1\r\nhost: host\r\n\r\n",
        b"GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"h" * 40_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ],
    ids=lambda data: data[:24].decode(),
)
def test_odd_requests_are_answered_and_nothing_dies(stack: NginxStack, data: bytes) -> None:
    workers = stack.workers()
    raw_port(stack.ports["nginx"], data, timeout_s=2, end=True)
    assert ask(stack, "/echo").status == 200
    assert stack.workers() == workers


def test_variables_are_what_was_decided(stack: NginxStack, marker: bytes) -> None:
    tail = tail_of(stack)
    ask(stack, "/echo?variables=" + marker.decode())
    (record,) = tail.wait()
    (line,) = eventually(
        lambda: [line for line in access_lines(stack) if "variables=" in line["path"]], "the line was written"
    )
    assert line["action"] == record["action"] == "block"
    assert line["enforced"] == record["enforced"]
    assert line["mode"] == record["mode"] == "enforce"
    assert float(line["score"]) == pytest.approx(record["score"], abs=1e-4)
    assert line["route"] == record["route"]
    assert line["reasons"] == ",".join(reason["name"] for reason in record["reasons"])
    assert line["place"] == record["place"] == "query.variables"
    assert len(line["id"]) == 16
    assert int(line["id"], 16) == record["id"]
    assert float(line["us"]) > 0


def test_variables_are_empty_where_nothing_was_decided(stack: NginxStack) -> None:
    ask(stack, "/plain/undecided")
    (line,) = eventually(
        lambda: [line for line in access_lines(stack) if line["path"] == "/plain/undecided"], "the line was written"
    )
    assert {value for name, value in line.items() if name not in ("status", "method", "path")} == {""}
