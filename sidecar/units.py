"""Durations, sizes and fractions as people write them, and back.

    250us 5ms 30s 10m 1h 1d        durations, kept as whole microseconds
    512B 64KiB 1MiB 2GiB           sizes, kept as whole bytes
    0.2  20%                       fractions, kept as a float from 0 to 1

A number without a unit is refused, because it is the classic way to be wrong by a factor of
a thousand. Parsing and formatting are inverse: parse(format(x)) == x for every whole x >= 0.
"""

from __future__ import annotations

import difflib
import re
from fractions import Fraction

DURATION_US: dict[str, int] = {
    "us": 1,
    "ms": 1_000,
    "s": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
}
SIZE_BYTES: dict[str, int] = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

# What the JSON Schema tells editors; the parsers below accept exactly this.
DURATION_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,6})? ?(us|ms|s|m|h|d)$"
SIZE_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,6})? ?(B|KiB|MiB|GiB)$"
FRACTION_PATTERN = r"^[0-9]{1,3}(\.[0-9]{1,12})?%?$"

_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([^\W\d_]{0,12})", re.ASCII)
_FRACTION = re.compile(FRACTION_PATTERN.removeprefix("^").removesuffix("$"), re.ASCII)

# Units people write and what they most likely mean.
_MEANT = {
    "usec": "us",
    "µs": "us",
    "μs": "us",
    "msec": "ms",
    "millis": "ms",
    "sec": "s",
    "secs": "s",
    "second": "s",
    "seconds": "s",
    "min": "m",
    "mins": "m",
    "minute": "m",
    "minutes": "m",
    "hour": "h",
    "hours": "h",
    "hr": "h",
    "day": "d",
    "days": "d",
    "b": "B",
    "byte": "B",
    "bytes": "B",
    "k": "KiB",
    "kb": "KiB",
    "kib": "KiB",
    "ki": "KiB",
    "mb": "MiB",
    "mib": "MiB",
    "mi": "MiB",
    "gb": "GiB",
    "gib": "GiB",
    "gi": "GiB",
    "g": "GiB",
}


class UnitError(ValueError):
    """A value that cannot be read: `what` is wrong with it and what would be right."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}: {remedy}")
        self.what = what
        self.remedy = remedy


def shown(value: object, width: int = 60) -> str:
    """A value as it may stand in a message: printable ASCII, quoted, cut at width characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = ascii(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def parse_duration(value: object) -> int:
    """Microseconds of `5ms` and the like; raises UnitError."""
    return _parse(value, "a duration", DURATION_US, ("250us", "5ms", "30s"), "a whole number of microseconds")


def parse_size(value: object) -> int:
    """Bytes of `64KiB` and the like; raises UnitError."""
    return _parse(value, "a size", SIZE_BYTES, ("512B", "64KiB", "1MiB"), "a whole number of bytes")


def parse_fraction(value: object) -> float:
    """0..1 from `0.2`, `20%`, 0 or 1; raises UnitError."""
    remedy = "write a number from 0 to 1, as 0.2, or a percentage, as 20%"
    number: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and _FRACTION.fullmatch(value):
        number = float(Fraction(value[:-1]) / 100) if value.endswith("%") else float(value)
    if number is None:
        raise UnitError(f"{shown(value)} is not a fraction", remedy)
    if not 0.0 <= number <= 1.0:
        raise UnitError(f"{shown(value)} is outside 0 to 1", remedy)
    return number


def format_duration(microseconds: int) -> str:
    """The shortest exact form: 1000 -> `1ms`, 90000000 -> `90s`."""
    return _format(microseconds, DURATION_US)


def format_size(size_bytes: int) -> str:
    """The shortest exact form: 65536 -> `64KiB`, 1500 -> `1500B`."""
    return _format(size_bytes, SIZE_BYTES)


def format_fraction(value: float) -> str:
    """Shortest decimal that reads back as the same float."""
    return repr(float(value))


def _parse(value: object, kind: str, units: dict[str, int], examples: tuple[str, ...], whole: str) -> int:
    usual = f"write it as {', '.join(examples[:-1])} or {examples[-1]} (units: {' '.join(units)})"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise UnitError(f"{shown(value)} has no unit", _with_unit(str(value), units))
    if not isinstance(value, str):
        raise UnitError(f"{shown(value)} is not {kind}", usual)
    match = _QUANTITY.fullmatch(value) or re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([µμ]s)", value)
    if match is None:
        raise UnitError(f"{shown(value)} is not {kind}", usual)
    number, unit = match.groups()
    if not unit:
        raise UnitError(f"{shown(value)} has no unit", _with_unit(number, units))
    if unit not in units:
        meant = _MEANT.get(unit) or _MEANT.get(unit.lower())
        if meant not in units:
            close = difflib.get_close_matches(unit, units, n=1)
            meant = close[0] if close else None
        raise UnitError(
            f"{shown(value)} has an unknown unit", f"did you mean {number}{meant}?" if meant else usual
        )
    amount = Fraction(number) * units[unit]
    if amount.denominator != 1:
        raise UnitError(f"{shown(value)} is not {whole}", "write a coarser value or a smaller unit")
    return int(amount)


def _with_unit(number: str, units: dict[str, int]) -> str:
    """What a bare number may have meant."""
    if "KiB" in units and number.isdecimal() and int(number) >= 1024:
        return f"for bytes write {_format(int(number), units)}"
    likely = [f"{number}{unit}" for unit in units][:3]
    return f"write {', '.join(likely[:-1])} or {likely[-1]}"


def _format(amount: int, units: dict[str, int]) -> str:
    if amount < 0:
        raise ValueError(f"negative quantity: {amount}")
    for unit, factor in reversed(units.items()):
        if amount and amount % factor == 0:
            return f"{amount // factor}{unit}"
    return f"0{'s' if 's' in units else 'B'}"
