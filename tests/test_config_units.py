"""Durations, sizes and fractions: exact, inverse to their formatting, and clear about what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import units


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("0s", 0),
        ("250us", 250),
        ("5ms", 5_000),
        ("1.5ms", 1_500),
        ("30s", 30_000_000),
        ("10m", 600_000_000),
        ("1h", 3_600_000_000),
        ("1d", 86_400_000_000),
        ("2 s", 2_000_000),
        ("0.000001s", 1),
    ],
)
def test_durations(text: str, microseconds: int) -> None:
    assert units.parse_duration(text) == microseconds


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0B", 0),
        ("512B", 512),
        ("64KiB", 65536),
        ("1MiB", 1 << 20),
        ("1.5KiB", 1536),
        ("2GiB", 2 << 30),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("value", "fraction"),
    [
        (0, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        ("0.2", 0.2),
        ("20%", 0.2),
        ("0%", 0.0),
        ("100%", 1.0),
        ("0.02%", 0.0002),
    ],
)
def test_fractions(value: object, fraction: float) -> None:
    assert units.parse_fraction(value) == fraction


@pytest.mark.parametrize(
    ("value", "what", "remedy"),
    [
        (5, "5 has no unit", "write 5us, 5ms or 5s"),
        (0, "0 has no unit", "0us"),
        ("10", "no unit", "10us, 10ms or 10s"),
        (True, "true is not a duration", "5ms"),
        (None, "null is not a duration", "5ms"),
        ("", "is not a duration", "5ms"),
        ("-5ms", "is not a duration", "5ms"),
        ("5 msec", "unknown unit", "did you mean 5ms?"),
        ("5µs", "unknown unit", "did you mean 5us?"),
        ("5 Minutes", "unknown unit", "did you mean 5m?"),
        ("3 fortnights", "unknown unit", "us ms s m h d"),
        ("1e3ms", "is not a duration", "5ms"),
        ("1_000ms", "is not a duration", "5ms"),
        ("٥ms", "is not a duration", "5ms"),
        ("0.1us", "not a whole number of microseconds", "smaller unit"),
        ("9" * 400 + "s", "is not a duration", "5ms"),
        (["5ms"], "is not a duration", "5ms"),
    ],
)
def test_bad_durations(value: object, what: str, remedy: str) -> None:
    with pytest.raises(units.UnitError) as caught:
        units.parse_duration(value)
    assert what in caught.value.what
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("value", "what", "remedy"),
    [
        (65536, "no unit", "for bytes write 64KiB"),
        (10, "no unit", "write 10B, 10KiB or 10MiB"),
        ("64KB", "unknown unit", "did you mean 64KiB?"),
        ("1 mb", "unknown unit", "did you mean 1MiB?"),
        ("64kib", "unknown unit", "did you mean 64KiB?"),
        ("0.3B", "not a whole number of bytes", "smaller unit"),
        ("5ms", "unknown unit", "B KiB MiB GiB"),
    ],
)
def test_bad_sizes(value: object, what: str, remedy: str) -> None:
    with pytest.raises(units.UnitError) as caught:
        units.parse_size(value)
    assert what in caught.value.what
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "value", [True, None, "half", "1.1", 1.5, -0.1, "101%", "-1%", [0.5], "0,5", "nan", float("nan")]
)
def test_bad_fractions(value: object) -> None:
    with pytest.raises(units.UnitError, match=r"from 0 to 1|as 0\.2"):
        units.parse_fraction(value)


@given(st.integers(0, 10**15 - 1))
def test_duration_round_trip(microseconds: int) -> None:
    text = units.format_duration(microseconds)
    assert units.parse_duration(text) == microseconds
    assert re.fullmatch(units.DURATION_PATTERN, text)


@given(st.integers(0, 10**15 - 1))
def test_size_round_trip(size_bytes: int) -> None:
    text = units.format_size(size_bytes)
    assert units.parse_size(text) == size_bytes
    assert re.fullmatch(units.SIZE_PATTERN, text)


@given(st.floats(0, 1))
def test_fraction_round_trip(fraction: float) -> None:
    assert units.parse_fraction(float(units.format_fraction(fraction))) == fraction


def refusal_of(parse: Callable[[object], int], text: str) -> units.UnitError | None:
    try:
        parse(text)
    except units.UnitError as error:
        return error
    return None


@given(st.text(max_size=20) | st.from_regex(units.DURATION_PATTERN) | st.from_regex(units.SIZE_PATTERN))
def test_parser_and_pattern_agree(text: str) -> None:
    """What the schema's pattern refuses the parser refuses, and the other way round but for exactness."""
    for parse, pattern in (
        (units.parse_duration, units.DURATION_PATTERN),
        (units.parse_size, units.SIZE_PATTERN),
    ):
        fits = re.fullmatch(pattern.removeprefix("^").removesuffix("$"), text, re.ASCII) is not None
        refusal = refusal_of(parse, text)
        assert fits if refusal is None else (not fits or "not a whole number" in refusal.what)


@given(st.text())
def test_shown_is_harmless(text: str) -> None:
    shown = units.shown(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 60
