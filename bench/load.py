"""The load generators: wrk for the ceiling (closed loop), h2load for constant arrival rates (open loop).

Why these two, both packaged by Debian and kept by others:

* **wrk** keeps N connections busy: each asks again as soon as it was answered. That finds the ceiling, and its script
  sends different headers and bodies with every request. A closed loop asks less when the server is slow, so what
  waits isn't counted: its latencies are those of a fully loaded server, good for comparing hosts, not for promises.
* **h2load** sends on schedule, whether or not answers have come: streams of one HTTP/2 connection don't wait for each
  other. A server that stalls for one second out of five is therefore seen by a fifth of the requests, in their tail
  (a test stops the upstream and checks that share).

How h2load is used follows from what was measured with 1.52 on an idle Envoy at 10,000 requests/s:

  --rps with 4 to 32 connections   100 requests at once every 10 ms (its timer is never shorter): p50 2.2 ms of its own
                                   making
  --timing-script-file             one timer per request, never shorter than 1 ms and late ones add up: 1,900/s
  --rps 50 on 200 connections      one request per tick and connection; opened one by one over the length of a tick
                                   (-r, --rate-period), they stay spread: 10 requests/ms, p50 0.4 to 0.8 ms on a
                                   machine whose two cores also run both Envoys

So each connection gets at most RPS_PER_CONNECTION, and the connections start spread. Arrivals are even to about a
millisecond (that is what libev's timers resolve), as with wrk2. What h2load itself starts more than
LATE_US behind schedule is counted from the schedule, not from the start.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sidecar.demo.supervisor import end_with_parent

LUA = Path(__file__).with_name("closed.lua")
RPS_PER_CONNECTION = 50.0
OPEN_CONNECTIONS = (8, 1024)  # fewest, most
STREAMS_PER_CONNECTION = 256  # five seconds of stall at 50/s
LATE_US = 10_000
SETTLE_US = 300_000  # of the open loop's start is left out: connections are being opened
OUTPUT_MAX = 4000  # characters of a generator's complaint that are shown
# shares of requests at or below; the rest falls by a tenth of a decade from point to point
PERCENTILES = tuple(100 * (1 - 10 ** (-step / 10)) for step in range(51))


# Set by the command's signal handlers. The exception that they raise can get lost in a destructor or a callback, where
# Python ignores exceptions; this can't.
STOP = threading.Event()
STOP_CHECK_S = 0.25


class LoadError(Exception):
    """The generator is missing or failed; the text says what to do."""


@dataclass(frozen=True)
class Sample:
    """One slice of load. Latencies in us; points belong to PERCENTILES. requests of them are in the latencies and in
    rps, answered were answered in all; errors: requests without any answer."""

    requests: int
    answered: int
    seconds: float
    non2xx: int
    errors: int
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    points: tuple[float, ...]
    late_us: float = 0.0  # open loop: how far behind schedule h2load started requests, p99

    @property
    def rps(self) -> float:
        return self.requests / self.seconds if self.seconds > 0 else 0.0


def find(program: str) -> str:
    """Its path. LoadError naming the Debian package where it is missing."""
    path = shutil.which(program)
    if path is None:
        package = {"h2load": "nghttp2-client"}.get(program, program)
        raise LoadError(
            f"{program} isn't installed (Debian and Ubuntu: apt-get install {package}). "
            "outrider bench needs wrk and h2load to make load"
        )
    return path


def generator_versions() -> dict[str, str]:
    out = {}
    for program in ("wrk", "h2load"):
        try:
            done = subprocess.run([find(program), "--version"], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LoadError(f"{program} doesn't run: {error}") from error
        first = (done.stdout + done.stderr).strip().splitlines() or ["unknown"]
        out[program] = re.sub(r"\s*\[.*| nghttp2/|^wrk |^h2load ?", " ", first[0]).strip()
    return out


def run(line: Sequence[str], timeout_s: float) -> tuple[str, int | None]:
    """Output (both streams) and status; None when it was ended because time was up. The process doesn't outlive this
    call, however it ends; nor this process, where a signal hits between its start and the try."""
    process = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    ends = time.monotonic() + timeout_s
    try:
        while time.monotonic() < ends:
            if STOP.is_set():
                raise KeyboardInterrupt
            try:
                out, _ = process.communicate(timeout=STOP_CHECK_S)
            except subprocess.TimeoutExpired:
                continue
            return out.decode("utf-8", "replace"), process.returncode
        process.terminate()
        try:
            out, _ = process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        return out.decode("utf-8", "replace"), None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


# ---- closed loop -----------------------------------------------------------------------------------------


def closed(url: str, requests_file: Path, connections: int, duration_s: int, threads: int = 1) -> Sample:
    """wrk for duration_s on so many keep-alive HTTP/1.1 connections."""
    threads = min(threads, connections)
    line = [find("wrk"), "-t", str(threads), "-c", str(connections), "-d", f"{duration_s}s", "--timeout", "10s"]
    out, status = run([*line, "-s", str(LUA), url, "--", str(requests_file)], duration_s * 2 + 30)
    return parse_wrk(out, status)


def parse_wrk(out: str, status: int | None = 0) -> Sample:
    """From closed.lua's line. LoadError when there is none."""
    for text in out.splitlines():
        if text.startswith("RESULT "):
            found = json.loads(text[7:])
            if len(found["points"]) != len(PERCENTILES):
                raise LoadError("closed.lua and bench.load disagree on the percentiles")
            return Sample(
                requests=int(found["requests"]),
                answered=int(found["requests"]),
                seconds=found["duration_us"] / 1e6,
                non2xx=int(found["non2xx"]),
                errors=int(found["socket_errors"]) + int(found["timeouts"]),
                p50_us=float(found["p50_us"]),
                p99_us=float(found["p99_us"]),
                p999_us=float(found["p999_us"]),
                max_us=float(found["max_us"]),
                points=tuple(float(us) for _, us in found["points"]),
            )
    raise LoadError(f"wrk failed (status {status}):\n{out[-OUTPUT_MAX:]}")


# ---- open loop -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How h2load is told an arrival rate."""

    connections: int
    rps_per_connection: float
    opened_at_once: int
    opened_every_ms: int


def schedule(rate: float) -> Schedule:
    """Connections enough that none fires more often than its timer can; opened spread over one tick."""
    low, high = OPEN_CONNECTIONS
    connections = min(high, max(low, math.ceil(rate / RPS_PER_CONNECTION)))
    tick_ms = 1000.0 * connections / rate
    if connections >= tick_ms:
        at_once, every_ms = math.ceil(connections / tick_ms), 1
    else:
        at_once, every_ms = 1, max(1, int(tick_ms / connections))
    return Schedule(connections, rate / connections, at_once, every_ms)


def request_arguments(uris: Path, fields: Sequence[tuple[str, str]], body: Path | None) -> list[str]:
    line = ["-i", str(uris)]
    for name, value in fields:
        line += ["-H", f"{name}: {value}"]
    return [*line, "-d", str(body)] if body is not None else line


def opened(
    uris: Path, fields: Sequence[tuple[str, str]], body: Path | None, rate: float, duration_s: float, log: Path
) -> Sample:
    """h2load at `rate` requests/s for duration_s, over cleartext HTTP/2. Where the server can't keep up it takes
    longer, at most four times and ten seconds more; what is unanswered then counts as errors."""
    plan = schedule(rate)
    each = max(1, round(duration_s * rate / plan.connections))
    total = each * plan.connections
    log.unlink(missing_ok=True)
    line = [
        *(find("h2load"), "-n", str(total), "-c", str(plan.connections), "-m", str(STREAMS_PER_CONNECTION)),
        *("-r", str(plan.opened_at_once), f"--rate-period={plan.opened_every_ms}ms"),
        *(f"--rps={plan.rps_per_connection:.6f}", f"--log-file={log}"),
        *request_arguments(uris, fields, body),
    ]
    out, status = run(line, duration_s * 4 + 10)
    if status not in (0, None):
        raise LoadError(f"h2load failed (status {status}):\n{out[-OUTPUT_MAX:]}")
    try:
        return summarize(read_log(log), rate, total)
    except ValueError as error:
        raise LoadError(f"h2load: {error}\n{out[-OUTPUT_MAX:]}") from error
    finally:
        log.unlink(missing_ok=True)


def counted(
    uris: Path, fields: Sequence[tuple[str, str]], body: Path | None, requests: int, connections: int, timeout_s: float
) -> tuple[dict[str, int], float]:
    """Exactly so many requests, closed loop, one at a time on each connection: h2load's counts and the seconds."""
    line = [find("h2load"), "-n", str(requests), "-c", str(min(connections, requests)), "-m", "1"]
    out, status = run([*line, *request_arguments(uris, fields, body)], timeout_s)
    if status != 0:
        raise LoadError(f"h2load failed ({'time was up' if status is None else status}):\n{out[-OUTPUT_MAX:]}")
    return parse_h2load(out)


def parse_h2load(out: str) -> tuple[dict[str, int], float]:
    """Counts (total, started, done, succeeded, failed, errored, timeout, 2xx, 3xx, 4xx, 5xx) and seconds of its
    summary. LoadError when it isn't there."""
    finished = re.search(r"^finished in ([\d.]+)(us|ms|s|m|h)?,", out, re.M)
    requests = re.search(r"^requests: (.+)$", out, re.M)
    codes = re.search(r"^status codes: (.+)$", out, re.M)
    if not (finished and requests and codes):
        raise LoadError(f"h2load's output isn't understood:\n{out[-OUTPUT_MAX:]}")
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (\w+)", f"{requests[1]}, {codes[1]}")}
    unit = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}[finished[2] or "s"]
    return counts, float(finished[1]) * unit


def read_log(path: Path) -> npt.NDArray[np.int64]:
    """h2load's log, shape (requests, 3): start (us since the epoch), status (-1: failed), us until the answer's end.
    A last line cut short is left out. ValueError when nothing is in it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it wrote no log ({error.strerror})") from error
    fields = np.array(data[: data.rfind(b"\n") + 1].split(), dtype=np.int64)
    if fields.size == 0 or fields.size % 3:
        raise ValueError("its log is empty or not understood")
    return fields.reshape(-1, 3)


def summarize(log: npt.NDArray[np.int64], rate: float, total: int) -> Sample:
    """The log of one constant rate. A request's wait counts from when h2load started it or, where that was more than
    LATE_US behind the schedule, from there."""
    log = log[np.argsort(log[:, 0], kind="stable")]
    start = log[:, 0] - log[0, 0]
    lag = start - np.arange(len(log)) * (1e6 / rate)
    # the first connections may open early or late; the schedule runs through the best of the start
    lag = lag - lag[: max(1, len(lag) // 20)].min()
    wait = log[:, 2] + np.maximum(0.0, lag - LATE_US)
    settled = start >= min(SETTLE_US, start[-1] / 4)
    answered = log[:, 1] >= 0
    used = settled & answered
    if not used.any():
        raise ValueError("no request was answered")
    first = start[used].min()
    seconds = float((start[used] + log[used, 2]).max() - first) / 1e6
    points = np.percentile(wait[used], PERCENTILES)
    p50, p99, p999 = np.percentile(wait[used], (50, 99, 99.9))
    status = log[answered, 1]
    return Sample(
        requests=int(used.sum()),
        answered=int(answered.sum()),
        seconds=max(seconds, 1e-6),
        non2xx=int(((status < 200) | (status > 299)).sum()),
        errors=total - int(answered.sum()),
        p50_us=float(p50),
        p99_us=float(p99),
        p999_us=float(p999),
        max_us=float(wait[used].max()),
        points=tuple(float(p) for p in points),
        late_us=float(np.percentile(lag, 99)),
    )
