"""One escalation as a log entry that a language model reads: bounded, on lines that a client can't break out of.

An entry is a header (who asks for what, and what the client has been doing) and a part of the payload between fences:

    POST /api/users/* 401
    agent: Mozilla/5.0 (X11; Linux x86_64) ... Firefox/128.0
    client: public v4, new, many failed logins, several accounts
    recent: POST /login 401 | POST /login 401
    place: form.name
    raw: <<< %27%20or%201%3D1 >>>
    decoded: <<< ' or 1=1 >>>

A payload that doesn't fit comes as several entries, each with the whole header and a window of the payload; windows
overlap, so that what matters stands whole in one of them. Whoever judges takes the worst window: padding moves the
payload into another window, never out of sight.
"""

from __future__ import annotations

import base64
import binascii
import html
import ipaddress
import math
import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from sidecar.judge.types import TEXT_CHARS_MAX, Escalation

ENTRY_CHARS = 640  # what the embedded judge is trained with
ENTRY_CHARS_MIN = 320
WINDOW_CHARS = 160  # of the payload in one entry: in more of them a small model loses an attack among words
WINDOWS_MAX = 16
OVERLAP_CHARS = 64
DECODE_ROUNDS = 3
OPEN, CLOSE = "<<< ", " >>>"

_HEADER_SHARE = 0.45
_PATH_CHARS, _AGENT_CHARS, _PLACE_CHARS, _RECENT_CHARS = 72, 44, 32, 32
_RECENT_SHOWN = 3
_STORY_WORDS_MAX = 6


# ---------------------------------------------------------------- escaping


def _atom(c: str) -> str:
    """How one character is shown. Never a line break, never anything invisible."""
    code = ord(c)
    if 0x20 <= code < 0x7F:
        return c
    if c == "\n":
        return "\\n"
    if c == "\r":
        return "\\r"
    if c == "\t":
        return "\\t"
    if code < 0x100 and not c.isprintable():
        return f"\\x{code:02x}"
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    # combining marks pile up on what stands before them, fences included
    if not c.isprintable() or 0x300 <= code <= 0x36F or 0xFE00 <= code <= 0xFE0F or code >= 0xE0000:
        return f"\\u{{{code:x}}}"
    return c


def atoms(text: str) -> list[str]:
    """The text as what is shown for each character; joined they hold no fence and no line break."""
    out: list[str] = []
    run = 0
    last = ""
    for c in text:
        run = run + 1 if c == last else 1
        last = c
        out.append(f"\\x{ord(c):02x}" if c in "<>" and run % 3 == 0 else _atom(c))
    return out


def escape(text: str, chars_max: int) -> str:
    """For the header: escaped, and cut in the middle where it is too long."""
    # what is cut away needn't be escaped; an atom has at least one character
    if len(text) > 2 * chars_max:
        text = f"{text[:chars_max]}{text[-chars_max:]}"
    parts = atoms(text)
    if sum(map(len, parts)) <= chars_max:
        return "".join(parts)
    room = chars_max - 3
    head, tail = _fitting(parts, room * 2 // 3), _fitting(parts[::-1], room - room * 2 // 3)
    return f"{''.join(parts[:head])}...{''.join(parts[len(parts) - tail :])}"


def _fitting(parts: list[str], room: int) -> int:
    """How many of the first atoms fit."""
    for n, part in enumerate(parts):
        room -= len(part)
        if room < 0:
            return n
    return len(parts)


# ---------------------------------------------------------------- decoding

_PERCENT = re.compile(r"%[0-9a-fA-F]{2}")
_PERCENT_U = re.compile(r"%u([0-9a-fA-F]{4})")
_BACKSLASH = re.compile(r"\\(?:u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2}))")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,24});?")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
_BASE64_RUNS = 8


def _char(digits: str) -> str:
    code = int(digits, 16)
    return chr(code) if code <= 0x10FFFF else "\ufffd"


def _percent(text: str, plus: bool) -> str:
    if plus:
        text = text.replace("+", " ")
    text = _PERCENT_U.sub(lambda m: _char(m[1]), text)
    if not _PERCENT.search(text):
        return text
    return unquote_to_bytes(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")


def _from_base64(match: re.Match[str]) -> str:
    """What the run of letters decodes to, where that is text; else the run as it is."""
    run = match[0].rstrip("=").replace("-", "+").replace("_", "/")
    try:
        raw = base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "=" * (-len(run) % 4), validate=True)
        text = raw.decode("utf-8")
    except (binascii.Error, ValueError):
        return match[0]
    shown = sum(c.isprintable() or c in "\r\n\t" for c in text)
    return text if len(text) >= 12 and shown >= 0.95 * len(text) else match[0]


def decoded(text: str, place: str = "") -> str:
    """The text after at most DECODE_ROUNDS rounds of percent, entities, backslash escapes and base64."""
    plus = place.startswith(("query", "form")) or ("%" in text and " " not in text)
    for number in range(DECODE_ROUNDS):
        before = text
        text = _percent(text, plus and number == 0)
        if "&" in text:
            text = _ENTITY.sub(lambda m: html.unescape(m[0]), text)
        if "\\" in text:
            text = _BACKSLASH.sub(lambda m: _char(m[1] or m[2] or m[3]), text)
        text = _BASE64.sub(_from_base64, text, count=_BASE64_RUNS)[:TEXT_CHARS_MAX]
        if text == before:
            break
    return text


# ---------------------------------------------------------------- the client's story


def _count(value: float) -> float:
    """Counts come as ln(1 + n)."""
    return math.expm1(min(max(value, 0.0), 30.0))


def _many(n: float, few: float, many: float) -> str:
    return "many" if n >= many else "several" if n >= few else ""


def story_words(story: dict[str, float]) -> list[str]:
    """The client's windows in words, the most telling first. Few and coarse: a language model of any size reads words
    more surely than numbers, and a client can't choose between many of them."""

    def value(name: str) -> float:
        found = story.get(name, 0.0)
        return found if math.isfinite(found) else 0.0

    out: list[str] = []

    def say(amount: str, what: str) -> None:
        if amount:
            out.append(f"{amount} {what}")

    if not story:
        return ["unknown"]
    requests = _count(value("requests_600s"))
    say(_many(_count(value("login_failures")), 3, 10), "failed logins")
    say(_many(_count(value("identities")), 3, 10), "accounts")
    if requests >= 4:
        share = max(value("missing_share_60s"), value("missing_share_600s"))
        say("many" if share >= 0.4 else "several" if share >= 0.15 else "", "misses")
        denied = value("denied_share")
        say("many" if denied >= 0.3 else "several" if denied >= 0.1 else "", "denials")
        errors = value("error_share")
        say("many" if errors >= 0.3 else "several" if errors >= 0.1 else "", "errors")
    say(_many(_count(value("object_steps")), 5, 20), "ids in sequence")
    say(_many(_count(value("objects")), 15, 60), "objects")
    say(_many(_count(value("paths")), 25, 80), "paths")
    say(_many(_count(value("agents")), 3, 6), "user agents")
    minute = _count(value("requests_60s"))
    say(
        "flood of" if minute >= 600 else "many" if minute >= 120 else "several" if minute >= 30 else "",
        "requests a minute",
    )
    if requests >= 10 and value("gap_deviation") < 0.15:
        out.append("clockwork")
    age = _count(value("age"))
    first = "new" if requests < 3 and age < 60 else "recent" if age < 600 else "known"
    return [first, *out[: _STORY_WORDS_MAX - 1]]


def address_kind(client: str | None) -> str:
    """public v4, private v6, loopback, named (a pseudonym or a name), none."""
    if not client:
        return "none"
    try:
        address = ipaddress.ip_address(client.split("%", 1)[0])
    except ValueError:
        return "named"
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return "loopback"
    kind = "link-local" if address.is_link_local else "private" if address.is_private else "public"
    return f"{kind} v{address.version}"


_STATUS_WORDS = {401: "not authenticated", 403: "forbidden", 404: "not found", 429: "too many requests"}


def _status(status: int | None) -> str:
    if status is None:
        return ""
    words = _STATUS_WORDS.get(status) or ("server error" if 500 <= status <= 599 else "")
    return f" {status}" + (f" {words}" if words else "")


def header(e: Escalation, chars_max: int) -> str:
    """The entry's lines above the payload, at most chars_max characters. Fields give way from the end."""
    path = e.path.partition("?")[0] if e.text else e.path
    lines = [f"{escape(e.method, 12)} {escape(path, _PATH_CHARS)}{_status(e.status)}"]
    lines.append(f"place: {escape(e.place or ('path' if not e.text else 'unknown'), _PLACE_CHARS)}")
    lines.append(f"client: {address_kind(e.client)}, {', '.join(story_words(e.story))}")
    if e.user_agent:
        lines.append(f"agent: {escape(e.user_agent, _AGENT_CHARS)}")
    if e.recent:
        shown = " | ".join(escape(shape, _RECENT_CHARS) for shape in e.recent[-_RECENT_SHOWN:])
        lines.append(f"recent: {shown}")
    while len(lines) > 1 and sum(len(line) + 1 for line in lines) > chars_max:
        lines.pop()
    return "".join(f"{line[: chars_max - 1]}\n" for line in lines)


# ---------------------------------------------------------------- windows

_TELLING = re.compile(
    r"['\"`;|<>{}$()\\]|--|/\*|\.\./|=|%[0-9a-f]{2}|\b(?:select|union|insert|update|delete|drop|sleep|or|and|from|where|"
    r"script|alert|onerror|onload|eval|exec|system|passthru|cat|wget|curl|bash|sh|cmd|etc|passwd|windows|php|jndi|ldap|"
    r"entity|doctype|file|import|process|runtime|class|proto|concat|char|waitfor|benchmark)\b",
    re.IGNORECASE,
)


def suspicion(window: str) -> int:
    """A cheap measure of how much a window looks like code: what to read first where not all can be read."""
    return sum(3 if m[0].isalpha() and len(m[0]) > 2 else 1 for m in _TELLING.finditer(window))


def _windows(parts: list[str], room: int) -> Iterator[str]:
    """Overlapping windows of whole atoms, each at most `room` characters."""
    start = 0
    while True:
        end = start + _fitting(parts[start : start + room], room)
        yield "".join(parts[start:end])
        if end >= len(parts):
            return
        back, left = end, OVERLAP_CHARS
        while back > start + 1 and left > 0:
            back -= 1
            left -= len(parts[back])
        start = back


def render(
    e: Escalation, chars_max: int = ENTRY_CHARS, windows_max: int = WINDOWS_MAX, window_chars: int = WINDOW_CHARS
) -> list[str]:
    """The escalation as one entry or several, each at most chars_max characters (ENTRY_CHARS_MIN at least) with at most
    window_chars of the payload (OVERLAP_CHARS twice at least), raw and decoded counted each.

    Every character of the payload - e.text, or the path where there is none - stands whole in one of them, unless that
    took more than windows_max: then the first, the last and those that look most like code are shown, and each entry
    says how many are left out."""
    chars_max = max(chars_max, ENTRY_CHARS_MIN)
    windows_max = max(windows_max, 3)
    text = e.text or e.path
    top = header(e, int(chars_max * _HEADER_SHARE))
    plain = decoded(text, e.place)
    raw_parts = atoms(text)
    forms = [("raw", raw_parts)]
    if plain != text:
        plain_parts = atoms(plain)
        if plain_parts != raw_parts:
            forms.append(("decoded", plain_parts))
    shown = [_line(name, "".join(parts)) for name, parts in forms]
    window_chars = max(window_chars, 2 * OVERLAP_CHARS)
    longest = max(map(len, shown)) - len(_line("decoded", ""))
    if longest <= window_chars and len(top) + sum(map(len, shown)) <= chars_max:
        return [top + "".join(shown)]
    room = min(window_chars, chars_max - len(top) - len("part 99 of 99, 999 left out\n") - len(_line("decoded", "")))
    cut = [(name, window) for name, parts in forms for window in _windows(parts, room)]
    total = len(cut)
    if total > windows_max:
        ends = {0, total - 1}
        others = sorted(set(range(total)) - ends, key=lambda k: (-suspicion(cut[k][1]), k))
        chosen = sorted(ends | set(others[: windows_max - len(ends)]))
    else:
        chosen = list(range(total))
    left = f", {total - len(chosen)} left out" if total > len(chosen) else ""
    return [f"{top}part {k + 1} of {total}{left}\n{_line(*cut[k])}" for k in chosen]


def _line(name: str, shown: str) -> str:
    return f"{name}: {OPEN}{shown}{CLOSE}\n"
