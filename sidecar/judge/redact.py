"""Secrets out of an escalation before it is queued, and the shape by which the same question is known again.

Redaction replaces letters and digits by `a`, `A` and `0` and keeps everything else: what makes a value an attack -
quotes, brackets, comment marks - stays where it is even under a secret's key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
from dataclasses import replace
from urllib.parse import unquote

from sidecar.judge.render import story_words
from sidecar.judge.types import Escalation

# ---------------------------------------------------------------- redaction

_SECRET_WORD = (
    r"pass(?:word|wd|phrase|code)?|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|authorization|"
    r"proxy-authorization|auth|credential[s]?|session|sessionid|sid|jsessionid|phpsessid|csrf|xsrf|otp|totp|pin|cvv|cvc|"
    r"ssn|iban|signature|sig|bearer|jwt|card[_-]?number|cc[_-]?number|code_verifier|set-cookie|cookie"
)
# a key is a secret's where one of its words is: user[password], x-api-key, refresh_token, newPassword
_SECRET_KEY = re.compile(rf"(?:^|[^a-z])(?:{_SECRET_WORD})(?:$|[^a-z])", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_KEY = r"(?:[A-Za-z0-9_.\-\[\]]|%5[bBdD]){1,48}"
_QUOTED = re.compile(rf"""(["'])({_KEY})\1(\s{{0,8}}[:=]\s{{0,8}})(["'])((?:(?!\4)[^\\]|\\.){{1,4096}})""", re.DOTALL)
_BARE_KEY = re.compile(rf"(?<![A-Za-z0-9])({_KEY})\s{{0,4}}(?:=|%3[dD]|:)\s{{0,4}}[\"']?")
_BARE_VALUE = re.compile(r"[^&;,\s\"'<>{}]{1,4096}")
_SCHEME = re.compile(
    r"\b(Bearer|Basic|Token|Digest|Negotiate|ApiKey)((?:\s|%20|\+){1,4})([A-Za-z0-9._~+/=\-]{8,})", re.IGNORECASE
)
_JWT = re.compile(r"\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{4,}(?:\.[A-Za-z0-9_\-]*){0,3}")
_ISSUED = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bxox[abeprs]-[A-Za-z0-9\-]{10,}|"
    r"\b[srp]k_(?:live|test)_[A-Za-z0-9]{10,}|\bAIza[A-Za-z0-9_\-]{30,}|\bya29\.[A-Za-z0-9_\-]{20,}|\bglpat-[A-Za-z0-9_\-]{16,}"
)
_CARD = re.compile(r"(?<![0-9A-Za-z])[0-9](?:(?:[ \-+]|%20)?[0-9]){12,18}(?![0-9A-Za-z])")
_MAIL = re.compile(
    r"(?<![A-Za-z0-9._\-])([A-Za-z0-9._\-]{1,64})(?=(?:\+[A-Za-z0-9._\-]{0,64})?(?:@|%40)[A-Za-z0-9\-]{1,63}\.[A-Za-z])"
)
_LONG = re.compile(r"[A-Za-z0-9_\-]{24,}")
_PATH_TOKEN = re.compile(r"(?<=/)[A-Za-z0-9_\-]{20,}(?=/|$|\?)")
_MASKED = re.compile(r"%([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|([A-Z])|([a-z])|([0-9])|([^\W\d_])")


def _mask_one(m: re.Match[str]) -> str:
    if m[1] or m[2]:
        shown = chr(int(m[1] or m[2], 16))
        return ("%61" if m[1] else "\\u0061") if shown.isalnum() else m[0]
    return "A" if m[3] else "a" if m[4] or m[6] else "0"


def mask(text: str) -> str:
    """Letters and digits replaced, escaped ones too; the rest as it is."""
    return _MASKED.sub(_mask_one, text)


def is_secret(key: str) -> bool:
    """Does this key's value have to be kept out of queues and logs?"""
    return _SECRET_KEY.search(_CAMEL.sub("_", unquote(key[:256]))) is not None


def _luhn(digits: str) -> bool:
    total = 0
    for k, c in enumerate(reversed(digits)):
        n = int(c) * (2 if k % 2 else 1)
        total += n - 9 if n > 9 else n
    return total % 10 == 0


def _card(m: re.Match[str]) -> str:
    digits = re.sub(r"\D", "", m[0].replace("%20", ""))
    return mask(m[0]) if 13 <= len(digits) <= 19 and len(set(digits)) > 1 and _luhn(digits) else m[0]


def _says_something(run: str) -> bool:
    """Does the run decode to text? An attack in base64 is no token."""
    padded = run.replace("-", "+").replace("_", "/")
    for raw in (_unhex(run), _unbase64(padded)):
        if raw and sum(0x20 <= b < 0x7F or b in b"\r\n\t" for b in raw) >= 0.9 * len(raw):
            return True
    return False


def _unhex(run: str) -> bytes:
    try:
        return bytes.fromhex(run)
    except ValueError:
        return b""


def _unbase64(run: str) -> bytes:
    try:
        return base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "=" * (-len(run) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _random_looking(run: str) -> bool:
    """Letters and digits that change often: ids and tokens, not words joined by dashes."""
    kinds = [("d" if c.isdigit() else "u" if c.isupper() else "l") for c in run if c.isalnum()]
    turns = sum(a != b for a, b in itertools.pairwise(kinds))
    return "d" in kinds and len(set(kinds)) > 1 and turns >= len(kinds) / 6 and not _says_something(run)


def _long(m: re.Match[str]) -> str:
    return mask(m[0]) if _random_looking(m[0]) else m[0]


def _quoted(m: re.Match[str]) -> str:
    if not is_secret(m[2]):
        return m[0]
    return f"{m[1]}{m[2]}{m[1]}{m[3]}{m[4]}{mask(m[5])}"


def _bare(text: str) -> str:
    """Masks values without quotes that follow a secret's key. Looked for from the end of each key, so that a key inside
    another one's value is found: https://h/?token=..."""
    out, at = [], 0
    while (key := _BARE_KEY.search(text, at)) is not None:
        out.append(text[at : key.end()])
        at = key.end()
        if is_secret(key[1]) and (value := _BARE_VALUE.match(text, at)) is not None:
            out.append(mask(value[0]))
            at = value.end()
    return "".join([*out, text[at:]])


def redact_text(text: str) -> str:
    """Secrets inside a text, found by their keys and by their form."""
    text = _JWT.sub(lambda m: mask(m[0]), text)
    text = _SCHEME.sub(lambda m: m[1] + m[2] + mask(m[3]), text)
    text = _ISSUED.sub(lambda m: mask(m[0]), text)
    text = _QUOTED.sub(_quoted, text)
    text = _bare(text)
    text = _CARD.sub(_card, text)
    text = _MAIL.sub(lambda m: mask(m[1]), text)
    return _LONG.sub(_long, text)


_SECRET_PLACES = ("cookie", "header.authorization", "header.proxy-authorization", "header.x-api-key")


def redact(e: Escalation) -> Escalation:
    """A copy without secrets: those under a secret's key or in a cookie, and what has a secret's form anywhere.

    client stays: it is what a verdict is about."""
    secret = e.place.lower().startswith(_SECRET_PLACES) or is_secret(e.place)
    path, mark, query = e.path.partition("?")
    return replace(
        e,
        path=_PATH_TOKEN.sub(_long, redact_text(path)) + mark + redact_text(query),
        text=mask(e.text) if secret else redact_text(e.text),
        user_agent=redact_text(e.user_agent),
        recent=tuple(redact_text(shape) for shape in e.recent),
    )


# ---------------------------------------------------------------- shapes

_NUMBER = re.compile(r"[0-9]+")
_ID = re.compile(r"(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|[0-9a-f]{16,}|[0-9]+)", re.IGNORECASE)
_WORD = re.compile(r"[a-z_]{2,}")
_CODE = re.compile(r"['\"`;|<>{}$()\\=*%&#!\[\]^~]|--|\.\.|/|@|\n|\r")
_RUN = re.compile(r"(.)\1{3,}", re.DOTALL)


def _bucket(n: int) -> int:
    """Lengths by powers of two."""
    return n.bit_length()


def payload_shape(text: str) -> str:
    """What stays of a text: numbers folded, case gone, long runs of one character shortened. Words are folded by their
    length only where nothing in the text could be code: else whoever sends `hello(1)` often enough would have the
    question of `system(1)` answered beforehand."""
    code = _CODE.search(text) is not None
    text = text.lower()
    text = re.sub(r"[a-z0-9]{12,}", lambda m: "#" if _random_looking(m[0]) else m[0], text)
    text = _NUMBER.sub("0", text)
    text = _RUN.sub(lambda m: m[1] * 3 + str(_bucket(len(m[0]))), text)
    if not code:
        text = _WORD.sub(lambda m: f"w{_bucket(len(m[0]))}", text)
        text = re.sub(r"(?:w\d[ ,.]?){4,}", lambda m: f"w*{_bucket(len(m[0]))}", text)
    return text


def path_shape(path: str) -> str:
    """The path with ids in its segments replaced, the query gone."""
    parts = path.partition("?")[0].lower().split("/")
    return "/".join("*" if _ID.fullmatch(s) or (len(s) >= 8 and _random_looking(s)) else s for s in parts)


def shape_of(e: Escalation) -> str:
    """32 hex digits, equal for the same question: method, path, place and payload without ids, the status' hundred, and
    what the client has been doing in words."""
    place = re.sub(r"\d+", "0", e.place.lower())
    parts = [
        e.method.upper(),
        path_shape(e.path),
        place,
        payload_shape(e.text),
        str((e.status or 0) // 100),
        ",".join(sorted(story_words(e.story)[1:])),
    ]
    if not e.text:  # the question is about what the client does
        parts += [
            "|".join(_NUMBER.sub("0", path_shape(shape)) for shape in e.recent[-3:]),
            payload_shape(e.path.partition("?")[2]),
        ]
    digest = hashlib.blake2b(digest_size=16, person=b"outrider-shape")
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.hexdigest()
