"""The simulator: the same seed gives the same log, and people and attackers look as they should."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import orjson
import pytest
from click.testing import CliRunner

from sidecar.commands.simulate import command
from sidecar.records import RequestRecord, read
from sidecar.records.jsonlines import dump
from sidecar.simulate import ATTACKS, Attack, Scenario, simulate
from sidecar.simulate.draws import Draws
from sidecar.simulate.people import AT_HOME, AT_WORK, rhythm
from sidecar.simulate.service import draw_service, uuid

EVERY = tuple(Attack(name, variant) for name, variants in ATTACKS.items() for variant in variants)


@cache
def day(seed: int = 1) -> tuple[RequestRecord, ...]:
    return tuple(simulate(Scenario(users=150, hours=24, seed=seed, machines=False)))


@cache
def attack(name: str, variant: str, seed: int = 1) -> tuple[RequestRecord, ...]:
    scenario = Scenario(users=20, hours=6, seed=seed, attacks=(Attack(name, variant),), machines=False)
    return tuple(record for record in simulate(scenario) if record.label)


def test_a_seed_is_a_log() -> None:
    scenario = Scenario(users=30, hours=3, seed=5, attacks=EVERY, start_hour=15, intensity=0.1)
    first = [dump(record) for record in simulate(scenario)]
    assert first == [dump(record) for record in simulate(scenario)]
    assert len(first) > 5000
    other = [dump(r) for r in simulate(Scenario(users=30, hours=3, seed=6, start_hour=15))]
    assert not set(first) & set(other)


def test_records_come_in_the_order_of_time_and_are_whole() -> None:
    scenario = Scenario(users=60, hours=5, seed=2, attacks=EVERY, start_hour=14, intensity=0.2)
    last = scenario.first_ts
    ids = set()
    for record in simulate(scenario):
        assert record.ts is not None
        assert last <= record.ts < scenario.end_ts
        last = record.ts
        ids.add(record.id)
        assert record.method.isupper()
        assert record.url.startswith("/")
        assert record.client
        assert record.label in (0, 1)
        assert (record.label == 1) == (record.cls in ATTACKS)
        assert record.status is not None
        assert 200 <= record.status < 600
        assert record.response_ms is not None
        assert 0 < record.response_ms < 600_000
        assert record.header("host")
        assert record.header("user-agent")
        if record.body:
            assert record.header("content-length") == str(len(record.body))
            if record.header("content-type") == "application/json":
                orjson.loads(record.body)
    assert len(ids) > 5000


def test_addresses_belong_to_nobody() -> None:
    import ipaddress

    ranges = [
        ipaddress.ip_network(text)
        for text in (
            "10.0.0.0/8",
            "172.16.0.0/12",
            "100.64.0.0/10",
            "192.0.2.0/24",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "198.18.0.0/15",
            "2001:db8::/32",
        )
    ]
    scenario = Scenario(users=300, hours=12, seed=3, attacks=EVERY)
    for client in {record.client for record in simulate(scenario)}:
        address = ipaddress.ip_address(client or "")
        assert any(address in network for network in ranges), client


def test_people_come_by_day() -> None:
    hours = Counter(int((record.ts or 0) // 3600) % 24 for seed in (1, 2, 3, 4) for record in day(seed))
    night = sum(hours[h] for h in (1, 2, 3))
    evening = sum(hours[h] for h in (18, 19, 20))
    assert evening > 3 * night
    week = Counter(
        int((r.ts or 0) // 86400)
        for r in simulate(Scenario(users=80, hours=24 * 7, seed=4, machines=False))
        if (r.client or "").startswith("192.0.2.")
    )
    days = [count for _, count in sorted(week.items())]
    assert sum(days[5:]) < 0.35 * sum(days[:2])  # offices rest on Saturday and Sunday


def test_rhythm_follows_its_table() -> None:
    monday = 1_767_571_200.0
    for hour in range(24):
        assert rhythm(False, monday + hour * 3600, 0) == pytest.approx(AT_HOME[hour])
        assert rhythm(True, monday + hour * 3600, 3600) == pytest.approx(AT_WORK[(hour + 1) % 24])
    assert rhythm(True, monday + 5 * 86400 + 36000, 0) < 0.2 * rhythm(True, monday + 36000, 0)
    assert rhythm(False, monday + 12.5 * 3600, 0) == pytest.approx((AT_HOME[12] + AT_HOME[13]) / 2)


def test_logins_fail_now_and_then() -> None:
    streaks: dict[str, int] = defaultdict(int)
    worst = fails = wins = 0
    for seed in range(1, 5):
        service = draw_service(seed, 150)
        streaks.clear()
        for record in day(seed):
            if (
                record.method == "POST"
                and record.url == service.login_path
                and record.status in (200, service.failed_login)
            ):
                user = (
                    json.loads(record.body or b"{}").get(service.user_field)
                    if not service.login_form
                    else (record.body or b"").split(b"&")[0].decode()
                )
                if record.status == 200:
                    wins += 1
                    streaks[user] = 0
                else:
                    fails += 1
                    streaks[user] += 1
                    worst = max(worst, streaks[user])
    assert wins > 200
    assert 0.05 < fails / (fails + wins) < 0.3
    assert 1 < worst <= 6


def test_many_sit_behind_one_address() -> None:
    people: dict[str, set[str]] = defaultdict(set)
    for record in day():
        if record.principal:
            people[record.client or ""].add(record.principal)
    assert max(map(len, people.values())) >= 8
    assert sum(len(who) == 1 for who in people.values()) > len(people) / 2


def test_the_day_has_all_that_normal_traffic_has() -> None:
    records = list(simulate(Scenario(users=200, hours=24, seed=9)))
    methods = Counter(record.method for record in records)
    statuses = Counter(record.status for record in records)
    assert {"GET", "POST", "PUT", "PATCH", "DELETE"} <= set(methods)
    assert {200, 201, 204, 304, 404, 500, 502} <= set(statuses)
    assert 0.0005 < (statuses[500] + statuses[502]) / len(records) < 0.004
    classes = Counter(record.cls for record in records)
    assert set(classes) == {"user_web", "user_mobile", "crawler", "health_check", "integration"}
    users = [r for r in records if (r.cls or "").startswith("user_")]
    missing = sum(r.status == 404 for r in users) / len(users)
    assert 0.001 < missing < 0.03
    probes = [r.ts or 0 for r in records if r.cls == "health_check" and r.header("user-agent") == "Envoy/HC"]
    assert np.std(np.diff(probes)) < 0.05
    agents = {r.header("user-agent") for r in users}
    assert len(agents) > 50


@pytest.mark.parametrize("variant", ATTACKS["brute_force"])
def test_brute_force(variant: str) -> None:
    records = attack("brute_force", variant)
    logins = [r for r in records if r.method == "POST"]
    assert len({r.client for r in records}) == 1
    assert len(logins) > 0.9 * len(records)
    assert len(logins) > 80
    assert sum(r.status not in (200, 500, 502) for r in logins) > 0.9 * len(logins)
    bodies = {r.body for r in logins}
    assert len(bodies) > 0.5 * len(logins)
    gap = np.median(np.diff([r.ts or 0 for r in logins]))
    low, high = {"fast": (0, 1.2), "medium": (0.9, 6), "slow": (12, 50)}[variant]
    assert low < gap < high


@pytest.mark.parametrize("variant", ATTACKS["credential_stuffing"])
def test_credential_stuffing(variant: str) -> None:
    records = [r for r in attack("credential_stuffing", variant) if r.method == "POST"]
    sources = Counter(r.client for r in records)
    assert (len(sources) == 1) == (variant == "single")
    if variant == "distributed":
        assert len(sources) > 100
        assert max(sources.values()) <= 10  # each source stays below what one could notice
    assert len({r.body for r in records}) > 0.97 * len(records)
    assert 0 < sum(r.status == 200 for r in records) < 0.05 * len(records)


@pytest.mark.parametrize("variant", ATTACKS["scraping"])
def test_scraping(variant: str) -> None:
    records = attack("scraping", variant)
    assert (len({r.client for r in records}) == 1) == (variant == "single")
    assert {r.method for r in records} == {"GET"}
    assert not any("/static/" in r.url for r in records)
    assert len({r.url for r in records}) > 0.2 * len(records)
    assert sum(r.status == 200 for r in records) > 0.9 * len(records)


@pytest.mark.parametrize("variant", ATTACKS["object_enumeration"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_object_enumeration(variant: str, seed: int) -> None:
    records = attack("object_enumeration", variant, seed)
    numbers = [
        int(found)
        for r in records
        for found in [r.url.split("?")[0].replace("/receipt.pdf", "").rsplit("/", 1)[-1]]
        if found.isdigit()
    ]
    assert len({r.client for r in records}) == 1
    assert len(set(numbers)) == len(numbers)
    assert len(numbers) >= 40
    assert max(numbers) - min(numbers) < 2 * len(numbers) + 50  # a dense range of ids
    steps = Counter(b - a for a, b in itertools.pairwise(numbers))
    if variant == "sequential":
        assert steps[1] == len(numbers) - 1
    if variant == "shuffled":
        assert steps[1] < 0.2 * len(numbers)
    if variant == "guarded":
        assert sum(r.status == 403 for r in records) > 0.6 * len(records)


@pytest.mark.parametrize("variant", ATTACKS["scanning"])
def test_scanning(variant: str) -> None:
    records = attack("scanning", variant)
    assert sum(r.status in (404, 403, 401, 405) for r in records) > 0.85 * len(records)
    assert len({r.url for r in records}) > 0.5 * len(records)
    assert any("/.env" in r.url for r in records)


@pytest.mark.parametrize("variant", ATTACKS["ddos"])
def test_ddos(variant: str) -> None:
    records = attack("ddos", variant)
    sources = Counter(r.client for r in records)
    assert (len(sources) == 1) if variant == "single" else (len(sources) > 150)
    seconds = Counter(int(r.ts or 0) for r in records)
    assert max(seconds.values()) > 20
    if variant == "burst":
        assert sum(r.status in (503, 504) for r in records) > 0  # the service gives way


def test_a_flood_hurts_everyone() -> None:
    scenario = Scenario(users=100, hours=2, seed=3, attacks=(Attack("ddos", "burst"),), start_hour=17)
    records = list(simulate(scenario))
    times = [r.ts or 0 for r in records if r.label]
    inside = [r for r in records if not r.label and times[0] + 20 < (r.ts or 0) < times[-1] - 20]
    outside = [r for r in records if not r.label and not times[0] <= (r.ts or 0) <= times[-1] + 30]
    assert sum((r.status or 0) >= 503 for r in inside) > 0.05 * len(inside)
    assert sum((r.status or 0) >= 503 for r in outside) < 0.01 * len(outside)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"users": -1}, "users"),
        ({"users": 10**7}, "users"),
        ({"hours": 1e9}, "hours"),
        ({"hours": float("nan")}, "hours"),
        ({"intensity": 0}, "intensity"),
        ({"attacks": (Attack("ddos"),) * 2000}, "attacks"),
    ],
)
def test_scenarios_out_of_range(values: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Scenario(**values)  # type: ignore[arg-type]


def test_draws() -> None:
    d = Draws(1, 2, 3)
    assert [d.u() for _ in range(300)] != [Draws(1, 2, 4).u() for _ in range(300)]
    numbers = [d.integer(3, 5) for _ in range(1000)]
    assert set(numbers) == {3, 4, 5}
    assert np.mean([d.wait(7.0) for _ in range(5000)]) == pytest.approx(7, rel=0.1)
    assert np.mean([d.count(2.0, 100) for _ in range(5000)]) == pytest.approx(2, rel=0.1)
    assert np.median([d.lognormal(9.0, 1.0) for _ in range(5000)]) == pytest.approx(9, rel=0.1)
    assert sorted(d.shuffled(range(50))) == list(range(50))
    assert len(d.hex(7)) == 7
    assert len({uuid(1, n) for n in range(10_000)}) == 10_000


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl.gz"
    result = CliRunner().invoke(
        command,
        [
            "--users",
            "20",
            "--hours",
            "1",
            "--start-hour",
            "18",
            "--attack",
            "brute_force:medium",
            "--attack",
            "scanning",
            "--out",
            str(out),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "brute_force" in result.stderr
    reader = read(out, strict=True)
    assert {r.cls for r in reader} >= {"brute_force", "scanning", "user_web", "health_check"}
    assert reader.reports[0].records > 100
    result = CliRunner().invoke(command, ["--attack", "phishing"])
    assert result.exit_code == 2
    assert "object_enumeration" in result.stderr
    result = CliRunner().invoke(
        command, ["--users", "1", "--hours", "0.1", "--out", str(tmp_path / "no" / "x")]
    )
    assert result.exit_code == 1
