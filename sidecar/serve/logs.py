"""The process's own log: one JSON object (or one line of text) per event, on standard error.

Text of requests never goes through here unescaped: both forms are printable ASCII, one line per event.
Fields whose name says that they hold a secret are written as "[redacted]".
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

MESSAGE_MAX = 4000
SECRET_WORDS = (
    "authorization",
    "cookie",
    "password",
    "secret",
    "token",
    "api_key",
    "apikey",
    "credential",
    "key_file_content",
)

# what every LogRecord has; anything else was given by `extra=`
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The event's own fields, secrets redacted."""
    out: dict[str, Any] = {}
    for name, value in vars(record).items():
        if name in _STANDARD:
            continue
        if any(word in name.lower() for word in SECRET_WORDS):
            out[name] = "[redacted]"
        elif isinstance(value, (bool, int, float, type(None))):
            out[name] = value
        elif isinstance(value, (list, tuple)):
            out[name] = [str(v)[:MESSAGE_MAX] for v in value[:50]]
        else:
            out[name] = str(value)[:MESSAGE_MAX]
    return out


def dump(value: Any) -> str:
    """JSON in printable ASCII on one line: what a client sent can't start a terminal sequence, end the
    line or turn the writing direction."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False, default=str).replace(
        "\x7f", "\\u007f"
    )


def _when(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _fault(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MESSAGE_MAX],
            **fields_of(record),
        }
        if fault := _fault(record):
            event["fault"] = fault[-MESSAGE_MAX:]
        return dump(event)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in fields_of(record).items())
        line = f"{_when(record)} {record.levelname.lower():7} {record.getMessage()[:MESSAGE_MAX]} {fields}"
        fault = _fault(record)
        # a quoted string's inside: every control and non-ASCII character escaped
        return dump(line.rstrip() + (" | " + fault[-MESSAGE_MAX:] if fault else ""))[1:-1]


def set_up(level: str, form: str, stream: TextIO | None = None) -> None:
    """Log everything to one stream (standard error). May be called again on reload."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "outrider", False):
            root.removeHandler(old)
    handler.outrider = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(level.upper())
    # asyncio's debug lines and gRPC's reports of clients that went away aren't events of ours
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # a line for every change in the configuration's folder feeds on itself where the log stands there too
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
