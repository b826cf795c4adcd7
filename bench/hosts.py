"""What is measured, started on loopback: an upstream, and for each host an Envoy with what stands behind it.

* The **upstream** is a second Envoy that answers from its configuration, once it has the whole body: a real hop over
  TCP that is never the bottleneck.
* Each **host** has an Envoy process of its own with the shipped envoy.yaml, so that all are up at once and slices can
  alternate; idle ones cost nothing. Changed against the shipped file: ports, no access log (it would be most of
  what bare Envoy does), HTTP/2 clients may have 1,024 streams (the open loop must not wait for one), and
  message_timeout is 1 s, so that an overloaded sidecar shows in the latency and not as requests let through.
* The **client's address**: neither generator can vary it, and one address that sends 10,000 requests/s is a flood.
  So in every host, the bare one too, Envoy writes a random one of 4,096 into `x-bench-client`, and the sidecar is
  told to read it there (client.address_header). All detectors and models stay on.
* The **sidecar** has default settings but for a budget of 20 ms from which nothing is skipped: every request is
  scored in full, or its overrun counted. The empty server and the native transport have as many threads as Envoy
  has workers (a worker's connection belongs to one thread).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from sidecar.demo.envoy import DemoError, EnvoyPlan, filters, find_envoy, render, write_config
from sidecar.demo.stack import envoy_stats, make_folder, merge
from sidecar.demo.supervisor import Child, answers, free_port, wait_until

ROOT = Path(__file__).resolve().parents[1]
NULL_SOURCE = Path(__file__).with_name("null_ext_proc.c")
EXT_PROC = "envoy.filters.http.ext_proc"
CLIENT_HEADER = "x-bench-client"
CLIENTS = 4096  # three hexadecimal digits of the request id
HOSTS = {
    "bare": "Envoy alone",
    "null_native": "Envoy + an empty ext_proc server in C (the floor)",
    "native": "Envoy + Outrider, native transport",
    "grpcio": "Envoy + Outrider, grpcio transport",
}
ANSWER = '{"status":"ok","items":[{"id":17,"title":"oak chair"},{"id":18,"title":"brass lamp"}]}\n'
HEALTHY_S = 20.0


class HostError(Exception):
    """A host can't be measured here; the text says why and what to do."""


def transport(host: str) -> str:
    """The word for `listen.transport`. HostError where this build has no such transport."""
    if host == "native" and importlib.util.find_spec("native.http2") is None:
        raise HostError("native.http2 isn't built (libnghttp2-dev was missing when Outrider was built)")
    return host


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


def proxy_config(plan: EnvoyPlan, ext_proc: bool) -> dict[str, Any]:
    """The shipped configuration as changed for measuring (see the module); without ext_proc, the bare one."""
    config = render(plan)
    found = filters(config)
    hcm = found["hcm"]
    del hcm["access_log"]
    hcm["http2_protocol_options"]["max_concurrent_streams"] = 1024
    address = {"key": CLIENT_HEADER, "value": "2001:db8:%REQ(X-REQUEST-ID):3%::1"}
    found["envoy.filters.http.header_mutation"]["mutations"]["request_mutations"].append(
        {"append": {"header": address, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    )
    if not ext_proc:
        hcm["http_filters"] = [f for f in hcm["http_filters"] if f["name"] != EXT_PROC]
        resources = config["static_resources"]
        resources["clusters"] = [c for c in resources["clusters"] if c["name"] != "outrider"]
    return config


def sidecar_settings(
    host: str, folder: Path, admin_port: int, workers: int = 1, over: dict[str, Any] | None = None
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "service": {"name": "bench", "mode": "enforce", "failure": "open"},
        "listen": {"address": f"unix:{folder / 'ext_proc.sock'}", "transport": transport(host)},
        "admin": {"address": f"127.0.0.1:{admin_port}"},
        "arena": {"path": str(folder / "arena"), "clients": 16384},
        "client": {"address_header": CLIENT_HEADER},
        "latency": {"budget": "20ms", "skip": []},
        "log": {"level": "warning", "format": "text"},
    }
    if base["listen"]["transport"] == "native":
        base["listen"]["threads"] = workers  # as many as the empty server has
    return merge(base, over or {})


@dataclass
class Counts:
    """What one host's sidecar and proxy have counted so far; differences of two are what a slice did."""

    judged: int = 0  # requests that Outrider decided
    refused: int = 0  # of them throttled, challenged or blocked
    tagged: int = 0
    skipped: int = 0  # stages left out
    unjudged: int = 0  # let through by Envoy because ext_proc failed

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Host:
    """One Envoy and what stands behind it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        upstream_port: int,
        taken: set[int],
        workers: int,
        over: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.folder = name, folder
        folder.mkdir()
        self.port, envoy_admin, admin = (free_port(0, taken) for _ in range(3))
        self.url = f"http://127.0.0.1:{self.port}"
        self.envoy_admin = f"http://127.0.0.1:{envoy_admin}"
        self.admin = f"http://127.0.0.1:{admin}"
        socket = folder / "ext_proc.sock"
        self.sidecar: Child | None = None
        if name == "null_native":
            line = [str(build_null()), str(socket), str(workers)]
            self.sidecar = Child("the empty ext_proc server", line, folder / "sidecar.log")
        elif name != "bare":
            settings = folder / "outrider.yaml"
            wanted = sidecar_settings(name, folder, admin, workers, over)
            settings.write_text(yaml.safe_dump(wanted), encoding="utf-8")
            line = [sys.executable, "-m", "sidecar.cli", "serve", "-c", str(settings)]
            self.sidecar = Child(f"the sidecar ({name})", line, folder / "sidecar.log")
            paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
            self.sidecar.env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        plan = EnvoyPlan(
            port=self.port, admin_port=envoy_admin, api_port=upstream_port, socket=socket, access_log=folder / "none"
        )
        config = write_config(plan, folder / "envoy.json", proxy_config(plan, ext_proc=name != "bare"))
        self.envoy = Child(f"Envoy ({name})", envoy_line(config, workers), folder / "envoy.log")

    @property
    def is_outrider(self) -> bool:
        return self.name not in ("bare", "null_native")

    def start(self) -> None:
        """HostError with the log's end when it doesn't come up."""
        try:
            if self.sidecar is not None:
                self.sidecar.start()
                socket = self.folder / "ext_proc.sock"
                ready = (lambda: answers(self.admin + "/readyz")) if self.is_outrider else socket.exists
                wait_until(ready, "it was ready", [self.sidecar])
            self.envoy.start()
            wait_until(lambda: answers(self.envoy_admin + "/ready"), "it was ready", [self.envoy])
            if self.sidecar is not None:
                wait_until(self._healthy, "Envoy saw the ext_proc server", [self.envoy, self.sidecar], HEALTHY_S)
        except DemoError as error:
            raise HostError(str(error)) from error

    def _healthy(self) -> bool:
        return envoy_stats(self.envoy_admin).get("cluster.outrider.membership_healthy", 0) >= 1

    def counts(self) -> Counts:
        out = Counts()
        if self.sidecar is None:
            return out
        stats = envoy_stats(self.envoy_admin)
        out.unjudged = sum(n for name, n in stats.items() if name.endswith("failure_mode_allowed"))
        if self.is_outrider:
            metrics = self.metrics()
            out.judged = metrics.get("outrider_requests_total", 0)
            for action in ("throttle", "challenge", "block"):
                out.refused += metrics.get(f'outrider_enforced_total{{action="{action}"}}', 0)
            out.tagged = metrics.get('outrider_enforced_total{action="tag"}', 0)
            out.skipped = sum(n for name, n in metrics.items() if name.startswith("outrider_stages_skipped_total"))
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
        children = [c for c in (self.sidecar, self.envoy) if c is not None]
        return next((c for c in children if c.process is not None and not c.running()), None)

    def tell_to_stop(self) -> None:
        for child in (self.envoy, self.sidecar):
            if child is not None and child.process is not None and child.running():
                child.process.terminate()

    def stop(self) -> None:
        self.envoy.stop()
        if self.sidecar is not None:
            self.sidecar.stop()


def envoy_line(config: Path, workers: int) -> list[str]:
    line = [str(find_envoy()), "-c", str(config), "--disable-hot-restart"]
    return [*line, "--concurrency", str(workers), "-l", "error"]


def envoy_version() -> str:
    done = subprocess.run([str(find_envoy()), "--version"], capture_output=True, text=True, timeout=30, check=False)
    parts = done.stdout.strip().rpartition("version:")[2].split("/")
    return f"envoy {parts[1]}" if len(parts) > 2 else "envoy (version unknown)"


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
            host = Host(name, self.folder / name, port, taken, self.workers, self.over)
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
        children = [self.upstream, *(c for host in self.hosts for c in (host.envoy, host.sidecar))]
        return [c.pid for c in children if c is not None and c.process is not None]

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
