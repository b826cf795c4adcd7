"""The endurance run: a counted number of requests through Envoy and the sidecar at many connections.

It passes when every request was answered, every non-2xx was a decision of Outrider's, none went past Outrider
because ext_proc failed, and the sidecar's memory didn't grow between the first and the last tenth of the run.
Memory is the private part (RssAnon): the arena beside it is a file of fixed size whose pages are touched as clients
appear. Requests come in chunks, each over new connections, the cases taking turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench import load, measure
from bench.hosts import Counts, Host, HostError
from bench.proxy import Inputs
from bench.rig import Rig

CHUNKS = 100
CHUNK_TIMEOUT_S = 300.0
GROWTH_KIB_MAX = 256  # a fluke of the allocator, not a stream in a thousand left behind
GRPCIO_GROWTH_KIB_MAX = 4096


@dataclass
class Soak:
    host: str
    requests: int
    connections: int
    cases: tuple[str, ...]
    done: int = 0
    non2xx: int = 0
    failed: int = 0  # no answer, or a broken one
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)
    # one entry per chunk: requests so far, seconds so far, private and shared KiB of the sidecar
    memory: list[tuple[int, float, int, int]] = field(default_factory=list)

    @property
    def growth_kib(self) -> float:
        """Median private memory of the last tenth less that of the first."""
        if len(self.memory) < 2:
            return 0.0
        tenth = max(1, len(self.memory) // 10)
        private = [point[2] for point in self.memory]
        return statistics.median(private[-tenth:]) - statistics.median(private[:tenth])

    def problems(self) -> list[str]:
        """Empty: passed."""
        out = []
        strange = self.non2xx - self.counts.refused
        if self.done < self.requests:
            out.append(f"only {self.done:,} of {self.requests:,} requests were answered")
        if self.failed:
            out.append(f"{self.failed:,} requests failed")
        if strange > 0:
            out.append(f"{strange:,} answers weren't 2xx and no decision of Outrider's")
        if self.counts.unjudged:
            out.append(f"{self.counts.unjudged:,} requests went past Outrider unjudged")
        if self.counts.judged < self.done:
            out.append(f"Outrider decided {self.counts.judged:,} requests of {self.done:,}")
        limit = GROWTH_KIB_MAX if self.host == "native" else GRPCIO_GROWTH_KIB_MAX
        if self.growth_kib > limit:
            out.append(f"the sidecar's private memory grew by {self.growth_kib:,.0f} KiB (at most {limit:,})")
        return out

    def as_json(self) -> dict[str, Any]:
        """One object for --json."""
        return {
            "host": self.host,
            "mode": "soak",
            "cases": list(self.cases),
            "connections": self.connections,
            "requests": self.done,
            "seconds": round(self.seconds, 1),
            "rps": round(self.done / self.seconds, 1) if self.seconds else 0.0,
            "non2xx": self.non2xx,
            "refused": self.counts.refused,
            "unjudged": self.counts.unjudged,
            "judged": self.counts.judged,
            "errors": self.failed,
            "growth_kib": round(self.growth_kib),
            "memory": [
                {"requests": n, "seconds": seconds, "private_kib": private, "shared_kib": shared}
                for n, seconds, private, shared in self.memory
            ],
            "passed": not self.problems(),
            "problems": self.problems(),
        }


def soak(rig: Rig, host: Host, result: Soak, tick: Callable[[Soak], None]) -> Soak:
    """Fills `result`; tick after each chunk. HostError, LoadError."""
    assert host.sidecar is not None, "a bare proxy has nothing to soak"
    inputs = Inputs(rig.folder, result.cases)
    chunk = max(1, -(-result.requests // CHUNKS))
    before, started, turn, sent = host.counts(), time.monotonic(), 0, 0
    while sent < result.requests:
        case = result.cases[turn % len(result.cases)]
        n = min(chunk, result.requests - sent)
        uris, fields, body = inputs.opened(case, host.url, turn)
        found, _ = load.counted(uris, fields, body, n, result.connections, CHUNK_TIMEOUT_S)
        sent += n
        turn += 1
        result.done += found["done"]
        result.failed += found["failed"]  # errored and timed out among them
        result.non2xx += found["done"] - found["2xx"]
        dead = host.dead()
        if dead is not None:
            raise HostError(f"{dead.name} ended after {result.done:,} requests. Its log ends:\n{dead.tail()}")
        held = measure.memory(host.sidecar.pid)
        result.seconds = time.monotonic() - started
        result.memory.append((result.done, round(result.seconds, 2), held.private_kib, held.shared_kib))
        tick(result)
    result.counts = host.counts() - before
    return result
