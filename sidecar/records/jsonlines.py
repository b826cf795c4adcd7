"""Request records as JSON Lines: the project's own format, and access logs kept the same way."""
from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

import orjson

from sidecar.records.model import (
    BODY_BYTES_MAX,
    HEADER_CHARS_MAX,
    HEADERS_MAX,
    NAME_CHARS_MAX,
    URL_CHARS_MAX,
    BadLine,
    NoRequest,
    RequestRecord,
    clean,
)
from sidecar.records.times import unix_seconds

# text labels found in the wild: what is surely benign and surely hostile; others say nothing (None)
_BENIGN = frozenset({"benign", "human", "normal", "legitimate"})
_ATTACK = ("attack", "scanner", "malicious")


def load_object(line: bytes) -> dict[str, Any]:
    """One JSON object. orjson first; the tolerant parser where text is not clean Unicode."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            value = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            raise BadLine(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise BadLine("not a JSON object")
    return value


def parse(line: bytes) -> RequestRecord:
    return from_mapping(load_object(line))


def from_mapping(raw: dict[str, Any]) -> RequestRecord:
    """A decoded line to a record; BadLine says which field is wrong."""
    method, url = raw.get("method"), raw.get("url")
    if not isinstance(method, str) or not method:
        raise BadLine("no 'method'" if method is None else "'method' is not a text")
    if url == "":
        raise NoRequest                     # an access log's way to say it
    if not isinstance(url, str):
        raise BadLine("no 'url'" if url is None else "'url' is not a text")
    headers = _headers(raw.get("headers"))
    # access logs keep these at the top
    for key, name in (("ua", "User-Agent"), ("ref", "Referer")):
        value = raw.get(key)
        if isinstance(value, str) and value not in ("-", ""):
            headers.append((name, clean(value, HEADER_CHARS_MAX)))
    body, cut = _body(raw)
    ts = raw.get("ts")
    try:
        seconds = None if ts is None else unix_seconds(ts)
    except ValueError as error:
        raise BadLine(f"'ts': {error}") from None
    label, cls = _label(raw.get("label")), _text(raw, "cls")
    if cls is None and isinstance(raw.get("label"), str):
        cls = clean(raw["label"], NAME_CHARS_MAX)
    meta = raw.get("meta")
    return RequestRecord(
        method=clean(method, NAME_CHARS_MAX), url=clean(url, URL_CHARS_MAX), id=_text(raw, "id"), ts=seconds,
        client=_text(raw, "client"), principal=_text(raw, "principal"), headers=headers, body=body,
        status=_status(raw.get("status")), response_ms=_milliseconds(raw.get("response_ms")), label=label,
        cls=cls, src=_text(raw, "src"), meta=meta if isinstance(meta, dict) else None, body_cut=cut)


def _text(raw: dict[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadLine(f"'{key}' is not a text")
    return clean(str(value), NAME_CHARS_MAX)


def _headers(raw: object) -> list[tuple[str, str]]:
    if raw is None:
        return []
    pairs: list[tuple[str, str]] = []
    if isinstance(raw, dict):
        for name, value in raw.items():
            for one in value if isinstance(value, list) else (value,):
                if not isinstance(one, str):
                    if one is None or isinstance(one, dict | list):
                        raise BadLine("'headers' has a value that is not a text")
                    one = str(one)
                pairs.append((clean(name, NAME_CHARS_MAX), clean(one, HEADER_CHARS_MAX)))
    elif isinstance(raw, list):
        for pair in raw:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
                raise BadLine("'headers' is a list, but not of [name, value] pairs")
            pairs.append((clean(pair[0], NAME_CHARS_MAX), clean(pair[1], HEADER_CHARS_MAX)))
    else:
        raise BadLine("'headers' is not an object")
    return pairs[:HEADERS_MAX]


def _body(raw: dict[str, Any]) -> tuple[bytes | None, bool]:
    body = raw.get("body")
    if body is None or body == "":
        return None, False
    if not isinstance(body, str):
        raise BadLine("'body' is not a text (other bytes go in as base64 with body_enc: b64)")
    encoding = raw.get("body_enc") or "utf8"
    if encoding == "utf8":
        data = body.encode("utf-8", "replace")
    elif encoding == "b64":
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            raise BadLine("'body' is not base64, as body_enc says") from None
    else:
        raise BadLine("'body_enc' is neither utf8 nor b64")
    return data[:BODY_BYTES_MAX] or None, len(data) > BODY_BYTES_MAX or raw.get("body_cut") is True


def _label(raw: object) -> int | None:
    if raw is None:
        return None
    if isinstance(raw, bool):
        return int(raw)
    if isinstance(raw, int) and raw in (0, 1):
        return raw
    if isinstance(raw, str):
        word = raw.lower()
        return 0 if word in _BENIGN else 1 if word.startswith(_ATTACK) else None
    raise BadLine("'label' is not 0 or 1")


def _status(raw: object) -> int | None:
    if raw is None or raw == "-" or raw == "":
        return None
    try:
        status = int(raw) if isinstance(raw, str | int) and not isinstance(raw, bool) else -1
    except ValueError:
        status = -1
    if not 0 <= status <= 999:
        raise BadLine("'status' is not an HTTP status")
    return status or None            # Envoy writes 0 where there was no response


def _milliseconds(raw: object) -> float | None:
    if raw is None or raw == "-" or raw == "":
        return None
    try:
        value = float(raw) if isinstance(raw, str | int | float) and not isinstance(raw, bool) else -1.0
    except (ValueError, OverflowError):
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise BadLine("'response_ms' is not a duration")
    return value


def to_mapping(record: RequestRecord) -> dict[str, Any]:
    """The record's JSON form: absent fields left out, repeated headers as a list of values."""
    out: dict[str, Any] = {}
    for key in ("id", "ts", "client", "principal"):
        value = getattr(record, key)
        if value is not None:
            out[key] = value
    out["method"], out["url"] = record.method, record.url
    if record.headers:
        headers: dict[str, Any] = {}
        for name, text in record.headers:
            if name in headers:
                old = headers[name]
                headers[name] = [*old, text] if isinstance(old, list) else [old, text]
            else:
                headers[name] = text
        out["headers"] = headers
    if record.body is not None:
        try:
            out["body"], out["body_enc"] = record.body.decode(), "utf8"
        except UnicodeDecodeError:
            out["body"], out["body_enc"] = base64.b64encode(record.body).decode("ascii"), "b64"
        if record.body_cut:
            out["body_cut"] = True
    for key in ("status", "response_ms", "label", "cls", "src", "meta"):
        value = getattr(record, key)
        if value is not None:
            out[key] = value
    return out


def dump(record: RequestRecord) -> bytes:
    """One line of JSON, with its line end."""
    return orjson.dumps(to_mapping(record), option=orjson.OPT_APPEND_NEWLINE)
