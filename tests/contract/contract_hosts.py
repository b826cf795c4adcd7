"""The proxies that the contract suite runs on, and the Python host beside them."""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
from nginx_stack import NginxStack, nginx_binary
from proxy_harness import FRIEND, ask_port, raw_port

from sidecar import plugins
from sidecar.demo.envoy import DemoError, find_envoy
from sidecar.demo.stack import Stack
from sidecar.demo.supervisor import Child
from sidecar.demo.traffic import Reply

PROXIES = ("ext_proc", "envoy_plugin", "nginx_plugin")
SANITIZE = "OUTRIDER_SANITIZE_REPORTS"  # names a folder: NGINX's module is built and run with sanitizers
MARKER = "zqxjvkwyzqxjvkwyzqxjvkwy"


class ProxyStack(Protocol):
    """Demo API, sidecar and proxy, whichever."""

    folder: Path
    ports: dict[str, int]
    arena: Path
    decisions: Path
    access_log: Path
    sidecar: Child

    @property
    def port(self) -> int: ...

    @property
    def proxy(self) -> Child: ...

    @property
    def admin_url(self) -> str: ...

    def write_settings(self, over: dict[str, Any]) -> None: ...

    def start_sidecar(self) -> None: ...


def sanitizers(reports: Path) -> dict[str, str]:
    """The environment under which a proxy takes a module with sanitizers; what they find is written to files there."""

    def runtime(name: str) -> str:
        done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports / 'asan'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={reports / 'ubsan'}",
    }


def require(kind: str) -> None:
    """Skip where what this proxy needs isn't installed."""
    try:
        if kind == "nginx_plugin":
            nginx_binary()
            plugins.nginx_source()
        else:
            find_envoy()
        if kind != "ext_proc":
            plugins.compiler()
            plugins.cython_version()
    except (DemoError, plugins.PluginError) as error:
        pytest.skip(str(error))


def start(
    kind: str, settings: dict[str, Any], failure: str = "open", **more: Any
) -> AbstractContextManager[ProxyStack]:
    """A stack of this kind, to be entered. more: of the stack's own class."""
    require(kind)
    stack: Any
    if kind == "nginx_plugin":
        reports = os.environ.get(SANITIZE)
        stack = NginxStack(plugins.build("nginx", sanitize=bool(reports)), settings, failure=failure, **more)
        if reports:
            stack.nginx.env |= sanitizers(Path(reports))
    else:
        plan = {"failure_open": failure == "open", **more.pop("plan", {})}
        stack = Stack(settings, plan, fixed_ports=False, plugin=kind == "envoy_plugin", **more)
    return cast("AbstractContextManager[ProxyStack]", stack)


def ask(
    stack: ProxyStack,
    target: str = "/",
    client: str = FRIEND,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    return ask_port(stack.port, target, client, method, body, headers)


def raw(stack: ProxyStack, data: bytes, timeout_s: float = 10.0, end: bool = False) -> bytes:
    return raw_port(stack.port, data, timeout_s, end)
