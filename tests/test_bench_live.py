"""outrider bench on a real Envoy with real load, in slices as short as they can be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import hosts, load, proxy, traffic
from bench.hosts import EnvoyHost, HostError
from bench.rig import Rig
from sidecar.demo.envoy import DemoError, find_envoy
from sidecar.demo.stack import envoy_stats
from sidecar.demo.supervisor import wait_until

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    for program in ("wrk", "h2load"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} isn't installed")
    try:
        find_envoy()
    except DemoError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def floor() -> Iterator[Rig]:
    """Bare Envoy and the empty server."""
    try:
        hosts.build_null()
    except HostError as error:
        pytest.skip(str(error))
    with Rig(["bare", "null_native"], {"bare", "null_native"}) as rig:
        yield rig


def test_a_stall_is_seen_by_its_share_of_the_requests(floor: Rig) -> None:
    """The upstream stands still for 1 s of 4: a quarter of the requests waits, half of them over half a second."""
    host, inputs = floor.hosts[0], proxy.Inputs(floor.folder, ["get"])
    assert floor.upstream is not None
    pid = floor.upstream.pid

    def stall() -> None:
        time.sleep(1.5)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(pid, signal.SIGCONT)

    stalling = threading.Thread(target=stall)
    stalling.start()
    try:
        found = load.opened(*inputs.opened("get", host.url, 0), 200, 4, floor.folder / "log")
    finally:
        stalling.join()
    assert found.answered + found.errors == 800
    assert found.errors == 0
    # 200 of the 740 that are counted: a tenth (74) waits longer than 1 - 74/200 s
    tenth = dict(zip((round(p, 3) for p in load.PERCENTILES), found.points, strict=True))[90.0]
    assert 400_000 < tenth < 900_000
    assert found.p50_us < 400_000
    assert found.max_us > 800_000


def test_the_floor_is_asked_for_the_same_messages_as_outrider(floor: Rig) -> None:
    """Three messages for a request with a body (headers, body, response headers), two for one without; each
    answered, no error, also with a body over many frames."""
    host = floor.hosts[1]
    assert isinstance(host, EnvoyHost)

    def stats() -> dict[str, int]:
        found = envoy_stats(host.envoy_admin)
        return {
            name.rpartition(".")[2]: n for name, n in found.items() if name.startswith("http.ingress.ext_proc.outrider")
        }

    inputs = proxy.Inputs(floor.folder, traffic.CASES)
    for case, messages in (("get", 2), ("post_1k", 3), ("post_16k", 3)):
        before = stats()
        counts, _ = load.counted(*inputs.opened(case, host.url, 0), 300, 4, 30)
        assert counts["2xx"] == 300
        wait_until(lambda: stats()["streams_closed"] == stats()["streams_started"], "streams ended", [host.proxy], 10)
        after = stats()
        change = {name: after[name] - before.get(name, 0) for name in after}
        assert change["streams_started"] == 300
        assert change["stream_msgs_sent"] == change["stream_msgs_received"] == 300 * messages
        assert change.get("streams_failed", 0) == change.get("failure_mode_allowed", 0) == 0


def test_the_empty_server_survives_bad_peers(floor: Rig) -> None:
    """Garbage, and a connection that ends amid a request: closed, and others are served on."""
    import socket

    host = floor.hosts[1]
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect(str(host.folder / "ext_proc.sock"))
            peer.sendall(data)
            while peer.recv(4096):
                pass
    inputs = proxy.Inputs(floor.folder, ["get"])
    counts, _ = load.counted(*inputs.opened("get", host.url, 0), 50, 2, 30)
    assert counts["2xx"] == 50
    assert host.dead() is None


def run_bench(*line: str, cwd: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sidecar.cli", "bench", *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=env, cwd=cwd, check=False)


def test_a_short_run_end_to_end(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run_bench("--quick", "--case", "get", "--case", "post_1k", "--json", "--html", str(page), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    measured = {row["host"] for row in rows}
    assert measured >= {"bare", "grpcio"}
    assert not any(row["mode"] == "open" for row in rows if row["host"].startswith("nginx"))
    assert {(row["mode"], row["case"]) for row in rows if row["host"] == "bare"} == {
        (mode, case) for mode in ("closed", "open") for case in ("get", "post_1k")
    }
    for row in rows:
        assert row["rps"] > 0
        assert 0 < row["p50_us"] <= row["p99_us"] <= row["max_us"]
        assert row["non2xx"] == row["refused"] == 0
        assert row["stages_skipped"] == 0
        assert row["cpu_us_proxy"] > 0
        assert (row["cpu_us_sidecar"] > 0) is (row["host"] == "null_native" or row["host"] in hosts.OUTRIDER)
        assert row["base"] == ("nginx_bare" if row["host"].startswith("nginx") else "bare")
        if row["host"] in hosts.OUTRIDER and row["unjudged"] == 0:
            assert row["judged"] >= row["requests"] - row["errors"]
    text = page.read_text()
    assert text.count("<svg") >= 6
    assert "http://" not in text


def test_a_short_soak(tmp_path: Path) -> None:
    done = run_bench("--soak", "--requests", "2000", "--connections", "16", "--json", cwd=tmp_path)
    (row,) = json.loads(done.stdout)
    assert row["requests"] == 2000
    assert row["errors"] == row["unjudged"] == row["non2xx"] == 0
    assert row["judged"] >= 2000
    assert len(row["memory"]) == 100
    assert done.returncode == (0 if row["passed"] else 1)


def test_a_host_that_is_asked_for_and_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(host: str) -> str:
        raise HostError("not available in this build")

    monkeypatch.setattr(hosts, "transport", none)
    with pytest.raises(HostError, match="grpcio: not available in this build"), Rig(["grpcio"], {"grpcio"}):
        pass
    with Rig(["bare", "grpcio"], set()) as rig:
        assert rig.missing == {"grpcio": "not available in this build"}
        assert [host.name for host in rig.hosts] == ["bare"]
        folder, port = rig.folder, rig.hosts[0].port
    assert not folder.exists()
    assert port


def descendants(pid: int) -> set[int]:
    found = {pid}
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OUTRIDER_RUN_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "sidecar.cli", "bench", "--mode", "closed", "--case", "get", "--duration", "30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stderr is not None
    for line in process.stderr:
        if "round" in line:
            break
    mine = re.compile(re.escape(str(tmp_path)))

    def children() -> dict[int, str]:
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                text = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if entry.name.isdigit() and mine.search(text):
                found[int(entry.name)] = text
        return found

    assert len(children()) >= 4  # upstream, Envoys, a sidecar, wrk
    started = descendants(process.pid) | set(children())  # NGINX's workers don't show where they belong
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in err
    gone_by = time.monotonic() + 5
    while children() and time.monotonic() < gone_by:
        time.sleep(0.05)
    assert children() == {}
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []
    assert list(tmp_path.iterdir()) == []
