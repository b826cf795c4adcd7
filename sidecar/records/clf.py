"""NGINX and Apache access logs: common and combined format, and what is often put around them
(a virtual host or a syslog prefix before, forwarded-for and request time behind)."""
from __future__ import annotations

import ipaddress
import re
from urllib.parse import quote

from sidecar.records.model import (
    HEADER_CHARS_MAX,
    NAME_CHARS_MAX,
    URL_CHARS_MAX,
    BadLine,
    NoRequest,
    RequestRecord,
    clean,
)
from sidecar.records.times import clf_seconds

# Neither server lets a raw quote into a field, so the first date followed by `] "` is the log's own
# even where the user name tries to look like one. Every repetition below is over disjoint classes:
# the time is linear in the line.
_DATE = re.compile(r'\[(\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "')
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_REQUEST = re.compile(r'((?:[^"\\]|\\.)*)" (\d{3}|-)(?: (\d+|-))?(?= |$)')
_FIELDS = re.compile(r' ' + _QUOTED)
_SYSLOG = re.compile(r'^(?:<\d{1,3}>)?(?:[A-Z][a-z]{2} +\d{1,2} [\d:]{8}|\d{4}-\d\d-\d\dT\S+) \S+ [^\s:]+: ')
_TIME = re.compile(r'(?:^| )(?:rt|request_time|reqtime|duration)="?(\d{1,9}(?:\.\d{1,9})?)"?')
_PROTOCOL = re.compile(r'^HTTP/\d(?:\.\d)?$')
_METHOD = re.compile(r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")
_ESCAPE = re.compile(r'\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|(.))')
_ONE = {"n": "\n", "r": "\r", "t": "\t", "v": "\v", "f": "\f", "b": "\b"}


def looks_like(line: str) -> bool:
    """Is this a line of such a log?"""
    found = _DATE.search(line)
    return found is not None and _REQUEST.match(line, found.end()) is not None


def parse(line: bytes) -> RequestRecord:
    """One line; BadLine with the reason, NoRequest where the client never sent a request."""
    # latin-1 keeps every byte: the log may hold bytes that are not UTF-8
    text = line.decode("latin-1")
    found = _DATE.search(text)
    if found is None:
        raise BadLine('no [day/month/year:time zone] followed by a quoted request')
    try:
        ts = clf_seconds(found[1])
    except ValueError:
        raise BadLine(f"impossible time {found[1]}") from None
    client, user, host = _left(text[:found.start()])
    request = _REQUEST.match(text, found.end())
    if request is None:
        raise BadLine("the request's quote is not closed, or no status follows it")
    method, target = _request_line(request[1])
    record = RequestRecord(method=method, url=_target(target), ts=ts, client=client, principal=user,
                           status=int(request[2]) if request[2] != "-" else None)
    rest = text[request.end():]
    headers = record.headers
    if host:
        headers.append(("Host", host))
    fields: list[str] = []
    position = 0
    while len(fields) < 8 and (field := _FIELDS.match(rest, position)):
        fields.append(field[1])
        position = field.end()
    for name, raw in zip(("Referer", "User-Agent"), fields, strict=False):
        if raw not in ("-", ""):
            headers.append((name, _value(raw)))
    for raw in fields[2:]:
        if _addresses(raw):
            headers.append(("X-Forwarded-For", raw))
            break
    taken = _TIME.search(rest, position)
    if taken:
        record.response_ms = float(taken[1]) * 1000.0
    return record


def _left(left: str) -> tuple[str, str | None, str | None]:
    """`[vhost] client ident user ` -> client, user, vhost."""
    left = _SYSLOG.sub("", left, count=1).strip()
    parts = left.split(" ")
    host = None
    if len(parts) > 3 and not _is_address(parts[0]) and _is_address(parts[1]):
        host = parts.pop(0)
    elif len(parts) > 3 and ":" in parts[0] and not _is_address(parts[0]):
        host = parts.pop(0)                    # vhost_combined: name:port before a host name
    if not parts[0]:
        raise BadLine("no client before the time")
    # a user name may hold spaces
    user = " ".join(parts[2:])
    if user in ("-", '""', ""):
        user = ""
    client = parts[0].strip("[]") if _is_address(parts[0].strip("[]")) else parts[0]
    return (clean(_utf8(client), NAME_CHARS_MAX), clean(_value(user), NAME_CHARS_MAX) or None,
            clean(_utf8(host), NAME_CHARS_MAX) if host else None)


def _request_line(raw: str) -> tuple[str, str]:
    line = _unescape(raw)
    if line in ("-", ""):
        raise NoRequest
    method, space, rest = line.partition(" ")
    if not _METHOD.match(method) or not space or not rest.strip(" "):
        raise NoRequest                        # a TLS hello, an SSH banner: not HTTP
    target, space, protocol = rest.rpartition(" ")
    # raw spaces within the target are the client's; without a protocol it was HTTP/0.9
    return method, target if space and _PROTOCOL.match(protocol) else rest


def _target(raw: str) -> str:
    """Bytes of the target as text: UTF-8 where it is, else the odd bytes percent-encoded (which is
    how they'd be sent properly; the decoders behind see the same)."""
    if raw.isascii():
        return clean(raw, URL_CHARS_MAX)
    data = raw.encode("latin-1", "replace")
    try:
        return clean(data.decode(), URL_CHARS_MAX)
    except UnicodeDecodeError:
        return clean(quote(data, safe=_ASCII), URL_CHARS_MAX)


_ASCII = "".join(chr(c) for c in range(128))


def _value(raw: str) -> str:
    return clean(_utf8(_unescape(raw)), HEADER_CHARS_MAX)


def _utf8(raw: str) -> str:
    if raw.isascii():
        return raw
    try:
        return raw.encode("latin-1").decode()
    except (UnicodeDecodeError, UnicodeEncodeError):
        return raw                              # header bytes that are not UTF-8 stay latin-1


def _unescape(raw: str) -> str:
    r"""NGINX: \xNN; Apache: \xNN, \n, \t, \", \\; JSON-escaping NGINX: \uNNNN."""
    if "\\" not in raw:
        return raw

    def one(found: re.Match[str]) -> str:
        if found[1]:
            return chr(int(found[1], 16))
        if found[2]:
            code = int(found[2], 16)
            # as its UTF-8 bytes, since the line is handled byte by byte; surrogates mean nothing alone
            return "?" if 0xD800 <= code < 0xE000 else chr(code).encode().decode("latin-1")
        return _ONE.get(found[3], found[3])

    return _ESCAPE.sub(one, raw)


def _is_address(text: str) -> bool:
    if len(text) > 64 or not text or not (text[0].isalnum() or text[0] == ":"):
        return False
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def _addresses(text: str) -> bool:
    return len(text) <= 1024 and all(_is_address(part.strip()) for part in text.split(","))
