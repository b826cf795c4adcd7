"""Times as logs write them, to unix seconds."""
from __future__ import annotations

import calendar
import math
from datetime import UTC, datetime
from functools import lru_cache

_MONTHS = {name: i + 1 for i, name in enumerate(
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"))}
_FIRST = 0.0
_LAST = 253402300799.0          # the end of the year 9999


def unix_seconds(value: object) -> float:
    """A number (seconds; from 1e11 on milliseconds, from 1e14 us, from 1e17 ns) or ISO 8601 text.
    ValueError when it is neither or out of 1970..9999."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return _from_iso(value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a time")
    else:
        number = float(value)
    if not math.isfinite(number):
        raise ValueError("not a finite time")
    for scale in (1e17, 1e14, 1e11):
        if abs(number) >= scale:
            number /= scale / 1e8
            break
    if not _FIRST <= number <= _LAST:
        raise ValueError("time out of range")
    return number


def _from_iso(text: str) -> float:
    if len(text) > 64:
        raise ValueError("not a time")
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError("not a time") from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)       # logs without an offset are taken as UTC
    seconds = when.timestamp()
    if not _FIRST <= seconds <= _LAST:
        raise ValueError("time out of range")
    return seconds


@lru_cache(maxsize=4096)         # neighbouring lines share their second
def clf_seconds(text: str) -> float:
    """`10/Oct/2000:13:55:36 -0700` to unix seconds; ValueError otherwise."""
    # fixed columns: a regular expression would cost more than the rest of the line
    if len(text) != 26 or text[20] != " ":
        raise ValueError("not a time")
    try:
        month = _MONTHS[text[3:6]]
        numbers = tuple(_digits(text[a:b]) for a, b in ((7, 11), (0, 2), (12, 14), (15, 17), (18, 20)))
        offset = _digits(text[22:24]) * 3600 + _digits(text[24:26]) * 60
    except KeyError:
        raise ValueError("not a time") from None
    year, day, hour, minute, second = numbers
    if year < 1970 or not 1 <= day <= calendar.monthrange(year, month)[1] or hour > 23 \
            or minute > 59 or second > 60 or text[21] not in "+-":
        raise ValueError("not a time")
    seconds = calendar.timegm((year, month, day, hour, minute, second))
    return float(seconds - offset if text[21] == "+" else seconds + offset)


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("not a time")
    return int(text)
