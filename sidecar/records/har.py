"""HAR (HTTP Archive 1.2), as browsers and proxies export it."""
from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote_plus, urlsplit

import orjson

from sidecar.records.model import (
    BODY_BYTES_MAX,
    HAR_BYTES_MAX,
    HEADER_CHARS_MAX,
    HEADERS_MAX,
    NAME_CHARS_MAX,
    URL_CHARS_MAX,
    BadLine,
    RecordsError,
    RequestRecord,
    clean,
)
from sidecar.records.times import unix_seconds


def entries(name: str, data: bytes) -> Iterator[object]:
    """The entries of a HAR document; RecordsError when it is none or too large."""
    if len(data) > HAR_BYTES_MAX:
        raise RecordsError(name, f"the HAR document is larger than {HAR_BYTES_MAX // 2**20} MiB",
                           "split it, or convert it to JSON Lines")
    try:
        document = orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise RecordsError(f"{name}:{error.lineno}", f"not JSON: {error.msg} at column {error.colno}",
                           "is the export whole?") from None
    log = document.get("log") if isinstance(document, dict) else None
    items = log.get("entries") if isinstance(log, dict) else None
    if not isinstance(items, list):
        raise RecordsError(name, "no log.entries: not a HAR document", "name another --format")
    yield from items


def from_entry(entry: object) -> RequestRecord:
    """One entry to a record: an absolute URL becomes path and query, its authority the Host header."""
    request = entry.get("request") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(request, dict):
        raise BadLine("entry without a request")
    method, url = request.get("method"), request.get("url")
    if not isinstance(method, str) or not method or not isinstance(url, str) or not url:
        raise BadLine("request without method or url")
    headers, authority = _headers(request.get("headers"))
    target, host = split_url(url)
    if (authority or host) and not any(name.lower() == "host" for name, _ in headers):
        headers.insert(0, ("Host", authority or host))
    body, cut = _body(request.get("postData"))
    try:
        started = entry.get("startedDateTime")
        ts = None if started is None else unix_seconds(started)
    except ValueError:
        raise BadLine("startedDateTime is not a time") from None
    response = entry.get("response")
    status = response.get("status") if isinstance(response, dict) else None
    taken = entry.get("time")
    return RequestRecord(
        method=clean(method, NAME_CHARS_MAX), url=target, ts=ts, headers=headers[:HEADERS_MAX], body=body,
        body_cut=cut, status=status if isinstance(status, int) and 100 <= status <= 999 else None,
        response_ms=float(taken) if isinstance(taken, int | float) and 0 <= taken < 1e12 else None)


def split_url(url: str) -> tuple[str, str]:
    """An absolute http(s) or ws(s) URL -> (target, authority); others as they are, with no authority."""
    if not url.startswith(("http://", "https://", "ws://", "wss://")):
        return clean(url, URL_CHARS_MAX), ""
    try:
        authority = urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return clean(url, URL_CHARS_MAX), ""
    rest = url.partition("://")[2]
    cut = min((i for i in (rest.find(c) for c in "/?#") if i >= 0), default=len(rest))
    target = rest[cut:].partition("#")[0]
    if not target.startswith("/"):
        target = "/" + target
    return clean(target, URL_CHARS_MAX), clean(authority, NAME_CHARS_MAX)


def _headers(raw: object) -> tuple[list[tuple[str, str]], str]:
    pairs: list[tuple[str, str]] = []
    authority = ""
    for item in raw if isinstance(raw, list) else ():
        if not (isinstance(item, dict) and isinstance(item.get("name"), str)
                and isinstance(item.get("value"), str)):
            raise BadLine("a header without name and value")
        if item["name"].startswith(":"):
            if item["name"] == ":authority":
                authority = clean(item["value"], NAME_CHARS_MAX)
            continue
        pairs.append((clean(item["name"], NAME_CHARS_MAX), clean(item["value"], HEADER_CHARS_MAX)))
    return pairs, authority


def _body(raw: Any) -> tuple[bytes | None, bool]:
    if not isinstance(raw, dict):
        return None, False
    text = raw.get("text")
    if isinstance(text, str) and text:
        if raw.get("encoding") == "base64":
            try:
                data = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise BadLine("postData is not base64, as it says") from None
        else:
            data = text.encode("utf-8", "replace")
    else:
        params = raw.get("params")
        data = "&".join(
            f"{quote_plus(str(p.get('name', '')), errors='replace')}="
            f"{quote_plus(str(p.get('value') or ''), errors='replace')}"
            for p in params if isinstance(p, dict)).encode() if isinstance(params, list) else b""
    return data[:BODY_BYTES_MAX] or None, len(data) > BODY_BYTES_MAX
