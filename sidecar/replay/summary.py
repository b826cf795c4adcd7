"""What a replay comes to: counts, and who would have been refused and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sidecar.replay.decide import REFUSALS, Decided

ACTIONS = ("allow", "tag", "throttle", "challenge", "block")
CLIENTS_MAX = 2_000_000  # followed one by one; more are told as "at least"
SCORE_BINS = 10


@dataclass(slots=True)
class ClientSummary:
    requests: int = 0
    refused: int = 0
    first_refused_at: float | None = None
    requests_until_refused: int = 0  # its first refused request was its n-th
    cls: str | None = None
    label: int | None = None
    reasons: Counter[str] | None = None
    first: Mapping[str, Any] | None = None  # decision record of the first refusal
    first_request: str = ""


@dataclass(slots=True)
class ClassSummary:
    requests: int = 0
    refused: int = 0
    tagged: int = 0
    clients: set[str] = field(default_factory=set)


class Summary:
    """Add each decision in order; then read, or take `json()`."""

    def __init__(self) -> None:
        self.requests = 0
        self.refused_requests = 0
        self.text_only = 0
        self.actions: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.routes: dict[str, Counter[str]] = {}
        self.clients: dict[str, ClientSummary] = {}
        self.more_clients = False
        self.classes: dict[tuple[int | None, str], ClassSummary] = {}
        self.labelled = False
        self.bins: dict[int | None, list[int]] = {}
        self.first_ts: float | None = None
        self.last_ts: float | None = None

    def add(self, decided: Decided, output: Mapping[str, Any]) -> None:
        """`output` is the decision record of `decided` (Decider.output)."""
        record, refused = decided.record, decided.refused
        self.requests += 1
        self.actions[decided.action] += 1
        self.routes.setdefault(str(output.get("route")), Counter())[decided.action] += 1
        self.text_only += not decided.with_client
        bins = self.bins.setdefault(record.label, [0] * SCORE_BINS)
        bins[min(SCORE_BINS - 1, max(0, int(decided.score * SCORE_BINS)))] += 1
        if record.ts is not None:
            self.first_ts = record.ts if self.first_ts is None else min(self.first_ts, record.ts)
            self.last_ts = record.ts if self.last_ts is None else max(self.last_ts, record.ts)
        names = [str(reason["name"]) for reason in output.get("reasons", ())] if refused else []
        if refused:
            self.refused_requests += 1
            self.reasons.update(names)
        client = self._client(record.client, refused) if record.client is not None else None
        if client is not None:
            client.requests += 1
            if record.cls is not None:
                # an address that is shared counts as hostile from the first attack that came from it
                if record.label or client.cls is None:
                    client.cls, client.label = record.cls, record.label
            elif record.label is not None:
                client.label = max(client.label or 0, record.label)
            if refused:
                if client.reasons is None:
                    client.reasons = Counter()
                    client.first_refused_at, client.requests_until_refused = record.ts, client.requests
                    client.first, client.first_request = output, f"{record.method[:16]} {record.url[:200]}"
                client.refused += 1
                client.reasons.update(names)
        if record.label is not None or record.cls is not None:
            self.labelled = True
            group = self.classes.setdefault((record.label, record.cls or ""), ClassSummary())
            group.requests += 1
            group.refused += refused
            group.tagged += decided.action == "tag"
            if record.client is not None and len(group.clients) < CLIENTS_MAX:
                group.clients.add(record.client)

    def _client(self, name: str, refused: bool) -> ClientSummary | None:
        client = self.clients.get(name)
        if client is None:
            if len(self.clients) >= CLIENTS_MAX and not (refused and len(self.clients) < 2 * CLIENTS_MAX):
                self.more_clients = True
                return None
            client = self.clients[name] = ClientSummary()
        return client

    def refused_clients(self) -> list[tuple[str, ClientSummary]]:
        """By refused requests, the most first."""
        found = [(name, client) for name, client in self.clients.items() if client.refused]
        return sorted(found, key=lambda pair: (-pair[1].refused, pair[0]))

    def json(self) -> dict[str, Any]:
        """Times in unix seconds; reasons by name, the most frequent first."""
        out: dict[str, Any] = {
            "requests": self.requests,
            "clients": len(self.clients),
            "refused_requests": self.refused_requests,
            "refused_clients": [
                {
                    "client": name,
                    "requests": client.requests,
                    "first_refused_at": client.first_refused_at,
                    "reasons": [reason for reason, _ in (client.reasons or Counter()).most_common()],
                    "refused_requests": client.refused,
                    "requests_until_refused": client.requests_until_refused,
                }
                for name, client in self.refused_clients()
            ],
        }
        if self.labelled:
            out["classes"] = [
                {
                    "label": label,
                    "cls": cls,
                    "requests": group.requests,
                    "refused_requests": group.refused,
                    "tagged_requests": group.tagged,
                    "clients": len(group.clients),
                    "refused_clients": sum(
                        self.clients[c].refused > 0 for c in group.clients if c in self.clients
                    ),
                }
                for (label, cls), group in sorted(
                    self.classes.items(), key=lambda item: (item[0][0] or 0, item[0][1])
                )
            ]
        return out


__all__ = ["ACTIONS", "REFUSALS", "ClassSummary", "ClientSummary", "Summary"]
