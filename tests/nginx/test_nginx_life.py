"""The module's life: without an arena, with a new one, with a new configuration, and at the end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from nginx_stack import NginxStack
from proxy_harness import BLOCKED, FRIEND, access_lines, ask_port, echoed, eventually, post, raw_port

from sidecar.demo.supervisor import wait_until

MakeStack = Callable[..., NginxStack]


def status(stack: NginxStack, client: str) -> int:
    return ask_port(stack.ports["nginx"], "/echo", client).status


def judged(stack: NginxStack) -> bool:
    return status(stack, BLOCKED) == 403 and status(stack, FRIEND) == 200


def test_without_an_arena_open_passes_and_says_so(make_stack: MakeStack) -> None:
    with make_stack(failure="open", with_sidecar=False) as stack:
        seen = echoed(ask_port(stack.ports["nginx"], "/echo", BLOCKED, headers={"x-outrider-id": "forged"}))
        assert not [name for name in seen["headers"] if "outrider" in name]
        assert echoed(ask_port(stack.ports["nginx"], "/echo", BLOCKED, "POST", b"body"))["body_bytes"] == 4
        assert {line["action"] for line in access_lines(stack)} == {""}
        log = stack.error_log.read_text(encoding="utf-8")
        assert "[warn]" in log
        assert f"outrider: arena {stack.arena} isn't there: requests are passed unjudged" in log
        assert log.count("outrider:") < 5  # of requests nothing is said
        stack.start_sidecar()
        eventually(lambda: judged(stack), "requests are judged")
        assert "attached" in stack.error_log.read_text(encoding="utf-8")


def test_without_an_arena_closed_refuses(make_stack: MakeStack) -> None:
    with make_stack(failure="closed", with_sidecar=False) as stack:
        port = stack.ports["nginx"]
        for body in (None, b"a body"):
            reply = ask_port(port, "/echo", FRIEND, "POST" if body else "GET", body)
            assert reply.status == 503
            assert reply.headers["content-type"] == "application/problem+json"
            assert json.loads(reply.body)["status"] == 503
        with httpx.Client(http1=False, http2=True, base_url=f"http://127.0.0.1:{stack.ports['h2']}") as client:
            grpc = client.post("/a.B/C", headers={"content-type": "application/grpc"}, content=b"\0\0\0\0\0")
            assert (grpc.status_code, grpc.headers["grpc-status"], grpc.content) == (200, "14", b"")
        stack.start_sidecar()
        eventually(lambda: judged(stack), "requests are judged")


def test_decisions_go_on_without_the_sidecar(make_stack: MakeStack, marker: bytes) -> None:
    with make_stack() as stack:
        assert judged(stack)
        stack.sidecar.kill()
        assert judged(stack)
        assert ask_port(stack.ports["nginx"], "/echo", method="POST", body=marker).status == 403
        assert stack.nginx.running()


def test_reload_keeps_judging_and_loses_no_request(make_stack: MakeStack) -> None:
    with make_stack(main="worker_shutdown_timeout 5s;") as stack:
        failed: list[str] = []
        stop = threading.Event()

        def work() -> None:
            for n in range(3000):
                if stop.is_set():
                    return
                client, wanted = (BLOCKED, 403) if n % 3 == 0 else (FRIEND, 200)
                try:
                    got: object = ask_port(stack.ports["nginx"], "/echo", client, "POST", b"a body").status
                except (OSError, http.client.HTTPException) as error:
                    got = error
                if got != wanted:
                    failed.append(f"{client}: {got}")

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                stack.reload()
                assert judged(stack)
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert failed == []


def test_a_request_that_is_being_held_outlives_a_reload(make_stack: MakeStack, marker: bytes) -> None:
    with make_stack() as stack:
        body = b"the first half, " + marker
        (old,) = stack.workers()
        with socket.create_connection(("127.0.0.1", stack.ports["nginx"]), timeout=10) as peer:
            peer.sendall(post("/echo", body[:10], f"content-length: {len(body)}"))
            time.sleep(0.2)  # or it may still wait to be accepted, which nobody promises anything about
            os.kill(stack.nginx.pid, signal.SIGHUP)
            wait_until(lambda: len(stack.workers()) == 2, "a new worker", [stack.nginx], 20.0)
            peer.sendall(body[10:])
            assert peer.recv(4000).startswith(b"HTTP/1.1 403")
        wait_until(lambda: old not in stack.workers(), "the old worker ended", [stack.nginx], 20.0)
        log = stack.error_log.read_text(encoding="utf-8")
        assert f"worker process {old} exited with code 0" in log


def test_reload_with_another_arena_and_failure_mode(make_stack: MakeStack) -> None:
    with make_stack() as stack:
        assert judged(stack)
        first = stack.arena
        stack.arena, stack.failure = stack.folder / "another", "closed"
        stack.reload()
        assert status(stack, FRIEND) == 503
        stack.arena = first
        stack.reload()
        assert judged(stack)
        stack.failure = "open"
        stack.reload()
        assert judged(stack)


def test_reload_turns_it_off_and_on(make_stack: MakeStack) -> None:
    with make_stack() as stack:
        server, stack.server = stack.server, "location /echo { outrider off; proxy_pass http://api; }"
        stack.reload()
        assert status(stack, BLOCKED) == 200
        assert ask_port(stack.ports["nginx"], "/items", BLOCKED).status == 403
        stack.server = server
        stack.reload()
        assert judged(stack)


def test_a_bad_configuration_keeps_the_running_one(make_stack: MakeStack) -> None:
    with make_stack() as stack:
        workers = stack.workers()
        stack.failure = "sometimes"
        stack.write_config()
        os.kill(stack.nginx.pid, signal.SIGHUP)
        eventually(lambda: 'not "sometimes"' in stack.error_log.read_text(encoding="utf-8"), "NGINX complained")
        assert judged(stack)
        assert stack.workers() == workers
        stack.failure = "open"
        stack.reload()
        assert judged(stack)


def test_a_worker_that_dies_is_replaced_and_judges(make_stack: MakeStack) -> None:
    with make_stack() as stack:
        (worker,) = stack.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: bool(stack.workers() - {worker}), "a new worker", [stack.nginx], 20.0)
        eventually(lambda: judged(stack), "requests are judged")


@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGTERM])
def test_the_end_is_orderly(make_stack: MakeStack, how: signal.Signals) -> None:
    with make_stack() as stack:
        assert judged(stack)
        process = stack.nginx.process
        assert process is not None
        os.kill(stack.nginx.pid, how)
        assert process.wait(20) == 0
        log = stack.error_log.read_text(encoding="utf-8")
        assert "exited with code 0" in log
        assert "exited on signal" not in log


def test_only_workers_watch_the_arena(make_stack: MakeStack) -> None:
    with make_stack(http="proxy_cache_path cache keys_zone=cache:64k;") as stack:  # brings a process that keeps it
        assert judged(stack)
        assert threads_of(stack.nginx.pid) == 1
        titles = {Path(f"/proc/{pid}/cmdline").read_text().strip("\0 "): threads_of(pid) for pid in stack.workers()}
        assert titles["nginx: worker process"] == 2
        assert titles["nginx: cache manager process"] == 1


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_several_workers_share_what_they_know(make_stack: MakeStack) -> None:
    """Wrong passwords are counted over all workers: the demo refuses the client that fails ten times."""
    with make_stack() as stack:
        stack.config.write_text(
            stack.config.read_text(encoding="utf-8").replace("worker_processes 1;", "worker_processes 3;"),
            encoding="utf-8",
        )
        os.kill(stack.nginx.pid, signal.SIGHUP)
        wait_until(lambda: len(stack.workers()) == 3, "three workers", [stack.nginx], 20.0)
        body = json.dumps({"user": "ada", "password": "wrong"}).encode()
        request = post("/login", body, f"content-length: {len(body)}", "content-type: application/json")
        statuses = [raw_port(stack.ports["nginx"], request)[9:12] for _ in range(20)]
        assert statuses[:10] == [b"401"] * 10
        assert statuses[-1] == b"403"
