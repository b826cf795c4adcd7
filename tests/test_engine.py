"""Decisions: detectors, holds, budgets, modes, both halves."""
from __future__ import annotations

import json
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.engine import Engine, ModelError, Models
from sidecar.config import Settings, loads
from sidecar.core import Core, open_core
from sidecar.reasons import sentences


def core(text: str = "") -> Core:
    return open_core(loads(text, "test") if text else Settings(), private=True, load_models=False)


def drive(
    engine: Engine, n: int, method: str, url: str, status: int, client: str, every_s: float = 1.0, t: float = 1000.0
) -> int:
    """Send n requests ({i} in url counts); the number of the first one refused, 0 where none was."""
    for i in range(n):
        verdict = engine.decide(method, url.format(i=i), client=client, ts=t + i * every_s)
        if verdict.action in ("throttle", "challenge", "block"):
            return i + 1
        engine.respond(verdict, status, 5.0, ts=t + i * every_s + 0.01)
    return 0


@pytest.mark.parametrize("every_s", [0.05, 1.0, 20.0, 300.0])
def test_brute_force_is_found_at_any_pace(every_s: float) -> None:
    engine = core().engine()
    assert 0 < drive(engine, 60, "POST", "/login", 401, "192.0.2.1", every_s) <= 50
    verdict = engine.decide("POST", "/login", client="192.0.2.1", ts=1000.0 + 60 * every_s)
    assert verdict.action == "block"
    assert verdict.reasons == ["brute_force"]
    assert "guesses passwords" in sentences(verdict.record())[0]


def test_brute_force_where_failures_answer_200() -> None:
    assert 0 < drive(core().engine(), 60, "POST", "/wp-login.php", 200, "192.0.2.1") <= 50


@pytest.mark.parametrize(
    ("url", "status"),
    [("/api/orders/{i}", 200), ("/api/users/{i}7/profile", 403), ("/api/doc?id={i}31", 404)],
)
def test_enumeration_is_found(url: str, status: int) -> None:
    engine = core().engine()
    n = drive(engine, 60, "GET", url, status, "192.0.2.1", 0.5)
    assert 0 < n <= 50
    assert engine.decide("GET", url.format(i=99), client="192.0.2.1", ts=1060.0).reasons == ["object_enumeration"]


def test_scanning_is_found() -> None:
    engine = core().engine()
    assert 0 < drive(engine, 60, "GET", "/x{i}/admin.php", 404, "192.0.2.1") <= 50


ATTACK = "/{path}?q=%27%20union%20select%20password%20from%20users--"


def attack(engine: Engine, path: str, t: float, client: str = "192.0.2.1") -> str:
    verdict = engine.decide("GET", ATTACK.format(path=path), client=client, ts=t)
    assert verdict.action == "block"
    return verdict.reasons[-1]


def test_a_scanner_is_held_however_its_other_requests_look() -> None:
    engine = open_core(Settings(), private=True).engine()
    t = 1000.0
    for i in range(12):
        attack(engine, f"page{i}", t)
        for _ in range(10):
            verdict = engine.decide("GET", "/", client="192.0.2.1", ts=t)
            t += 1
    assert (verdict.action, verdict.reasons[0]) == ("block", "repeated_attacks")
    assert "keeps attacking" in sentences(verdict.record())[0]
    assert engine.decide("GET", "/", client="192.0.2.2", ts=t).action == "allow"


def test_one_page_on_which_people_paste_sql_holds_nobody() -> None:
    engine = open_core(Settings(), private=True).engine()
    for i in range(40):
        attack(engine, "notes", 1000.0 + i)
    assert engine.decide("GET", "/", client="192.0.2.1", ts=1040.0).action == "allow"


def test_a_flood_is_throttled_with_retry_after() -> None:
    c = core("detectors: {request_flood: {requests: 100}}")
    engine = c.engine()
    n = drive(engine, 200, "GET", "/", 200, "192.0.2.1", 0.01)
    assert 95 <= n <= 105
    verdict = engine.decide("GET", "/", client="192.0.2.1", ts=1002.0)
    assert (verdict.action, verdict.reasons) == ("throttle", ["request_flood"])
    assert engine.decide("GET", "/", client="192.0.2.1", ts=1100.0).action == "allow"


def test_ordinary_mistakes_are_not_refused() -> None:
    engine = core().engine()
    t = 1000.0
    for _day in range(30):
        for status in (401, 401, 200):
            verdict = engine.decide("POST", "/login", client="192.0.2.1", ts=t)
            assert verdict.action == "allow"
            engine.respond(verdict, status, 5.0, ts=t)
            t += 5
        for i in range(20):
            verdict = engine.decide("GET", f"/items/{i * 37 % 11}", client="192.0.2.1", ts=t)
            assert verdict.action == "allow"
            engine.respond(verdict, 404 if i == 7 else 200, 5.0, ts=t)
            t += 7
        t += 80000


def test_a_held_client_stays_refused_for_the_hold_and_no_longer() -> None:
    engine = core("detectors: {hold: 30s}").engine()
    assert engine.arena.counters()["held"] == 0
    n = drive(engine, 60, "POST", "/login", 401, "192.0.2.1", 1.0)
    end = 1000.0 + n - 1
    assert engine.decide("GET", "/", client="192.0.2.1", ts=end + 25).action == "block"
    assert engine.decide("GET", "/", client="192.0.2.2", ts=end + 25).action == "allow"
    assert engine.decide("GET", "/", client="192.0.2.1", ts=end + 4000).action == "allow"
    assert engine.arena.counters()["held"] > 0


def test_observe_says_what_enforce_would_do_and_does_nothing() -> None:
    engine = core("service: {mode: observe}").engine()
    drive(engine, 20, "POST", "/login", 401, "192.0.2.1")
    verdict = engine.decide("POST", "/login", client="192.0.2.1", ts=1020.0)
    assert (verdict.action, verdict.enforced) == ("block", "tag")
    assert verdict.record()["mode"] == "observe"


def test_detectors_can_be_switched_off_and_softened() -> None:
    engine = core("detectors: {brute_force: {enabled: false}}").engine()
    assert drive(engine, 60, "POST", "/login", 401, "192.0.2.1") == 0
    engine = core("detectors: {brute_force: {action: tag}}").engine()
    assert drive(engine, 60, "POST", "/login", 401, "192.0.2.1") == 0
    verdict = engine.decide("POST", "/login", client="192.0.2.1", ts=1061.0)
    assert (verdict.action, verdict.reasons) == ("tag", ["brute_force"])


def test_scores_stay_on_the_scale_of_the_actions() -> None:
    engine = core().engine()
    drive(engine, 60, "POST", "/login", 401, "192.0.2.1")
    assert 0.9 <= engine.decide("POST", "/login", client="192.0.2.1", ts=1061.0).record()["score"] <= 1
    engine = core("detectors: {request_flood: {requests: 10}}").engine()
    drive(engine, 60, "GET", "/", 200, "192.0.2.1", 0.01)
    assert 0.8 <= engine.decide("GET", "/", client="192.0.2.1", ts=1000.5).record()["score"] < 0.9


def test_without_models_it_decides_and_says_so() -> None:
    c = core()
    assert c.engine().decide("GET", "/?q=' or 1=1--", client="192.0.2.1").action == "allow"
    assert c.arena.counters()["no_models"] == 1


def test_a_bad_runtime_folder_is_refused(tmp_path: object) -> None:
    models = Models()
    with pytest.raises(ModelError, match=r"runtime\.bin"):
        models.load(tmp_path)
    assert models.generation == 0


headers = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=200)), max_size=140)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=400), headers, st.binary(max_size=500), st.binary(max_size=20))
def test_any_bytes_get_a_decision(method: bytes, url: bytes, headers: list, body: bytes, client: bytes) -> None:
    engine = core().engine()
    verdict = engine.decide(method, url, headers, body, client=client.decode("latin1"), ts=1000.0)
    record = verdict.record()
    assert record["action"] in ("allow", "tag", "throttle", "challenge", "block")
    assert 0 <= record["score"] <= 1
    engine.respond(verdict, 599, 1e9, ts=1000.0)


@pytest.mark.parametrize(
    ("headers", "body", "place"),
    [
        ([("authorization", "Bearer ' or 1=1 union select password from users--")], None, "header.authorization"),
        ([("cookie", "sid=' or 1=1 union select password from users--")], None, "cookie.sid"),
        (
            [("content-type", "application/json")],
            '{"Password": "\' or 1=1 union select password from users--"}',
            "json.Password",
        ),
    ],
)
def test_secrets_stay_out_of_records(headers: list, body: str | None, place: str) -> None:
    engine = open_core(Settings(), private=True).engine()
    record = engine.decide("POST", "/x", headers, body, client="192.0.2.1").record()
    assert record["place"] == place
    assert record["action"] == "block"
    assert record["excerpt"] == ""
    shown = engine.decide("GET", "/x?q=' or 1=1 union select password from users--", client="192.0.2.1").record()
    assert "union" in shown["excerpt"]


PASSWORD = "x;'\"<>%&|$(q)#7Kp\\{]"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", json.dumps({"user": "ada", "password": PASSWORD})),
        ("application/x-www-form-urlencoded", urlencode({"user": "ada", "password": PASSWORD})),
    ],
)
def test_a_generated_password_is_not_an_attack(kind: str, body: str) -> None:
    engine = open_core(Settings(), private=True).engine()
    assert engine.decide("POST", "/login", [("content-type", kind)], body, client="192.0.2.1").action == "allow"
    elsewhere = engine.decide("POST", "/login", [("content-type", kind)], body.replace("password", "note"))
    assert elsewhere.action != "allow"


def test_an_attack_in_a_password_is_still_one() -> None:
    engine = open_core(Settings(), private=True).engine()
    for payload in ("' union select password from users--", "<script>alert(1)</script>", "x'/**/or/**/1=1--"):
        body = json.dumps({"user": "ada", "password": payload})
        verdict = engine.decide("POST", "/login", [("content-type", "application/json")], body)
        assert verdict.action == "block", payload


def test_a_gateway_that_logs_many_in_is_not_guessing() -> None:
    engine = open_core(Settings(), private=True).engine()
    for i in range(200):
        body = json.dumps({"username": f"user{i}", "password": "Correct1!"})
        verdict = engine.decide(
            "POST", "/login", [("content-type", "application/json")], body, client="192.0.2.1", ts=1000.0 + i / 4
        )
        assert verdict.action in ("allow", "tag"), (i, verdict)  # many names at once are unusual
        engine.respond(verdict, 200, 20.0, ts=1000.01 + i / 4)


def test_a_request_that_was_read_in_part_says_so() -> None:
    engine = open_core(loads("text: {values: 10}", "test"), private=True).engine()
    many = "&".join(f"k{i}=value{i}" for i in range(50))
    assert engine.decide("GET", f"/x?{many}").reasons == ["text_cut"]
    assert engine.decide("GET", "/x?a=b").reasons == []
