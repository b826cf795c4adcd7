"""What is measured, started on loopback: an upstream, and hosts, each a proxy with what stands behind it. Here: what
all hosts have, and those of Envoy; those of NGINX are in nginx_hosts, and rig starts and ends all.

* The **upstream** is an Envoy that answers from its configuration, once it has the whole body: a real hop over TCP
  that is never the bottleneck.
* Each **host** has a proxy process of its own, so that all are up at once and slices can alternate; idle ones cost
  nothing. Envoy has the shipped envoy.yaml. Changed against it: ports, no access log (it would be most of
  what bare Envoy does), HTTP/2 clients may have 1,024 streams (the open loop must not wait for one), and
  message_timeout is 1 s, so that an overloaded sidecar shows in the latency and not as requests let through. The
  plugin's filter stands where ext_proc stood: what else is in the chain is the same in all.
* The **client's address**: neither generator can vary it, and one address that sends 10,000 requests/s is a flood.
  So in every host, the bare one too, Envoy writes a random one of 4,096 into `x-bench-client`, and the sidecar is
  told to read it there (client.address_header). All detectors and models stay on. (NGINX's module reads headers as
  the client sent them: there the requests bring their address along, see traffic.addressed.)
* The **sidecar** has default settings but for a budget of 20 ms from which nothing is skipped: every request is
  scored in full, or its overrun counted. The empty server and the native transport have as many threads as Envoy
  has workers (a worker's connection belongs to one thread). Beside a plugin it decides nothing: it owns the arena.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sidecar import plugins
from sidecar.config import ConfigError, loads
from sidecar.demo.envoy import DemoError, EnvoyPlan, filters, find_envoy, render, write_config
from sidecar.demo.stack import envoy_stats, merge
from sidecar.demo.supervisor import Child, answers, free_port, wait_until

ROOT = Path(__file__).resolve().parents[1]
NULL_SOURCE = Path(__file__).with_name("null_ext_proc.c")
EXT_PROC, PLUGIN = "envoy.filters.http.ext_proc", "outrider"  # filters' names
CLIENT_HEADER = "x-bench-client"
HOSTS = {
    "bare": "Envoy alone",
    "null_native": "Envoy + an empty ext_proc server in C (the floor)",
    "native": "Envoy + Outrider, native transport",
    "grpcio": "Envoy + Outrider, grpcio transport",
    "envoy_plugin": "Envoy + Outrider inside it",
    "nginx_bare": "NGINX alone",
    "nginx_plugin": "NGINX + Outrider inside it",
    "nginx_auth_request": "NGINX + Outrider asked by auth_request (headers only)",
    "nginx_modsecurity": "NGINX + ModSecurity with the OWASP CRS",
}
OUTRIDER = ("native", "grpcio", "envoy_plugin", "nginx_plugin", "nginx_auth_request")
PLUGINS = ("envoy_plugin", "nginx_plugin")
ANSWER = '{"status":"ok","items":[{"id":17,"title":"oak chair"},{"id":18,"title":"brass lamp"}]}\n'
HEALTHY_S = 20.0


class HostError(Exception):
    """A host can't be measured here; the text says why and what to do."""


def transport(host: str) -> str:
    """The word for `listen.transport`. HostError where this build has no such transport."""
    if host == "native" and importlib.util.find_spec("native.http2") is None:
        raise HostError("native.http2 isn't built (libnghttp2-dev was missing when Outrider was built)")
    return host


def is_nginx(host: str) -> bool:
    return host.startswith("nginx_")


def base_of(host: str) -> str:
    """The host that it is compared with: its own proxy alone."""
    return "nginx_bare" if is_nginx(host) else "bare"


def build_null(cache: Path | None = None) -> Path:
    """The empty server, compiled once per source into the cache. HostError where it can't be."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise HostError("the empty server needs a C compiler (Debian: apt-get install gcc libc6-dev libnghttp2-dev)")
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider" / "bench"
    digest = hashlib.sha256(NULL_SOURCE.read_bytes()).hexdigest()[:16]
    program = folder / f"null_ext_proc-{digest}"
    if os.access(program, os.X_OK):
        return program
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    except OSError as error:
        raise HostError(f"can't write to {folder}: {error.strerror}") from error
    try:
        line = [compiler, "-O2", "-o", str(fresh / "program"), str(NULL_SOURCE), "-lnghttp2", "-lpthread"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            hint = "apt-get install libnghttp2-dev" if "nghttp2" in done.stderr else "see above"
            raise HostError(f"the empty server doesn't compile (Debian: {hint}):\n{done.stderr[-1500:]}")
        (fresh / "program").replace(program)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return program


def upstream_config(port: int, admin_port: int) -> dict[str, Any]:
    types = "type.googleapis.com/envoy.extensions.filters"
    http = [
        # without it Envoy answers before it has read the body, and closes the connection
        {
            "name": "envoy.filters.http.buffer",
            "typed_config": {"@type": f"{types}.http.buffer.v3.Buffer", "max_request_bytes": 1 << 20},
        },
        {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{types}.http.router.v3.Router"}},
    ]
    answer = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 200, "body": {"inline_string": ANSWER}},
        "response_headers_to_add": [
            {
                "header": {"key": "content-type", "value": "application/json"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
    }
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "upstream",
        "generate_request_id": False,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [answer]}]},
        "http_filters": http,
    }
    listener = {
        "name": "upstream",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}},
        "static_resources": {"listeners": [listener]},
    }


def proxy_config(plan: EnvoyPlan, asks: str = "ext_proc") -> dict[str, Any]:
    """The shipped configuration as changed for measuring (see the module). asks: "ext_proc"; "plugin", by the arena of
    the plan; "nobody", the bare one."""
    config = render(replace(plan, arena=None))
    found = filters(config)
    hcm = found["hcm"]
    del hcm["access_log"]
    hcm["http2_protocol_options"]["max_concurrent_streams"] = 1024
    address = {"key": CLIENT_HEADER, "value": "2001:db8:%REQ(X-REQUEST-ID):3%::1"}
    found["envoy.filters.http.header_mutation"]["mutations"]["request_mutations"].append(
        {"append": {"header": address, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    )
    if asks != "ext_proc":
        instead = [{"name": PLUGIN, "typed_config": filters(render(plan))[PLUGIN]}] if asks == "plugin" else []
        chain = hcm["http_filters"]
        at = [f["name"] for f in chain].index(EXT_PROC)
        hcm["http_filters"] = [*chain[:at], *instead, *chain[at + 1 :]]
        resources = config["static_resources"]
        resources["clusters"] = [c for c in resources["clusters"] if c["name"] != "outrider"]
    return config


def sidecar_settings(
    host: str, folder: Path, admin_port: int, workers: int = 1, over: dict[str, Any] | None = None
) -> dict[str, Any]:
    """HostError where this build can't serve such a host."""
    listen: dict[str, Any] = {"address": f"unix:{folder / 'ext_proc.sock'}"}
    if host == "nginx_auth_request":
        listen["auth_request"] = f"unix:{folder / 'auth_request.sock'}"
    elif host not in PLUGINS:
        listen["transport"] = transport(host)
    if listen.get("transport") == "native":
        listen["threads"] = workers  # as many as the empty server has
    base: dict[str, Any] = {
        "service": {"name": "bench", "mode": "enforce", "failure": "open"},
        "listen": listen,
        "admin": {"address": f"127.0.0.1:{admin_port}"},
        "arena": {"path": str(folder / "arena"), "clients": 16384},
        "judge": {"enabled": False},  # measured by itself: judge_latency.py
        "client": {"address_header": CLIENT_HEADER},
        "latency": {"budget": "20ms", "skip": []},
        "log": {"level": "warning", "format": "text"},
    }
    wanted = merge(base, over or {})
    try:
        loads(yaml.safe_dump(wanted))
    except ConfigError as error:
        raise HostError(f"this build of Outrider refuses its settings: {error}") from error
    return wanted


def plugin(kind: str) -> Path:
    """The built module. HostError where it can't be built."""
    try:
        return plugins.build(kind)
    except plugins.PluginError as error:
        raise HostError(str(error)) from error


@dataclass
class Counts:
    """What one host's sidecar and proxy have counted so far; differences of two are what a slice did."""

    judged: int = 0  # requests that Outrider decided
    refused: int = 0  # of them throttled, challenged or blocked
    tagged: int = 0
    skipped: int = 0  # stages left out
    unjudged: int = 0  # let through because ext_proc failed, or the plugin had no policy to decide with

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Host:
    """A proxy and what stands behind it; the proxy itself comes with the classes made from this one."""

    opens = True  # whether the open loop can be put to it
    proxy: Child

    def __init__(self, name: str, folder: Path, taken: set[int], workers: int, over: dict[str, Any] | None) -> None:
        self.name, self.folder, self.workers = name, folder, workers
        folder.mkdir()
        self.port, admin = free_port(0, taken), free_port(0, taken)
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin = f"http://127.0.0.1:{admin}"
        self.socket = folder / "ext_proc.sock"
        self.arena = folder / "arena"
        self.sidecar: Child | None = None
        if self.is_outrider:
            settings = folder / "outrider.yaml"
            wanted = sidecar_settings(name, folder, admin, workers, over)
            settings.write_text(yaml.safe_dump(wanted), encoding="utf-8")
            line = [sys.executable, "-m", "sidecar.cli", "serve", "-c", str(settings)]
            self.sidecar = Child(f"the sidecar ({name})", line, folder / "sidecar.log")
            paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
            self.sidecar.env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    @property
    def is_outrider(self) -> bool:
        return self.name in OUTRIDER

    def start(self) -> None:
        """HostError with the log's end when it doesn't come up."""
        try:
            if self.sidecar is not None:
                self.sidecar.start()
                ready = (lambda: answers(self.admin + "/readyz")) if self.is_outrider else self.socket.exists
                wait_until(ready, "it was ready", [self.sidecar])
            self.start_proxy()
            if self.is_outrider:
                children = [c for c in (self.proxy, self.sidecar) if c is not None]
                wait_until(self._judges, "Outrider was asked", children, HEALTHY_S)
        except DemoError as error:
            raise HostError(str(error)) from error

    def start_proxy(self) -> None:
        raise NotImplementedError

    def _judges(self) -> bool:
        """Whether Outrider hears of a request that is sent now."""
        before = self.counts().judged
        return answers(self.url + "/") and self.counts().judged > before

    def proxy_pids(self) -> list[int]:
        """The processes whose CPU is the proxy's."""
        return [self.proxy.pid]

    def handled(self) -> int | None:
        """Requests that the proxy has taken up so far, those whose client went away included; None where it doesn't
        tell without work of its own."""
        return None

    def pids(self) -> list[int]:
        started = self.proxy_pids() if self.proxy.process is not None else []
        return [*started, *([self.sidecar.pid] if self.sidecar is not None and self.sidecar.process else [])]

    def version(self) -> str:
        """The proxy's."""
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        """What else a report says about it."""
        return {}

    def counts(self) -> Counts:
        out = Counts()
        if self.is_outrider:
            metrics = self.metrics()
            out.judged = metrics.get("outrider_requests_total", 0)
            for action in ("throttle", "challenge", "block"):
                out.refused += metrics.get(f'outrider_enforced_total{{action="{action}"}}', 0)
            out.tagged = metrics.get('outrider_enforced_total{action="tag"}', 0)
            out.skipped = sum(n for name, n in metrics.items() if name.startswith("outrider_stages_skipped_total"))
            out.unjudged = sum(n for name, n in metrics.items() if name.startswith("outrider_unjudged_total"))
        return out

    def metrics(self) -> dict[str, int]:
        """The sidecar's counters by name with labels; empty when it doesn't answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.admin + "/metrics", timeout=5) as response:
                text = response.read(4 << 20).decode("utf-8", "replace")
        except OSError:
            return {}
        out = {}
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name and not line.startswith("#"):
                with contextlib.suppress(ValueError, OverflowError):
                    out[name] = int(float(value))
        return out

    def dead(self) -> Child | None:
        """The first of its processes that has ended."""
        children = [c for c in (self.sidecar, self.proxy) if c is not None]
        return next((c for c in children if c.process is not None and not c.running()), None)

    def tell_to_stop(self) -> None:
        for child in (self.proxy, self.sidecar):
            if child is not None and child.process is not None and child.running():
                child.process.terminate()

    def stop(self) -> None:
        self.proxy.stop()
        if self.sidecar is not None:
            self.sidecar.stop()


class EnvoyHost(Host):
    """Envoy, alone, with an ext_proc server behind it, or with Outrider inside.

    change: what else is done to its configuration before it starts."""

    def __init__(
        self,
        name: str,
        folder: Path,
        upstream_port: int,
        taken: set[int],
        workers: int,
        over: dict[str, Any] | None = None,
        change: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        super().__init__(name, folder, taken, workers, over)
        envoy_admin = free_port(0, taken)
        self.envoy_admin = f"http://127.0.0.1:{envoy_admin}"
        if name == "null_native":
            line = [str(build_null()), str(self.socket), str(workers)]
            self.sidecar = Child("the empty ext_proc server", line, folder / "sidecar.log")
        is_plugin = name in PLUGINS
        plan = EnvoyPlan(
            port=self.port,
            admin_port=envoy_admin,
            api_port=upstream_port,
            socket=self.socket,
            access_log=folder / "none",
            arena=self.arena if is_plugin else None,
        )
        env = {"ENVOY_DYNAMIC_MODULES_SEARCH_PATH": str(plugin("envoy").parent)} if is_plugin else None
        config = proxy_config(plan, "plugin" if is_plugin else "nobody" if name == "bare" else "ext_proc")
        if change is not None:
            change(config)
        path = write_config(plan, folder / "envoy.json", config)
        self.proxy = Child(f"Envoy ({name})", envoy_line(path, workers), folder / "envoy.log", env)

    def start_proxy(self) -> None:
        self.proxy.start()
        wait_until(lambda: answers(self.envoy_admin + "/ready"), "it was ready", [self.proxy])
        if self.sidecar is not None and self.name not in PLUGINS:
            wait_until(self._healthy, "Envoy saw the ext_proc server", [self.proxy, self.sidecar], HEALTHY_S)

    def _healthy(self) -> bool:
        return envoy_stats(self.envoy_admin).get("cluster.outrider.membership_healthy", 0) >= 1

    def version(self) -> str:
        return envoy_version()

    def counts(self) -> Counts:
        out = super().counts()
        if self.sidecar is not None and self.name not in PLUGINS:
            stats = envoy_stats(self.envoy_admin)
            out.unjudged = sum(n for name, n in stats.items() if name.endswith("failure_mode_allowed"))
        return out


def envoy_line(config: Path, workers: int) -> list[str]:
    line = [str(find_envoy()), "-c", str(config), "--disable-hot-restart"]
    return [*line, "--concurrency", str(workers), "-l", "error"]


def envoy_version() -> str:
    done = subprocess.run([str(find_envoy()), "--version"], capture_output=True, text=True, timeout=30, check=False)
    parts = done.stdout.strip().rpartition("version:")[2].split("/")
    return f"envoy {parts[1]}" if len(parts) > 2 else "envoy (version unknown)"
