"""Listening addresses: parsed, and checked before anything is started on them.

gRPC itself would remove a socket file that another process still listens on, and share a TCP port
silently; both are refused here with a sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.serve.errors import StartupError

SOCKET_PATH_MAX = 107  # bytes: sun_path on Linux less its terminator
SOCKET_MODE = 0o660  # the folder's group (a pod's fsGroup) may connect, others may not
PROBE_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class Address:
    """path: of a UNIX socket, or None; else host and port."""

    path: Path | None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> Address:
    """`unix:/path`, `host:port` or `[v6]:port`; StartupError otherwise."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        # unix:///run/x is the URL form of the same
        return Address(Path("/" + path.lstrip("/")) if path.startswith("//") else Path(path))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or not host:
        raise StartupError(f"{text!r} isn't an address: write unix:/path/to.sock or host:port")
    return Address(None, host.strip("[]"), int(port))


def check_unix(path: Path) -> None:
    """Make sure that a socket can be created at path: its folder exists and is writable, nobody listens
    there. A socket file left behind by a process that is gone is removed; nothing else ever is.
    StartupError says what is wrong."""
    if not path.is_absolute():
        raise StartupError(f"the socket path {path} isn't absolute")
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise StartupError(
            f"the socket path {path} is longer than the {SOCKET_PATH_MAX} bytes the system allows"
        )
    folder = path.parent
    if not folder.is_dir():
        raise StartupError(
            f"the folder of the socket, {folder}, doesn't exist: create it (mkdir -p {folder}), "
            "or mount the shared volume there"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StartupError(f"no permission to create a socket in {folder} (user id {os.getuid()})")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartupError(
            f"{path} exists and isn't a socket: move it away, or choose another listen.address"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)  # its process died without removing it
            return
        except OSError as error:
            raise StartupError(f"can't tell whether {path} is in use: {error.strerror or error}") from error
    raise StartupError(
        f"another process already listens on {path}: stop it, or choose another listen.address"
    )


def check_tcp(host: str, port: int, what: str) -> None:
    """Make sure that host:port can be bound; StartupError (naming `what`) otherwise."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartupError(f"{what}: {host} isn't an address of this machine: {error.strerror}") from error
    family, kind, protocol, _, name = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(name)
        except OSError as error:
            raise StartupError(f"{what}: {explain(error, host, port)}") from error


def explain(error: OSError, host: str, port: int) -> str:
    """A failed bind in words."""
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another process: stop it, or choose another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} isn't an address of this machine"
    if error.errno == errno.EACCES:
        return f"no permission to listen on {where}: ports below 1024 need a privilege"
    return f"can't listen on {where}: {error.strerror}"


def check(address: Address, what: str) -> None:
    if address.path is not None:
        check_unix(address.path)
    elif address.port:
        check_tcp(address.host, address.port, what)


class Listener:
    """A listening socket, non-blocking, and for a UNIX socket its file. OSError where the address can't be had."""

    def __init__(self, address: Address, backlog: int) -> None:
        self.path = address.path
        if address.path is not None:
            self.socket = socket.socket(socket.AF_UNIX)
            name: Any = str(address.path)
        else:
            family, kind, protocol, _, name = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.socket = socket.socket(family, kind, protocol)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(name)
            self.socket.listen(backlog)
            self.socket.setblocking(False)
        except OSError:
            self.socket.close()
            raise
        self.port: int = self.socket.getsockname()[1] if address.path is None else 0
        self._made = address.path.stat() if address.path is not None else None

    def remove(self) -> None:
        """The socket's file, if it is still ours: another sidecar may have taken the path over."""
        if self.path is not None and self._made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(self.path.lstat(), self._made):
                    self.path.unlink()
