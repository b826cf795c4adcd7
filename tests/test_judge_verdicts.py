"""What a judgement may lead to, and what it may not."""
from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.judge.types import LABELS, SCOPES, Decision, Escalation, Judgement, Label, WireError
from sidecar.judge.verdicts import History, Rules, address_decision, decision_id, reach, shown

NOW = 1_700_000_000.0


def asked(n: int = 1, **changes: object) -> Escalation:
    given: dict[str, object] = {
        "id": f"pod:{n}", "ts": NOW, "service": "shop", "method": "GET", "path": "/search", "client": "198.51.100.7",
        "client_key": 7, "principal_key": 9, "payload_key": 100 + n, "text": f"1' or {n}={n} --",
    }  # fmt: skip
    return Escalation(**{**given, **changes})  # type: ignore[arg-type]


def said(label: Label | None = "sql_injection", malicious: float = 0.97, model: str = "m") -> Judgement:
    rest = {name: 0.0 for name in LABELS}
    rest["benign"] = 1 - malicious
    rest[label if label not in (None, "benign") else "abuse"] = malicious  # type: ignore[index]
    return Judgement("pod:1", label, max(malicious, 1 - malicious), rest, 0.99, 1, model)


def entered(
    e: Escalation, *judgements: Judgement, rules: Rules | None = None, history: History | None = None
) -> list[Decision]:
    verdict = reach(e, judgements, {"m": 0.9, "other": 0.5}, rules or Rules(), history or History(), NOW, "judge-1")
    return list(verdict.decisions)


def test_an_attack_bans_its_payload_for_a_while() -> None:
    (decision,) = entered(asked(), said())
    assert (decision.scope, decision.key, decision.action) == ("payload", 101, "block")
    assert decision.expires == NOW + 600
    assert decision.provenance["event"] == "pod:1"
    assert decision.provenance["model"] == "m"
    assert decision.provenance["probabilities"]["sql_injection"] == 0.97


@pytest.mark.parametrize(
    "judgement", [said(malicious=0.89), said("benign", 0.1), said(None, 0.99), said("benign", 0.95)]
)
def test_what_is_not_flagged_leads_to_nothing(judgement: Judgement) -> None:
    assert entered(asked(), judgement) == []


def test_any_judge_may_flag_by_its_own_threshold() -> None:
    assert entered(asked(), said("benign", 0.01), said(malicious=0.6, model="other"))
    assert not entered(asked(), said("benign", 0.01), said(malicious=0.6))
    assert not entered(asked(), said(malicious=0.99, model="unknown"))  # no threshold is known of it
    assert entered(asked(), said(malicious=0.6, model="unknown"), rules=Rules(flag=0.5))


def test_a_client_is_banned_for_other_payloads_not_for_one_again() -> None:
    history = History()
    for _ in range(10):
        assert [d.scope for d in entered(asked(1), said(), history=history)] == ["payload"]
    assert [d.scope for d in entered(asked(2), said(), history=history)] == ["payload"]
    third = entered(asked(3), said(), history=history)
    key = address_decision(ipaddress.ip_address("198.51.100.7"))
    assert [(d.scope, d.key) for d in third] == [("payload", 103), ("address", key)]
    assert third[1].address == third[1].shown == "198.51.100.7"


def test_repetition_and_confidence_lengthen_up_to_a_maximum() -> None:
    history, rules = History(), Rules(duration_max_s=3000)
    seconds = [
        [d.expires - NOW for d in entered(asked(n), said(malicious=0.95), rules=rules, history=history)][-1]
        for n in range(1, 8)
    ]
    assert seconds == [600, 600, 600, 1200, 2400, 3000, 3000]
    assert entered(asked(), said(malicious=0.995))[0].expires == NOW + 1200


def test_an_allow_list_wins_over_addresses_and_principals() -> None:
    rules = Rules(repeat=1, principals=True, allow=(ipaddress.ip_network("198.51.100.0/24"),))
    assert [d.scope for d in entered(asked(), said(), rules=rules)] == ["payload"]
    assert {d.scope for d in entered(asked(client="203.0.113.1"), said(), rules=rules)} == set(SCOPES)


def test_principals_are_claims_and_entered_only_where_told() -> None:
    assert {d.scope for d in entered(asked(), said(), rules=Rules(repeat=1))} == {"payload", "address"}


@pytest.mark.parametrize("client", [None, "127.0.0.1", "::1", "0.0.0.0", "not an address", "198.51.100.7, 10.0.0.1"])
def test_who_is_no_single_client_is_never_entered(client: str | None) -> None:
    assert [d.scope for d in entered(asked(client=client), said(), rules=Rules(repeat=1))] == ["payload"]


def test_abuse_bans_the_client_and_not_what_it_sent() -> None:
    history = History()
    found = [entered(asked(n, payload_key=100), said("abuse"), history=history) for n in range(3)]
    assert [[d.scope for d in decisions] for decisions in found] == [[], [], ["address"]]


def test_what_was_long_ago_does_not_count() -> None:
    history = History()
    for n in range(3):
        verdict = reach(asked(n), [said()], {"m": 0.9}, Rules(), history, NOW + n * 601, "j")
        assert [d.scope for d in verdict.decisions] == ["payload"]


def test_history_is_bounded() -> None:
    history = History(clients_max=10)
    for client in range(100):
        history.add(client, 1, NOW, 600, 12)
    assert len(history._flagged) == 10
    for what in range(100):
        assert history.add(1, what, NOW, 600, 12) <= 12


@given(
    st.lists(st.tuples(st.sampled_from([*LABELS, None]), st.floats(0, 1)), min_size=1, max_size=4),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.text(max_size=300),
)
def test_whatever_is_said_only_adds_and_expires(said_: list, client_key: int, payload_key: int, text: str) -> None:  # type: ignore[type-arg]
    e = asked(client_key=client_key, payload_key=payload_key, text=text)
    for decision in entered(e, *(said(label, p) for label, p in said_), rules=Rules(repeat=1)):
        assert decision.action == "block"
        assert NOW < decision.expires <= NOW + 86400
        assert decision.key != 0
        assert not decision.undone
        assert decision.id == decision_id(decision.scope, decision.key)
        assert Decision.from_wire(decision.to_wire()) == decision


@given(st.text(max_size=400))
def test_what_is_shown_steers_no_terminal(text: str) -> None:
    assert shown(text).isascii()
    assert shown(text).isprintable()


def test_wire_refuses_what_is_none_of_ours() -> None:
    for data in (b"", b"[]", b"{}", b'{"id": 1}', b"\xff", b"0" * 200_000):
        with pytest.raises(WireError):
            Escalation.from_wire(data)
    e = asked(story={"requests_60s": 3.0}, recent=("GET /a 200",) * 20)
    assert Escalation.from_wire(e.to_wire()) == e
    assert len(e.recent) == 8
    newer = e.to_wire()[:-1] + b', "new_field": 1}'
    assert Escalation.from_wire(newer) == e
