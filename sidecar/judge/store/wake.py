"""Wakes the processes that share a file: each has a datagram socket in a folder beside it, and whoever wrote sends a
byte to all. Nobody polls; a byte lost for lack of room finds its receiver about to look anyway."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import socket
import threading
import time

PROCESSES_MAX = 256
_CLOSE = b"c"
_SELF = "/proc/self/fd"  # the folder's path may be longer than a socket's address


class Wake:
    def __init__(self, folder: str) -> None:
        """Raises OSError."""
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        self._changed = threading.Condition()
        self._turns = {"q": 0, "d": 0}
        self._closed = False
        self._ears: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def turn(self, kind: str) -> int:
        """To be read before looking, and given to wait."""
        with self._changed:
            return self._turns[kind]

    def ring(self, kind: str) -> None:
        """q: there is work; d: a decision was made."""
        self._turn(kind)
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for name in [entry.name for entry in itertools.islice(entries, PROCESSES_MAX)]:
                if name != self._name:
                    self._send(name, kind.encode())

    def listen(self) -> None:
        """To be called before the first look that wait is to follow. Raises OSError."""
        with self._changed:
            if self._thread is not None or self._closed:
                return
            ears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                ears.bind(f"{_SELF}/{self._folder}/{self._name}")
            except OSError:
                ears.close()
                raise
            self._ears = ears
            self._thread = threading.Thread(target=self._hear, args=(ears,), name="judge-store-wake", daemon=True)
            self._thread.start()

    def wait(self, kind: str, seen: int, timeout_s: float) -> bool:
        """Whether anyone rang since turn said `seen`; False after timeout_s, or once closed."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while self._turns[kind] == seen and not self._closed:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return self._turns[kind] != seen

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            self._send(self._name, _CLOSE)
            thread.join(1.0)
        with contextlib.suppress(OSError):
            os.unlink(self._name, dir_fd=self._folder)
        self._sender.close()
        os.close(self._folder)

    def _turn(self, kind: str) -> None:
        with self._changed:
            self._turns[kind] += 1
            self._changed.notify_all()

    def _send(self, name: str, what: bytes) -> None:
        try:
            self._sender.sendto(what, f"{_SELF}/{self._folder}/{name}")
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:  # its process is gone
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._folder)

    def _hear(self, ears: socket.socket) -> None:
        with ears:
            while not self._closed:
                try:
                    what = ears.recv(16).decode("latin-1")
                except OSError:
                    return
                if what in self._turns:
                    self._turn(what)
