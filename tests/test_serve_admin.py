"""/metrics, /healthz and /readyz over real sockets."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.serve.addresses import Address
from sidecar.serve.admin import CONNECTIONS_MAX, AdminServer
from sidecar.serve.errors import StartupError
from sidecar.serve.metrics import Outrider, Tally, histogram, make_registry

COUNTERS = {
    "requests": 10,
    "action_allow": 7,
    "action_block": 3,
    "enforced_block": 2,
    "skipped_text": 1,
    "budget_overruns": 4,
    "events_dropped": 5,
    "something_new": 6,
    "unjudged_open": 8,
    "unjudged_closed": 0,
    "proxies_attached": 2,
}
HISTOGRAMS = {"text": [0, 5, 3, 0], "total": [0, 1, 6, 1]}


def collector(tally: Tally, transport: Callable[[], Mapping[str, float]] = dict) -> Outrider:
    return Outrider(
        lambda: COUNTERS,
        lambda: HISTOGRAMS,
        [1.0, 10.0, 100.0],
        transport,
        tally,
        lambda: {"ready": ("1 while requests are accepted.", 1.0)},
        "9.9",
        lambda: "observe",
    )


class State:
    def __init__(self) -> None:
        self.healthy, self.ready = (True, "ok"), (False, "starting")


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def admin(state: State) -> Iterator[AdminServer]:
    tally = Tally()
    tally.add("config_reloads", "refused")
    registry = make_registry(collector(tally, lambda: {"streams": 2, "messages_total": 30}))
    server = AdminServer(Address(None, "127.0.0.1", 0), registry, lambda: state.healthy, lambda: state.ready)
    yield server
    server.close()


def get(admin: AdminServer, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", admin.address.port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_probes_follow_the_state(admin: AdminServer, state: State) -> None:
    assert get(admin, "/healthz") == (200, "ok\n")
    assert get(admin, "/readyz") == (503, "starting\n")
    state.ready = (True, "ok")
    assert get(admin, "/readyz?verbose") == (200, "ok\n")
    state.healthy = (False, "the event loop is 12 s late")
    assert get(admin, "/healthz") == (503, "the event loop is 12 s late\n")
    assert get(admin, "/readyz", "HEAD") == (200, "")
    assert get(admin, "/nothing")[0] == 404
    assert get(admin, "/")[0] == 200


def test_metrics_name_what_the_arena_counted(admin: AdminServer) -> None:
    status, text = get(admin, "/metrics")
    found = samples(text)
    assert status == 200
    assert found["outrider_requests_total", ()] == 10
    assert found["outrider_decisions_total", (("action", "allow"),)] == 7
    assert found["outrider_enforced_total", (("action", "block"),)] == 2
    assert found["outrider_stages_skipped_total", (("stage", "text"),)] == 1
    assert found["outrider_budget_overruns_total", ()] == 4
    assert found["outrider_something_new_total", ()] == 6
    assert found["outrider_unjudged_total", (("outcome", "open"),)] == 8
    assert found["outrider_unjudged_total", (("outcome", "closed"),)] == 0
    assert found["outrider_proxies_attached_total", ()] == 2
    assert found["outrider_transport_streams", ()] == 2
    assert found["outrider_transport_messages_total", ()] == 30
    assert found["outrider_config_reloads_total", (("result", "refused"),)] == 1
    assert found["outrider_config_reloads_total", (("result", "applied"),)] == 0
    assert found["outrider_ready", ()] == 1
    (info,) = [dict(labels) for name, labels in found if name == "outrider_build_info"]
    assert (info["version"], info["mode"]) == ("9.9", "observe")
    assert found["outrider_process_start_time_seconds", ()] > 0


def test_every_metric_has_our_prefix_and_no_label_of_a_client(admin: AdminServer) -> None:
    names, labels = set(), set()
    for family in text_string_to_metric_families(get(admin, "/metrics")[1]):
        names.add(family.name)
        for sample in family.samples:
            labels |= set(sample.labels)
    assert all(name.startswith("outrider_") for name in names)
    assert labels <= {"le", "action", "stage", "result", "outcome", "version", "python", "mode"}


def test_histograms_are_cumulative_in_seconds(admin: AdminServer) -> None:
    found = samples(get(admin, "/metrics")[1])
    stage = "outrider_stage_duration_seconds_bucket"
    rows = {dict(labels)["le"]: value for (name, labels), value in found.items() if name == stage}
    assert rows == {"1e-06": 0, "1e-05": 5, "0.0001": 8, "+Inf": 8}
    assert found["outrider_stage_duration_seconds_count", (("stage", "text"),)] == 8
    total = "outrider_decision_duration_seconds_count"
    assert [value for (name, _), value in found.items() if name == total] == [8]


def test_the_estimated_sum_lies_between_the_buckets_edges() -> None:
    family = histogram("h", "", "stage", {"a": [2, 3, 0]}, [1.0, 10.0])
    (total,) = [s.value for s in family.samples if s.name == "h_sum"]
    assert 3 * 1e-6 < total < 2e-6 + 3 * 10e-6


def test_a_failing_collector_is_an_error_page_and_not_the_end(state: State) -> None:
    broken = collector(Tally())
    broken.counters = lambda: 1 // 0  # type: ignore[assignment, return-value]
    server = AdminServer(
        Address(None, "127.0.0.1", 0), make_registry(broken), lambda: state.healthy, lambda: state.ready
    )
    try:
        assert get(server, "/metrics") == (500, "metrics can't be read\n")
        assert get(server, "/healthz")[0] == 200
    finally:
        server.close()


def test_garbage_and_silent_connections_cost_nothing(admin: AdminServer) -> None:
    idle = [socket.create_connection(("127.0.0.1", admin.address.port)) for _ in range(CONNECTIONS_MAX - 1)]
    try:
        with socket.create_connection(("127.0.0.1", admin.address.port), timeout=5) as garbage:
            garbage.sendall(b"\x16\x03\x01\x00\xff\r\n\r\n")
            garbage.settimeout(5)
            assert b"200" not in garbage.recv(4096)
        deadline = time.monotonic() + 10
        while True:  # the garbage's own slot is free again in a moment
            try:
                assert get(admin, "/healthz")[0] == 200
                break
            except (http.client.HTTPException, ConnectionError):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        for one in idle:
            one.close()


def test_connections_beyond_the_limit_are_closed(admin: AdminServer) -> None:
    idle = [socket.create_connection(("127.0.0.1", admin.address.port)) for _ in range(CONNECTIONS_MAX)]
    try:
        time.sleep(0.5)
        with socket.create_connection(("127.0.0.1", admin.address.port), timeout=5) as more:
            assert more.recv(1) == b""
    finally:
        for one in idle:
            one.close()


def test_an_address_in_use_is_said(admin: AdminServer, state: State) -> None:
    with pytest.raises(StartupError, match=r"admin.address: 127.0.0.1:\d+ is in use"):
        AdminServer(
            Address(None, "127.0.0.1", admin.address.port),
            make_registry(collector(Tally())),
            lambda: state.healthy,
            lambda: state.ready,
        )
