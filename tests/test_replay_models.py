"""Replay with the default bundle: real and simulated traffic, thresholds as shipped."""
from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.core import DEFAULT_BUNDLE
from sidecar.records import RequestRecord, read
from sidecar.replay import Decider, Summary, open_offline
from sidecar.simulate import Attack, Scenario, simulate

pytestmark = pytest.mark.skipif(
    not (DEFAULT_BUNDLE / "manifest.json").exists(), reason="no default bundle here (make default-models)"
)


def replayed(records: object) -> Summary:
    core = open_offline()
    decider, summary = Decider(core), Summary()
    for one in decider.decide(records):  # type: ignore[arg-type]
        summary.add(one, decider.output(one))
    core.close()
    return summary


def test_a_real_site_is_left_in_peace(data_dir: Path) -> None:
    summary = replayed(read(data_dir / "log_apache_2015.jsonl.gz"))
    assert summary.requests == 10_000
    assert summary.refused_requests <= 20


@pytest.mark.parametrize("name", ["acunetix", "netsparker"])
def test_real_scanners_are_found(data_dir: Path, name: str) -> None:
    summary = replayed(read(data_dir / f"log_scan_{name}.jsonl.gz"))
    (client,) = (client for _, client in summary.refused_clients())
    assert client.requests_until_refused <= 100
    assert client.refused > 0.1 * client.requests


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_attackers_among_normal_users(seed: int) -> None:
    attacks = (Attack("brute_force", ("fast", "medium", "slow")[seed % 3]), Attack("object_enumeration"))
    summary = replayed(simulate(Scenario(users=150, hours=6, seed=seed, attacks=attacks, start_hour=10)))
    refused = [client for _, client in summary.refused_clients()]
    assert {client.cls for client in refused} == {"brute_force", "object_enumeration"}
    assert all(client.requests_until_refused <= 50 for client in refused)


def test_text_is_judged_without_client_or_time() -> None:
    bad = "/search?q=1%27%20UNION%20SELECT%20password%20FROM%20users--"
    summary = replayed([RequestRecord("GET", "/search?q=blue+lamp"), RequestRecord("GET", bad)])
    assert (summary.requests, summary.refused_requests, summary.text_only) == (2, 1, 2)
    assert summary.reasons["sql_injection"] == 1
