"""Lines of a file or of standard input, plain or gzip, with a bound on each."""
from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from sidecar.records.model import LINE_BYTES_MAX, RecordsError

PEEK_BYTES = 256 * 1024


class Source:
    """An opened input. `head` is its first part, which reading does not consume."""

    def __init__(self, path: str | Path) -> None:
        self.name = "<stdin>" if str(path) == "-" else str(path)
        try:
            raw = sys.stdin.buffer if str(path) == "-" else open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise RecordsError(self.name, error.strerror or str(error), "give an existing, readable file") \
                from error
        self._raw = raw
        # by content, not by name: a rotated log is often misnamed
        plain = io.BufferedReader(cast(io.RawIOBase, raw), PEEK_BYTES)
        self._file: BinaryIO
        try:
            if _peek(plain, 2)[:2] == b"\x1f\x8b":
                self._file = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=plain)), PEEK_BYTES)
            else:
                self._file = plain
            self.head = _peek(self._file, PEEK_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            self.close()
            raise RecordsError(self.name, f"cannot be read: {error}", "is the file whole?") from error

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """(line number from 1, line without its end); None stands for a line over LINE_BYTES_MAX."""
        number = 0
        readline = self._file.readline
        try:
            while line := readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):
                    while rest := readline(LINE_BYTES_MAX):
                        if rest.endswith(b"\n"):
                            break
                    yield number, None
                else:
                    yield number, line.rstrip(b"\r\n")
        except (OSError, EOFError, zlib.error) as error:
            raise RecordsError(f"{self.name}:{number + 1}", f"cannot be read on: {error}",
                               "the file is cut short or damaged; what came before was used") from error

    def read(self, bytes_max: int) -> bytes:
        """The whole input, at most bytes_max + 1 bytes."""
        try:
            return self._file.read(bytes_max + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise RecordsError(self.name, f"cannot be read: {error}", "is the file whole?") from error

    def close(self) -> None:
        if self._raw is not sys.stdin.buffer:
            self._raw.close()


def _peek(file: Any, n: int) -> bytes:
    """Up to n bytes ahead. A pipe gives what it has: its first write decides the format."""
    head: bytes = file.peek(n)
    return head[:n]
