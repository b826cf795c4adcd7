"""How fast a decision travels through the judge's store, from one process to another, and what waiting costs.

    python -m bench.judge_store [--rate 100] [--seconds 20] [--idle 5]

One process puts escalations at an even rate and follows decisions; another, a judge without a model, claims them and
settles each with a decision. "said": from the call of settle until the other process hears of the decision. Redis is a
redis-server of this script's own on the loopback (append-only file, fsync every second, as it is usually run).
"""
from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.store import open_store
from sidecar.judge.types import Decision, Escalation

WAIT_S = 15.0
TEXT = "q=' or 1=1 -- " * 20


def judge(settings: JudgeStore) -> None:
    """The other process, until it is terminated. The monotonic clock is the same in both."""
    with open_store(settings) as store:
        while True:
            for claimed in store.claim("bench", 64, 2.0):
                claimed_at, now = time.monotonic(), store.now()
                one = claimed.escalation
                times = {"claimed": claimed_at, "settled": time.monotonic()}
                made = Decision(
                    one.id, "address", one.client_key, "block", "abuse", 1.0, now, now + 300, provenance=times
                )
                store.settle([claimed.receipt], [made])


def measure(settings: JudgeStore, rate: float, seconds: float, idle_s: float) -> dict[str, Any]:
    heard: dict[str, tuple[float, Decision]] = {}
    gaps: list[float] = []
    all_there = threading.Event()
    many = round(rate * seconds)

    def on_change(decisions: list[Decision]) -> None:
        at = time.monotonic()
        for one in decisions:
            heard[one.id] = at, one
        if len(heard) >= many + 1:
            all_there.set()

    command = [sys.executable, "-m", "bench.judge_store", "--judge", settings.model_dump_json()]
    other = subprocess.Popen(command)
    try:
        with open_store(settings) as store:
            store.follow(on_change, lambda: gaps.append(time.monotonic()))
            store.put([escalation(0, "first")])
            until = time.monotonic() + WAIT_S
            while not heard and time.monotonic() < until:
                time.sleep(0.01)
            put: dict[str, float] = {}
            returned: list[float] = []
            start = time.monotonic()
            for n in range(many):
                time.sleep(max(0.0, start + n / rate - time.monotonic()))
                at = put[str(n)] = time.monotonic()
                store.put([escalation(n + 1, str(n))])
                returned.append(time.monotonic() - at)
            all_there.wait(WAIT_S)
            busy = time.process_time()
            time.sleep(idle_s)
            busy = time.process_time() - busy
            stats = store.stats()
    finally:
        other.terminate()
        other.wait(WAIT_S)
    rows = [(put[id], at, one.provenance) for id, (at, one) in list(heard.items()) if id in put]
    return {
        "put": returned,
        "claimed": [times["claimed"] - at for at, _, times in rows],
        "said": [at - times["settled"] for _, at, times in rows],
        "whole": [at - before for before, at, _ in rows],
        "lost": many - len(rows),
        "errors": stats["errors"] + stats["shed"] + len(gaps),
        "idle": busy / idle_s,
    }


def escalation(client: int, id: str) -> Escalation:
    return Escalation(id, time.time(), "bench", "GET", "/search", client_key=client + 1, text=TEXT)


def redis_server(folder: Path) -> tuple[subprocess.Popen[bytes], int] | None:
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        return None
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--dir", str(folder))
    process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
    time.sleep(1.0)
    return process, port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0, help="escalations a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of following without any work")
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.judge:
        judge(JudgeStore.model_validate_json(given.judge))
        return
    table = Table(title=f"{given.rate:g} escalations a second for {given.seconds:g} s, {os.cpu_count()} cores; ms")
    for column in ("store", "", "p50", "p99", "most", "lost", "errors", "CPU idle"):
        table.add_column(column, justify="left" if column in ("store", "") else "right")
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as name:
        folder = Path(name)
        cases = {"file": JudgeStore(path=str(folder / "judge.db"))}
        server = redis_server(folder)
        if server is not None:
            address = f"127.0.0.1:{server[1]}"
            cases["Redis"] = JudgeStore(backend="redis", addresses=(address,), path=str(folder / "spool.db"))
        try:
            for store, settings in cases.items():
                found = measure(settings, given.rate, given.seconds, given.idle)
                for key, words in (
                    ("put", "put returns"),
                    ("claimed", "put to claimed"),
                    ("said", "settle to heard"),
                    ("whole", "put to heard"),
                ):
                    times = np.array(found[key] or [np.nan]) * 1000
                    shown = [f"{value:.2f}" for value in (*np.percentile(times, (50, 99)), times.max())]
                    last = [str(found["lost"]), str(found["errors"]), f"{found['idle']:.2%}"] if key == "put" else []
                    table.add_row(store if key == "put" else "", words, *shown, *last)
        finally:
            if server is not None:
                server[0].terminate()
                server[0].wait(WAIT_S)
    Console(width=110).print(table)
    if server is None:
        print("no redis-server here: Redis wasn't measured (Debian: redis-server)")


if __name__ == "__main__":
    main()
