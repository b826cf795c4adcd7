"""One and the same module in every Envoy that it is made for: what a request passes on its way through the hooks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_hosts import MARKER
from h2_client import ask_h2, pseudo
from harness import BLOCKED, FRIEND, access_lines, ask, chunked, echoed, eventually, post, raw, tail_of
from proxy_harness import make_bundle

from sidecar import plugins
from sidecar.demo.envoy import find_envoy
from sidecar.demo.stack import Stack, merge

VERSIONS = ("1.38", "1.39", "1.40")
JSON = {"content-type": "application/json"}


def binary_of(version: str) -> Path:
    """Of the environment's own version, or of those that `make test` puts beside it."""
    own = find_envoy()
    said = subprocess.run([str(own), "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    if f"/{version}." in said:
        return own
    found = Path(sys.prefix) / "envoys" / version / "envoy/_bin/envoy"
    if not found.exists():
        pytest.skip(f"Envoy {version} isn't installed (make {found.relative_to(Path(sys.prefix).parent).parents[2]})")
    found.chmod(0o755)
    return found


@pytest.fixture(scope="module", params=VERSIONS)
def stack(
    request: pytest.FixtureRequest,
    envoy_binary: Path,
    settings: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    try:
        plugins.build("envoy")
    except plugins.PluginError as error:
        pytest.skip(str(error))
    bundle = make_bundle(tmp_path_factory.mktemp("marker") / "bundle", 0.1, MARKER.encode())
    over = {"models": {"bundle": str(bundle)}, "detectors": {"hold": "0s", "scanning": {"enabled": False}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTRIDER_ENVOY", str(binary_of(request.param)))
        # Envoy 1.38 takes no configuration from below /dev, /dev/shm included
        patch.setenv("OUTRIDER_RUN_DIR", str(tmp_path_factory.mktemp("run")))
        with Stack(merge(settings, over), fixed_ports=False, plugin=True) as running:
            yield running


def test_the_module_is_the_same_for_all() -> None:
    assert plugins.build("envoy") == plugins.build("envoy")


def test_envoy_has_nothing_to_complain_of(stack: Stack) -> None:
    """Not of the ABI's name either, which differs between versions."""
    text = (stack.logs / "envoy.log").read_text()
    assert "dynamic_module" not in text.replace("[dynamic_modules]", ""), text
    assert "[error]" not in text


def test_passing_and_refusing(stack: Stack) -> None:
    inside = echoed(ask(stack, "/echo?q=chair", headers={"x-outrider-score": "9", "X-Outrider-Mine": "1"}))["headers"]
    assert inside["x-outrider-action"] == "allow"
    assert float(inside["x-outrider-score"]) < 0.5
    assert "x-outrider-mine" not in inside
    refused = ask(stack, "/echo", BLOCKED)
    assert (refused.status, refused.headers["content-type"]) == (403, "application/problem+json")
    assert ask(stack, f"/search?q={MARKER}", "198.18.20.1").status == 403


@pytest.mark.parametrize("target", ["/echo", "/upload"])
@pytest.mark.parametrize("trailers", [b"", b"x-sum: 1\r\n"])
def test_bodies(stack: Stack, target: str, trailers: bytes) -> None:
    for marker, status in ((b"chair", b"200"), (MARKER.encode(), b"403")):
        pieces = (b'{"a": "', marker[:3], marker[3:], b'"}')
        lines = ("transfer-encoding: chunked", "content-type: application/json")
        data = post(target, chunked(*pieces, trailers=trailers), *lines)
        answer = raw(stack, data.replace(FRIEND.encode(), b"198.18.20.2"), timeout_s=5)
        assert answer.split(b" ")[1] == status, answer[:200]


def test_a_body_over_the_limits(stack: Stack) -> None:
    """Over ours and over Envoy's own: judged by its first part, and never a 413."""
    for size in (20_000, 200_000, 900_000):
        tail = tail_of(stack)
        body = json.dumps({"pad": "x" * size}).encode()
        seen = echoed(ask(stack, "/echo", "198.18.20.3", "POST", body, JSON))
        assert seen["body_bytes"] == len(body)
        (record,) = tail.wait()
        assert record["body"] == "part"


def test_the_access_log_has_the_record(stack: Stack) -> None:
    ask(stack, "/search?q=logged", BLOCKED)

    def line() -> Any:
        return [one for one in access_lines(stack) if "q=logged" in str(one["path"])]

    (found,) = eventually(line, "the access log's line")
    assert found["outrider"]["action"] == "block"
    assert found["outrider"]["reasons"] == ["blocked_range"]
    assert found["outrider"]["route"] == "default"
    assert found["outrider"]["mode"] == "enforce"
    assert len(found["outrider"]["id"]) == 16
    assert found["response_code_details"] == "outrider_block"


def test_responses_are_told(stack: Stack) -> None:
    """A client that fails to log in is known by what the service answered."""
    statuses = [
        ask(stack, "/login", "198.18.20.4", "POST", b'{"user": "ada", "password": "%d"}' % n, JSON).status
        for n in range(14)
    ]
    assert statuses[0] == 401
    assert statuses[-1] == 403


def test_grpc_over_http2(stack: Stack) -> None:
    fields = [*pseudo("POST", "/shop.Items/Find"), ("content-type", "application/grpc"), ("te", "trailers")]
    mine = ("x-forwarded-for", "198.18.20.5")
    for marker, refused in ((b"chair", False), (MARKER.encode(), True)):
        message = b"\0" + (len(marker) + 2).to_bytes(4, "big") + b"\n" + bytes([len(marker)]) + marker
        # the stream stays open: a call may have more messages, or wait for the service's first
        answer = ask_h2(stack.port, [*fields, mine], [message], timeout_s=5)
        if refused:
            assert (answer.status, answer.headers["grpc-status"]) == (200, "7"), answer
            assert answer.headers["content-type"] == "application/grpc"
        else:
            assert answer.headers.get("grpc-status") != "7", answer
