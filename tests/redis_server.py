"""A redis-server of the test's own, and a way to it that can be slow, cut off or refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from live_sidecar import free_port
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")


def need_redis() -> str:
    if BINARY is None:
        pytest.skip("there is no redis-server (Debian: redis-server)")
    return BINARY


class RedisServer:
    """On a loopback port, with its files in a folder; without persistence unless `options` say otherwise."""

    def __init__(self, folder: Path, *options: str, tls: dict[str, Any] | None = None, mode: str = "") -> None:
        self.binary, self.folder, self.port = need_redis(), folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.options, self.tls, self.mode = options, tls, mode
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, **more: Any) -> Redis:
        given = {**(self.tls or {}), "socket_timeout": 5, "retry": Retry(NoBackoff(), 0), **more}
        return Redis(host="127.0.0.1", port=self.port, **given)

    def start(self) -> RedisServer:
        ports = ("--port", "0", "--tls-port") if self.tls else ("--port",)
        command = [self.binary, *((str(self.folder / "sentinel.conf"), self.mode) if self.mode else ())]
        if not self.mode:
            command += ["--bind", "127.0.0.1", "--save", "", *ports, str(self.port), "--dir", str(self.folder)]
        log = self.folder / "log"
        with log.open("ab") as out:
            self.process = subprocess.Popen([*command, *self.options], stdout=out, stderr=out)
        until = time.monotonic() + 20
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return self
                except RedisError as error:
                    if isinstance(error, AuthenticationError):  # it is there, and asks who it is
                        return self
                    if self.process.poll() is not None or time.monotonic() > until:
                        self.stop()
                        raise RuntimeError(f"{command} didn't start: {log.read_text()[-2000:]}") from None
                    time.sleep(0.02)

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, how)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)
            self.process.wait(20)
        self.process = None


class Way:
    """A TCP way to a port: `delay_s` on what comes back, `cut` lets nothing through and says nothing."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_s = 0.0
        self._open = threading.Event()
        self._open.set()
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def drop(self) -> None:
        """Resets what is connected."""
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self._open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            left = [2]
            for source, sink, back in ((near, far, False), (far, near, True)):
                thread = threading.Thread(target=self._carry, args=(source, sink, back, left), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket, back: bool, left: list[int]) -> None:
        try:
            while data := source.recv(65536):
                if back and self.delay_s:
                    time.sleep(self.delay_s)
                self._open.wait()
                sink.sendall(data)
        except OSError:
            pass
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
        left[0] -= 1
        if left[0] == 0:
            source.close()
            sink.close()
