"""The demo's three processes as one thing to enter and leave."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from sidecar.demo.envoy import DemoError, EnvoyPlan, arguments, render, write_config
from sidecar.demo.supervisor import Child, answers, free_port, wait_until
from sidecar.memory import memory_folder
from sidecar.plugins import build

SETTINGS = Path(__file__).with_name("outrider.yaml")
SOCKET_PATH_MAX = 107  # bytes, sun_path less its terminator
PORTS = {"envoy": 10000, "envoy_admin": 9903, "admin": 9902, "api": 8080}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A copy of base in which mappings are merged key by key and everything else is replaced."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = copy.deepcopy(value)
    return out


ROOM_BYTES = 160 << 20  # arena, logs


def make_folder() -> Path:
    """A new private folder, in memory where possible (the arena lives there), with a path short enough
    for a UNIX socket; under $OUTRIDER_RUN_DIR where that is set. DemoError where there is no place."""
    chosen = os.environ.get("OUTRIDER_RUN_DIR")
    places = [chosen] if chosen else [memory_folder(ROOM_BYTES), tempfile.gettempdir(), "/tmp"]
    for place in places:
        if os.access(place, os.W_OK | os.X_OK) and len(place) + 40 < SOCKET_PATH_MAX:
            try:
                return Path(tempfile.mkdtemp(prefix="outrider-", dir=place))
            except OSError:
                continue
    raise DemoError(f"no folder to write to: tried {', '.join(places)}")


class Stack:
    """Demo API, sidecar and Envoy on loopback.

    settings: laid over the demo's outrider.yaml; plan: fields of EnvoyPlan to change; plugin: Outrider inside Envoy,
    and not behind ext_proc. The folder with
    configurations, logs, socket and arena is removed on leaving unless `keep` is set or an error ended
    the block.
    """

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        keep: bool = False,
        fixed_ports: bool = True,
        plugin: bool = False,
    ) -> None:
        library = build("envoy") if plugin else None
        self.folder = make_folder()
        self.keep = keep
        self.logs = self.folder / "logs"
        self.logs.mkdir()
        taken: set[int] = set()
        self.ports = {name: free_port(port if fixed_ports else 0, taken) for name, port in PORTS.items()}
        self.socket = self.folder / "outrider.sock"
        self.arena = self.folder / "arena"
        self.settings_file = self.folder / "outrider.yaml"
        self.decisions = self.logs / "decisions.jsonl"
        self.access_log = self.logs / "access.jsonl"
        self.plan = replace(
            EnvoyPlan(
                port=self.ports["envoy"],
                admin_port=self.ports["envoy_admin"],
                api_port=self.ports["api"],
                socket=self.socket,
                access_log=self.access_log,
            ),
            **(plan or {}),
        )
        if library is not None:
            self.plan = replace(self.plan, arena=self.arena)
        self.write_settings(settings or {})
        envoy_config = write_config(self.plan, self.folder / "envoy.json", render(self.plan))
        python = [sys.executable, "-m"]
        self.api = Child(
            "the demo API",
            [*python, "sidecar.demo.api", "--port", str(self.ports["api"])],
            self.logs / "api.log",
        )
        self.sidecar = Child(
            "the sidecar",
            [*python, "sidecar.cli", "serve", "-c", str(self.settings_file)],
            self.logs / "sidecar.log",
        )
        self.envoy = Child("Envoy", arguments(envoy_config), self.logs / "envoy.log")
        if library is not None:
            self.envoy.env["ENVOY_DYNAMIC_MODULES_SEARCH_PATH"] = str(library.parent)
        self.children = [self.api, self.sidecar, self.envoy]
        root = str(Path(__file__).resolve().parents[2])
        for child in (self.api, self.sidecar):
            # the checkout first, also when the demo is started from elsewhere
            child.env["PYTHONPATH"] = os.pathsep.join(
                p for p in (root, os.environ.get("PYTHONPATH", "")) if p
            )

    @property
    def port(self) -> int:
        """Where requests go in."""
        return self.ports["envoy"]

    @property
    def proxy(self) -> Child:
        return self.envoy

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['envoy']}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['admin']}"

    @property
    def envoy_admin_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['envoy_admin']}"

    def write_settings(self, over: dict[str, Any]) -> None:
        """(Re)write outrider.yaml: the demo's, with `over` laid on top. Replaced in one step, as the
        sidecar may be watching it."""
        base = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
        own = {
            "listen": {"address": f"unix:{self.socket}"},
            "admin": {"address": f"127.0.0.1:{self.ports['admin']}"},
            "arena": {"path": str(self.arena)},
            "decision_log": {"path": str(self.decisions)},
        }
        fresh = self.settings_file.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(merge(merge(base, own), over), sort_keys=False), encoding="utf-8")
        fresh.replace(self.settings_file)

    def start_sidecar(self) -> None:
        self.sidecar.start()
        wait_until(lambda: answers(self.admin_url + "/readyz"), "it was ready", [self.sidecar])

    def wait_for_envoy(self, healthy: bool = True) -> None:
        """Until Envoy's health check sees the sidecar as up (or down). A module asks nobody."""
        if self.plan.arena is not None:
            return
        wait_until(
            lambda: self.envoy_sees_sidecar() is healthy,
            f"Envoy saw the sidecar as {'up' if healthy else 'down'}",
            [self.envoy],
            20.0,
        )

    def envoy_sees_sidecar(self) -> bool:
        return envoy_stats(self.envoy_admin_url).get("cluster.outrider.membership_healthy", 0) >= 1

    def start(self) -> None:
        """Start all three and wait until a request would be decided. DemoError, with everything ended,
        when one doesn't come up."""
        try:
            self.api.start()
            self.start_sidecar()
            wait_until(lambda: answers(f"http://127.0.0.1:{self.ports['api']}/"), "it answered", [self.api])
            self.envoy.start()
            wait_until(lambda: answers(self.envoy_admin_url + "/ready"), "it was ready", [self.envoy])
            self.wait_for_envoy()
        except BaseException:
            self.keep = True
            self.stop()
            raise

    def stop(self) -> None:
        """End the children, the proxy first so that nothing is left asking."""
        for child in reversed(self.children):
            child.stop()
        if self.keep:
            self.arena.unlink(missing_ok=True)  # it is in memory, and nothing a person reads
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def dead(self) -> Child | None:
        """A child that ended by itself, if any."""
        return next((c for c in self.children if c.process is not None and not c.running()), None)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, (KeyboardInterrupt, SystemExit)):
            self.keep = True
        self.stop()


def envoy_stats(admin_url: str, everything: bool = False) -> dict[str, int]:
    """Envoy's counters and gauges by name, those that were ever used or all; empty when it doesn't answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(admin_url + ("/stats" if everything else "/stats?usedonly"), timeout=2) as response:
            lines = response.read(1 << 20).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    out = {}
    for line in lines:
        name, _, value = line.rpartition(": ")
        if value.isdigit():
            out[name] = int(value)
    return out
