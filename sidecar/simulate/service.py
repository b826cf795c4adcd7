"""The simulated API: its routes, identifiers, latencies and how it suffers under load."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sidecar.simulate.draws import Draws


@dataclass(frozen=True, slots=True)
class Service:
    """The shape of one API. Each seed draws another, so that what is learned isn't its spelling."""

    host: str
    prefix: str  # before every API path
    items: str  # the public collection
    objects: str  # the collection of which everyone owns a part
    login_path: str
    login_form: bool  # form instead of JSON
    user_field: str  # of the login
    failed_login: int  # status
    item_numbers: bool  # items are numbered; else UUIDs. Objects and users are always numbered.
    n_items: int
    first_object: int
    paging: str  # page | offset | cursor
    auth: str  # bearer | cookie | key
    details: bool               # its pages fetch each listed item by itself ("N+1")
    asset_hash: str
    salt: int

    def item(self, n: int) -> str:
        return f"{self.prefix}/{self.items}/{self.item_id(n)}"

    def item_id(self, n: int) -> str:
        return str(1000 + n) if self.item_numbers else uuid(self.salt, n)

    def object(self, n: int) -> str:
        return f"{self.prefix}/{self.objects}/{self.first_object + n}"

    def user(self, n: int) -> str:
        return f"{self.prefix}/users/{self.first_object // 2 + n}"

    def page(self, collection: str, page: int, size: int) -> str:
        if self.paging == "page":
            return f"{self.prefix}/{collection}?page={page + 1}&per_page={size}"
        if self.paging == "offset":
            return f"{self.prefix}/{collection}?offset={page * size}&limit={size}"
        cursor = "" if page == 0 else f"&cursor={uuid(self.salt ^ 7, page).replace('-', '')[:20]}"
        return f"{self.prefix}/{collection}?limit={size}{cursor}"


def draw_service(seed: int, n_users: int) -> Service:
    d = Draws(seed, 0, 0)
    prefix = d.pick(("/api/v1", "/api/v2", "/v1", "/api", "/rest/v3", ""))
    return Service(
        host=d.pick(("api.shop.example", "www.shop.example", "app.example.org", "api.example.net")),
        prefix=prefix,
        items=d.pick(("products", "articles", "listings", "tracks", "recipes")),
        objects=d.pick(("orders", "invoices", "documents", "tickets", "bookings")),
        login_path=prefix
        + d.pick(("/login", "/auth/login", "/session", "/sessions", "/auth/token", "/users/sign_in")),
        login_form=d.chance(0.25),
        user_field=d.pick(("email", "username", "login", "user")),
        failed_login=d.pick((401, 401, 401, 403, 400)),
        item_numbers=d.chance(0.6),
        n_items=max(200, 20 * int(math.sqrt(n_users)) * d.integer(3, 9)),
        first_object=d.integer(1, 9) * 10_000,
        paging=d.pick(("page", "offset", "cursor")),
        auth=d.pick(("bearer", "bearer", "cookie", "key")),
        details=d.chance(0.3),
        asset_hash=d.hex(8),
        salt=d.integer(1, 2**31),
    )


def uuid(salt: int, n: int) -> str:
    """A UUID (version 4 in form) that depends on nothing but its arguments."""
    text = f"{_mix(salt * 2654435761 + n):016x}{_mix(salt + n * 0x9E3779B97F4A7C15):016x}"
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:32]}"


def _mix(x: int) -> int:
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class Load:
    """How busy the service is: answers get slower as its rate nears capacity, and fail beyond it."""

    __slots__ = ("_capacity", "_draws", "_rate", "_ts")
    MEMORY_S = 5.0

    def __init__(self, capacity_per_s: float, draws: Draws) -> None:
        self._capacity, self._draws = capacity_per_s, draws
        self._rate, self._ts = 0.0, 0.0

    def answer(self, ts: float, status: int, response_ms: float) -> tuple[int, float]:
        """Count a request; what became of its status and its time."""
        gap = ts - self._ts
        if gap > 0:
            self._rate *= math.exp(-gap / self.MEMORY_S)
            self._ts = ts
        self._rate += 1.0 / self.MEMORY_S
        use = self._rate / self._capacity
        luck = self._draws.u()
        if use > 0.5:
            response_ms *= min(40.0, 1.0 / max(0.025, 1.0 - use))
            if use > 0.9 and luck < min(0.8, (use - 0.9) * 2.0):
                return (503 if luck < 0.6 else 504), response_ms
        if luck > 0.9985 and status < 500:  # things break now and then on a quiet day too
            return (500 if luck > 0.9993 else 502), response_ms
        return status, response_ms
