"""From judgements to decisions: what a verdict may lead to, and what it may not.

A verdict only ever adds an entry with an expiry. It never clears one, never lets through what the inline models refuse,
and never touches who is on an allow-list. An attack in a request's text bans that payload for everybody; the client
itself is banned only when it keeps coming with others, since an address may be shared. How long follows from the
confidence and from the repetition.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecar.judge.types import Decision, Escalation, Judgement, Scope

CLIENTS_MAX = 65536
SHOWN_CHARS_MAX = 120
CONFIDENT = 0.99  # from here a verdict holds twice as long

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Rules:
    """action: of the entries. flag: P(attack) from which a judgement is one, None: the threshold that the model was
    calibrated with. repeat: flagged requests of one client within repeat_window_s, each with another payload, from
    which the client itself is entered. principals: enter these too, which is safe only where the proxy verifies them.
    allow: never entered by address."""

    action: str = "block"
    flag: float | None = None
    duration_s: float = 600.0
    duration_max_s: float = 86400.0
    repeat: int = 3
    repeat_window_s: float = 600.0
    principals: bool = False
    allow: tuple[Network, ...] = ()


class History:
    """What was flagged of each client lately; the least recent client is forgotten first."""

    def __init__(self, clients_max: int = CLIENTS_MAX) -> None:
        self._clients_max = clients_max
        self._flagged: OrderedDict[int, deque[tuple[float, int]]] = OrderedDict()

    def add(self, client: int, what: int, now: float, window_s: float, most: int) -> int:
        """Takes note; how many different ones there are within the window, `most` at most."""
        seen = self._flagged.setdefault(client, deque(maxlen=most))
        self._flagged.move_to_end(client)
        if len(self._flagged) > self._clients_max:
            self._flagged.popitem(last=False)
        while seen and seen[0][0] < now - window_s:
            seen.popleft()
        if what in (known for _, known in seen):
            return len(seen)
        seen.append((now, what))
        return len(seen)


@dataclass(frozen=True)
class Verdict:
    """judgement: the one that counts. flagged: taken for an attack. decisions: for every pod's blocklist."""

    judgement: Judgement
    flagged: bool
    decisions: tuple[Decision, ...]


def address_decision(address: Address) -> int:
    """The key of decisions about this address: equal everywhere."""
    return int.from_bytes(hashlib.blake2b(address.packed, digest_size=8, person=b"address").digest()) | 1


def decision_id(scope: Scope, key: int) -> str:
    """The same scope and key always have the same one, so that a verdict delivered twice is one entry."""
    return hashlib.blake2b(f"{scope}:{key:016x}".encode(), digest_size=8).hexdigest()


def reach(
    e: Escalation,
    judgements: Sequence[Judgement],
    thresholds: Mapping[str, float],
    rules: Rules,
    history: History,
    now: float,
    who: str,
) -> Verdict:
    """What the judges' opinions of one request lead to: any of them may flag it. thresholds: by model hash, P(attack)
    from which that model flags where rules.flag is None. now: unix seconds by the store's clock. ValueError without a
    judgement."""
    if not judgements:
        raise ValueError("no judgement")

    def margin(j: Judgement) -> float:
        # as a share of what is left above the threshold: models are calibrated differently
        threshold = rules.flag if rules.flag is not None else thresholds.get(j.model, 1.0)
        return (j.malicious - threshold) / max(1e-9, 1.0 - threshold) if j.label is not None else -1e9

    first = max(judgements, key=margin)
    flagged = first.label not in (None, "benign") and margin(first) >= 0
    if not flagged:
        return Verdict(first, False, ())
    entered: list[Decision] = []
    address = _address(e.client)
    allowed = address is not None and any(address in network for network in rules.allow)
    confidence = first.malicious

    def enter(scope: Scope, key: int, times: int, shown: str, to: str = "") -> None:
        seconds = rules.duration_s * 2 ** max(0, times - 1) * (2 if confidence >= CONFIDENT else 1)
        entered.append(
            Decision(
                id=decision_id(scope, key),
                scope=scope,
                key=key,
                action=rules.action,
                label=str(first.label),
                confidence=round(confidence, 6),
                decided=now,
                expires=now + min(seconds, rules.duration_max_s),
                address=to,
                shown=shown,
                provenance={
                    "event": e.id,
                    "model": first.model,
                    "probabilities": {name: round(p, 6) for name, p in first.probabilities.items()},
                    "mass": round(first.mass, 6),
                    "service": e.service,
                    "route": e.route,
                    "why": e.why,
                    "who": who,
                    "times": times,
                },
            )
        )

    is_payload = first.label != "abuse" and e.payload_key != 0
    what = e.payload_key if is_payload else int.from_bytes(hashlib.blake2b(e.id.encode(), digest_size=8).digest())
    most = 4 * max(1, rules.repeat)
    times = history.add(e.client_key, what, now, rules.repeat_window_s, most) if e.client_key else 1
    if is_payload:
        enter("payload", e.payload_key, 1, shown(e.text))
    if times >= rules.repeat:
        if e.client_key and address is not None and not allowed:
            enter("address", address_decision(address), times - rules.repeat + 1, str(address), str(address))
        if e.principal_key and rules.principals and not allowed:
            enter("principal", e.principal_key, times - rules.repeat + 1, f"principal {e.principal_key:016x}")
    return Verdict(first, True, tuple(entered))


def shown(text: str) -> str:
    """For people: the beginning, with whatever could steer a terminal or a page written out."""
    cut = text[:SHOWN_CHARS_MAX]
    return cut.encode("ascii", "backslashreplace").decode().translate(
        {code: f"\\x{code:02x}" for code in (*range(32), 127)}
    ) + ("..." if len(text) > SHOWN_CHARS_MAX else "")


def _address(text: str | None) -> Address | None:
    if text is None:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # one's own machine stands for all who come through a proxy on it
    return None if address.is_loopback or address.is_unspecified else address
