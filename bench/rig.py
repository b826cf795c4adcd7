"""The upstream and the hosts as one thing to enter and leave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.hosts import EnvoyHost, Host, HostError, envoy_line, is_nginx, upstream_config
from bench.nginx_hosts import NginxHost
from sidecar.demo.envoy import DemoError
from sidecar.demo.stack import make_folder
from sidecar.demo.supervisor import Child, answers, free_port, wait_until


class Rig:
    """The upstream and the hosts, entered and left as one. A host that can't be started is in `missing` with its
    reason, unless it is in `required`: then HostError. Nothing outlives it; its folder goes with it."""

    def __init__(
        self, names: list[str], required: set[str], workers: int = 1, over: dict[str, Any] | None = None
    ) -> None:
        """over: settings of the sidecars that differ from the bench's own."""
        self.names, self.required, self.workers, self.over = names, required, workers, over
        self.hosts: list[Host] = []
        self.missing: dict[str, str] = {}
        self.folder = make_folder()
        self.upstream: Child | None = None

    def __enter__(self) -> Self:
        try:
            taken: set[int] = set()
            port, admin_port = free_port(0, taken), free_port(0, taken)
            config = self.folder / "upstream.json"
            config.write_text(json.dumps(upstream_config(port, admin_port)), encoding="utf-8")
            self.upstream = Child("the upstream", envoy_line(config, self.workers), self.folder / "upstream.log")
            self.upstream.start()
            upstream = self.upstream
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/"), "it answered", [upstream])
            for name in self.names:
                self._add(name, port, taken)
        except DemoError as error:
            self.close()
            raise HostError(str(error)) from error
        except BaseException:
            self.close()
            raise
        return self

    def _add(self, name: str, port: int, taken: set[int]) -> None:
        host = None
        try:
            host = make_host(name, self.folder / name, port, taken, self.workers, self.over)
            self.hosts.append(host)
            host.start()
        except HostError as error:
            if host is not None:
                host.stop()
                self.hosts.remove(host)
            if name in self.required:
                raise HostError(f"{name}: {error}") from error
            self.missing[name] = str(error)

    def pids(self) -> list[int]:
        ours = [self.upstream.pid] if self.upstream is not None and self.upstream.process is not None else []
        return [*ours, *(pid for host in self.hosts for pid in host.pids())]

    def close(self) -> None:
        for host in self.hosts:  # all are told before any is waited for: sidecars drain for seconds
            host.tell_to_stop()
        for host in self.hosts:
            host.stop()
        if self.upstream is not None:
            self.upstream.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_host(
    name: str, folder: Path, upstream_port: int, taken: set[int], workers: int, over: dict[str, Any] | None = None
) -> Host:
    """Not started yet. HostError, DemoError."""
    kind = NginxHost if is_nginx(name) else EnvoyHost
    return kind(name, folder, upstream_port, taken, workers, over)
