"""Writing JSON Lines: request records, decision records."""
from __future__ import annotations

import gzip
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import orjson

from sidecar.records.jsonlines import dump
from sidecar.records.model import RecordsError, RequestRecord


class JsonLinesWriter:
    """Lines into a file ('-' is standard output), gzip by a name that ends in .gz.

    The file appears under its name when the block ends well, whole; until then, and after an
    exception, what stood there stays as it was.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = None if str(path) == "-" else Path(path)
        self._temporary: str | None = None
        self.count = 0

    def __enter__(self) -> JsonLinesWriter:
        if self._path is None:
            self._file = self._out = cast(IO[bytes], sys.stdout.buffer)
            return self
        try:
            if self._path.is_dir():
                raise IsADirectoryError(21, "is a folder")
            if self._path.exists() and not self._path.is_file():
                self._file = open(self._path, "wb")     # a pipe or device: nothing to replace
            else:
                handle, self._temporary = tempfile.mkstemp(prefix=f".{self._path.name}.",
                                                           dir=self._path.parent)
                self._file = os.fdopen(handle, "wb")
        except OSError as error:
            raise RecordsError(str(self._path), error.strerror or str(error),
                               "name a file in a writable folder") from error
        self._out = cast(IO[bytes], gzip.GzipFile("", "wb", 6, self._file, mtime=0)) \
            if self._path.suffix == ".gz" else self._file
        return self

    def write_line(self, line: bytes) -> None:
        """One line that ends in a line feed."""
        self._out.write(line)
        self.count += 1

    def write(self, record: RequestRecord) -> None:
        self.write_line(dump(record))

    def write_object(self, value: dict[str, Any]) -> None:
        self.write_line(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._path is None:
            self._out.flush()
            return
        try:
            if self._out is not self._file:
                self._out.close()
            self._file.flush()
            if kind is None and self._temporary:
                os.fsync(self._file.fileno())
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(self._temporary, 0o666 & ~umask)
                os.replace(self._temporary, self._path)
                self._temporary = None
        finally:
            self._file.close()
            if self._temporary:
                Path(self._temporary).unlink(missing_ok=True)


def write(path: str | Path, records: Iterable[RequestRecord]) -> int:
    """Write all; returns how many."""
    with JsonLinesWriter(path) as writer:
        for record in records:
            writer.write(record)
    return writer.count
