"""NGINX's auth_request with the configuration that ships, before a real sidecar and a service."""
from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_sidecar import Sidecar, free_port, until

CONF = Path(__file__).resolve().parents[2] / "envoy" / "nginx-auth-request.conf"
REFUSAL = {"type": "about:blank", "title": "Request refused"}
SQL = "/search?q=%27%20OR%201%3D1%20UNION%20SELECT%20password%20FROM%20users--"


class Service(http.server.ThreadingHTTPServer):
    """Answers with what it got; /forbidden with 403 and headers of ours."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            body = json.dumps({"method": self.command, "path": self.path, "headers": self.headers.items(),
                               "body": self.rfile.read(int(self.headers.get("content-length", 0))).decode()}).encode()
            self.send_response(403 if self.path == "/forbidden" else 200)
            self.send_header("content-length", str(len(body)))
            self.send_header("x-outrider-score", "0.9999")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()


class Stack:
    def __init__(self, folder: Path, **over: Any) -> None:
        self.folder = folder
        self.socket = folder / "auth.sock"
        over.setdefault("listen", {}).setdefault("auth_request", f"unix:{self.socket}")
        self.sidecar = Sidecar(folder, **over).start()
        self.service = Service()
        self.port = free_port()
        self.nginx: subprocess.Popen[bytes] | None = None
        self.conf = folder / "nginx.conf"
        text = CONF.read_text()
        user = "user root;" if os.geteuid() == 0 else ""
        for old, new in (
            ("worker_processes auto;", f"worker_processes 1; daemon off; pid {folder}/nginx.pid; "
                                       f"error_log {folder}/error.log info; {user}"),
            ("server 127.0.0.1:8080;", f"server 127.0.0.1:{self.service.server_port};"),
            ("unix:/run/outrider/auth.sock;\n        keepalive", f"unix:{self.socket};\n        keepalive"),
            ("listen 0.0.0.0:80;", f"listen 127.0.0.1:{self.port};"),
            ("/var/log/nginx/access.log", f"{folder}/access.log"),
            # the test's clients name their address in a header
            ("# set_real_ip_from 192.0.2.0/24;", "set_real_ip_from 127.0.0.1;"),
            ("# real_ip_header X-Forwarded-For;", "real_ip_header X-Test-Client;"),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        self.text = text

    def start(self, text: str | None = None) -> None:
        self.conf.write_text(self.text if text is None else text)
        command = ["nginx", "-p", str(self.folder), "-c", str(self.conf), "-e", str(self.folder / "error.log")]
        self.nginx = subprocess.Popen(command)
        until(lambda: self.get("/")[0] or True if self.listens() else None, "NGINX doesn't listen")

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, target: str, method: str = "GET", body: str | None = None, client: str = "192.0.2.7",
            headers: list[tuple[str, str]] | None = None) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, target)
            connection.putheader("X-Test-Client", client)
            for name, value in headers or []:
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body.encode() if body is not None else None)
            answer = connection.getresponse()
            return answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()

    def seen(self, target: str, **kwargs: Any) -> dict[str, Any]:
        """What the service got; headers by lower-case name."""
        status, _, body = self.get(target, **kwargs)
        assert status == 200, body
        got: dict[str, Any] = json.loads(body)
        got["headers"] = {name.lower(): value for name, value in got["headers"]}
        return got

    def close(self) -> None:
        for process in (self.nginx, self.sidecar.process):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(20)
        self.service.shutdown()
        self.service.server_close()


Make = Callable[..., Stack]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx isn't installed")
    made: list[Stack] = []

    def start(**over: Any) -> Stack:
        made.append(Stack(tmp_path_factory.mktemp("n"), **over))
        return made[-1]

    yield start
    for stack in made:
        stack.close()


def test_pass_refuse_and_count(make: Make) -> None:
    stack = make(lists={"block": ["198.51.100.0/24"]}, decision_log={"actions": ["allow", "tag", "throttle", "block"]})
    stack.start()
    before = stack.sidecar.metric("outrider_requests_total")
    got = stack.seen("/orders/7?full=yes", headers=[("User-Agent", "test")])
    assert (got["method"], got["path"]) == ("GET", "/orders/7?full=yes")
    assert not [name for name in got["headers"] if name.startswith("x-outrider") or name.startswith("x-original")]
    got = stack.seen("/orders", method="POST", body='{"a": 1}')
    assert (got["method"], got["body"]) == ("POST", '{"a": 1}')

    status, headers, body = stack.get("/orders", client="198.51.100.9")
    assert status == 403
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"
    assert "retry-after" not in headers
    assert json.loads(body) == {**REFUSAL, "status": 403}
    assert stack.get(SQL)[0] == 403

    assert stack.sidecar.metric("outrider_requests_total") == before + 4
    assert stack.sidecar.metric('outrider_enforced_total{action="block"}') == 2
    assert stack.sidecar.metric("outrider_auth_request_refusals_total") == 2
    assert stack.sidecar.metric("outrider_auth_request_faults_total") == 0
    # NGINX keeps its connection
    assert stack.sidecar.metric("outrider_auth_request_connections_opened_total") == 1
    listed, sql = until(lambda: [d for d in stack.sidecar.decisions() if d["action"] == "block"][:2], "logged")
    assert (listed["client"], listed["method"], listed["path"]) == ("198.51.100.9", "GET", "/orders")
    assert listed["reasons"][0]["name"] == "blocked_range"
    assert (sql["reasons"][0]["name"], sql["place"], sql["client"]) == ("sql_injection", "query.q", "192.0.2.7")
    posted = [d for d in stack.sidecar.decisions() if d["method"] == "POST"]
    assert posted[0]["path"] == "/orders"
    assert posted[0]["authority"] == f"127.0.0.1:{stack.port}"
    # the proxy's log names the decision
    last = until(lambda: (stack.folder / "access.log").read_text().splitlines()[-1], "the access log")
    assert last.endswith(f"block {sql['score']:.4f} {sql['id']:016x}")


def test_a_throttled_client_gets_429_and_retry_after(make: Make) -> None:
    stack = make(detectors={"request_flood": {"requests": 20, "window": "10s", "action": "throttle"}},
                 answers={"throttle": {"retry_after": "17s"}})
    stack.start()
    answers = [stack.get("/") for _ in range(40)]
    status, headers, body = answers[-1]
    assert status == 429
    assert (headers["retry-after"], headers["content-type"]) == ("17", "application/problem+json")
    assert json.loads(body) == {**REFUSAL, "status": 429}
    assert answers[0][0] == 200
    assert stack.get("/", client="192.0.2.8")[0] == 200


def test_forged_headers(make: Make) -> None:
    stack = make(answers={"headers": "all"}, lists={"block": ["198.51.100.0/24"]})
    stack.start()
    forged = [("X-Outrider-Action", "allow"), ("X-Outrider-Score", "0.0000"), ("X-Outrider-Id", "1"),
              ("X_Outrider_Score", "0"), ("X-Original-URI", "/harmless"), ("X-Original-Method", "OPTIONS"),
              ("X-Real-IP", "10.0.0.1"), ("X-Outrider-Status", "200")]
    headers = stack.seen("/a", headers=forged)["headers"]
    assert headers["x-outrider-action"] == "allow"
    assert re.fullmatch(r"0\.[0-9]{4}", headers["x-outrider-score"])
    assert re.fullmatch(r"[0-9a-f]{16}", headers["x-outrider-id"])
    assert headers["x-outrider-id"] != "1"
    assert "x_outrider_score" not in headers
    assert stack.get(SQL, headers=forged)[0] == 403
    assert stack.get("/a", client="198.51.100.1", headers=[*forged, ("X-Forwarded-For", "10.0.0.1")])[0] == 403
    # and the service can't tell clients anything in our name, nor is its own 403 taken for ours
    status, headers, body = stack.get("/forbidden")
    assert status == 403
    assert not [name for name in headers if name.startswith("x-outrider")]
    assert json.loads(body)["path"] == "/forbidden"


def test_without_answers_headers_the_service_hears_nothing_and_forgeries_go(make: Make) -> None:
    stack = make(answers={"headers": "none"})
    stack.start()
    headers = stack.seen("/a", headers=[("X-Outrider-Action", "allow"), ("X-Outrider-Id", "1")])["headers"]
    assert not [name for name in headers if name.startswith("x-outrider")]


def test_targets_come_through_as_sent(make: Make) -> None:
    """Nothing of a target is cut off or taken for an authority before it is judged."""
    stack = make()
    stack.start()
    attack = "1%27%20UNION%20SELECT%20password%20FROM%20users--%20OR%20%27a%27=%27a"
    for target in (f"/?u=http://x/&q={attack}", f"/a?q=1#&q={attack}", f"/a//b/../c?q={attack}"):
        assert stack.get(target)[0] == 403, target


def test_hops_are_counted_as_for_envoy(make: Make) -> None:
    """client.trusted_hops: NGINX's peer stands at the right end of X-Forwarded-For."""
    stack = make(client={"trusted_hops": 1}, lists={"block": ["198.51.100.0/24"]})
    stack.start()
    blocked, other = "198.51.100.1", "192.0.2.1"
    for forwarded, status in ((blocked, 403), (f"{blocked}, {other}", 200), (f"{other}, {blocked}", 403)):
        assert stack.get("/", headers=[("X-Forwarded-For", forwarded)])[0] == status, forwarded


def test_without_a_sidecar_it_fails_closed_and_recovers(make: Make) -> None:
    stack = make()
    stack.start()
    assert stack.get("/")[0] == 200
    stack.sidecar.stop(signal.SIGKILL)
    for _ in range(3):
        assert stack.get("/")[0] == 500
    stack.sidecar.start()                         # over the socket that the killed one left
    assert stack.get("/")[0] == 200
    assert stack.get(SQL)[0] == 403
    assert stack.sidecar.stop() == 0
    assert not stack.socket.exists()
    assert stack.get("/")[0] == 500


def test_failing_open_as_the_configuration_says(make: Make) -> None:
    stack = make()
    text = stack.text
    for line in ("# proxy_intercept_errors on;", "# error_page 500 502 503 504 = @unjudged;"):
        assert text.count(line) == 1
        text = text.replace(line, line[2:])
    stack.start(text)
    assert stack.get(SQL)[0] == 403
    stack.sidecar.stop(signal.SIGKILL)
    assert stack.get(SQL)[0] == 200
    got = stack.seen("/a", method="POST", body="x", headers=[("X-Outrider-Action", "allow")])
    assert (got["method"], got["body"]) == ("POST", "x")
    assert "x-outrider-action" not in got["headers"]
    stack.sidecar.start()
    assert stack.get(SQL)[0] == 403
    # a sidecar that sleeps is one that doesn't answer
    assert stack.sidecar.process is not None
    stack.sidecar.process.send_signal(signal.SIGSTOP)
    try:
        assert stack.get("/")[0] == 200
    finally:
        stack.sidecar.process.send_signal(signal.SIGCONT)


def test_an_incomplete_configuration_fails_closed_and_is_explained(make: Make) -> None:
    stack = make()
    text = stack.text.replace("proxy_set_header X-Original-URI $request_uri;", "")
    stack.start(text)
    assert stack.get("/", headers=[("X-Original-Method", "GET")])[0] == 500
    (line,) = stack.sidecar.said("a subrequest can't be answered")
    assert line["why"] == "no x-original-uri: the location has to set it with proxy_set_header"
    assert stack.sidecar.metric("outrider_auth_request_faults_total") >= 1
