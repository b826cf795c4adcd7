"""Settings -> the policy that the data plane reads: everything parsed, inherited and bounded once,
so that nothing is looked up or interpreted while a request waits."""
from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from sidecar.config.types import WINDOWS_S

if TYPE_CHECKING:
    from sidecar.config import Settings

ACTIONS = {"allow": 0, "tag": 1, "throttle": 2, "challenge": 3, "block": 4}
NEVER = 2.0  # a threshold that no score reaches
PAYLOAD_FLOOR_MIN = 0.1  # whatever the thresholds: a text scored lower looks like nothing
METHOD_BITS = {"GET": 1, "HEAD": 2, "POST": 4, "PUT": 8, "PATCH": 16, "DELETE": 32, "OPTIONS": 64}
METHOD_OTHER = 128
BODY_MODES = {"none": 0, "buffered": 1, "streamed": 2}
PRINCIPAL_KINDS = {"header": 1, "cookie": 2, "jwt_claim": 3, "basic": 4}

TELL = {"none": 0, "flagged": 1, "all": 2}
PATH_ANY, PATH_EXACT, PATH_PATTERN = 0, 1, 2
PROBLEM_TYPE = "application/problem+json"
PROBLEM_BODY = '{"type":"about:blank","title":"Request refused","status":%d}\n'


def compile_policy(settings: Settings) -> dict[str, Any]:
    """The dict that ArenaFile.write_policy takes."""
    detectors = settings.detectors
    return {
        "fail_closed": settings.service.failure == "closed",
        "trusted_hops": settings.client.trusted_hops,
        "address_header": settings.client.address_header,
        "block_status": settings.answers.block.status,
        "throttle_status": settings.answers.throttle.status,
        "tell_upstream": TELL[settings.answers.headers],
        "tell_proxy": TELL[settings.answers.metadata],
        "retry_after_s": settings.answers.throttle.retry_after_s,
        "block_type": PROBLEM_TYPE,
        "block_body": PROBLEM_BODY % settings.answers.block.status,
        "throttle_body": PROBLEM_BODY % settings.answers.throttle.status,
        "hold_us": detectors.hold_s * 1_000_000,
        "allow_sample": (
            settings.decision_log.sample
            if settings.decision_log.path is not None and "allow" in settings.decision_log.actions
            else 0.0
        ),
        "escalate_client_ms": 60_000 // settings.escalation.client_per_minute,
        "escalate_all_us": 1_000_000 // settings.escalation.per_second,
        "escalate_text": settings.escalation.text_bytes,
        "skip": list(settings.latency.skip),
        "shed": settings.latency.shed,
        "shed_hold_ms": settings.latency.recover_s * 1000,
        "principals": [
            {
                "kind": PRINCIPAL_KINDS[source.kind],
                "name": source.cookie if source.kind == "cookie" else source.header_name,
                "claim": source.jwt_claim or "",
            }
            for source in settings.client.principal
        ],
        # in the order of DetectorKind in native/policy.pxd
        "detectors": [
            _detector(detectors.brute_force, detectors.brute_force.failures, detectors.brute_force.share),
            _detector(
                detectors.credential_stuffing,
                detectors.credential_stuffing.principals,
                detectors.credential_stuffing.share,
            ),
            _detector(
                detectors.object_enumeration, detectors.object_enumeration.objects, detectors.object_enumeration.share
            ),
            _detector(detectors.scanning, detectors.scanning.paths, detectors.scanning.share),
            _detector(detectors.request_flood, detectors.request_flood.requests, 0.0),
            {
                "enabled": detectors.unusual_behaviour.enabled,
                "action": ACTIONS[detectors.unusual_behaviour.action],
                "window": 3,
                "count": 0.0,
                "share": 0.0,
            },
        ],
        "text": {
            "body_bytes_max": settings.text.body_bytes,
            "decode_rounds": settings.text.decode_rounds,
            "values_max": settings.text.values,
            "windows_max": settings.text.windows,
            "every_header": settings.text.headers is None,
            "headers": list(settings.text.headers or ()),
        },
        "routes": [_route(route) for route in settings.effective_routes()],
        "ranges": disjoint_ranges(settings.lists.allow, settings.lists.block),
    }


def _detector(detector: Any, count: float, share: float) -> dict[str, Any]:
    return {
        "enabled": detector.enabled,
        "action": ACTIONS[detector.action],
        "window": WINDOWS_S.index(detector.window_s),
        "count": float(count),
        "share": float(share),
    }


def _route(route: Any) -> dict[str, Any]:
    methods = 0
    for method in route.methods:
        methods |= METHOD_BITS.get(method, METHOD_OTHER)
    thresholds = route.thresholds
    levels = [NEVER] + [
        NEVER if level is None else level
        for level in (thresholds.tag, thresholds.throttle, thresholds.challenge, thresholds.block)
    ]
    kind = PATH_ANY if route.path in ("/**", "**") else PATH_PATTERN if "*" in route.path else PATH_EXACT
    return {
        "name": route.name,
        "kind": kind,
        "path": route.path,
        "methods": methods,
        "mode": 1 if route.mode == "enforce" else 0,
        "exempt": route.exempt,
        "login": route.login,
        "body_mode": BODY_MODES[route.body],
        "body_limit": route.body_limit_bytes,
        "budget_us": route.budget_us,
        "threshold": levels,
        **_escalation(route.escalation, levels),
    }


def _escalation(escalation: Any, levels: list[float]) -> dict[str, float]:
    """levels: the route's thresholds by action, NEVER where there is none."""
    tag, block = levels[ACTIONS["tag"]], levels[ACTIONS["block"]]
    begin = tag if escalation.uncertain_from is None else escalation.uncertain_from
    end = block if escalation.uncertain_to is None else escalation.uncertain_to
    # a text's score moves a little with the numbers in it, and with others it is still the same payload: hence the half
    floor = max(0.5 * min(tag, 1.0), PAYLOAD_FLOOR_MIN)
    if not escalation.enabled:
        return {
            **dict.fromkeys(("escalate_from", "escalate_to", "escalate_novel"), NEVER),
            "escalate_sample": 0.0,
            "payload_floor": floor,
        }
    return {
        "escalate_from": begin,
        "escalate_to": end,
        "escalate_novel": NEVER if escalation.novel is None else escalation.novel,
        "escalate_sample": escalation.sample,
        "payload_floor": floor,
    }


def _span(network: Any) -> tuple[int, int]:
    """First and last address as 128-bit numbers, IPv4 mapped into ::ffff:0:0/96."""
    net = ipaddress.ip_network(network, strict=False)
    low, high = int(net.network_address), int(net.broadcast_address)
    if net.version == 4:
        low, high = low | 0xFFFF << 32, high | 0xFFFF << 32
    return low, high


def disjoint_ranges(allow: Any, block: Any) -> list[tuple[bytes, bytes, int]]:
    """CIDR ranges -> sorted, disjoint intervals of 16-byte addresses with their action; allow wins."""
    edges: list[tuple[int, int, int]] = []  # address, +1 or -1, list
    for which, networks in ((0, allow), (1, block)):
        for network in networks:
            low, high = _span(network)
            edges.append((low, 1, which))
            edges.append((high + 1, -1, which))
    edges.sort()
    ranges: list[tuple[int, int, int]] = []
    depth = [0, 0]
    start = 0
    for at, step, which in edges:
        action = ACTIONS["allow"] if depth[0] else ACTIONS["block"] if depth[1] else None
        if action is not None and at > start:
            if ranges and ranges[-1][1] + 1 == start and ranges[-1][2] == action:
                ranges[-1] = (ranges[-1][0], at - 1, action)
            else:
                ranges.append((start, at - 1, action))
        depth[which] += step
        start = at
    return [(low.to_bytes(16, "big"), high.to_bytes(16, "big"), action) for low, high, action in ranges]
