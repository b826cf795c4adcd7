"""Decisions as a person reads them in a terminal. Everything a client sent is made harmless first."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

LINE_MAX = 1 << 16
TEXT_MAX = 160
STYLES = {
    "allow": "green",
    "tag": "yellow",
    "throttle": "magenta",
    "challenge": "magenta",
    "block": "bold red",
}

Record = dict[str, Any]


def harmless(value: object, limit: int = TEXT_MAX) -> str:
    """Printable text on one line: no control characters, no turning of the writing direction, no more than
    limit characters."""
    text = str(value)
    out = "".join(
        c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"
        for c in text[:limit]
    )
    return out + ("…" if len(text) > limit else "")


def why(record: Record) -> str:
    """The reasons' sentences, joined."""
    return "; ".join(
        harmless(reason.get("text") or reason.get("name", "")) for reason in record.get("reasons", [])
    )


def line(record: Record) -> Text:
    """One decision on one line; built as Text, so that nothing in it is read as markup."""
    action = str(record.get("action", "?"))
    text = Text(overflow="fold")
    text.append(time.strftime("%H:%M:%S ", time.localtime(float(record.get("ts") or 0))), "dim")
    text.append(f"{harmless(action, 10):9}", STYLES.get(action, "white"))
    text.append(f"{float(record.get('score') or 0):.2f} ", "cyan")
    text.append(f"{float(record.get('spent_us') or 0):7.0f}us ", "dim")
    text.append(f"{harmless(record.get('client', ''), 40):16} ")
    target = f"{harmless(record.get('method', ''), 8)} {harmless(record.get('path', ''), 80)}".strip()
    text.append(target)
    reasons = why(record)
    if reasons:
        text.append("  " + reasons, "italic")
    return text


class Tail:
    """New lines of a JSON Lines file, as they are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._rest = b""

    def new(self) -> Iterator[Record]:
        """What was appended since the last call; nothing while the file doesn't exist."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._at)
                data = file.read(1 << 22)
        except FileNotFoundError:
            return
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-LINE_MAX:]
        for one in lines:
            try:
                record = json.loads(one)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record

    def wait(self, timeout_s: float = 3.0) -> list[Record]:
        """New records, waiting for at least one; empty when none came in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = list(self.new())
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)
