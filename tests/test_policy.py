"""Settings -> policy: routes, methods, thresholds, ranges."""
from __future__ import annotations

import ipaddress
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native.engine import Engine
from native.extproc import ExtProcStream
from sidecar.config import Settings, loads
from sidecar.core import Core, open_core
from sidecar.policy import disjoint_ranges
from tests.extproc_messages import pb, request_headers, set_headers

HEALTH = ((":method", "GET"), (":path", "/healthz"), (":authority", "a"), (":scheme", "https"))


def core_of(text: str) -> Core:
    return open_core(loads(text, "test"), private=True, load_models=False)


def route_of(engine: Engine, method: str, path: str) -> int:
    return int(engine.decide(method, path, client="192.0.2.1").record()["route"])


ROUTES = """
routes:
  - {name: exact, path: /login, methods: [POST], budget: 200us, login: true}
  - {name: star, path: /users/*/orders, budget: 300us}
  - {name: health, path: /healthz, exempt: true}
  - {name: deep, path: /api/**, thresholds: {block: null}}
"""


@pytest.mark.parametrize(
    ("method", "path", "index"),
    [
        ("POST", "/login", 1),
        ("GET", "/login", 0),
        ("POST", "/login/", 0),
        ("POST", "/login?next=/", 1),
        ("GET", "/users/17/orders", 2),
        ("GET", "/users//17//orders", 2),
        ("GET", "/users//orders", 0),  # slashes are merged: there is no id between them
        ("GET", "/users/a%2Fb/orders", 0),
        ("GET", "/users/17/%6frders", 2),
        ("GET", "/./users/x/../17/orders/.", 0),
        ("GET", "/x/..//users/17/orders", 2),
        ("GET", "/users/17/..%2f17/%2e/orders", 2),
        ("GET", "/users\\17%5corders", 2),
        ("GET", "/users/17%252Forders", 0),  # unescaped once, as the service will
        ("GET", "http://shop.example/users/17/orders", 2),
        ("GET", "http://shop.example", 0),
        ("GET", "/../../../users/17/orders", 2),
        ("GET", "/%", 0),
        ("GET", "/api/%zz", 4),
        ("GET", "/users/17/x/orders", 0),
        ("GET", "/users/17/orders/1", 0),
        ("GET", "/healthz", 3),
        ("GET", "/api", 4),
        ("GET", "/api/", 4),
        ("GET", "/api/a/b/c", 4),
        ("GET", "/apix", 0),
        ("GET", "/", 0),
        ("GET", "", 0),
    ],
)
def test_routes(method: str, path: str, index: int) -> None:
    core = core_of(ROUTES)
    assert route_of(core.engine(), method, path) == index


@pytest.mark.parametrize(
    "weaker",
    [
        "exempt: true",
        "mode: observe",
        "body: none",
        "body_limit: 1KiB",
        "thresholds: {block: 0.99999}",
        "thresholds: {block: null}",
    ],
)
def test_only_the_plain_spelling_buys_a_weaker_route(weaker: str) -> None:
    """A service that reads the target differently would serve something else to a request nobody looked at."""
    core = core_of(f"routes: [{{name: weak, path: /status/*, {weaker}}}]")
    plain = ["/status/a", "/status/a?x=/../b", "/status/a%20b"]
    odd = ["/x/%2e%2e/status/a", "/status//a", "/status/b/..%2fa", "/%73tatus/a", "/status/x#", "/status\\a",
           "http://shop.example//status/a", "/x/../status/a"]
    assert [route_of(core.engine(), "GET", path) for path in plain] == [1] * 3
    assert [route_of(core.engine(), "GET", path) for path in odd] == [0] * len(odd)


def test_any_spelling_comes_under_a_stricter_route() -> None:
    core = core_of("routes: [{name: strict, path: /login, thresholds: {block: 0.85}}]")
    for path in ("/login", "//login", "/x/../login", "/log%69n", "/login#x", "/./login", "/login?x"):
        assert route_of(core.engine(), "POST", path) == 1


def test_a_route_overrides_and_inherits() -> None:
    core = core_of(ROUTES + "latency: {budget: 3ms}\n")
    engine = core.engine()
    login = engine.decide("POST", "/login", client="192.0.2.1").record()
    other = engine.decide("GET", "/x", client="192.0.2.1").record()
    assert (login["budget_us"], other["budget_us"]) == (200, 3000)
    core = core_of("routes: [{name: quiet, path: /x, mode: observe}]")
    assert core.engine().decide("GET", "/x", client="192.0.2.1").record()["mode"] == "observe"


def test_new_settings_apply_at_once_to_running_engines() -> None:
    core = core_of("service: {mode: enforce}")
    engine = core.engine()
    assert engine.decide("GET", "/").record()["mode"] == "enforce"
    core.reload(loads("service: {mode: observe}", "test"))
    assert engine.decide("GET", "/").record()["mode"] == "observe"


def test_lists_and_their_order() -> None:
    core = core_of("lists: {block: [192.0.2.0/24, '2001:db8::/32'], allow: [192.0.2.128/25]}")
    engine = core.engine()
    assert engine.decide("GET", "/", client="192.0.2.5").reasons == ["blocked_range"]
    assert engine.decide("GET", "/", client="192.0.2.200").action == "allow"
    assert engine.decide("GET", "/", client="2001:db8:1::1").action == "block"
    assert engine.decide("GET", "/", client="198.51.100.1").action == "allow"


def test_allow_listed_clients_are_never_refused_but_it_shows() -> None:
    core = core_of("lists: {allow: [192.0.2.1]}")
    engine = core.engine()
    for i in range(30):
        verdict = engine.decide("POST", "/login", client="192.0.2.1", ts=1000.0 + i)
        engine.respond(verdict, 401, ts=1000.5 + i)
    assert verdict.action == "tag"
    assert verdict.reasons[-1] == "allow_listed"


def test_exempt_routes_are_not_read() -> None:
    core = core_of(ROUTES)
    verdict = core.engine().decide("GET", "/healthz", client="192.0.2.1")
    assert verdict.reasons == ["exempt_route"]
    assert core.arena.knows("192.0.2.1") == 0


def test_blocked_addresses_stay_blocked_on_exempt_routes() -> None:
    core = core_of(ROUTES + "lists: {block: [192.0.2.1], allow: [192.0.2.2]}\n")
    engine = core.engine()
    verdict = engine.decide("GET", "/healthz", client="192.0.2.1")
    assert (verdict.action, verdict.reasons) == ("block", ["blocked_range"])
    core.arena.block(core.arena.client_key("192.0.2.3"), 60)
    assert engine.decide("GET", "/healthz", client="192.0.2.3").reasons == ["blocked_address"]
    assert engine.decide("GET", "/healthz", client="192.0.2.2").reasons == ["exempt_route"]


def test_a_throttled_client_is_told_the_status_that_it_gets() -> None:
    core = core_of("detectors: {request_flood: {requests: 10}}\nanswers: {throttle: {status: 503, retry_after: 7s}}")
    engine = core.engine()
    request = request_headers([("x-forwarded-for", "192.0.2.1")]).SerializeToString()
    for _ in range(20):
        answer = ExtProcStream(engine.host_address(), engine).message(request)
    assert answer is not None
    refusal = pb.ProcessingResponse.FromString(answer).immediate_response
    assert refusal.status.code == 503
    assert json.loads(refusal.body)["status"] == 503
    assert set_headers(refusal.headers)["retry-after"] == "7"


def test_the_proxy_hears_of_flagged_requests_and_their_route_by_name() -> None:
    core = core_of(ROUTES + "lists: {block: [192.0.2.1]}\n")
    engine = core.engine()

    def metadata(client: str) -> Any:
        request = request_headers([("x-forwarded-for", client)], pseudo=HEALTH).SerializeToString()
        answer = pb.ProcessingResponse.FromString(ExtProcStream(engine.host_address(), engine).message(request))
        found = answer.dynamic_metadata.fields
        return found["outrider"].struct_value.fields if found else None

    named = next(r["name"] for r in core.arena.routes() if r["path"] == "/healthz")
    assert metadata("192.0.2.1")["route"].string_value == named
    assert metadata("192.0.2.9") is None
    core.reload(loads(ROUTES + "answers: {metadata: all}\n"))
    assert metadata("192.0.2.9")["route"].string_value == named


networks = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 32)).map(lambda t: ipaddress.ip_network(t, strict=False)),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(1, 128)).map(
        lambda t: ipaddress.ip_network((t[0], t[1]), strict=False) if t[0] > 2**32 else ipaddress.ip_network("::/1")
    ),
)


@given(st.lists(networks, max_size=12), st.lists(networks, max_size=12), st.data())
def test_ranges_mean_what_the_lists_say(allow: list, block: list, data: st.DataObject) -> None:
    ranges = disjoint_ranges(allow, block)
    for (_, high, _), (low, _, _) in itertools.pairwise(ranges):
        assert high < low  # sorted and disjoint: what the binary search needs
    probes = [n.network_address for n in allow + block] + [n.broadcast_address for n in allow + block]
    probes.append(ipaddress.ip_address(data.draw(st.integers(0, 2**32 - 1))))
    for probe in probes:
        packed = probe.packed if probe.version == 6 else bytes(10) + b"\xff\xff" + probe.packed
        got = next((action for low, high, action in ranges if low <= packed <= high), None)

        def within(networks: list, probe: object = probe) -> bool:
            return any(n.version == probe.version and probe in n for n in networks)

        mapped = probe.version == 6 and probe.ipv4_mapped is not None
        if not mapped and not any(n.version == 6 and ipaddress.ip_address("::ffff:0:0") in n for n in allow + block):
            want = 0 if within(allow) else 4 if within(block) else None
            assert got == want


def test_defaults_compile() -> None:
    core = open_core(Settings(), private=True, load_models=False)
    assert core.engine().decide("GET", "/", client="192.0.2.1").action == "allow"


def test_bodies_offline_are_what_a_proxy_would_have_sent() -> None:
    core = core_of(
        "text: {body: 32B}\nroutes:\n  - {name: none, path: /none, body: none}\n"
        "  - {name: short, path: /short, body_limit: 8B}\n"
    )
    engine = core.engine()

    def body(path: str, n: int) -> tuple[str, list[str]]:
        verdict = engine.decide("POST", path, [("content-type", "text/plain")], b"x" * n, client="192.0.2.1")
        return verdict.record()["body"], verdict.reasons

    assert body("/none", 100) == ("none", [])
    assert body("/short", 8) == ("whole", [])
    assert body("/short", 9) == ("part", ["body_part"])
    assert body("/", 32) == ("whole", [])
    assert body("/", 100_000) == ("part", ["body_part"])
    assert core.arena.counters()["bodies_in_part"] == 2
