"""A real `outrider serve` in a process of its own, for tests."""
from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(check: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
    """What check gives once that is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


class Sidecar:
    """Its files lie in `folder`; over: sections of the configuration, merged key by key into a small one."""

    def __init__(self, folder: Path, **over: dict[str, Any]) -> None:
        self.folder, self.file, self.log = folder, folder / "outrider.yaml", folder / "sidecar.log"
        self.arena = folder / "arena"
        self.admin = free_port()
        self.config: dict[str, Any] = {
            "listen": {"address": f"unix:{folder}/grpc.sock", "drain": "0s", "threads": 1},
            "admin": {"address": f"127.0.0.1:{self.admin}"},
            "arena": {"path": str(self.arena), "clients": 1024},
            "judge": {"enabled": False},
            "decision_log": {"path": str(folder / "decisions.jsonl")},
            "latency": {"budget": "1s"},
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.write(**over)

    def write(self, **over: dict[str, Any]) -> None:
        for section, values in over.items():
            self.config[section] = self.config.get(section, {}) | values if isinstance(values, dict) else values
        fresh = self.file.with_suffix(".fresh")
        fresh.write_text(yaml.safe_dump(self.config))
        fresh.rename(self.file)

    def start(self, *, ready: bool = True, user: int | None = None) -> Sidecar:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidecar.cli", "serve", "-c", str(self.file)], stdout=log, stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                cwd=self.folder, user=user, extra_groups=[] if user is not None else None)
        if ready:
            until(lambda: self.ready() or self.process.poll() is not None, "the sidecar isn't ready")
            assert self.process.poll() is None, self.log.read_text()
        return self

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def metric(self, name: str) -> float | None:
        """The sample with this name (and labels, as written)."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=5) as answer:
            found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else None

    def said(self, word: str) -> list[dict[str, Any]]:
        """Lines of its log with this word in them."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if word in str(line)]

    def decisions(self) -> list[dict[str, Any]]:
        file = self.folder / "decisions.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, timeout_s: float = 30) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def stop(self, how: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.wait()
