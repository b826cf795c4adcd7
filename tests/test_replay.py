"""Replay and score: order, summary, what a person sees, and what the real core finds."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sidecar.commands.replay import command as replay_command
from sidecar.commands.score import command as score_command
from sidecar.reasons import sentence
from sidecar.records import RecordsError, RequestRecord, read, write
from sidecar.replay import Decided, Decider, Summary, in_time, open_offline
from sidecar.replay.order import Disorder, reorder
from sidecar.replay.render import show
from sidecar.simulate import ATTACKS, Attack, Scenario, simulate


def record(ts: float | None, n: int = 0, **more: Any) -> RequestRecord:
    return RequestRecord("GET", f"/{n}", ts=ts, client=more.pop("client", "192.0.2.1"), **more)


# -- order ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), max_size=60), st.integers(1, 80))
def test_reorder_sorts_within_its_window(times: list[float], window: int) -> None:
    disorder = Disorder()
    out = list(reorder((record(ts, i) for i, ts in enumerate(times)), disorder, window))
    assert sorted(r.url for _, _, r in out) == sorted(f"/{i}" for i in range(len(times)))
    keys = [ts for ts, _, _ in out]
    assert keys == sorted(keys)  # also what comes late, at the time it came
    if window >= len(times):
        assert disorder.late == 0
        assert [r.ts for _, _, r in out] == sorted(times)
    assert disorder.late == sum(r.ts != key for key, _, r in out)


def test_reorder_is_bounded_by_bytes_and_keeps_untimed_records_in_place() -> None:
    disorder = Disorder()
    big = [record(float(100 - i), i, body=b"x" * 10_000) for i in range(100)]
    assert len(list(reorder(big, disorder, 1000, 50_000))) == 100
    assert disorder.late > 80
    disorder = Disorder()
    out = list(reorder([record(5.0, 1), record(None, 2), record(3.0, 3), record(None, 4)], disorder))
    assert [r.url for _, _, r in out] == ["/3", "/4", "/1", "/2"]
    assert (disorder.untimed, disorder.late) == (2, 0)


def test_files_are_merged_by_time(tmp_path: Path) -> None:
    paths = []
    everything = [record(float(i), i) for i in range(300)]
    for k in range(3):
        part = everything[k::3]
        random.Random(k).shuffle(part)
        paths.append(tmp_path / f"{k}.jsonl")
        write(paths[-1], part)
    records, readers, disorder = in_time(paths)
    assert list(records) == everything
    assert [reader.reports[0].records for reader in readers] == [100, 100, 100]
    assert disorder.late == 0
    with pytest.raises(RecordsError, match="more than"):
        in_time(["x"] * 1000)


# -- summary -------------------------------------------------------------------------------------------


def decided(r: RequestRecord, action: str = "allow", score: float = 0.0) -> Decided:
    return Decided(r, action, action, score, None, True)


def output(*names: str) -> dict[str, Any]:
    return {
        "route": "default",
        "place": "query.q",
        "reasons": [{"code": 2, "name": name, "value": 0.95} for name in names],
    }


def filled() -> Summary:
    summary = Summary()
    for i in range(8):
        summary.add(decided(record(float(i), i, label=0, cls="user")), output())
    for i in range(5):
        bad = RequestRecord(
            "GET",
            "/\x1b]0;x\x07[bold red]?q=\u202e",
            ts=10.0 + i,
            client="\x1b[2J[red]evil",
            label=1,
            cls="sqli",
        )
        summary.add(
            decided(bad, "block" if i >= 2 else "tag", 0.99), output("sql_injection", "unusual_behaviour")
        )
    summary.add(decided(record(20.0, client="192.0.2.2"), "throttle", 0.8), output("request_flood"))
    summary.add(decided(RequestRecord("GET", "/"), "block", 1.0), output("sql_injection"))
    return summary


def test_summary_as_json() -> None:
    out = filled().json()
    assert (out["requests"], out["clients"], out["refused_requests"]) == (15, 3, 5)
    evil, flood = out["refused_clients"]
    assert evil["client"] == "\x1b[2J[red]evil"
    assert (evil["requests"], evil["first_refused_at"], evil["requests_until_refused"]) == (5, 12.0, 3)
    assert evil["reasons"] == ["sql_injection", "unusual_behaviour"]
    assert (flood["client"], flood["requests"], flood["reasons"]) == ("192.0.2.2", 1, ["request_flood"])
    classes = {(c["label"], c["cls"]): c for c in out["classes"]}
    assert classes[(0, "user")]["refused_requests"] == 0
    assert classes[(1, "sqli")] == {
        "label": 1,
        "cls": "sqli",
        "requests": 5,
        "refused_requests": 3,
        "tagged_requests": 2,
        "clients": 1,
        "refused_clients": 1,
    }
    json.dumps(out)


@pytest.mark.parametrize("width", [60, 200])
def test_what_a_person_sees_cannot_drive_the_terminal(width: int) -> None:
    text = io.StringIO()
    show(Console(file=text, force_terminal=False, width=width), filled(), 0.5, 20, sentence)
    shown = text.getvalue()
    assert not any(c in shown for c in "\x1b\x07\u202e\x00")
    if width == 200:
        assert "[red]" in shown  # as text, not as colour
        assert "5 requests (33.333%) of 2 clients would have been refused" in shown
        assert "query.q looks like SQL injection" in shown
        assert "benign requests refused (false positives): 0 of 8" in shown


def test_empty_summary() -> None:
    text = io.StringIO()
    show(Console(file=text, width=100), Summary(), 0.0, 5, sentence)
    assert "0 requests" in text.getvalue()
    assert Summary().json() == {"requests": 0, "clients": 0, "refused_requests": 0, "refused_clients": []}


# -- with the core ---------------------------------------------------------------------------------------


def replayed(records: Any, **options: Any) -> Summary:
    core = open_offline(load_models=False, **options)
    decider, summary = Decider(core), Summary()
    for one in decider.decide(records):
        summary.add(one, decider.output(one))
    core.close()
    return summary


SINGLE = [
    ("brute_force", "fast"),
    ("brute_force", "medium"),
    ("object_enumeration", "sequential"),
    ("object_enumeration", "shuffled"),
    ("object_enumeration", "guarded"),
]


@pytest.mark.parametrize("seed", range(8))
def test_one_guessing_and_one_enumerating_client_are_found_and_nobody_else(seed: int) -> None:
    attacks = (
        Attack("brute_force", ("fast", "medium")[seed % 2]),
        Attack("object_enumeration", ATTACKS["object_enumeration"][seed % 3]),
    )
    summary = replayed(simulate(Scenario(users=120, hours=3, seed=seed, attacks=attacks, start_hour=16)))
    refused = dict(summary.refused_clients())
    found = {client.cls: client for client in refused.values()}
    assert set(found) == {"brute_force", "object_enumeration"}
    assert len(refused) == 2
    for name, client in found.items():
        assert client.requests_until_refused <= 50, name
        assert name in (client.reasons or {})


@pytest.mark.parametrize("seed", [11, 12])
def test_a_quiet_day_refuses_nobody(seed: int) -> None:
    summary = replayed(simulate(Scenario(users=250, hours=24, seed=seed)))
    assert summary.refused_clients() == []
    assert summary.requests > 20_000


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        ("scanning:fast", 0.8),
        ("scanning:careful", 0.3),
        ("credential_stuffing:single", 0.8),
        ("brute_force:fast", 0.8),
    ],
)
def test_other_attacks(attack: str, share: float) -> None:
    records = simulate(Scenario(users=40, hours=3, seed=21, attacks=(Attack.parse(attack),), start_hour=12))
    summary = replayed(records)
    (group,) = (g for (label, _), g in summary.classes.items() if label == 1)
    assert group.refused > share * group.requests
    assert {client.label for _, client in summary.refused_clients()} == {1}


def test_the_order_of_lines_in_the_log_does_not_matter(tmp_path: Path) -> None:
    records = list(
        simulate(Scenario(users=20, hours=2, seed=3, attacks=(Attack("brute_force", "fast"),), start_hour=12))
    )
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    write(paths[0], records)
    random.Random(1).shuffle(records)
    write(paths[1], records)
    results = []
    for path in paths:
        result = CliRunner().invoke(replay_command, [str(path), "--json", "--no-models"])
        assert result.exit_code == 0, result.stderr
        results.append(json.loads(result.stdout))
    assert results[0] == results[1]
    assert set(results[0]) >= {"requests", "clients", "refused_requests", "refused_clients"}
    (client,) = results[0]["refused_clients"]
    assert set(client) >= {"client", "requests", "first_refused_at", "reasons"}
    assert client["reasons"] == ["brute_force"]
    before = sum(r.client == client["client"] and (r.ts or 0) <= client["first_refused_at"] for r in records)
    assert before <= 50


def test_replay_tables_and_decisions(tmp_path: Path) -> None:
    log, out = tmp_path / "day.jsonl", tmp_path / "decisions.jsonl.gz"
    write(
        log,
        simulate(Scenario(users=20, hours=2, seed=3, attacks=(Attack("scanning", "fast"),), start_hour=12)),
    )
    result = CliRunner().invoke(replay_command, [str(log), "--no-models", "--out", str(out), "--top", "5"])
    assert result.exit_code == 0, result.stderr
    for title in ("Actions", "Refused clients", "Reasons", "By what the data say", "Scores"):
        assert title in result.stdout
    import gzip

    decisions = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    assert [d["id"] for d in decisions] == [r.id for r in read(log)]
    assert {d["action"] for d in decisions} >= {"allow", "block"}
    assert all(0 <= d["score"] <= 1 for d in decisions)
    assert isinstance(decisions[0]["route"], str)


def test_observe_mode_still_says_who_would_have_been_refused(tmp_path: Path) -> None:
    config = tmp_path / "outrider.yaml"
    config.write_text("service: {mode: observe}\n")
    summary = replayed(
        simulate(Scenario(users=5, hours=2, seed=3, attacks=(Attack("brute_force", "fast"),))), config=config
    )
    (client,) = (client for _, client in summary.refused_clients())
    assert client.cls == "brute_force"
    assert summary.actions["block"] > 0


def test_scoring_without_client_or_time_leaves_the_windows_alone() -> None:
    guesses = [
        RequestRecord(
            "POST",
            "/login",
            ts=None if i % 2 else float(i),
            client="192.0.2.1" if i % 2 else None,
            headers=[("X-Api-Key", "k")],
            status=401,
            body=b'{"user":"a","password":"b"}',
        )
        for i in range(200)
    ]
    summary = replayed(guesses)
    assert summary.refused_requests == 0
    assert summary.text_only == 200
    summary = replayed(
        [RequestRecord("POST", "/login", ts=i * 1.0, client="192.0.2.1", status=401) for i in range(200)]
    )
    assert summary.refused_requests > 100


def test_responses_count_when_they_came() -> None:
    """Twenty guesses at once: nobody can know that they fail before the first answer is there."""
    at_once = [
        RequestRecord(
            "POST", "/login", ts=100.0 + i * 0.001, client="192.0.2.1", status=401, response_ms=500.0
        )
        for i in range(18)
    ]
    later = [RequestRecord("POST", "/login", ts=101.0, client="192.0.2.1", status=401, response_ms=500.0)]
    core = open_offline(load_models=False)
    actions = [one.action for one in Decider(core).decide(at_once + later)]
    assert actions == ["allow"] * 18 + ["block"]


def test_score_command(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_text(
        '192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "GET /a?b=c HTTP/1.1" 200 2326 "-" "x"\nbroken\n'
    )
    result = CliRunner().invoke(score_command, [str(log), "--no-models"])
    assert result.exit_code == 0, result.stderr
    (decision,) = map(json.loads, result.stdout.splitlines())
    assert (decision["client"], decision["action"], decision["ts"]) == ("192.0.2.1", "allow", 1760104536.0)
    assert "1 of 2 lines could not be read" in " ".join(result.stderr.split())  # wrapped where the path ends
    result = CliRunner().invoke(score_command, [str(log), "--no-models", "--strict"])
    assert result.exit_code == 1
    assert f"{log}:2" in result.stderr


def test_a_decision_record_has_its_fields_and_says_why(tmp_path: Path) -> None:
    log, config = tmp_path / "log.jsonl", tmp_path / "o.yaml"
    write(log, [record(1.0, 1, id="r1")])
    config.write_text("lists: {block: [192.0.2.1]}\nroutes: [{name: one, path: /1}]\n")
    result = CliRunner().invoke(score_command, [str(log), "--no-models", "-c", str(config)])
    (decision,) = map(json.loads, result.stdout.splitlines())
    assert set(decision) >= {
        *("id", "ts", "client", "action", "mode", "score", "scores", "reasons"),
        *("route", "budget_us", "spent_us", "skipped", "escalated"),
    }
    assert (decision["id"], decision["route"], decision["action"]) == ("r1", "one", "block")
    (reason,) = decision["reasons"]
    assert (reason["name"], "range" in reason["text"]) == ("blocked_range", True)


@pytest.mark.parametrize("command", [replay_command, score_command])
def test_what_cannot_be_done_is_said(command: Any, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "No such file" in run(command, [str(tmp_path / "none"), "--no-models"]).stderr
    log = tmp_path / "log"
    log.write_text("hello\nworld\n")
    result = run(command, [str(log), "--no-models"])
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "not recognised" in result.stderr
    config = tmp_path / "bad.yaml"
    config.write_text("service: {mod: observe}\n")
    result = run(command, [str(log), "--no-models", "-c", str(config)])
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "mod" in result.stderr
    log.write_text('{"method": "GET", "url": "/"}\n')
    result = run(command, [str(log), "--no-models", "--out", str(tmp_path / "a" / "b")])
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)


def as_access_log(r: RequestRecord) -> str:
    """What NGINX would have written: whole seconds, no principal, no body."""
    when = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(r.ts or 0))
    return (
        f'{r.client} - - [{when}] "{r.method} {r.url} HTTP/1.1" {r.status} 0 "-" '
        f'"{r.header("user-agent")}"\n'
    )


@pytest.mark.parametrize("seed", [30, 31, 32, 33])
def test_an_access_log_is_enough(seed: int, tmp_path: Path) -> None:
    attacks = tuple(Attack(name, ATTACKS[name][seed % 3]) for name in ("brute_force", "object_enumeration"))
    scenario = Scenario(users=100, hours=6, seed=seed, attacks=attacks, start_hour=8)
    log, hostile = tmp_path / "access.log", {}
    with open(log, "w") as file:
        for r in simulate(scenario):
            file.write(as_access_log(r))
            if r.label:
                hostile[r.client] = r.cls
    result = CliRunner().invoke(replay_command, [str(log), "--json", "--no-models"])
    found = {client["client"]: client for client in json.loads(result.stdout)["refused_clients"]}
    assert set(found) == set(hostile)
    for client, name in hostile.items():
        assert found[client or ""]["requests_until_refused"] <= 50
        assert name in found[client or ""]["reasons"]
