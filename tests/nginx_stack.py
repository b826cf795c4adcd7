"""Demo API, sidecar and a real NGINX with Outrider's module as one thing to enter and leave."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from sidecar.demo.envoy import DemoError
from sidecar.demo.stack import SETTINGS as DEMO_SETTINGS
from sidecar.demo.stack import make_folder, merge
from sidecar.demo.supervisor import Child, answers, free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
START_TIMEOUT_S = 20.0
SANITIZED = os.environ.get("OUTRIDER_SANITIZE") == "1"  # the module with sanitizers, whose runtime NGINX then needs
VARIABLES = ("action", "enforced", "mode", "score", "id", "route", "reasons", "place", "us")

PROXIED = """
proxy_pass http://api;
proxy_http_version 1.1;
proxy_set_header Connection "";
proxy_set_header Host $host;
"""


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def sanitizer_env(logs: Path) -> dict[str, str]:
    """What NGINX needs in its environment to load a sanitized module; reports go to files in that folder."""
    if not SANITIZED:
        return {}
    line = ["gcc", "-print-file-name=libasan.so"]
    return {
        "LD_PRELOAD": subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip(),
        # NGINX frees nothing at its end
        "ASAN_OPTIONS": f"detect_leaks=0:handle_segv=0:log_path={logs / 'asan'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={logs / 'ubsan'}",
    }


class NginxStack:
    """NGINX on ports["nginx"] (HTTP/1) and ports["h2"] (HTTP/2 without TLS) before the demo API.

    module: the built module; settings: laid over the demo's outrider.yaml; failure: None leaves the directive out;
    main, http and server: more directives for these blocks; root: those of location /, proxied to the API by default.
    The client is who X-Forwarded-For says. `with_sidecar`: whether start() starts the sidecar. The folder with
    configurations, logs and arena is removed on leaving, unless an error ended the block or `keep` is set.
    """

    def __init__(
        self,
        module: Path,
        settings: dict[str, Any] | None = None,
        failure: str | None = "open",
        main: str = "",
        http: str = "",
        server: str = "",
        root: str = PROXIED,
        with_sidecar: bool = True,
        keep: bool = False,
    ) -> None:
        self.folder = make_folder()
        self.keep, self.with_sidecar = keep, with_sidecar
        self.logs = self.folder / "logs"
        self.logs.mkdir()
        taken: set[int] = set()
        self.ports = {name: free_port(0, taken) for name in ("nginx", "h2", "api", "admin")}
        self.socket = self.folder / "outrider.sock"
        self.arena = self.folder / "arena"
        self.settings_file = self.folder / "outrider.yaml"
        self.config = self.folder / "nginx.conf"
        self.decisions = self.logs / "decisions.jsonl"
        self.access_log = self.logs / "access.jsonl"
        self.error_log = self.logs / "nginx.log"
        self.module, self.failure = module, failure
        self.main, self.http, self.server, self.root = main, http, server, root
        self.write_settings(settings or {})
        self.write_config()
        python = [sys.executable, "-m"]
        self.api = Child(
            "the demo API", [*python, "sidecar.demo.api", "--port", str(self.ports["api"])], self.logs / "api.log"
        )
        self.sidecar = Child(
            "the sidecar",
            [*python, "sidecar.cli", "serve", "-c", str(self.settings_file)],
            self.logs / "sidecar.log",
        )
        self.nginx = Child("NGINX", [nginx_binary(), *self.arguments()], self.logs / "nginx-start.log")
        self.nginx.env |= sanitizer_env(self.logs)
        for child in (self.api, self.sidecar):
            child.env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)

    def arguments(self) -> list[str]:
        return ["-p", str(self.folder), "-c", str(self.config), "-e", str(self.error_log)]

    @property
    def port(self) -> int:
        """Where requests go in."""
        return self.ports["nginx"]

    @property
    def proxy(self) -> Child:
        return self.nginx

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['nginx']}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['admin']}"

    def write_settings(self, over: dict[str, Any]) -> None:
        """(Re)write outrider.yaml in one step: the demo's, with `over` laid on top."""
        base = yaml.safe_load(DEMO_SETTINGS.read_text(encoding="utf-8"))
        own = {
            "listen": {"address": f"unix:{self.socket}"},
            "admin": {"address": f"127.0.0.1:{self.ports['admin']}"},
            "arena": {"path": str(self.arena)},
            "decision_log": {"path": str(self.decisions)},
        }
        fresh = self.settings_file.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(merge(merge(base, own), over), sort_keys=False), encoding="utf-8")
        fresh.replace(self.settings_file)

    def write_config(self) -> None:
        """(Re)write nginx.conf from what is set."""
        # workers of root's become another user, who may not open the arena; nobody else can choose one
        user = "user root;" if os.geteuid() == 0 else ""
        temporary = "\n".join(f"{name}_temp_path {self.folder / name};" for name in TEMPORARY)
        failure = f"outrider_failure {self.failure};" if self.failure else ""
        fields = ", ".join(f'"{name}": "$outrider_{name}"' for name in VARIABLES)
        line = f'{{"status": "$status", "method": "$request_method", "path": "$request_uri", {fields}}}'
        self.config.write_text(
            f"""
load_module {self.module};
{user}
worker_processes 1;
daemon off;
pid {self.folder / "nginx.pid"};
error_log {self.error_log} notice;
{self.main}
events {{ worker_connections 512; }}
http {{
{temporary}
log_format decisions escape=json '{line}';
access_log {self.access_log} decisions;
set_real_ip_from 127.0.0.1;
real_ip_header X-Forwarded-For;
client_max_body_size 64m;
outrider_arena {self.arena};
{failure}
upstream api {{ server 127.0.0.1:{self.ports["api"]}; }}
{self.http}
server {{
    listen 127.0.0.1:{self.ports["nginx"]};
    listen 127.0.0.1:{self.ports["h2"]} http2;
    outrider on;
    {self.server}
    location / {{ {self.root} }}
}}
}}
""",
            encoding="utf-8",
        )

    def start_sidecar(self) -> None:
        self.sidecar.start()
        wait_until(lambda: answers(self.admin_url + "/readyz"), "it was ready", [self.sidecar])

    def start_nginx(self) -> None:
        self.nginx.start()
        wait_until(lambda: listening(self.ports["nginx"]), "it listened", [self.nginx], START_TIMEOUT_S)

    def start(self) -> None:
        """DemoError, with everything ended, when one doesn't come up."""
        try:
            self.api.start()
            if self.with_sidecar:
                self.start_sidecar()
            wait_until(lambda: answers(f"http://127.0.0.1:{self.ports['api']}/"), "it answered", [self.api])
            self.start_nginx()
        except BaseException:
            self.keep = True
            self.stop()
            raise

    def workers(self) -> set[int]:
        """The process ids of NGINX's workers, old ones that are ending included."""
        text = Path(f"/proc/{self.nginx.pid}/task/{self.nginx.pid}/children").read_text(encoding="ascii")
        return {int(pid) for pid in text.split()}

    def reload(self) -> None:
        """Rewrite nginx.conf and have NGINX follow it; returns when only new workers are there. DemoError when
        NGINX keeps the old one."""
        old = self.workers()
        self.write_config()
        os.kill(self.nginx.pid, signal.SIGHUP)
        wait_until(
            lambda: bool(self.workers()) and not self.workers() & old,
            "it had new workers",
            [self.nginx],
            START_TIMEOUT_S,
        )

    def stop(self) -> None:
        for child in (self.nginx, self.sidecar, self.api):
            child.stop()
        reports = [path.read_text(errors="replace") for path in self.logs.glob("*san.*")]
        assert not reports, reports[0]
        if self.keep:
            self.arena.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, (KeyboardInterrupt, SystemExit)):
            self.keep = True
        self.stop()


def nginx_binary() -> str:
    """DemoError where NGINX isn't installed."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise DemoError("NGINX isn't installed (Debian: apt-get install nginx nginx-dev)")
    return found
