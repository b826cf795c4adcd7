"""A scenario, and the traffic that comes of it in the order of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from sidecar.records.model import RequestRecord
from sidecar.simulate.actor import Actor
from sidecar.simulate.attacks import Attack, Field, launch
from sidecar.simulate.draws import Draws
from sidecar.simulate.machines import crawler, health_check, integration
from sidecar.simulate.people import person
from sidecar.simulate.service import Load, Service, draw_service

START_TS = 1_767_571_200.0  # Monday 2026-01-05, 00:00 UTC: fixed, so that a seed is a log
USERS_MAX = 1_000_000
HOURS_MAX = 24.0 * 366
ATTACKS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Scenario:
    """`users` people over `hours` from `start_ts` (unix seconds), with these attacks somewhere in the
    middle. The same values give the same records. ValueError when something is out of range."""

    users: int = 200
    hours: float = 24.0
    seed: int = 0
    attacks: tuple[Attack, ...] = ()
    start_ts: float = START_TS
    machines: bool = True  # health checks, crawlers, integrations
    intensity: float = 1.0  # of the attacks
    start_hour: float = field(default=0.0)  # of the day, UTC; short logs want to begin by day

    def __post_init__(self) -> None:
        for name, low, high in (
            ("users", 0, USERS_MAX),
            ("hours", 0.0, HOURS_MAX),
            ("seed", 0, 2**63 - 1),
            ("intensity", 0.001, 1000.0),
            ("start_hour", 0.0, 24.0),
            ("start_ts", 0.0, 2.0e11),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low:,} and {high:,}, not {value:,}")
        if len(self.attacks) > ATTACKS_MAX:
            raise ValueError(f"more than {ATTACKS_MAX:,} attacks")

    @property
    def first_ts(self) -> float:
        return self.start_ts + self.start_hour * 3600.0

    @property
    def end_ts(self) -> float:
        return self.first_ts + self.hours * 3600.0


def simulate(scenario: Scenario) -> Iterator[RequestRecord]:
    """The records, by time. Memory grows with the number of clients (about 4 KB each), not of records."""
    start, end, seed = scenario.first_ts, scenario.end_ts, scenario.seed
    service = draw_service(seed, scenario.users)
    # room for the evening's peak several times over; a flood still brings it down
    load = Load(60.0 + scenario.users * 0.05, Draws(seed, 5, 0))
    queue: list[tuple[float, int, Actor, RequestRecord]] = []
    for number, actor in enumerate(_actors(scenario, service, start, end)):
        first = next(actor, None)
        if first is not None:
            queue.append((first.ts or start, number, actor, first))
    heapify(queue)
    count = 0
    prefix = f"sim-{seed:x}-"
    while queue:
        ts, number, actor, record = queue[0]
        status, response_ms = load.answer(ts, record.status or 200, record.response_ms or 0.0)
        record.status, record.response_ms = status, round(response_ms, 3)
        record.ts = round(ts, 6)
        record.id = f"{prefix}{count:08x}"
        try:
            following = actor.send(status)
        except StopIteration:
            heappop(queue)
        else:
            # an actor's parallel requests may overlap; its own order stays, time never runs back
            later = following.ts or ts
            heapreplace(queue, (later if later > ts else ts, number, actor, following))
        if ts < end:
            count += 1
            yield record


def _actors(scenario: Scenario, service: Service, start: float, end: float) -> Iterator[Actor]:
    seed, users = scenario.seed, scenario.users
    for n in range(users):
        yield person(seed, n, users, service, start, end)
    if scenario.machines:
        for n in range(4):
            yield health_check(seed, n, service, start, end)
        for n in range(min(40, 1 + users // 150)):
            yield crawler(seed, n, service, start, end)
        for n in range(min(200, 1 + users // 80)):
            yield integration(seed, n, service, start, end)
    d = Draws(seed, 6, 0)
    for number, attack in enumerate(scenario.attacks):
        at = start + (end - start) * d.between(0.1, 0.6)
        yield from launch(attack, Field(seed, number, service, at, end, users, scenario.intensity))
