"""Entries that a judge reads: everything of the payload in sight, nothing that a client can break out with."""

from __future__ import annotations

import base64
import re
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.judge.render import (
    CLOSE,
    DECODE_ROUNDS,
    ENTRY_CHARS,
    ENTRY_CHARS_MIN,
    OPEN,
    OVERLAP_CHARS,
    WINDOWS_MAX,
    address_kind,
    atoms,
    decoded,
    escape,
    render,
    story_words,
)
from sidecar.judge.types import TEXT_CHARS_MAX, Escalation

HOSTILE = st.text(
    st.one_of(st.characters(), st.sampled_from("<>\n\r\t\x00\x1b%'\" \\&+\u202e\u200b\u0301\u2028")), max_size=1500
)
LINE = re.compile(
    r"(?:part \d+ of \d+(?:, \d+ left out)?|(?:raw|decoded): <<< .* >>>|(?:place|client|agent|recent): .*|\S* .*|)"
)


def escalation(**fields: object) -> Escalation:
    base: dict[str, object] = {"id": "1", "ts": 0.0, "service": "s", "method": "GET", "path": "/"}
    return Escalation(**{**base, **fields})  # type: ignore[arg-type]


def payload(entry: str, name: str = "raw") -> str | None:
    for line in entry.split("\n"):
        if line.startswith(f"{name}: {OPEN}") and line.endswith(CLOSE):
            return line[len(f"{name}: {OPEN}") : -len(CLOSE)]
    return None


def test_short_entry_holds_everything() -> None:
    e = escalation(
        method="POST",
        path="/api/users/7?x=1",
        status=401,
        client="8.8.8.8",
        user_agent="curl/8.1",
        place="form.name",
        text="%27%20or%201%3D1",
        story={"requests_600s": 3.0, "login_failures": 3.0, "age": 5.0, "gap_deviation": 1.0},
        recent=("POST /login 401", "POST /login 401"),
    )
    (entry,) = render(e)
    assert entry.splitlines() == [
        "POST /api/users/7 401 not authenticated",
        "place: form.name",
        "client: public v4, recent, many failed logins",
        "agent: curl/8.1",
        "recent: POST /login 401 | POST /login 401",
        "raw: <<< %27%20or%201%3D1 >>>",
        "decoded: <<< ' or 1=1 >>>",
    ]


@given(text=HOSTILE.filter(bool), chars_max=st.integers(ENTRY_CHARS_MIN, 1200))
@settings(max_examples=150, deadline=None)
def test_every_character_stands_whole_in_a_window(text: str, chars_max: int) -> None:
    entries = render(escalation(text=text, place="query.q"), chars_max, windows_max=1000)
    shown = [found for entry in entries if (found := payload(entry)) is not None]
    # windows in their order, each beginning inside the one before it or at its end
    whole = "".join(atoms(text))
    covered = 0
    for window in shown:
        at = whole.find(window, max(0, covered - len(window)))
        assert 0 <= at <= covered, (covered, window)
        covered = max(covered, at + len(window))
    assert covered == len(whole)


@given(cut=st.integers(0, 1400), size=st.integers(1, OVERLAP_CHARS - 12))
@settings(max_examples=150, deadline=None)
def test_what_is_shorter_than_the_overlap_is_never_cut_in_two(cut: int, size: int) -> None:
    needle = "S" + "x" * (size - 1) + "E"
    text = "a" * cut + needle + "b" * 900
    assert any(needle in (payload(entry) or "") for entry in render(escalation(text=text)))


@given(
    path=HOSTILE,
    text=HOSTILE,
    agent=HOSTILE,
    method=HOSTILE,
    place=HOSTILE,
    recent=st.lists(HOSTILE, max_size=9),
    client=HOSTILE,
    chars_max=st.integers(0, 2000),
)
@settings(max_examples=200, deadline=None)
def test_bounds_and_fences_hold(
    path: str, text: str, agent: str, method: str, place: str, recent: list[str], client: str, chars_max: int
) -> None:
    e = escalation(
        path=path, text=text, user_agent=agent, method=method, place=place, recent=tuple(recent), client=client
    )
    entries = render(e, chars_max)
    assert 1 <= len(entries) <= WINDOWS_MAX
    for entry in entries:
        assert len(entry) <= max(chars_max, ENTRY_CHARS_MIN)
        lines = entry.split("\n")
        assert len(lines) <= 10
        assert lines[-1] == ""
        assert all(c.isprintable() for c in entry.replace("\n", "")), entry
        assert "\u202e" not in entry
        assert "\u2028" not in entry
        fenced = [line for line in lines if line.startswith(("raw: <<< ", "decoded: <<< "))]
        assert fenced
        assert all(line.endswith(CLOSE) for line in fenced)
        # our own fences and no others
        assert entry.count("<<<") == entry.count(">>>") == len(fenced)
        assert all(LINE.fullmatch(line) for line in lines), lines


@pytest.mark.parametrize(
    "attack", ["' union select a,b from users-- -", "<script>alert(1)</script>", ";cat /etc/passwd|sh"]
)
@pytest.mark.parametrize("around", [(800, 0), (0, 800), (4000, 4000), (8000, 0), (0, 8000), (2000, 6000)])
def test_padding_does_not_push_a_payload_out_of_sight(attack: str, around: tuple[int, int]) -> None:
    text = "a" * around[0] + attack + "a" * around[1]
    entries = render(escalation(text=text))
    assert any("".join(atoms(attack)) in entry for entry in entries)
    assert len(entries) > 1


def test_what_is_left_out_is_said() -> None:
    entries = render(escalation(text="a" * TEXT_CHARS_MAX))
    assert len(entries) == WINDOWS_MAX
    total = int(re.search(r"part \d+ of (\d+), (\d+) left out", entries[0])[1])  # type: ignore[index]
    assert all(f"of {total}, {total - WINDOWS_MAX} left out\n" in entry for entry in entries)
    assert "part 1 of " in entries[0]
    assert f"part {total} of " in entries[-1]
    assert "left out" not in "".join(render(escalation(text="a" * 1000)))


def test_long_header_fields_leave_room() -> None:
    e = escalation(
        path="/" + "p" * 8000,
        user_agent="u" * 300,
        place="q" * 300,
        recent=("GET /" + "r" * 300,) * 9,
        text="needle" * 3,
        story={name: 9.0 for name in ("login_failures", "identities", "objects", "paths")},
    )
    (entry,) = render(e)
    assert "needleneedleneedle" in entry
    assert len(entry) <= ENTRY_CHARS


def test_without_text_the_path_is_the_payload() -> None:
    (entry,) = render(escalation(path="/a?q=%3Cscript%3E"))
    assert payload(entry) == "/a?q=%3Cscript%3E"
    assert payload(entry, "decoded") == "/a?q=<script>"


@pytest.mark.parametrize(
    ("sent", "plain"),
    [
        ("%27%20or", "' or"),
        ("%2527", "'"),
        ("%25252527", "%27"),
        ("&lt;b&gt;", "<b>"),
        ("&#x3c;b", "<b"),
        ("&#60b", "<b"),
        ("\\u003cb", "<b"),
        ("\\x3cb", "<b"),
        ("%u003cb", "<b"),
        ("a+b%27", "a b'"),
        ("a + b", "a + b"),
        ("plain", "plain"),
        (base64.b64encode(b"<script>alert(1)</script>").decode(), "<script>alert(1)</script>"),
        (quote(base64.b64encode(b"; cat /etc/passwd").decode()), "; cat /etc/passwd"),
        ("deadbeefdeadbeefdeadbeef", "deadbeefdeadbeefdeadbeef"),
        ("%ff%fe", "\udcff\udcfe"),
        ("&#x110000;", "\ufffd"),
    ],
)
def test_decoding(sent: str, plain: str) -> None:
    assert decoded(sent) == plain


def test_decoding_is_bounded() -> None:
    text = "'"
    for _ in range(DECODE_ROUNDS + 2):
        text = quote(text)
    assert decoded(text) != "'"
    assert len(decoded("&NotEqualTilde;" * 2000)) <= TEXT_CHARS_MAX


@given(HOSTILE, st.integers(8, 80))
def test_escape_fits(text: str, chars_max: int) -> None:
    shown = escape(text, chars_max)
    assert len(shown) <= chars_max
    assert "\n" not in shown
    assert "<<<" not in shown
    assert ">>>" not in shown


def test_bytes_and_invisible_characters_are_told() -> None:
    assert (
        "".join(atoms("\x00\x1b\u202e\u200b\n\t\udcff\u0301é漢"))
        == "\\x00\\x1b\\u{202e}\\u{200b}\\n\\t\\xff\\u{301}é漢"
    )


@pytest.mark.parametrize(
    ("client", "kind"),
    [
        ("8.8.8.8", "public v4"),
        ("10.1.2.3", "private v4"),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("2a00:1450::1", "public v6"),
        ("fd00::1", "private v6"),
        ("fe80::1%eth0", "link-local v6"),
        ("::ffff:10.0.0.1", "private v4"),
        (None, "none"),
        ("", "none"),
        ("n0cb6-7df", "named"),
    ],
)
def test_address_kinds(client: str | None, kind: str) -> None:
    assert address_kind(client) == kind


def test_story_in_words() -> None:
    assert story_words({}) == ["unknown"]
    assert story_words({"requests_600s": 0.0}) == ["new"]
    busy = {
        "requests_600s": 5.0,
        "login_failures": 3.0,
        "identities": 3.0,
        "missing_share_60s": 0.9,
        "age": 8.0,
        "gap_deviation": 1.0,
    }
    assert story_words(busy) == ["known", "many failed logins", "many accounts", "many misses"]
    assert story_words({"requests_600s": float("nan"), "age": float("inf")}) == ["new"]
    assert (
        len(
            story_words(
                {
                    name: 50.0
                    for name in (
                        "requests_600s",
                        "login_failures",
                        "identities",
                        "missing_share_60s",
                        "denied_share",
                        "error_share",
                        "object_steps",
                        "objects",
                        "paths",
                        "agents",
                        "requests_60s",
                        "age",
                    )
                }
            )
        )
        <= 6
    )
