"""From a request to an entry that holds on every pod, through real sidecars, a real judge and a real store."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_sidecar import ROOT, Sidecar, free_port, until
from redis_server import RedisServer

PAYLOAD = "%27%20or%20{n}%3D{n}%20union%20select%20password%20from%20users--"


class Pod(Sidecar):
    """One that refuses nothing by its own models, so that what is refused was judged."""

    def __init__(self, folder: Path, **over: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.auth = free_port()
        super().__init__(
            folder,
            **{
                "thresholds": {"tag": 0.5, "throttle": None, "challenge": None, "block": None},
                "listen": {"auth_request": f"127.0.0.1:{self.auth}"},
                "escalation": {"client_per_minute": 1000, "per_second": 1000},
                "judge": {"enabled": True, "again": "1s"},
                **over,
            },
        )

    def ask(self, target: str, client: str) -> int:
        """The status that the proxy is told."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.auth}/",
            headers={"X-Original-Method": "GET", "X-Original-URI": target, "X-Real-IP": client, "Host": "shop"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def judge(self, *words: str) -> subprocess.CompletedProcess[str]:
        command, *rest = words
        return subprocess.run(
            [sys.executable, "-m", "sidecar.cli", "judge", command, "-c", str(self.file), *rest],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )

    def held(self) -> list[dict[str, Any]]:
        listed = self.judge("list", "--json")
        assert listed.returncode == 0, listed.stderr
        return [json.loads(line) for line in listed.stdout.splitlines()]

    def is_judging(self) -> bool:
        return self.metric("outrider_judge_ready") == 1


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path / "pod").start()
    until(pod.is_judging, "no judge came")
    yield pod
    pod.stop()


def attack(n: int) -> str:
    return "/search?q=" + PAYLOAD.format(n=n)


def test_a_verdict_is_enforced_shown_and_undone(pod: Pod) -> None:
    assert pod.ask(attack(1), "198.51.100.1") == 204
    until(lambda: pod.ask(attack(2), "198.51.100.2") == 403, "the verdict isn't enforced")
    (entry,) = pod.held()
    assert entry["scope"] == "payload"
    assert entry["label"] == "sql_injection"
    assert entry["provenance"]["model"]
    assert entry["provenance"]["probabilities"]["sql_injection"] > 0.5
    record = until(
        lambda: [d for d in pod.decisions() if "blocked_payload" in str(d["reasons"])], "it isn't in the decision log"
    )[0]
    assert record["action"] == "block"
    assert pod.ask("/search?q=garden%20chairs", "198.51.100.2") == 204
    assert pod.metric("outrider_blocklist_held") == 1

    told = pod.judge("feedback", entry["provenance"]["event"], "benign", "--note", "a test")
    assert told.stdout == "kept\n", told.stderr
    (kept,) = [json.loads(line) for line in pod.judge("export").stdout.splitlines()]
    assert (kept["label"], kept["escalation"]["id"]) == ("benign", entry["provenance"]["event"])

    assert pod.judge("undo", entry["id"]).stdout == f"{entry['id']}: undone\n"
    until(lambda: pod.ask(attack(3), "198.51.100.3") == 204, "it still holds after it was undone")
    assert pod.judge("undo", entry["id"]).returncode == 1


def test_a_judge_that_is_killed_comes_back_and_loses_nothing(pod: Pod) -> None:
    def child() -> int | None:
        told = ["pgrep", "-P", str(pod.process.pid), "-f", "sidecar.judge.process"]
        found = subprocess.run(told, capture_output=True, text=True, check=False).stdout.split()
        return int(found[0]) if found else None

    first = child()
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert pod.ask(attack(1), "198.51.100.1") == 204  # requests don't wait for it
    until(lambda: pod.metric("outrider_judge_restarts_total") == 1, "its end wasn't noticed")
    until(lambda: pod.ask(attack(2), "198.51.100.2") == 403, "what waited wasn't judged")
    assert child() != first


def test_what_holds_outlives_the_sidecar(pod: Pod) -> None:
    pod.ask(attack(1), "198.51.100.1")
    until(lambda: pod.ask(attack(2), "198.51.100.2") == 403, "the verdict isn't enforced")
    pod.stop(signal.SIGKILL)
    pod.start()
    until(lambda: pod.ask(attack(3), "198.51.100.3") == 403, "it was forgotten")


def test_an_address_is_entered_by_hand(pod: Pod) -> None:
    assert pod.ask("/", "198.51.100.77") == 204
    assert "block 198.51.100.77" in pod.judge("block", "198.51.100.77", "--for", "60").stdout
    until(lambda: pod.ask("/", "198.51.100.77") == 403, "it isn't enforced")
    assert pod.ask("/", "198.51.100.78") == 204
    refused = pod.judge("block", "198.51.100.0/24")
    assert refused.returncode == 1
    assert "lists.block" in refused.stderr


def test_the_judge_ends_with_the_sidecar(pod: Pod) -> None:
    pid = pod.process.pid
    pod.stop(signal.SIGKILL)

    def gone() -> bool:
        found = subprocess.run(
            ["pgrep", "-f", f"sidecar.judge.process {pod.file}"], capture_output=True, text=True, check=False
        )
        return found.stdout.strip() == ""

    until(gone, f"the judge of {pid} is still there")


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server (Debian: redis-server)")
def test_another_pod_enforces_it_through_redis(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    redis = RedisServer(tmp_path / "redis").start()
    pods: list[Pod] = []
    try:
        over = {
            "client": {"key_file": str(key)},
            "judge_store": {"backend": "redis", "addresses": [redis.address]},
        }
        one = Pod(tmp_path / "one", **over)
        other = Pod(tmp_path / "other", judge={"enabled": True, "local": False, "again": "1s"}, **over)
        for pod in (one, other):
            pods.append(pod.start())
        until(one.is_judging, "no judge came")
        other.ask(attack(1), "198.51.100.1")  # escalated by one that has no judge
        until(lambda: one.ask(attack(2), "198.51.100.2") == 403, "the verdict doesn't reach the one")
        until(lambda: other.ask(attack(3), "198.51.100.3") == 403, "the verdict doesn't reach the other")
    finally:
        for pod in pods:
            pod.stop()
        redis.stop()
