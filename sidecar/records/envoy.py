"""Envoy's JSON access logs, with the key spellings in use, bare or behind a container runtime's prefix.

NGINX logs written as JSON differ in their keys only and are read by the same table."""

from __future__ import annotations

import re
from typing import Any

from sidecar.records import clf
from sidecar.records.jsonlines import _milliseconds, _status, load_object
from sidecar.records.model import (
    HEADER_CHARS_MAX,
    NAME_CHARS_MAX,
    URL_CHARS_MAX,
    BadLine,
    NoRequest,
    RequestRecord,
    clean,
)
from sidecar.records.times import clf_seconds, unix_seconds

# `2025-12-31T17:37:40.493+01:00 stdout F {` (CRI) before the object
_RUNTIME = re.compile(rb"^\d{4}-\d\d-\d\dT\S{1,40} std(?:out|err) [FP] (?=\{)")

# Keys are compared in lower case with ':' at the start removed and '-', '.' as '_'. First match wins.
_TIME = ("start_time", "time", "timestamp", "ts", "_timestamp", "time_iso8601", "time_local", "msec", "date")
_METHOD = ("method", "request_method", "req_method", "http_method", "http_request_method")
# the path before a rewrite is what the client sent
_PATH = (
    "x_envoy_original_path",
    "x_envoy_origin_path",
    "original_path",
    "path",
    "url",
    "uri",
    "request_uri",
    "req_path",
    "request_path",
    "url_path",
    "http_url",
    "http_target",
)
_STATUS = (
    "response_code",
    "status",
    "status_code",
    "http_status",
    "code",
    "response_status",
    "http_response_status_code",
)
_MILLISECONDS = ("duration", "duration_ms", "response_duration", "total_time", "request_duration")
_SECONDS = ("request_time", "duration_s")
# Envoy's remote address has X-Forwarded-For resolved by its trusted hops already; the header is only
# used without it, and then its last hop: the only one that the client cannot write itself.
_CLIENT = (
    "downstream_remote_address",
    "downstream_remote_address_without_port",
    "remote_address",
    "client_ip",
    "client_address",
    "remote_addr",
    "source_address",
    "downstream_direct_remote_address",
    "client",
)
_FORWARDED = ("x_forwarded_for", "http_x_forwarded_for", "forwarded_for")
_ID = ("request_id", "x_request_id", "req_id", "id")
_PRINCIPAL = ("principal", "user", "remote_user", "jwt_sub")
_HEADERS = {
    "Host": ("authority", "host", "http_host", "requested_authority", "request_authority"),
    "User-Agent": ("user_agent", "http_user_agent", "useragent", "user_agent_original"),
    "Referer": ("referer", "referrer", "http_referer"),
    "Content-Type": ("content_type", "request_content_type"),
    "X-Forwarded-For": _FORWARDED,
}
_OWN = frozenset(_TIME + _METHOD + _PATH + _STATUS)


def looks_like(keys: frozenset[str]) -> bool:
    """Do these (folded) keys speak of an access log?"""
    return bool(
        keys
        & {
            "response_code",
            "downstream_remote_address",
            "x_envoy_original_path",
            "start_time",
            "request_uri",
            "request_method",
            "remote_addr",
            "response_flags",
        }
    )


def fold(key: str) -> str:
    return key.lstrip(":").lower().replace("-", "_").replace(".", "_")


def strip_prefix(line: bytes) -> bytes:
    return _RUNTIME.sub(b"", line, count=1)


def parse(line: bytes) -> RequestRecord:
    raw = {fold(key): value for key, value in load_object(strip_prefix(line)).items()}
    method, path = _first(raw, _METHOD), _first(raw, _PATH)
    if method is None and path is None:
        line_text = _first(raw, ("request",))
        if isinstance(line_text, str):
            method, path = clf._request_line(line_text)
        elif "response_flags" in raw or "upstream_cluster" in raw:
            raise NoRequest  # a TCP proxy's line, or a connection without a request
    if not isinstance(method, str):
        raise BadLine(f"no method (looked for {', '.join(_METHOD[:3])})")
    if not isinstance(path, str):
        raise BadLine(f"no path (looked for {', '.join(_PATH[:4])})")
    when = _first(raw, _TIME)
    try:
        ts = None if when is None else _time(when)
    except ValueError:
        raise BadLine("the time cannot be read") from None
    record = RequestRecord(
        method=clean(method, NAME_CHARS_MAX),
        url=clean(path, URL_CHARS_MAX),
        ts=ts,
        client=_client(raw),
        status=_status(_first(raw, _STATUS)),
    )
    milliseconds, seconds = _first(raw, _MILLISECONDS), _first(raw, _SECONDS)
    if isinstance(milliseconds, str) and milliseconds.endswith("ms"):
        milliseconds = milliseconds[:-2]
    record.response_ms = _milliseconds(milliseconds)
    if record.response_ms is None and (taken := _milliseconds(seconds)) is not None:
        record.response_ms = taken * 1000.0
    for field, keys in (("id", _ID), ("principal", _PRINCIPAL)):
        value = _first(raw, keys)
        if isinstance(value, str | int):
            setattr(record, field, clean(str(value), NAME_CHARS_MAX))
    for name, spellings in _HEADERS.items():
        value = _first(raw, spellings)
        if isinstance(value, str):
            record.headers.append((name, clean(value, HEADER_CHARS_MAX)))
    return record


def _first(raw: dict[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        value = raw.get(key)
        if value is not None and value != "-" and value != "":
            return value
    return None


def _time(value: object) -> float:
    if isinstance(value, str) and "/" in value:
        return clf_seconds(value.strip("[]"))
    return unix_seconds(value)


def _client(raw: dict[str, Any]) -> str | None:
    value = _first(raw, _CLIENT)
    if not isinstance(value, str):
        value = _first(raw, _FORWARDED)
        if not isinstance(value, str):
            return None
        value = value.rsplit(",", 1)[-1].strip()
    return clean(without_port(value), NAME_CHARS_MAX) or None


def without_port(address: str) -> str:
    """`10.0.0.1:5`, `[::1]:5`, `::1` -> the address alone; anything else as it is."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, colon, port = address.rpartition(":")
    return host if colon and ":" not in host and port.isdigit() else address
