"""Records in the order of time, with a bound on what is held in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush, merge
from pathlib import Path

from sidecar.records import Reader, RecordsError, RequestRecord, read

RECORDS_MAX = 200_000  # held back to be put into order, over all files
BYTES_MAX = 256 * 1024 * 1024  # ... and their size, roughly
FILES_MAX = 200  # read side by side

Timed = tuple[float, int, RequestRecord]


@dataclass(slots=True)
class Disorder:
    """What could not be put right."""

    late: int = 0  # came after records that are later than they are
    untimed: int = 0  # have no time of their own


def in_time(
    paths: Iterable[str | Path], format: str = "auto", strict: bool = False, records_max: int = RECORDS_MAX
) -> tuple[Iterator[RequestRecord], list[Reader], Disorder]:
    """The records of all files merged by `ts`, the readers (for their reports), and the disorder left.

    Each file is put into order within a window of records_max / files records (at most BYTES_MAX in all);
    a record that is further from its place comes late and is counted. A record without time stays
    behind its predecessor.
    """
    paths = list(paths)
    if len(paths) > FILES_MAX:
        raise RecordsError(
            str(paths[FILES_MAX]),
            f"more than {FILES_MAX} files at once",
            "join some of them, or replay them in parts",
        )
    disorder = Disorder()
    readers = [read(path, format, strict) for path in paths]
    share = max(1, len(paths))
    streams = [
        reorder(reader, disorder, max(1, records_max // share), BYTES_MAX // share) for reader in readers
    ]
    merged = streams[0] if len(streams) == 1 else merge(*streams, key=lambda timed: timed[0])
    return (record for _, _, record in merged), readers, disorder


def reorder(
    records: Iterable[RequestRecord],
    disorder: Disorder,
    records_max: int = RECORDS_MAX,
    bytes_max: int = BYTES_MAX,
) -> Iterator[Timed]:
    """(time, number, record) by time, holding back at most so many records and bytes."""
    heap: list[Timed] = []
    held = 0
    latest = last = 0.0
    for number, record in enumerate(records):
        if record.ts is None:
            disorder.untimed += 1
            ts = latest
        else:
            ts = latest = record.ts
        held += _size(record)
        heappush(heap, (ts, number, record))
        while len(heap) > records_max or (held > bytes_max and len(heap) > 1):
            timed = heappop(heap)
            held -= _size(timed[2])
            if timed[0] < last:
                disorder.late += 1
                timed = (last, timed[1], timed[2])  # a merge needs its streams in order
            last = timed[0]
            yield timed
    while heap:
        timed = heappop(heap)
        if timed[0] < last:
            disorder.late += 1
            timed = (last, timed[1], timed[2])
        last = timed[0]
        yield timed


def _size(record: RequestRecord) -> int:
    return 700 + len(record.url) + 160 * len(record.headers) + len(record.body or b"")
