"""Attackers. Each attack is one or many clients; all that they send carries label 1 and the attack's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from sidecar.simulate import clients, words
from sidecar.simulate.actor import Actor, Caller
from sidecar.simulate.draws import Draws
from sidecar.simulate.people import post_login
from sidecar.simulate.service import Service

# name -> variants; the first draw of an attack without a named variant picks one of them
ATTACKS: dict[str, tuple[str, ...]] = {
    "brute_force": ("fast", "medium", "slow"),
    "credential_stuffing": ("single", "distributed"),
    "scraping": ("single", "pool"),
    "object_enumeration": ("sequential", "shuffled", "guarded", "slow"),
    "scanning": ("fast", "careful"),
    "ddos": ("burst", "single"),
}


@dataclass(frozen=True, slots=True)
class Attack:
    name: str
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Attack:
        """`brute_force` or `brute_force:slow`; ValueError names what there is."""
        name, _, variant = text.partition(":")
        if name not in ATTACKS:
            raise ValueError(f"unknown attack {name!r}: one of {', '.join(ATTACKS)}")
        if variant and variant not in ATTACKS[name]:
            raise ValueError(f"{name} has no variant {variant!r}: one of {', '.join(ATTACKS[name])}")
        return cls(name, variant or None)


@dataclass(frozen=True, slots=True)
class Field:
    """Where an attack takes place."""

    seed: int
    number: int  # of the attack in the scenario
    service: Service
    start: float  # its first request is not before
    end: float  # nothing happens after
    n_users: int
    intensity: float  # multiplies the number of sources and requests

    def draws(self, source: int = 0) -> Draws:
        return Draws(self.seed, 1000 + self.number, source)

    def scaled(self, n: float) -> int:
        return max(1, round(n * self.intensity))


def launch(attack: Attack, field: Field) -> Iterator[Actor]:
    """The attack's actors."""
    d = Draws(field.seed, 999, field.number)
    variant = attack.variant or d.pick(ATTACKS[attack.name])
    return _LAUNCH[attack.name](variant, field, d)


def _caller(field: Field, d: Draws, name: str, address: str | None = None, scanner: bool = False) -> Caller:
    headers = clients.hostile_headers(d, field.service.host, scanner)
    return Caller(d, field.service, address or clients.attacker(d), headers, name, 1)


def _guess(d: Draws) -> str:
    word = d.pick(words.COMMON_PASSWORDS)
    return (
        word
        if d.chance(0.4)
        else f"{word}{d.integer(0, 9999)}"
        if d.chance(0.6)
        else f"{d.pick(words.NOUNS)}{d.hex(3)}"
    )


def _victim(d: Draws, field: Field) -> str:
    who = f"{d.pick(words.FIRST_NAMES)}.{d.pick(words.LAST_NAMES)}".replace(" ", ".").replace("'", "")
    who += str(d.integer(0, max(99, field.n_users)))
    return f"{who}@{d.pick(words.MAIL_HOSTS)}" if "mail" in field.service.user_field else who


# -- brute force: many passwords, one account (or a few), one source ---------------------------


def _brute_force(variant: str, field: Field, d: Draws) -> Iterator[Actor]:
    low, high, tries = {"fast": (0.08, 0.6, 400), "medium": (1.0, 5.0, 250), "slow": (15.0, 45.0, 200)}[
        variant
    ]
    yield _guesses(field, d, d.between(low, high), field.scaled(tries * d.between(0.5, 1.5)))


def _guesses(field: Field, d: Draws, gap: float, tries: int) -> Actor:
    caller = _caller(field, d, "brute_force")
    accounts = [_victim(d, field) for _ in range(d.pick((1, 1, 1, 2, 3)))]
    lucky = d.integer(tries // 2, tries) if d.chance(0.25) else -1
    t = field.start
    if d.chance(0.5):
        t, _ = yield from caller.call(t, "GET", "/", 200, 15)
    for i in range(tries):
        if t >= field.end:
            return
        fields = {field.service.user_field: accounts[i % len(accounts)], "password": _guess(d)}
        t, _ = yield from post_login(caller, t, fields, 200 if i == lucky else field.service.failed_login)
        if i == lucky:
            caller.principal = "stolen-0"
            for path in ("/users/me", f"/{field.service.objects}?limit=50"):
                t, _ = yield from caller.call(
                    t + d.between(0.2, 2), "GET", field.service.prefix + path, 200, 25
                )
            return
        t += d.between(0.6, 1.4) * gap


# -- credential stuffing: leaked pairs, each account once ----------------------------------------


def _credential_stuffing(variant: str, field: Field, d: Draws) -> Iterator[Actor]:
    if variant == "single":
        yield _pairs(
            field,
            d,
            clients.attacker(d),
            field.start,
            d.between(0.15, 2.5),
            field.scaled(400 * d.between(0.5, 1.5)),
        )
        return
    sources = field.scaled(d.integer(120, 400))
    spread = min(d.between(1200.0, 5400.0), max(1.0, field.end - field.start))
    for i in range(sources):
        own = field.draws(i)
        yield _pairs(
            field,
            own,
            clients.bot(field.number * 5000 + i),
            field.start + own.between(0, spread * 0.5),
            spread / 8 * own.between(0.5, 1.5),
            own.integer(2, 8),
        )


def _pairs(field: Field, d: Draws, address: str, t: float, gap: float, tries: int) -> Actor:
    caller = _caller(field, d, "credential_stuffing", address)
    t += d.between(0, gap)
    for i in range(tries):
        if t >= field.end:
            return
        fits = d.chance(0.012)
        fields = {field.service.user_field: _victim(d, field), "password": _guess(d)}
        t, got = yield from post_login(caller, t, fields, 200 if fits else field.service.failed_login)
        if got == 200:
            caller.principal = f"stolen-{i}"
            t, _ = yield from caller.call(t + 0.3, "GET", field.service.prefix + "/users/me", 200, 14)
            caller.principal = None
        t += d.between(0.4, 1.6) * gap


# -- scraping: everything that is public, in order, fast -----------------------------------------


def _scraping(variant: str, field: Field, d: Draws) -> Iterator[Actor]:
    sources = 1 if variant == "single" else field.scaled(d.integer(5, 20))
    total = field.scaled(d.integer(800, 2500))
    rate = d.between(2.0, 10.0) if sources == 1 else d.between(0.5, 2.0)
    for i in range(sources):
        yield _copies(field, field.draws(i), i, sources, rate, total // sources)


def _copies(field: Field, d: Draws, part: int, parts: int, rate: float, requests: int) -> Actor:
    s = field.service
    caller = _caller(field, d, "scraping")
    t = field.start + d.between(0, 3)
    item, made, page = part, 0, part
    while made < requests:
        t, _ = yield from caller.call(t, "GET", s.page(s.items, page, 50), 200, 35)
        made += 1
        for _ in range(20):
            if t >= field.end or made >= requests:
                return
            t += d.between(0.5, 1.5) / rate
            gone = d.chance(0.02)
            t, _ = yield from caller.call(t, "GET", s.item(item % s.n_items), 404 if gone else 200, 20)
            made += 1
            item += parts
        page += parts


# -- object enumeration: other people's objects, by their numbers ---------------------------------


def _object_enumeration(variant: str, field: Field, d: Draws) -> Iterator[Actor]:
    yield _numbers(field, d, variant)


def _numbers(field: Field, d: Draws, variant: str) -> Actor:
    s = field.service
    caller = _caller(field, d, "object_enumeration")
    n = d.integer(100, 600) if variant != "slow" else d.integer(60, 200)
    first = d.integer(0, max(1, field.n_users * 40 - n))
    numbers = list(range(first, first + field.scaled(n)))
    if variant == "shuffled" or (variant != "sequential" and d.chance(0.5)):
        numbers = d.shuffled(numbers)
    # what the service answers: it checks ownership, or it doesn't (the flaw that is looked for)
    guarded = variant == "guarded" or d.chance(0.5)
    denied, absent = (
        (d.between(0.75, 0.95), 0.8) if guarded else (d.between(0.0, 0.05), d.between(0.05, 0.45))
    )
    gap = d.between(8.0, 25.0) if variant == "slow" else d.lognormal(0.5, 0.9)
    t = field.start
    if d.chance(0.9):  # mostly with an account of the attacker's own
        who = {s.user_field: _victim(d, field), "password": d.hex(10)}
        t, _ = yield from post_login(caller, t, who, 200)
        caller.principal = f"user-{field.n_users + field.number}"
        caller.headers = (*caller.headers, clients.credential(s.auth, caller.principal, d))
        t, _ = yield from caller.call(t + 0.4, "GET", s.page(s.objects, 0, 20), 200, 30)
    path: Callable[[int], str] = s.user if d.chance(0.3) else s.object
    tail = d.pick(("", "", "", "/receipt.pdf", "?expand=all"))
    for number in numbers:
        t += d.between(0.5, 1.5) * gap
        if t >= field.end:
            return
        luck = d.u()
        status = 403 if luck < denied else 404 if d.chance(absent) else 200
        t, _ = yield from caller.call(t, "GET", path(number) + tail, status, 20)


# -- scanning: what else is there? ------------------------------------------------------------------


def _scanning(variant: str, field: Field, d: Draws) -> Iterator[Actor]:
    yield _probes(field, d, 1.0 / d.between(5, 40) if variant == "fast" else d.between(0.5, 4.0))


def _probes(field: Field, d: Draws, gap: float) -> Actor:
    s = field.service
    caller = _caller(field, d, "scanning", None, True)
    paths = d.shuffled(words.PROBE_PATHS)
    endings = ("", ".bak", ".old", "~", ".swp", ".php", ".json")
    t = field.start
    for i in range(field.scaled(d.integer(150, 600))):
        if t >= field.end:
            return
        path = paths[i % len(paths)]
        if i >= len(paths):
            path = path.rstrip("/") + d.pick(endings[1:])
        if d.chance(0.12):  # looks whether a parameter gives way
            path = (
                f"{s.prefix}/{d.pick(('search', s.items, 'suggest'))}?{d.pick(('q', 'id', 'file', 'url'))}="
                + quote(d.pick(words.PROBE_VALUES))
            )
        luck = d.u()
        status = (
            404 if luck < 0.84 else 403 if luck < 0.9 else 401 if luck < 0.93 else 405 if luck < 0.95 else 200
        )
        method = "GET" if d.chance(0.85) else d.pick(("HEAD", "POST", "OPTIONS", "PUT", "TRACE", "PROPFIND"))
        t, _ = yield from caller.call(t, method, path, status, 8)
        t += d.between(0.3, 1.7) * gap


# -- denial of service ------------------------------------------------------------------------------


def _ddos(variant: str, field: Field, d: Draws) -> Iterator[Actor]:
    lasting = d.between(40.0, 180.0)
    targets = [
        f"{field.service.prefix}/search?q={d.pick(words.NOUNS)}",
        "/",
        field.service.page(field.service.items, 0, 100),
    ]
    target = d.pick(targets)
    buster = d.chance(0.5)
    if variant == "single":
        yield _hammer(field, d, clients.attacker(d), target, buster, 1.0 / d.between(30, 150), lasting / 2)
        return
    for i in range(field.scaled(d.integer(200, 800))):
        own = field.draws(i)
        yield _hammer(
            field,
            own,
            clients.bot(100_000 + field.number * 5000 + i),
            target,
            buster,
            own.between(0.4, 3.0),
            lasting * own.between(0.4, 1.0),
        )


def _hammer(
    field: Field, d: Draws, address: str, target: str, buster: bool, gap: float, lasting: float
) -> Actor:
    caller = _caller(field, d, "ddos", address)
    t = field.start + d.wait(4.0)
    end = min(field.end, t + lasting)
    while t < end:
        url = target + ("&" if "?" in target else "?") + f"{d.hex(3)}={d.hex(8)}" if buster else target
        # doesn't wait for the answer before the next one
        yield from caller.call(t, "GET", url, 200, 60)
        t += d.wait(gap) if math.isfinite(gap) else lasting


_LAUNCH: dict[str, Callable[[str, Field, Draws], Iterator[Actor]]] = {
    "brute_force": _brute_force,
    "credential_stuffing": _credential_stuffing,
    "scraping": _scraping,
    "object_enumeration": _object_enumeration,
    "scanning": _scanning,
    "ddos": _ddos,
}
