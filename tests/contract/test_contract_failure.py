"""What becomes of requests when something breaks, with Outrider inside the proxy: each failure has one outcome.

| what | outcome |
|---|---|
| no arena yet, or one that can't be used | the module's failure mode; picked up when it comes |
| sidecar killed | decisions go on; policy, models and clients are those in the arena |
| arena removed | what is attached decides on |
| arena cut short | no crash: failure mode until there is a whole one |
| models damaged | those in use stay; a proxy that starts then decides by lists and detectors |
| proxy or its worker killed | the next one attaches; the arena isn't harmed |
"""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from contract_hosts import MARKER, ProxyStack, ask, start
from proxy_harness import BLOCKED, FRIEND, eventually, make_bundle, metrics

from sidecar.demo.stack import merge

MODULES = ("envoy_plugin", "nginx_plugin")
VERSION_AT = 8


@pytest.fixture(params=MODULES)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def stack(kind: str, marked_settings: dict[str, Any]) -> Iterator[ProxyStack]:
    with start(kind, marked_settings) as running:
        yield running


def blocked(stack: ProxyStack) -> bool:
    return ask(stack, "/items", BLOCKED).status == 403


def logged(stack: ProxyStack, client: str) -> bool:
    """Is there a refusal of this client in the decision log?"""
    lines = stack.decisions.read_text(encoding="utf-8").splitlines()
    return any(f'"client":"{client}"' in line and '"action":"block"' in line for line in lines)


def log_of(stack: ProxyStack) -> str:
    return "".join(path.read_text(errors="replace") for path in stack.folder.glob("logs/*.log"))


@contextmanager
def load(stack: ProxyStack, most: int = 3000) -> Iterator[Counter[str]]:
    """Requests from two threads, half of them of a blocked client; counts statuses by client."""
    seen: Counter[str] = Counter()
    stop, lock = threading.Event(), threading.Lock()

    def work() -> None:
        for number in range(most):
            if stop.is_set():
                return
            client = BLOCKED if number % 2 else FRIEND
            try:
                status = str(ask(stack, f"/items?n={number}", client).status)
            except OSError as error:
                status = type(error).__name__
            with lock:
                seen[f"{client} {status}"] += 1

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def without_sidecar(kind: str, settings: dict[str, Any], failure: str) -> Any:
    """A stack of which only the service and the proxy run."""
    stack: Any = start(kind, settings, failure)
    stack.start_sidecar, stack.later = lambda: None, type(stack).start_sidecar.__get__(stack)
    return stack


@pytest.mark.parametrize("failure", ["open", "closed"])
def test_before_the_sidecar_is_there(kind: str, marked_settings: dict[str, Any], failure: str) -> None:
    with without_sidecar(kind, marked_settings, failure) as stack:
        reply = ask(stack, "/items", BLOCKED)
        if failure == "open":
            assert reply.status == 200
        else:
            assert reply.status == 503
            assert reply.headers["content-type"] == "application/problem+json"
            assert json.loads(reply.body)["status"] == 503
        assert "isn't there" in log_of(stack)
        stack.later()
        eventually(lambda: blocked(stack), "the arena was picked up")
        counted = eventually(
            lambda: metrics(stack).get(f'outrider_unjudged_total{{outcome="{failure}"}}'), "unjudged ones were counted"
        )
        assert counted >= 1
        assert metrics(stack)["outrider_proxies_attached_total"] >= 1


@pytest.mark.parametrize("what", ["garbage", "version", "empty", "folder", "pipe", "cut"])
def test_an_arena_that_cannot_be_used(
    kind: str, marked_settings: dict[str, Any], what: str, tmp_path: Path
) -> None:
    """The failure mode, a line in the log that says why, and no harm done."""
    with without_sidecar(kind, marked_settings, "closed") as stack:
        if what == "folder":
            stack.arena.mkdir()
        elif what == "pipe":
            os.mkfifo(stack.arena)
        else:
            from native.arenafile import ArenaFile

            ArenaFile.create(stack.arena, 1024, 64, 64)
            whole = stack.arena.read_bytes()
            stack.arena.write_bytes(
                {
                    "garbage": os.urandom(len(whole)),
                    "version": whole[:VERSION_AT] + struct.pack("<I", 99) + whole[VERSION_AT + 4 :],
                    "empty": b"",
                    "cut": whole[: len(whole) // 2],
                }[what]
            )
        words = {
            "garbage": "wrong magic",
            "version": "layout version 99, this build reads version",
            "empty": "too short",
            "folder": "cannot open",
            "pipe": "not a regular file",
            "cut": "size mismatch",
        }
        eventually(lambda: words[what] in log_of(stack), "the log said why")
        assert ask(stack, "/items").status == 503
        assert stack.proxy.running()


def test_killing_the_sidecar_under_load(stack: ProxyStack) -> None:
    with load(stack) as seen:
        time.sleep(1)
        os.kill(stack.sidecar.pid, signal.SIGKILL)
        stack.sidecar.process.wait()  # type: ignore[union-attr]
        before = Counter(seen)
        time.sleep(1.5)
        later = Counter(seen) - before
        stack.start_sidecar()
        time.sleep(1)
    assert set(seen) == {f"{FRIEND} 200", f"{BLOCKED} 403"}, seen
    assert sum(later.values()) > 20
    ask(stack, f"/search?q={MARKER}", "198.18.9.9")
    eventually(lambda: logged(stack, "198.18.9.9"), "the decision reached the log")


def test_a_changed_configuration_and_other_models_are_followed(
    stack: ProxyStack, marked_settings: dict[str, Any], tmp_path: Path
) -> None:
    """While requests go on, and none is answered by anything but the one or the other."""
    assert ask(stack, "/items", "198.18.9.1").status == 200
    with load(stack) as seen:
        over = merge(marked_settings, {"lists": {"block": ["203.0.113.0/24", "198.18.9.1/32"]}})
        stack.write_settings(over)
        eventually(lambda: ask(stack, "/items", "198.18.9.1").status == 403, "the new list was followed")
        assert ask(stack, "/search?q=another%20marker%20brickwork", "198.18.9.2").status == 200
        bundle = make_bundle(tmp_path / "other", 0.1, b"brickwork")
        stack.write_settings(merge(over, {"models": {"bundle": str(bundle)}}))
        eventually(
            lambda: ask(stack, "/search?q=another%20marker%20brickwork", "198.18.9.2").status == 403,
            "the new models were followed",
        )
        assert ask(stack, f"/search?q={MARKER}", "198.18.9.3").status == 200
    assert set(seen) == {f"{FRIEND} 200", f"{BLOCKED} 403"}, seen


def test_removing_the_arena(stack: ProxyStack) -> None:
    assert blocked(stack)
    stack.arena.unlink()
    eventually(lambda: "was removed" in log_of(stack), "the log said so")
    assert blocked(stack)
    assert ask(stack, "/items").status == 200
    # a sidecar that starts anew makes another one, which is taken over
    stack.sidecar.stop()
    stack.start_sidecar()
    eventually(lambda: metrics(stack).get("outrider_proxies_attached_total", 0) >= 1, "the new arena was attached")
    assert blocked(stack)


@pytest.mark.parametrize("size", [0, 4096, 100_000])
@pytest.mark.parametrize("failure", ["open", "closed"])
def test_cutting_the_arena_short_under_load(
    kind: str, marked_settings: dict[str, Any], size: int, failure: str
) -> None:
    """Touching what isn't there any more would be SIGBUS: the module takes that, the proxy never notices."""
    with start(kind, marked_settings, failure) as stack:
        pid = stack.proxy.pid
        workers = children(pid)
        with load(stack) as seen:
            time.sleep(0.5)
            os.truncate(stack.arena, size)
            eventually(lambda: "cut short" in log_of(stack), "the log said so")
            wanted = 200 if failure == "open" else 503
            eventually(lambda: ask(stack, "/items", BLOCKED).status == wanted, "the failure mode was followed")
            eventually(lambda: not stack.sidecar.running(), "the sidecar ended")
            stack.start_sidecar()
            eventually(lambda: blocked(stack), "the new arena was taken over")
        allowed = {f"{FRIEND} 200", f"{BLOCKED} 403", f"{BLOCKED} 200" if failure == "open" else f"{BLOCKED} 503"}
        if failure == "closed":
            allowed.add(f"{FRIEND} 503")
        assert set(seen) <= allowed, seen
        assert stack.proxy.running()
        assert stack.proxy.pid == pid
        assert children(pid) == workers  # not one of NGINX's workers died of it


def children(pid: int) -> set[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return {int(child) for child in text.split()}


def published(stack: ProxyStack) -> Path:
    (found,) = stack.arena.parent.glob(f"{stack.arena.name}.models/*/runtime.bin")
    return found


def answered(stack: ProxyStack) -> bool:
    try:
        return ask(stack, "/items").status == 200
    except OSError:
        return False


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "world-writable"])
def test_models_that_are_damaged(stack: ProxyStack, damage: str) -> None:
    assert ask(stack, f"/search?q={MARKER}", "198.18.10.1").status == 403
    runtime = published(stack)
    content = runtime.read_bytes()
    runtime.chmod(0o600)
    if damage == "missing":
        runtime.unlink()
    elif damage == "cut":
        runtime.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        runtime.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:
        runtime.chmod(0o666)
    # what is attached keeps what it has read
    assert ask(stack, f"/search?q={MARKER}", "198.18.10.2").status == 403
    stack.proxy.stop()
    stack.proxy.start()
    eventually(lambda: answered(stack), "the proxy answered")
    eventually(lambda: "models refused, lists and detectors decide alone" in log_of(stack), "the log said so")
    assert blocked(stack)
    assert ask(stack, f"/search?q={MARKER}", "198.18.10.3").status == 200
    assert metrics(stack)["outrider_decisions_without_models_total"] >= 1


def test_killing_the_proxy_under_load(stack: ProxyStack, kind: str) -> None:
    """At any moment, many times: whatever a worker held is let go, and the arena stays what it was."""
    inode = stack.arena.stat().st_ino
    with load(stack) as seen:
        for _ in range(6):
            time.sleep(0.3)
            if kind == "nginx_plugin":
                for worker in children(stack.proxy.pid):
                    os.kill(worker, signal.SIGKILL)
            else:
                stack.proxy.kill()
                stack.proxy.start()
            eventually(lambda: answered(stack), "the next one answered")
    assert stack.arena.stat().st_ino == inode
    assert stack.sidecar.running()
    wrong = {key for key in seen if key.endswith((" 403", " 200"))} - {f"{FRIEND} 200", f"{BLOCKED} 403"}
    assert not wrong, seen
    before = metrics(stack)["outrider_requests_total"]
    for _ in range(20):
        assert blocked(stack)
    eventually(lambda: metrics(stack)["outrider_requests_total"] >= before + 20, "requests were counted")
    # an event that a killed worker left half-written is given up, and later ones come through
    ask(stack, f"/search?q={MARKER}", "198.18.11.1")
    eventually(lambda: logged(stack, "198.18.11.1"), "the decision reached the log")
