"""`outrider demo` as a person runs it: starts, shows, ends, leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import BLOCKED, eventually

from sidecar.demo import show, supervisor
from sidecar.demo.envoy import DemoError, find_envoy
from sidecar.demo.traffic import Case, send

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_BUNDLE = ROOT / "sidecar" / "default_bundle"


def start(*arguments: str, out: Any = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "sidecar.cli", "demo", *arguments],
        cwd=ROOT,
        text=True,
        stdout=out,
        stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )


def children_of(pid: int) -> list[int]:
    """Living processes whose parent is pid."""
    out = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            out.append(int(stat.parent.name))
    return out


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Shown:
    """A running demo and what it printed so far."""

    def __init__(self, process: subprocess.Popen[str], out: Path) -> None:
        self.process, self.out = process, out

    @property
    def text(self) -> str:
        return self.out.read_text(encoding="utf-8")

    def wait_for(self, words: str, timeout_s: float = 60) -> None:
        eventually(lambda: words in self.text or self.process.poll() is not None, words, timeout_s)
        assert words in self.text, self.text


@pytest.fixture
def demo(envoy_binary: Path, calm_bundle: Path, tmp_path: Path) -> Iterator[Shown]:
    out = tmp_path / "shown"
    with out.open("w") as file:
        process = start("--bundle", str(calm_bundle), out=file)
    shown = Shown(process, out)
    try:
        shown.wait_for("Decisions as they happen")
        yield shown
    finally:
        process.kill()
        process.wait()


def port_of(text: str) -> int:
    found = re.search(r"the API, guarded +http://127\.0\.0\.1:(\d+)", text)
    assert found, text
    return int(found[1])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_decisions_are_shown_until_it_is_told_to_end(demo: Shown, how: signal.Signals) -> None:
    port = port_of(demo.text)
    assert send(port, Case("", True, target="/search?q=shown"), BLOCKED).status == 200
    demo.wait_for(BLOCKED)
    assert "/search" in demo.text
    for line in ("curl -i", "/metrics", "Ctrl-C"):
        assert line in demo.text
    children = children_of(demo.process.pid)
    assert len(children) == 3
    demo.process.send_signal(how)
    assert demo.process.wait(30) == 0
    assert not any(alive(child) for child in children)
    folder = re.search(r"logs, configurations +(\S+)", demo.text)
    assert folder
    assert not Path(folder[1]).exists()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def test_killed_it_takes_its_children_along(demo: Shown) -> None:
    children = children_of(demo.process.pid)
    demo.process.kill()
    demo.process.wait()
    eventually(lambda: not any(alive(child) for child in children), "the children gone")


def test_a_child_that_dies_ends_the_demo_with_its_log(demo: Shown) -> None:
    (api,) = [
        child
        for child in children_of(demo.process.pid)
        if b"sidecar.demo.api" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    os.kill(api, signal.SIGKILL)
    assert demo.process.wait(30) == 1
    assert "the demo API ended" in demo.text


def test_without_envoy_it_says_what_to_install() -> None:
    process = start(OUTRIDER_ENVOY="/nowhere/envoy")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "OUTRIDER_ENVOY names /nowhere/envoy, which can't be executed" in text
    assert "Traceback" not in text


def test_what_cannot_start_is_shown_with_its_log(envoy_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    process = start("--bundle", str(tmp_path))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "the sidecar ended (status 4)" in text
    assert "models.bundle" in text
    assert "Traceback" not in text


def test_the_tour_says_when_a_promise_was_not_kept(envoy_binary: Path, calm_bundle: Path) -> None:
    """Models that find everything harmless keep none of the promised refusals."""
    process = start("--once", "--bundle", str(calm_bundle))
    text, _ = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "answers were not as promised: SQL injection in a query" in text
    assert "refused at request" in text  # the counting detectors need no models


@pytest.mark.skipif(not DEFAULT_BUNDLE.is_dir(), reason="no default bundle: make default-models builds it")
def test_the_tour_keeps_its_promises(envoy_binary: Path) -> None:
    process = start("--once")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "answers were as promised" in text


# ---- the parts


def test_a_taken_port_is_not_used() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        used: set[int] = set()
        assert supervisor.free_port(port, used) != port
        assert len(used) == 1


def test_envoy_is_found_where_it_is_installed(envoy_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_ENVOY", str(envoy_binary))
    assert find_envoy() == envoy_binary
    monkeypatch.setenv("OUTRIDER_ENVOY", "/etc/passwd")
    with pytest.raises(DemoError, match="can't be executed"):
        find_envoy()


def test_a_child_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    deaf = supervisor.Child(
        "deaf",
        [
            sys.executable,
            "-c",
            "import signal, time; "
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); "
            "time.sleep(60)",
        ],
        tmp_path / "log",
    )
    deaf.start()
    eventually(lambda: "up" in deaf.tail(), "the child up")
    begun = time.monotonic()
    assert deaf.stop(timeout_s=0.5) == -signal.SIGKILL
    assert time.monotonic() - begun < 10
    assert not alive(deaf.pid)


def test_hostile_text_is_shown_harmless() -> None:
    record = {
        "ts": 1.0,
        "action": "block",
        "score": 0.9,
        "client": "\x1b[31m[bold]x",
        "method": "GET",
        "path": "/\x9b2J\u202e[link=file:///etc]\n",
        "reasons": [{"name": "x", "text": "\x1b]0;owned\x07"}],
    }
    text = show.line(record).plain
    assert all(c.isprintable() for c in text)
    assert "[bold]x" in text  # shown, not read as markup
    assert len(show.harmless("x" * 10_000)) <= show.TEXT_MAX + 1


def test_the_tail_reads_only_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    tail = show.Tail(path)
    assert list(tail.new()) == []
    path.write_text(json.dumps({"id": 1}) + "\n" + '{"id": 2')
    assert [r["id"] for r in tail.new()] == [1]
    with path.open("a") as file:
        file.write('}\nnot json\n[1]\n{"id": 3}\n')
    assert [r["id"] for r in tail.new()] == [2, 3]
