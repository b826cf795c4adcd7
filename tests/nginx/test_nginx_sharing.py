"""What the sidecar shares with NGINX's workers, where they are another user; and what it knows of them."""

from __future__ import annotations

import grp
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nginx_stack import NginxStack
from proxy_harness import BLOCKED, ask_port, metrics

from sidecar.demo.supervisor import wait_until

USER = "www-data"
MakeStack = Callable[..., NginxStack]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="workers as another user take root")


def as_user(stack: NginxStack) -> NginxStack:
    """Let the workers be another user, who may enter the folder."""
    text = stack.config.read_text()
    assert text.count("user root;") == 1
    stack.config.write_text(text.replace("user root;", f"user {USER};"))
    for folder in (stack.folder, stack.folder.parent):
        os.chmod(folder, folder.stat().st_mode | 0o011)
    return stack


def status(stack: NginxStack, target: str = "/", client: str = "198.51.100.77") -> int:
    return int(ask_port(stack.port, target, client).status)


def worker_user(stack: NginxStack) -> int:
    (pid,) = stack.workers()
    return Path(f"/proc/{pid}").stat().st_uid


def test_workers_of_another_user_decide_with_the_groups_arena_and_the_models_beside_it(
    make_stack: MakeStack, marker: bytes
) -> None:
    with as_user(make_stack({"arena": {"group": USER}})) as stack:
        assert worker_user(stack) != 0
        assert stack.arena.stat().st_gid == grp.getgrnam(USER).gr_gid
        wait_until(lambda: status(stack, client=BLOCKED) == 403, "the list is followed", [stack.nginx])
        # only the models know the marker
        assert status(stack, f"/?q={marker.decode()}") == 403
        assert status(stack, "/?q=plain") == 200
        found = metrics(stack)
        assert found["outrider_proxies_attached_total"] == 1
        assert found["outrider_requests_total"] >= 3


def test_without_the_group_workers_of_another_user_follow_their_failure_mode(make_stack: MakeStack) -> None:
    with as_user(make_stack()) as stack:
        assert status(stack, client=BLOCKED) == 200
        assert metrics(stack)["outrider_proxies_attached_total"] == 0
        assert "Permission denied" in stack.error_log.read_text()


@pytest.mark.parametrize(("failure", "outcome", "answer"), [("open", "open", 200), ("closed", "closed", 503)])
def test_what_went_unjudged_is_counted_once_the_worker_has_attached(
    make_stack: MakeStack, failure: str, outcome: str, answer: int
) -> None:
    over: dict[str, Any] = {"service": {"failure": failure}}
    with make_stack(over, failure=failure, with_sidecar=False) as stack:
        for _ in range(7):
            assert status(stack, client=BLOCKED) == answer
        stack.start_sidecar()
        wait_until(lambda: status(stack, client=BLOCKED) == 403, "it is attached", [stack.nginx])
        other = {"open": "closed", "closed": "open"}[outcome]
        found = metrics(stack)
        assert found[f'outrider_unjudged_total{{outcome="{outcome}"}}'] >= 7
        assert found[f'outrider_unjudged_total{{outcome="{other}"}}'] == 0
        assert found["outrider_proxies_attached_total"] == 1
