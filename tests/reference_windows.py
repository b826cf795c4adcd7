"""What native/clients.pxd and native/windows.pxd should compute, in plain Python: the oracle of
tests/test_windows.py. Written for reading; doubles where the core has floats."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LENGTHS_S = (1, 10, 60, 600, 3600)
QUANTITIES = (
    "requests", "writes", "logins", "login_failures", "denied", "missing", "errors", "kilobytes", "objects",
    "objects_refused",
)
STRICT = ("login", "logon", "signin", "sign-in", "sign_in", "xmlrpc")
LOOSE = ("auth", "session", "token", "passw")
MASK = (1 << 64) - 1


def ids_of(path: str, query: str) -> tuple[tuple[Any, ...] | None, tuple[str, ...], int]:
    """(template or None, ids, number of the last id)."""
    template: list[str] = []
    ids: list[str] = []
    number = 0
    for segment in path.split("/"):
        if not segment:
            continue
        found = id_like(segment)
        if found is None:
            template.append(segment)
        else:
            template.append("*")
            ids.append(segment)
            number = found
    for pair in query.split("&"):
        key, equals, value = pair.partition("=")
        if equals and id_key(key):
            found = id_like(value)
            if found is not None:
                template.append("?" + key)
                ids.append(value)
                number = found
    return (tuple(template) if ids else None), tuple(ids), number


def id_key(key: str) -> bool:
    if not 2 <= len(key) <= 40:
        return False
    return key[-2:].lower() == "id" or key in ("user", "order", "account", "invoice", "customer")


def id_like(segment: str) -> int | None:
    """None: not an id; else its trailing number, 0 where it has none."""
    if not segment or len(segment) > 64 or "." in segment or not re.search("[0-9]", segment):
        return None
    digits = re.search("[0-9]+$", segment)
    tail = digits.group() if digits else ""
    number = int(tail[:18]) if tail else 0
    if len(tail) == len(segment):
        return number
    if re.fullmatch("[0-9a-fA-F_-]+", segment) and len(re.sub("[_-]", "", segment)) >= 12:
        return 0
    return number if len(tail) >= 3 else None


@dataclass
class Client:
    """One client's story; request() and response() in the order of time, then features()."""

    spans: dict[int, dict[int, dict[str, float]]] = field(default_factory=lambda: {n: {} for n in LENGTHS_S})
    distinct: dict[str, dict[int, set[Any]]] = field(
        default_factory=lambda: {n: {} for n in ("paths", "objects", "identities", "agents", "templates")}
    )
    times: list[float] = field(default_factory=list)
    gap: tuple[float, float] = (0.0, 0.0)
    size: tuple[float, float] = (0.0, 0.0)
    history: tuple[float, float] = (0.0, 0.0)
    response_mean: float = 0.0
    minute: int | None = None
    last: tuple[Any, int] | None = None
    step: int = 0
    step_run: int = 0
    agent: str | None = None
    agent_changes: int = 0
    fail_streak: int = 0

    def _count(self, t: float, name: str, amount: float = 1.0) -> None:
        for length in LENGTHS_S:
            span = self.spans[length].setdefault(int(t // length), dict.fromkeys(QUANTITIES, 0.0))
            span[name] += amount

    def _fold_minutes(self, t: float) -> None:
        minute = int(t // 60)
        if self.minute is not None and minute > self.minute:
            n = self.spans[60].get(self.minute, {}).get("requests", 0.0)
            self.history = ewma(self.history, math.log1p(n), 0.1)
            for _ in range(min(minute - self.minute - 1, 30)):
                self.history = ewma(self.history, 0.0, 0.1)
        self.minute = minute

    def _see(self, t: float, what: str, item: Any) -> None:
        self.distinct[what].setdefault(int(t // 600), set()).add(item)

    def request(self, t: float, method: str, url: str, agent: str | None, body: int, identity: str | None) -> None:
        parts = urlsplit(url)
        template, ids, number = ids_of(parts.path, parts.query)
        self._fold_minutes(t)
        size = math.log1p(body)
        if self.times:
            gap = math.log((t - self.times[-1]) * 1000 + 1)
            self.gap = (gap, 0.0) if len(self.times) == 1 else ewma(self.gap, gap, 0.1)
            self.size = ewma(self.size, size, 0.05)
        else:
            self.size = (size, 0.0)
        self.times.append(t)
        self._count(t, "requests")
        if method not in ("GET", "HEAD", "OPTIONS"):
            self._count(t, "writes")
        if is_login(method, parts.path) == "strict":
            self._count(t, "logins")
        self._count(t, "kilobytes", body / 1024)
        self._see(t, "paths", parts.path)
        if template is not None:
            self._count(t, "objects")
            self._see(t, "objects", (template, ids))  # the same object, whatever is done with it
            template = (method, *template)
            self._see(t, "templates", template)
            if self.last is not None and self.last[0] == template and number:
                step = number - self.last[1]
                if step:
                    self.step_run = self.step_run + 1 if step == self.step and abs(step) <= 64 else 0
                    self.step = step
            else:
                self.step_run = self.step = 0
            self.last = (template, number)
        elif method in ("GET", "HEAD", "OPTIONS"):
            self.step_run = 0  # a listing, perhaps
        if identity is not None:
            self._see(t, "identities", identity)
        if agent is not None:
            self._see(t, "agents", agent)
            if self.agent is not None and self.agent != agent:
                self.agent_changes += 1
            self.agent = agent

    def response(self, t: float, method: str, url: str, status: int, response_ms: float | None) -> None:
        parts = urlsplit(url)
        login = is_login(method, parts.path)
        template, _, _ = ids_of(parts.path, parts.query)
        self._fold_minutes(t)
        if login == "loose" and status >= 400:
            self._count(t, "logins")
        if login and status in (401, 403, 400, 422, 423, 429):
            self._count(t, "login_failures")
            self.fail_streak += 1
        elif login and 200 <= status < 400:
            self.fail_streak = 0
        elif status in (401, 403):
            self._count(t, "denied")
        elif status in (404, 410):
            self._count(t, "missing")
        elif status >= 500:
            self._count(t, "errors")
        if template is not None and status in (401, 403, 404, 410):
            self._count(t, "objects_refused")
        if response_ms is not None:
            self.response_mean += 0.1 * (math.log1p(response_ms) - self.response_mean)

    def value(self, t: float, length: int, name: str) -> float:
        epoch = int(t // length)
        inside = 1 - (t - epoch * length) / length
        now = self.spans[length].get(epoch, {}).get(name, 0.0)
        return now + self.spans[length].get(epoch - 1, {}).get(name, 0.0) * inside

    def count_distinct(self, t: float, what: str) -> int:
        epoch = int(t // 600)
        return len(self.distinct[what].get(epoch, set()) | self.distinct[what].get(epoch - 1, set()))

    def features(self, t: float) -> dict[str, float]:
        """Those features that do not depend on the route's statistics. Distinct counts are exact here."""
        r10, r60, r600 = (self.value(t, n, "requests") for n in (10, 60, 600))
        logins, failures = self.value(t, 600, "logins"), self.value(t, 600, "login_failures")
        out = {f"requests_{n}s": math.log1p(self.value(t, n, "requests")) for n in LENGTHS_S}
        out |= {
            "burst_10s_in_60s": r10 * 6 / (r60 + 1),
            "burst_60s_in_600s": r60 * 10 / (r600 + 1),
            "rate_against_own_history": (math.log1p(r60) - self.history[0]) / math.sqrt(self.history[1] + 0.09),
            "gap_mean": self.gap[0],
            "gap_deviation": math.sqrt(self.gap[1]),
            "missing_share_60s": share(self.value(t, 60, "missing"), r60),
            "missing_share_600s": share(self.value(t, 600, "missing"), r600),
            "denied_share": share(self.value(t, 600, "denied"), r600),
            "error_share": share(self.value(t, 600, "errors"), r600),
            "logins": math.log1p(logins),
            "login_failures": math.log1p(failures),
            "login_failure_share": share(failures, logins),
            "login_share": share(logins, r600),
            "write_share": share(self.value(t, 600, "writes"), r600),
            "object_share": share(self.value(t, 600, "objects"), r600),
            "object_steps": math.log1p(self.step_run),
            "agent_changes": math.log1p(self.agent_changes),
            "payload_size": self.size[0],
            "response_time": self.response_mean,
            "age": math.log1p(t - self.times[0]),
        }
        return out


def is_login(method: str, path: str) -> str | None:
    if method != "POST":
        return None
    lowered = path[:256].lower()
    if any(word in lowered for word in STRICT):
        return "strict"
    return "loose" if any(word in lowered for word in LOOSE) else None


def share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def ewma(state: tuple[float, float], x: float, alpha: float) -> tuple[float, float]:
    mean, var = state
    d = x - mean
    return mean + alpha * d, (1 - alpha) * (var + alpha * d * d)


def siphash24(data: bytes, k0: int, k1: int) -> int:
    """SipHash-2-4 as the paper writes it, checked in the tests against the paper's own vector."""
    v0, v1 = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D
    v2, v3 = k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573

    def rotate(x: int, b: int) -> int:
        return (x << b | x >> (64 - b)) & MASK

    def rounds(v0: int, v1: int, v2: int, v3: int, n: int) -> tuple[int, int, int, int]:
        for _ in range(n):
            v0 = (v0 + v1) & MASK
            v1 = rotate(v1, 13) ^ v0
            v0 = rotate(v0, 32)
            v2 = (v2 + v3) & MASK
            v3 = rotate(v3, 16) ^ v2
            v0 = (v0 + v3) & MASK
            v3 = rotate(v3, 21) ^ v0
            v2 = (v2 + v1) & MASK
            v1 = rotate(v1, 17) ^ v2
            v2 = rotate(v2, 32)
        return v0, v1, v2, v3

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 255])
    for i in range(0, len(padded), 8):
        m = int.from_bytes(padded[i : i + 8], "little")
        v0, v1, v2, v3 = rounds(v0, v1, v2, v3 ^ m, 2)
        v0 ^= m
    v0, v1, v2, v3 = rounds(v0, v1, v2 ^ 0xFF, v3, 4)
    return v0 ^ v1 ^ v2 ^ v3
