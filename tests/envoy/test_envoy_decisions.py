"""Envoy asks, Outrider decides: what the client, the service, the logs and the metrics see of it."""

from __future__ import annotations

import json

import pytest
from harness import BLOCKED, FRIEND, access_lines, ask, echoed, eventually, metrics, raw, tail_of

from sidecar.demo.stack import Stack
from sidecar.demo.supervisor import answers


def outrider_headers(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-outrider-")}


def test_an_allowed_request_passes_with_headers_for_the_service_only(stack: Stack) -> None:
    tail = tail_of(stack)
    reply = ask(stack, "/echo?q=oak+chair")
    inside = outrider_headers(echoed(reply)["headers"])
    assert inside["x-outrider-action"] == "allow"
    assert 0.0 <= float(inside["x-outrider-score"]) <= 1.0
    assert outrider_headers(reply.headers) == {}
    (record,) = tail.wait()
    assert record["action"] == "allow"
    assert record["spent_us"] > 0
    assert record["client"] == FRIEND


def test_a_blocked_client_is_refused_and_told_why_in_the_log(stack: Stack) -> None:
    tail = tail_of(stack)
    reply = ask(stack, "/echo", BLOCKED)
    assert reply.status == 403
    assert reply.headers["content-type"] == "application/problem+json"
    assert json.loads(reply.body)["status"] == 403
    assert outrider_headers(reply.headers) == {}
    (record,) = tail.wait()
    assert record["action"] == "block"
    assert record["reasons"][0]["name"] == "blocked_range"
    assert "range" in record["reasons"][0]["text"]


def test_a_tagged_request_passes_and_says_so_to_the_service(stack: Stack) -> None:
    """The route is in observe mode: the refusal is recorded, the request passes."""
    tail = tail_of(stack)
    reply = ask(stack, "/echo", BLOCKED, method="PUT", body=b"{}")
    inside = outrider_headers(echoed(reply)["headers"])
    assert inside["x-outrider-action"] in ("tag", "block")
    assert outrider_headers(reply.headers) == {}
    (record,) = tail.wait()
    assert (record["action"], record["mode"]) == ("block", "observe")


def test_headers_forged_outside_never_arrive(stack: Stack) -> None:
    reply = ask(
        stack,
        "/echo",
        headers={"x-outrider-action": "trusted", "X-Outrider-Score": "0", "x-outrider-anything": "1"},
    )
    inside = outrider_headers(echoed(reply)["headers"])
    assert inside["x-outrider-action"] == "allow"
    assert "x-outrider-anything" not in inside
    assert set(inside) <= {"x-outrider-action", "x-outrider-score", "x-outrider-id"}


def test_the_access_log_carries_the_decision(stack: Stack) -> None:
    ask(stack, "/search?q=logged-allow")
    ask(stack, "/search?q=logged-block", BLOCKED)

    def line(word: str) -> list[dict[str, object]]:
        return [one for one in access_lines(stack) if word in str(one["path"])]

    allowed = eventually(lambda: line("logged-allow"), "the access log's line")[0]
    blocked = eventually(lambda: line("logged-block"), "the access log's line")[0]
    # the headers of what was let through, the whole record of what was flagged
    assert (allowed["response_code"], allowed["outrider_action"], allowed["outrider"]) == (200, "allow", None)
    assert (blocked["response_code"], blocked["outrider"]["action"]) == (403, "block")
    assert blocked["outrider"]["route"] == "default"
    assert blocked["outrider_action"] is None
    assert blocked["downstream_remote_address"] == BLOCKED
    assert 0.0 <= float(allowed["outrider_score"]) <= 1.0
    assert len(allowed["outrider_id"]) == 16


def test_a_client_cannot_write_itself_another_address(stack: Stack) -> None:
    """One hop is trusted here (the test itself): what stands left of it is the client's own word."""
    assert ask(stack, "/echo", f"{FRIEND}, {BLOCKED}").status == 403
    assert ask(stack, "/echo", f"{BLOCKED}, {FRIEND}").status == 200


def test_a_path_spelt_differently_is_the_same_route(stack: Stack) -> None:
    tail = tail_of(stack)
    for spelling in ("/login", "//login", "/./login", "/x/../login", "/%6cogin"):
        ask(stack, spelling, method="POST", body=b"{}", headers={"content-type": "application/json"})
        (record,) = tail.wait()
        assert record["route"] == "login", spelling
    assert ask(stack, "/x%2f..%2flogin").status == 307


def test_what_envoy_answers_itself_does_no_harm(stack: Stack) -> None:
    """A redirect or a 400 of Envoy's own reaches Outrider as a response without a request."""
    before = metrics(stack)["outrider_requests_total"]
    assert ask(stack, "/a%2fb").status == 307
    assert raw(stack, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert ask(stack, "/items/1").status == 200
    assert metrics(stack)["outrider_requests_total"] >= before + 1


def test_metrics_count_what_was_decided(stack: Stack) -> None:
    name = 'outrider_decisions_total{action="block"}'
    before = metrics(stack)
    for _ in range(5):
        ask(stack, "/items", BLOCKED)
        ask(stack, "/items/2")
    after = metrics(stack)
    assert after["outrider_requests_total"] - before["outrider_requests_total"] == 10
    assert after[name] - before[name] == 5
    assert after['outrider_decision_duration_seconds_count'] >= 10
    # the response half of those that reached the service
    assert after["outrider_responses_total"] - before["outrider_responses_total"] >= 5
    assert answers(stack.admin_url + "/readyz")
    assert answers(stack.admin_url + "/healthz")


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PATCH", "OPTIONS"])
def test_every_method_is_decided(stack: Stack, method: str) -> None:
    tail = tail_of(stack)
    assert ask(stack, "/items/999999", method=method).status == 404
    (record,) = tail.wait()
    assert record["action"] == "allow"
