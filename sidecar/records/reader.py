"""Reading request records from files of any known format, with an account of what could not be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sidecar.records import clf, envoy, har, jsonlines
from sidecar.records.lines import Source
from sidecar.records.model import (
    HAR_BYTES_MAX,
    LINE_BYTES_MAX,
    BadLine,
    NoRequest,
    RecordsError,
    RequestRecord,
    printable,
)

FORMATS = ("auto", "jsonl", "combined", "envoy", "har")
MISTAKES_KEPT = 5
_DETECT_LINES = 20
_PARSERS: dict[str, Callable[[bytes], RequestRecord]] = {
    "jsonl": jsonlines.parse,
    "combined": clf.parse,
    "envoy": envoy.parse,
}


@dataclass(frozen=True, slots=True)
class Mistake:
    line: int  # from 1; for HAR the entry's number
    what: str
    excerpt: str  # printable, cut


@dataclass(slots=True)
class FileReport:
    """What was read from one file."""

    path: str
    format: str
    lines: int = 0  # that are not blank (HAR: entries)
    records: int = 0
    bad: int = 0
    without_request: int = 0  # sound lines of connections that sent no HTTP request
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def probably_wrong_format(self) -> bool:
        return self.bad > 0 and self.bad * 2 > self.lines

    def messages(self) -> list[str]:
        """For a person, one per line; nothing when all was well."""
        out = []
        if self.bad:
            out.append(
                f"{self.path}: {self.bad:,} of {self.lines:,} lines could not be read as {self.format}"
                " and were skipped (--strict stops at the first)"
            )
            out += [f"  line {m.line:,}: {m.what}: {m.excerpt}" for m in self.mistakes]
            if self.bad > len(self.mistakes):
                out.append(f"  and {self.bad - len(self.mistakes):,} more")
            if self.probably_wrong_format:
                out.append(
                    f"  more than half is unreadable: {self.format} is probably the wrong format; "
                    f"name it with --format ({', '.join(FORMATS[1:])})"
                )
        if self.without_request:
            out.append(f"{self.path}: {self.without_request:,} lines hold no HTTP request and were left out")
        return out


class Reader:
    """Iterator over the records of several files, one after another. `reports` grows with each file."""

    def __init__(self, paths: Iterable[str | Path], format: str = "auto", strict: bool = False) -> None:
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
        self._paths, self._format, self._strict = list(paths), format, strict
        self.reports: list[FileReport] = []
        self._records = self._read()

    def __iter__(self) -> Iterator[RequestRecord]:
        return self

    def __next__(self) -> RequestRecord:
        return next(self._records)

    def messages(self) -> list[str]:
        return [line for report in self.reports for line in report.messages()]

    def _read(self) -> Iterator[RequestRecord]:
        for path in self._paths:
            source = Source(path)
            try:
                format = self._format if self._format != "auto" else detect(source.head)
                if format is None:
                    if not source.head.strip():
                        self.reports.append(FileReport(source.name, "empty"))
                        continue
                    raise RecordsError(
                        source.name,
                        "the format is not recognised: its first lines are neither request records, "
                        "a combined access log, an Envoy JSON log nor HAR",
                        f"name it with --format ({', '.join(FORMATS[1:])})",
                    )
                report = FileReport(source.name, format)
                self.reports.append(report)
                yield from self._entries(source, report) if format == "har" else self._lines(source, report)
            finally:
                source.close()

    def _lines(self, source: Source, report: FileReport) -> Iterator[RequestRecord]:
        parse = _PARSERS[report.format]
        for number, line in source.lines():
            if line is None:
                report.lines += 1
                self._mistake(report, number, f"longer than {LINE_BYTES_MAX // 2**20} MiB", b"")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line or line.isspace():
                continue
            report.lines += 1
            try:
                record = parse(line)
            except NoRequest:
                report.without_request += 1
                continue
            except BadLine as error:
                self._mistake(report, number, str(error), line)
                continue
            report.records += 1
            yield record

    def _entries(self, source: Source, report: FileReport) -> Iterator[RequestRecord]:
        for number, entry in enumerate(har.entries(source.name, source.read(HAR_BYTES_MAX)), 1):
            report.lines += 1
            try:
                record = har.from_entry(entry)
            except BadLine as error:
                self._mistake(report, number, str(error), repr(entry)[:200].encode("utf-8", "replace"))
                continue
            report.records += 1
            yield record

    def _mistake(self, report: FileReport, number: int, what: str, line: bytes) -> None:
        excerpt = printable(line, 100)
        if self._strict:
            raise RecordsError(
                f"{report.path}:{number}",
                f"{what}: {excerpt}",
                "without --strict such lines are skipped and counted",
            )
        report.bad += 1
        if len(report.mistakes) < MISTAKES_KEPT:
            report.mistakes.append(Mistake(number, what, excerpt))


def read(paths: str | Path | Iterable[str | Path], format: str = "auto", strict: bool = False) -> Reader:
    """Records of one or several files ('-' is standard input), streaming, .gz by content.

    Lines that are no records are skipped and accounted for in the Reader's `reports`; with `strict`
    the first one raises RecordsError, as do files that cannot be read or recognised.
    """
    return Reader([paths] if isinstance(paths, str | Path) else paths, format, strict)


def detect(head: bytes) -> str | None:
    """The format of what starts like this, None when nothing fits."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    lines = [line for line in head.split(b"\n")[: _DETECT_LINES * 4] if line.strip()][:_DETECT_LINES]
    votes: Counter[str] = Counter()
    for line in lines:
        format = _detect_line(line.strip())
        if format == "har":
            return "har"
        if format:
            votes[format] += 1
    if votes:
        return votes.most_common(1)[0][0]
    # a HAR document on many lines: no line of it is JSON by itself
    start = head.lstrip()[:65536]
    if start.startswith(b"{") and b'"log"' in start and (b'"entries"' in start or b'"creator"' in start):
        return "har"
    return None


def _detect_line(line: bytes) -> str | None:
    body = envoy.strip_prefix(line)
    if body.startswith(b"{"):
        try:
            raw = jsonlines.load_object(body)
        except BadLine:
            # cut by the look-ahead: judge by what is there
            start = body[:4096]
            return (
                "har"
                if b'"log"' in start[:64] and b'"entries"' in start
                else "jsonl"
                if b'"method"' in start and b'"url"' in start
                else None
            )
        if isinstance(raw.get("log"), dict) and "entries" in raw["log"]:
            return "har"
        keys = frozenset(envoy.fold(key) for key in raw)
        if envoy.looks_like(keys):
            return "envoy"
        if "method" in raw and "url" in raw:
            return "jsonl"
        return "envoy" if "method" in keys and "path" in keys else None
    return "combined" if clf.looks_like(line.decode("latin-1")) else None
