"""Starting, watching and ending the demo's processes. Each is ended by its own process id; none outlives
the supervisor, not even when that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from sidecar.demo.envoy import DemoError

START_TIMEOUT_S = 60.0  # models are compiled on a first start
STOP_TIMEOUT_S = 12.0
TAIL_BYTES = 6000
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """In the child, before exec: be killed when the supervisor dies without having said so (Linux)."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Child:
    """One process with its log file."""

    def __init__(self, name: str, argv: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.name, self.argv, self.log = name, argv, log
        self.env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} isn't started"
        return self.process.pid

    def start(self) -> None:
        """DemoError when the program can't be executed."""
        with self.log.open("ab") as out:
            try:
                # an own session: Ctrl-C reaches the supervisor only, which ends the children in order
                self.process = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self.env,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            except OSError as error:
                raise DemoError(f"can't start {self.name} ({self.argv[0]}): {error.strerror}") from error

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """SIGTERM, then SIGKILL after the timeout; waits, so that no zombie stays. The exit status, or
        None when it never ran."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory is short."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        """The end of the log, control characters made visible: it may quote hostile requests."""
        try:
            data = self.log.read_bytes()[-TAIL_BYTES:]
        except OSError:
            return ""
        return "".join(
            c if c == "\n" or c.isprintable() else f"\\x{ord(c):02x}" for c in data.decode("utf-8", "replace")
        )


def wait_until(
    ready: Callable[[], bool], what: str, children: list[Child], timeout_s: float = START_TIMEOUT_S
) -> None:
    """Poll until ready; DemoError with the log's end when a child died or time is up."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        for child in children:
            if not child.running():
                status = child.process.returncode if child.process else None
                raise DemoError(
                    f"{child.name} ended (status {status}) before {what}. Its log, "
                    f"{child.log}, ends:\n{child.tail()}"
                )
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {child.log}\n{child.tail()}" for child in children)
            raise DemoError(f"waited {timeout_s:.0f} s for {what} in vain.\n{logs}")
        time.sleep(0.05)


def answers(url: str, timeout_s: float = 1.0) -> bool:
    """Whether a GET gets status 200. No proxy of the environment is used: the address is local."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def free_port(preferred: int, taken: set[int]) -> int:
    """The preferred port if nothing listens there, else one of the system's choice; never one in taken."""
    for port in (preferred, *([0] * 20)):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            chosen = int(probe.getsockname()[1])
        if chosen not in taken:
            taken.add(chosen)
            return chosen
    raise DemoError("no free port on 127.0.0.1: is the range of local ports used up?")
