"""Hosts of NGINX: alone, with Outrider's module, with auth_request to the sidecar, and with ModSecurity and the OWASP
CRS, the peer.

* All have the same nginx.conf but for what asks: workers as wanted, no access log, kept connections to both sides that
  no count ends, bodies held before they are passed on (as is NGINX's default), in memory up to 64 KiB as in the shipped
  nginx.conf.
* The **peer** is Debian's: libnginx-mod-http-modsecurity with modsecurity-crs at paranoia level 1, its default
  thresholds, refusing what it finds. What costs and isn't judging is off: audit log, error log below `crit`, and
  response bodies, which Outrider doesn't read either. Its settings are here and not those in /etc, which may have been
  changed. A host of it starts only if it refuses SQL injection in a query and in a JSON body, and nothing harmless.
* Only the **closed loop** is put to them: h2load sends one set of headers per run, so one client's address.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from bench import measure
from bench.hosts import Host, HostError, plugin
from sidecar.demo.supervisor import Child, answers, free_port, wait_until

MODULE_PLACES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
MODSECURITY_MODULE = "ngx_http_modsecurity_module.so"
CRS_RULES = Path("/usr/share/modsecurity-crs/rules")
UNICODE_MAP = Path("/etc/nginx/unicode.mapping")
PEER_PACKAGES = "apt-get install libnginx-mod-http-modsecurity modsecurity-crs"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
CHECK_TIMEOUT_S = 60  # for nginx -t; ModSecurity compiles its rules
KEPT_FOREVER = 1_000_000_000  # requests on a connection; by default 1,000

PROXIED = """
        proxy_pass http://api;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;"""
ASKING = """
        location = /outrider {
            internal;
            proxy_pass http://outrider;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_pass_request_body off;
            proxy_set_header Content-Length "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Original-Method $request_method;
            proxy_set_header X-Original-URI $request_uri;
            proxy_set_header X-Real-IP $remote_addr;
        }"""


def find_nginx() -> str:
    """HostError where it isn't installed."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise HostError("NGINX isn't installed (Debian: apt-get install nginx)")
    return found


def nginx_version() -> str:
    done = subprocess.run([find_nginx(), "-v"], capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r"nginx/([\d.]+)", done.stderr)
    return f"nginx {found[1]}" if found else "nginx (version unknown)"


def modsecurity_module() -> Path:
    """HostError where it, or its rules, aren't installed."""
    found = [Path(place) / MODSECURITY_MODULE for place in MODULE_PLACES]
    module = next((path for path in found if path.is_file()), None)
    if module is None:
        raise HostError(f"ModSecurity's NGINX module isn't installed (Debian: {PEER_PACKAGES})")
    if not any(CRS_RULES.glob("REQUEST-942-*.conf")):
        raise HostError(f"the OWASP CRS isn't at {CRS_RULES} (Debian: {PEER_PACKAGES})")
    return module


def modsecurity_version() -> str:
    """Of the library, by its file's name."""
    found = [path.name for path in Path("/usr/lib").glob("*/libmodsecurity.so.3.*")]
    return f"ModSecurity {found[0].partition('.so.')[2]}" if len(found) == 1 else "ModSecurity (version unknown)"


def crs_version() -> str:
    text = (CRS_RULES / "REQUEST-901-INITIALIZATION.conf").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"ver\.(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def modsecurity_rules(folder: Path) -> str:
    """ModSecurity's own settings and the CRS with its defaults: paranoia level 1, an anomaly score of 5 refuses."""
    setup = crs_version().replace(".", "") if crs_version() != "unknown" else "300"
    codes = f"SecUnicodeMapFile {UNICODE_MAP} 20127" if UNICODE_MAP.is_file() else ""
    return f"""
SecRuleEngine On
SecRequestBodyAccess On
SecRequestBodyLimit 13107200
SecRequestBodyNoFilesLimit 131072
SecResponseBodyAccess Off
SecAuditEngine Off
SecStatusEngine Off
SecTmpDir {folder}
SecDataDir {folder}
SecPcreMatchLimit 1000
SecPcreMatchLimitRecursion 1000
{codes}
SecRule REQUEST_HEADERS:Content-Type "@rx ^application/json" \\
    "id:200001,phase:1,t:none,t:lowercase,pass,nolog,ctl:requestBodyProcessor=JSON"
SecRule REQUEST_HEADERS:Content-Type "@rx ^(?:application|text)/(?:soap\\+)?xml" \\
    "id:200000,phase:1,t:none,t:lowercase,pass,nolog,ctl:requestBodyProcessor=XML"
SecRule REQBODY_ERROR "!@eq 0" "id:200002,phase:2,t:none,nolog,deny,status:400"
SecDefaultAction "phase:1,nolog,pass"
SecDefaultAction "phase:2,nolog,pass"
SecAction "id:900990,phase:1,nolog,pass,t:none,setvar:tx.crs_setup_version={setup}"
Include {CRS_RULES}/*.conf
"""


class NginxHost(Host):
    """NGINX with one of the four. answer: what its one location does, by default to ask the upstream."""

    opens = False

    def __init__(
        self,
        name: str,
        folder: Path,
        upstream_port: int,
        taken: set[int],
        workers: int,
        over: dict[str, Any] | None = None,
        answer: str = PROXIED,
    ) -> None:
        super().__init__(name, folder, taken, workers, over)
        binary = find_nginx()
        self.status_port = free_port(0, taken)
        self.status_asked = 0
        self.config = folder / "nginx.conf"
        self.config.write_text(self._config(upstream_port, answer), encoding="utf-8")
        line = [binary, "-p", str(folder), "-c", str(self.config)]
        # until it has read its configuration it would write to the system's log
        self.start_log = folder / "start.log"
        self.line = [*line, "-e", str(self.start_log)]
        self.proxy = Child(f"NGINX ({name})", self.line, folder / "nginx.log")
        self.workers_started: set[int] = set()

    def _config(self, upstream_port: int, answer: str) -> str:
        main = http = server = ask = ""
        level = "error"
        if self.name == "nginx_plugin":
            main = f"load_module {plugin('nginx')};"
            http = f"outrider_arena {self.arena};\n    outrider_failure open;"
            ask = "outrider on;"
        elif self.name == "nginx_auth_request":
            http = f"upstream outrider {{ server unix:{self.folder / 'auth_request.sock'}; keepalive 1024; "
            http += f"keepalive_requests {KEPT_FOREVER}; }}"
            server, ask = ASKING, "auth_request /outrider;"
        elif self.name == "nginx_modsecurity":
            main, level = f"load_module {modsecurity_module()};", "crit"
            rules = self.folder / "modsecurity.conf"
            rules.write_text(modsecurity_rules(self.folder), encoding="utf-8")
            ask = f"modsecurity on;\n        modsecurity_rules_file {rules};"
        # workers of root's become another user, who may not open the arena; nobody else can choose one
        user = "user root;" if os.geteuid() == 0 else ""
        temporary = "\n    ".join(f"{name}_temp_path {self.folder / name};" for name in TEMPORARY)
        return f"""
{main}
{user}
worker_processes {self.workers};
daemon off;
pid {self.folder / "nginx.pid"};
error_log stderr {level};
events {{ worker_connections 8192; }}
http {{
    {temporary}
    access_log off;
    client_body_buffer_size 64k;
    client_max_body_size 8m;
    large_client_header_buffers 4 16k;
    keepalive_requests {KEPT_FOREVER};
    {http}
    upstream api {{
        server 127.0.0.1:{upstream_port};
        keepalive 1024;
        keepalive_requests {KEPT_FOREVER};
    }}
    server {{
        listen 127.0.0.1:{self.port} reuseport backlog=4096;
        {ask}
        location / {{ {answer} }}
        {server}
    }}
    server {{
        listen 127.0.0.1:{self.status_port};
        location / {{ stub_status; }}
    }}
}}
"""

    def start_proxy(self) -> None:
        # says mistakes, and that a module was made for another NGINX, in words
        try:
            done = subprocess.run(
                [*self.line, "-t"], capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HostError(f"nginx -t: {error}") from error
        if done.returncode:
            said = self.start_log.read_text(errors="replace") if self.start_log.exists() else ""
            raise HostError(f"NGINX refuses its configuration:\n{(said + done.stderr)[-2000:]}")
        self.proxy.start()
        wait_until(lambda: answers(self.url + "/"), "it answered", [self.proxy])
        self.workers_started = set(measure.children(self.proxy.pid))
        if self.name == "nginx_modsecurity":
            self.check_that_it_refuses()

    def check_that_it_refuses(self) -> None:
        """HostError where ModSecurity with the CRS isn't at work."""
        words = "1' UNION SELECT name,password FROM users-- "
        escaped = words.replace(" ", "%20").replace("'", "%27")
        body = b'{"user": "%s"}' % words.encode()
        for target, sent, wanted in (
            (f"/api/v1/chairs?id={escaped}", None, 403),
            ("/api/v1/orders", body, 403),
            ("/api/v1/chairs?q=oak+chair", None, 200),
            ("/api/v1/orders", b'{"user": "kim"}', 200),
        ):
            status = self.status_of(target, sent)
            if status != wanted:
                what = "an attack" if wanted == 403 else "a harmless request"
                kind = "with a JSON body" if sent else "in a query"
                raise HostError(
                    f"ModSecurity isn't set up as it should be: {what} {kind} was answered {status}, not {wanted}"
                )

    def handled(self) -> int:
        """By its own account (stub_status), which asking isn't part of."""
        connection = http.client.HTTPConnection("127.0.0.1", self.status_port, timeout=10)
        try:
            connection.request("GET", "/")
            text = connection.getresponse().read(4096).decode("ascii", "replace")
            self.status_asked += 1
            # accepts, handled connections, requests
            return int(re.findall(r"^ (\d+) (\d+) (\d+)", text, re.M)[0][2]) - self.status_asked
        except (OSError, http.client.HTTPException, IndexError) as error:
            raise HostError(f"NGINX ({self.name}) doesn't tell its status: {error}") from error
        finally:
            connection.close()

    def status_of(self, target: str, body: bytes | None = None) -> int:
        """Of one request as a browser sends it: GET, or POST with this JSON body. HostError without an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        fields = {"host": "shop.example", "user-agent": "Mozilla/5.0", "accept": "application/json"}
        if body is not None:
            fields["content-type"] = "application/json"
        try:
            connection.request("GET" if body is None else "POST", target, body, fields)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise HostError(f"NGINX ({self.name}) gives no answer: {error}") from error
        finally:
            connection.close()

    def version(self) -> str:
        return nginx_version()

    def facts(self) -> dict[str, str]:
        if self.name != "nginx_modsecurity":
            return {}
        # NGINX's log of its start has the connector's word
        said = self.start_log.read_text(encoding="utf-8", errors="replace") if self.start_log.exists() else ""
        rules = re.search(r"rules loaded inline/local/remote: \d+/(\d+)/", said)
        return {
            "peer": (
                f"{modsecurity_version()} with OWASP CRS {crs_version()}{f' ({rules[1]} rules)' if rules else ''}: "
                "paranoia level 1, default thresholds, refusing; request bodies read (JSON parsed), response bodies "
                "not; no audit log, error log from crit on"
            )
        }

    def proxy_pids(self) -> list[int]:
        """The master's and its workers'."""
        return [self.proxy.pid, *measure.children(self.proxy.pid)]

    def dead(self) -> Child | None:
        """NGINX too where a worker has ended: the master replaces it, and what it used would be lost to the account."""
        now = set(measure.children(self.proxy.pid)) if self.proxy.process is not None else set()
        return super().dead() or (self.proxy if now != self.workers_started else None)

    def stop(self) -> None:
        workers = measure.children(self.proxy.pid) if self.proxy.running() else []
        super().stop()
        for pid in workers:  # a master that had to be killed leaves them behind, in the session that was made for it
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == self.proxy.pid:
                    os.kill(pid, signal.SIGKILL)
