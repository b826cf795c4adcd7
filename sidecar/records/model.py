"""The request record: one HTTP request as logs, training data and replay know it."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Bounds on what is taken from a file. Request data is hostile; a log of it is no better.
LINE_BYTES_MAX = 8 * 1024 * 1024        # a longer line is skipped and counted as bad
BODY_BYTES_MAX = 1024 * 1024            # a longer body is cut; RequestRecord.body_cut says so
URL_CHARS_MAX = 64 * 1024               # cut
HEADERS_MAX = 256                       # further headers are dropped
HEADER_CHARS_MAX = 64 * 1024            # of one value; cut
NAME_CHARS_MAX = 256                    # method, client, principal, id, cls; cut
HAR_BYTES_MAX = 256 * 1024 * 1024       # HAR is one JSON document, it cannot be read in pieces


@dataclass(slots=True)
class RequestRecord:
    """One request. Every field but `method` and `url` may be absent (None, or no headers).

    `ts` is in unix seconds, `response_ms` in milliseconds, `url` the request target as sent
    (path and query, or absolute), `headers` pairs in their order with names as they came.
    All text can be encoded as UTF-8 (no lone surrogates). `label` is 0 benign, 1 attack.
    """

    method: str
    url: str
    id: str | None = None
    ts: float | None = None
    client: str | None = None
    principal: str | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | None = None
    status: int | None = None
    response_ms: float | None = None
    label: int | None = None
    cls: str | None = None
    src: str | None = None
    meta: Mapping[str, Any] | None = None
    body_cut: bool = False

    def header(self, name: str) -> str | None:
        """Value of the first header of this name, in any case."""
        name = name.lower()
        for key, value in self.headers:
            if key.lower() == name:
                return value
        return None


class RecordsError(Exception):
    """A file can't be used: `where` it stands, `what` is wrong and the `remedy`."""

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        super().__init__(f"{where}: {what}" + (f" ({remedy})" if remedy else ""))
        self.where, self.what, self.remedy = where, what, remedy


class BadLine(ValueError):
    """One line is not a record; the reader counts it and goes on."""


class NoRequest(ValueError):
    """A sound log line of a connection that never sent a request (`"-"`, a TLS hello)."""


def clean(text: str, chars_max: int) -> str:
    """Cut, and with lone surrogates replaced, so that it can be encoded."""
    if len(text) > chars_max:
        text = text[:chars_max]
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def printable(text: str | bytes, chars_max: int = 120) -> str:
    """For a terminal or a message: control, format and direction characters escaped, cut."""
    if isinstance(text, bytes):
        text = text[: 4 * chars_max].decode("utf-8", "backslashreplace")
    cut = len(text) > chars_max
    out = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
                  for c in text[:chars_max])
    return out + "…" if cut else out
