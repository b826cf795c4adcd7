"""Secrets leave an escalation, attacks don't; the same question has the same shape."""

from __future__ import annotations

import base64
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.judge.redact import is_secret, mask, path_shape, payload_shape, redact, redact_text, shape_of
from sidecar.judge.types import Escalation

BASE = Escalation(id="1", ts=0.0, service="s", method="POST", path="/login", place="form.q", text="x")
JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
SECRET = "hunter2"


@pytest.mark.parametrize(
    "text",
    [
        "password=hunter2",
        "a=1&Password=hunter2&b=2",
        "user[password]=hunter2",
        "user%5Bpassword%5D=hunter2",
        '{"password":"hunter2"}',
        '{"user": {"newPassword" : "hunter2", "n": 1}}',
        "{'api_key': 'hunter2'}",
        "x-api-key: hunter2",
        "refresh_token=hunter2;",
        "Authorization: Bearer hunter2hunter2",
        "authorization=Basic%20aHVudGVyMjpodW50ZXIy",
        "sessionid=hunter2",
        "pin=hunter2",
        "https://h/x?access_token=hunter2#f",
        '"client_secret":"a\\"hunter2"',
        "password = hunter2",
        "pwd=%68unter2",
        "hunter2@example.com",
        "mail=hunter2%40example.com",
        "bearer hunter2hunter2",
    ],
)
def test_secrets_go(text: str) -> None:
    shown = redact_text(text)
    assert SECRET not in shown
    assert "aHVudGVyMjpodW50ZXIy" not in shown
    assert "unter" not in shown
    assert len(shown) >= len(text) - 4


@pytest.mark.parametrize(
    "text",
    [
        f"q={JWT}",
        f"Cookie: a={JWT}; b=1",
        "card=4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "n:5500005555555559",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_0123456789abcdefghijABCDEFGHIJ012345",
        "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
        "/reset/Zk3jT9xQ2mLp8RvB4nYw7Hc1",
        "id=9f8e7d6c5b4a39281706f5e4d3c2b1a0",
    ],
)
def test_secrets_are_known_by_their_form(text: str) -> None:
    shown = redact_text(text)
    kept = set(re.findall(r"[A-Za-z0-9]{8,}", text)) & set(re.findall(r"[A-Za-z0-9]{8,}", shown))
    assert not kept
    assert len(shown) == len(text)


@pytest.mark.parametrize(
    "text",
    [
        "' or 1=1-- -",
        "1 union select user,2 from users where id=1",
        "<script>alert(document.cookie)</script>",
        "../../etc/passwd",
        ";cat /etc/passwd|sh",
        "${jndi:ldap://a.b/c}",
        "{{7*7}}",
        "<!ENTITY x SYSTEM 'file:///etc/passwd'>",
        "*)(uid=*",
        "$(id)",
        base64.b64encode(b"<script>alert(document.domain)</script>").decode(),
        b"; cat /etc/passwd #".hex(),
        "4111 1111 1111 1112",
        "12345678901234567890123",
        "just a sentence about passwords and tokens",
        "/articles/how-to-reset-a-password",
        "%27%20or%20%271%27%3D%271",
        "order-of-the-day-in-two-thousand-words",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("attack", ["' or '1'='1", '"><svg/onload=x>', "`id`;|&&", "{{7*7}}", "../../x", "a'/**/--"])
@pytest.mark.parametrize("place", ["form.password", "json.user.token", "cookie.sid", "header.authorization"])
def test_under_a_secrets_key_its_marks_stay(attack: str, place: str) -> None:
    shown = redact(replace(BASE, place=place, text=attack)).text
    assert re.sub(r"[a-zA-Z0-9]", "", shown) == re.sub(r"[a-zA-Z0-9]", "", attack)
    assert len(shown) == len(attack)
    assert not set(re.findall(r"[b-zB-Z1-9]", shown))


def test_all_fields_are_read() -> None:
    e = replace(
        BASE,
        path=f"/a?token={SECRET}&q=1",
        text=f"password={SECRET}",
        user_agent=f"x token={SECRET}",
        recent=(f"GET /x?sid={SECRET} 200",),
        client="8.8.8.8",
    )
    r = redact(e)
    assert SECRET not in r.to_wire().decode()
    assert r.client == "8.8.8.8"
    assert r.path.startswith("/a?token=")
    assert r.path.endswith("&q=1")


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("password", True),
        ("user[password]", True),
        ("newPassword", True),
        ("X-Api-Key", True),
        ("access_token", True),
        ("csrf-token", True),
        ("json.user.pin", True),
        ("cookie.PHPSESSID", True),
        ("name", False),
        ("spinner", False),
        ("passenger", False),
        ("author", False),
        ("design", False),
        ("compass", False),
        ("query.q", False),
        ("tokenizer", False),
        ("", False),
    ],
)
def test_secret_keys(key: str, secret: bool) -> None:
    assert is_secret(key) is secret


@given(st.text(max_size=400))
@settings(deadline=None)
def test_masking_keeps_all_marks(text: str) -> None:
    marks = [c for c in text if c.isascii() and not c.isalnum()]
    assert [c for c in mask(text) if c.isascii() and not c.isalnum()] == marks or "%" in text or "\\u" in text


@given(st.text(st.sampled_from("aA0'\"<>=:&;@.-_%5+\\ {}[]/eyJbearpswod"), max_size=2000))
@settings(max_examples=100, deadline=None)
def test_hostile_text_is_taken(text: str) -> None:
    e = replace(BASE, text=text, path=text, user_agent=text[:200], place=text[:60])
    assert len(redact(e).text) <= 8192
    assert re.fullmatch("[0-9a-f]{32}", shape_of(e))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1' or 7=7--", "482' or 91=91--"),
        ("id=9f8e7d6c5b4a39281706f5e4d3c2b1a0'", "id=0a8e7d6c5b4a39281706f5e4d3c2bfff'"),
        ("hello world", "hallo werld"),
        ("SELECT 1;", "select 2;"),
        ("a" * 600 + "'", "a" * 700 + "'"),
        ("Summer Shoes 42", "Winter Boots 17"),
    ],
)
def test_same_question(a: str, b: str) -> None:
    assert payload_shape(a) == payload_shape(b)
    assert shape_of(replace(BASE, text=a)) == shape_of(replace(BASE, text=b, id="2", client="8.8.4.4"))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("hello(1)", "system(1)"),
        ("' or 1=1", "' or sleep(1)"),
        ("hello", "hello'"),
        ("a/b", "a/../b"),
        ("a" * 8 + "'", "a" * 4000 + "'"),
        ("${hello:x}", "${jndi:x}"),
        ("one", "one two three four five six"),
    ],
)
def test_other_questions(a: str, b: str) -> None:
    assert shape_of(replace(BASE, text=a)) != shape_of(replace(BASE, text=b))


def test_what_else_makes_a_question() -> None:
    seen = {
        shape_of(e)
        for e in (
            BASE,
            replace(BASE, method="GET"),
            replace(BASE, path="/other"),
            replace(BASE, place="form.b"),
            replace(BASE, status=404),
            replace(BASE, story={"requests_600s": 3.0, "login_failures": 3.0, "age": 5.0}),
        )
    }
    assert len(seen) == 6
    assert shape_of(replace(BASE, path="/users/17/x")) == shape_of(replace(BASE, path="/users/99/x?q=1"))
    told = replace(BASE, text="", recent=("GET /a 404",))
    assert shape_of(told) != shape_of(replace(told, recent=("GET /b 404",)))


def test_paths() -> None:
    assert path_shape("/Users/17/files/0b7e4c1e-8c6e-4a53-9b0e-1f0c2c9d7a11?x=1") == "/users/*/files/*"


def test_attacks_of_different_build_are_different_questions() -> None:
    texts = ["' or 1=1 -- ", "' and (2>1) or 1=1", "' union select password from users --", "<script>alert(1)</script>"]
    assert len({payload_shape(text) for text in texts}) == len(texts)
    assert payload_shape("' or 7=7 -- ") == payload_shape("' or 1=1 -- ")
