"""From a request to the verdict's enforcement, with a real sidecar, its own judge and its own store.

    python -m bench.judge_latency --rate 100 --seconds 20

Requests that the inline models leave open come at an even rate, each with another payload. Time runs from the decision
on the request (the data plane's stamp) until the payload's entry stands in the arena, where every worker finds it;
looked for every half millisecond. Latency of the requests themselves is taken in a run of its own, since looking costs
time, and shown beside that of a sidecar without a judge.
"""
from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import yaml

from native.arenafile import ArenaFile
from sidecar.config.judge_store import JudgeStore
from sidecar.demo.supervisor import free_port
from sidecar.judge.store import open_store

PARTS = ("or 1=1", "and (2>1)", "/**/", "|| 'a'", "union select", "; drop table", "like '%'", "(select 1)",
         "is not null", "having", "-- ")


def payload(n: int) -> str:
    """Each built differently, as what differs by digits or words alone is one question."""
    return quote("' " + " ".join(PARTS[n // len(PARTS) ** i % len(PARTS)] for i in range(5)))


def ask(peer: socket.socket, target: str, client: str) -> float:
    """ms until the answer's head is there."""
    begun = time.perf_counter()
    peer.sendall(
        f"GET / HTTP/1.1\r\nHost: shop\r\nX-Original-Method: GET\r\nX-Original-URI: {target}\r\n"
        f"X-Real-IP: {client}\r\n\r\n".encode()
    )
    data = b""
    while b"\r\n\r\n" not in data:
        got = peer.recv(4096)
        if not got:
            raise SystemExit("the sidecar hung up")
        data += got
    return (time.perf_counter() - begun) * 1e3


def run(rate: float, seconds: float, judged: bool, watched: bool, redis: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        taken: set[int] = set()
        auth, admin = free_port(0, taken), free_port(0, taken)
        store = {"backend": "redis", "addresses": [redis], "name": f"bench-{os.getpid()}"} if redis else {}
        settings = {
            "listen": {"address": f"unix:{folder}/s", "auth_request": f"127.0.0.1:{auth}", "drain": "0s"},
            "admin": {"address": f"127.0.0.1:{admin}"},
            "arena": {"path": f"{folder}/arena", "clients": 4096, "blocklist": 8192, "escalations": 4096},
            "thresholds": {"tag": 0.5, "throttle": None, "challenge": None, "block": None},
            "escalation": {"client_per_minute": 600, "per_second": 1000, "enabled": judged},
            "judge": {"enabled": judged},
            "judge_store": store,
            "log": {"level": "error"},
        }
        file = folder / "outrider.yaml"
        file.write_text(yaml.safe_dump(settings))
        process = subprocess.Popen([sys.executable, "-m", "sidecar.cli", "serve", "-c", str(file)])
        try:
            wait_for(admin, judged)
            return measure(folder, auth, rate, seconds, watched, store)
        finally:
            process.terminate()
            process.wait(30)


def wait_for(admin: int, judged: bool) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=2) as answer:
                text = answer.read().decode()
            if "outrider_ready 1.0" in text and (not judged or "outrider_judge_ready 1.0" in text):
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("the sidecar isn't ready")


def measure(
    folder: Path, auth: int, rate: float, seconds: float, watched: bool, store: dict[str, object]
) -> dict[str, float]:
    arena = ArenaFile.open(folder / "arena")
    seen: dict[int, float] = {}
    stopping = threading.Event()

    def watch() -> None:
        while not stopping.wait(0.0005):
            now = time.time()
            for entry in arena.blocked():
                if entry["kind"] == "payload":
                    seen.setdefault(entry["key"], now)

    watcher = threading.Thread(target=watch, daemon=True)
    if watched:
        watcher.start()
    inline: list[float] = []
    begun = time.perf_counter()
    with socket.create_connection(("127.0.0.1", auth)) as peer:
        for n in range(int(rate * seconds)):
            while (left := begun + n / rate - time.perf_counter()) > 0:
                time.sleep(left)
            inline.append(ask(peer, f"/search?q={payload(n)}", f"198.18.{n // 200 % 200}.{1 + n % 200}"))
    time.sleep(2.0 if watched else 0.0)
    stopping.set()
    found: dict[str, float] = {"requests": len(inline)}
    if not watched:
        found.update(inline_p50_ms=statistics.median(inline), inline_p99_ms=float(np.percentile(inline, 99)))
    if not watched:
        return found
    watcher.join()
    with open_store(JudgeStore(**{"path": f"{folder}/arena.judge.db", **store})) as opened:  # type: ignore[arg-type]
        judgements = opened.judgements(100_000)
    asked = {j.escalation.payload_key: j.escalation.ts for j in judgements}
    took = [(seen[key] - ts) * 1e3 for key, ts in asked.items() if key in seen]
    found.update(
        judged=len(judgements),
        enforced=len(took),
        enforced_p50_ms=statistics.median(took) if took else float("nan"),
        enforced_p99_ms=float(np.percentile(took, 99)) if took else float("nan"),
        model_ms_p50=statistics.median(j.judgement.took_ms for j in judgements) if judgements else float("nan"),
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0, help="escalations per second (100)")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--redis", help="HOST:PORT of a Redis to use in place of the file")
    options = parser.parse_args()
    if not 0 < options.rate <= 1000 or not 0 < options.seconds <= 600:
        parser.error("--rate: at most 1000; --seconds: at most 600")
    rows = {
        "without a judge": run(options.rate, options.seconds, False, False, None),
        "with its judge": run(options.rate, options.seconds, True, False, options.redis),
        "with its judge, watched": run(options.rate, options.seconds, True, True, options.redis),
    }
    for name, row in rows.items():
        print(name + ": " + json.dumps({key: round(value, 3) for key, value in row.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
