"""A principal is what a request claims: nobody may be locked out by what others do in his name. And clocks that
were ahead must not leave windows that only fill."""
from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest

from native.engine import Engine
from sidecar.config import Settings
from sidecar.core import open_core

REFUSED = ("throttle", "challenge", "block")


def engine() -> Engine:
    return open_core(Settings(), private=True, load_models=False).engine()


def token(subject: str) -> str:
    parts = (json.dumps({"alg": "none"}), json.dumps({"sub": subject}), "x")
    return "Bearer " + ".".join(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts)


NAMES = {
    "api key": {"x-api-key": "victim"},
    "token": {"authorization": token("victim")},
    "basic": {"authorization": "Basic " + base64.b64encode(b"victim:x").decode()},
}
ATTACKS: dict[str, tuple[Callable[[int], tuple[str, str]], int, float]] = {
    "logins": (lambda i: ("POST", "/login"), 401, 0.3),
    "walk": (lambda i: ("GET", f"/api/orders/{i + 100}"), 401, 0.3),
    "scan": (lambda i: ("GET", f"/x{i}/admin.php"), 404, 0.3),
    "denied": (lambda i: ("GET", "/api/me"), 401, 0.3),
    "flood": (lambda i: ("GET", "/api/me"), 401, 0.005),
}


@pytest.mark.parametrize("addresses", [1, 200])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", NAMES)
def test_nobody_is_locked_out_in_his_name(name: str, attack: str, addresses: int) -> None:
    decider = engine()
    headers, t, refused = NAMES[name], 1e9, 0
    make, status, every_s = ATTACKS[attack]
    for i in range(1200 if attack == "flood" else 80):
        verdict = decider.decide(*make(i), headers, client=f"203.0.113.{i % addresses}", ts=t)
        if verdict.action in REFUSED:
            refused += 1
        else:
            decider.respond(verdict, status, 3, ts=t)
        t += every_s
        if i % 16 == 15:  # the victim at work all the while, opening orders and mistyping once
            for url in ("/api/me", f"/api/orders/{i * 7919 % 1000}"):
                verdict = decider.decide("GET", url, headers, client="198.51.100.7", ts=t)
                assert verdict.action not in REFUSED, (i, verdict)
                decider.respond(verdict, 404 if i == 31 else 200, 3, ts=t)
    if addresses == 1:
        assert refused > 0


def test_whoever_walks_with_a_stolen_key_is_refused_wherever_he_comes_from() -> None:
    decider, t, refused = engine(), 1e9, 0
    for i in range(120):
        verdict = decider.decide("GET", f"/api/orders/{i}", NAMES["api key"], client=f"10.{i}.0.1", ts=t)
        if verdict.action in REFUSED:
            refused += 1
        else:
            decider.respond(verdict, 200, 3, ts=t)
        t += 1
    assert refused > 80


@pytest.mark.parametrize("ahead_s", [3600.0, 10 * 365 * 86400.0])
def test_a_clock_that_was_ahead_does_not_fill_windows_for_good(ahead_s: float) -> None:
    decider = engine()
    verdict = decider.decide("GET", "/a", client="192.0.2.1", ts=1e9 + ahead_s)
    decider.respond(verdict, 200, 3, ts=1e9 + ahead_s)
    for i in range(2000):
        t = 1e9 + i * 3
        verdict = decider.decide("GET", "/a", client="192.0.2.1", ts=t)
        assert verdict.action not in REFUSED, (i, verdict)
        decider.respond(verdict, 200, 3, ts=t)
