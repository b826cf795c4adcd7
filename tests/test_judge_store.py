"""What every store of the judge must do: the same tests on a file and on a real Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from redis_server import RedisServer

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.store import Store, StoreError, open_store
from sidecar.judge.types import Decision, Escalation, Judgement

Opener = Callable[..., Store]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield one
    one.stop()


@pytest.fixture(params=["sqlite", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens stores that share what they keep, as two processes would."""
    given: dict[str, Any] = {"backend": request.param, "path": str(tmp_path / "judge.db")}
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("server")
        with server.client() as client:
            client.flushall()
        given["addresses"] = (server.address,)
    opened: list[Store] = []

    def open_one(**more: Any) -> Store:
        opened.append(open_store(JudgeStore(**{**given, **more})))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(opener: Opener) -> Store:
    return opener()


def escalation(id: str, client: int = 1, **more: Any) -> Escalation:
    given = {"service": "shop", "method": "GET", "path": "/search", "client_key": client, **more}
    return Escalation(id=id, ts=1.0, **given)


def judgement(of: str, label: Any = "sql_injection") -> Judgement:
    return Judgement(of, label, 0.9, {"benign": 0.1, "sql_injection": 0.9}, 0.99, 1, "cafe")


def decision(store: Store, id: str, key: int = 2**64 - 1, action: str = "block", lasts_s: float = 600.0) -> Decision:
    now = store.now()
    until = now + lasts_s
    return Decision(id, "address", key, action, "sql_injection", 0.9, now, until, "203.0.113.7", False, {"n": 1})


def eventually(holds: Callable[[], Any]) -> None:
    until = time.monotonic() + 15
    while not holds():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.01)


class Heard:
    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.gaps = 0

    def change(self, decisions: list[Decision]) -> None:
        self.decisions += decisions

    def gap(self) -> None:
        self.gaps += 1

    @property
    def ids(self) -> list[str]:
        return [one.id for one in self.decisions]


# the queue


def test_put_claim_settle(opener: Opener) -> None:
    sidecar, judge = opener(), opener()
    made = [escalation("a", text="' or 1=1", recent=("GET / 200",), story={"rate": 2.5}), escalation("b", client=2)]
    assert sidecar.put(made) == 2
    claimed = judge.claim("one", 10, 0)
    assert [one.escalation for one in claimed] == made
    assert [one.deliveries for one in claimed] == [1, 1]
    assert sidecar.depth() == 2
    judge.settle([one.receipt for one in claimed], [decision(judge, "d")], [judgement("a"), judgement("b", None)])
    assert sidecar.depth() == 0
    assert judge.claim("one", 10, 0) == []
    assert [one.id for one in sidecar.active()] == ["d"]
    last, first = sidecar.judgements(10)
    assert (last.judgement, last.escalation) == (judgement("b", None), made[1])
    assert (first.judgement, first.escalation) == (judgement("a"), made[0])
    stats = judge.stats()
    assert (stats["claimed"], stats["settled"], stats["decisions"], stats["depth"], stats["up"]) == (2, 2, 1, 0, 1)
    assert sidecar.stats()["put"] == 2


def test_nobody_gets_what_another_has(opener: Opener) -> None:
    sidecar = opener(queue_max=400, per_client_max=400)
    assert sidecar.put([escalation(str(n), client=n + 1) for n in range(200)]) == 200
    got: list[str] = []

    def work(store: Store, name: str) -> None:
        while claimed := store.claim(name, 7, 0):
            got.extend(one.escalation.id for one in claimed)
            store.settle([one.receipt for one in claimed])

    threads = [threading.Thread(target=work, args=(opener(), f"judge-{n}")) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got, key=int) == [str(n) for n in range(200)]
    assert sidecar.depth() == 0


def test_claim_waits_for_work(opener: Opener) -> None:
    sidecar, judge = opener(), opener()
    got: list[str] = []
    waiting = threading.Thread(target=lambda: got.extend(c.escalation.id for c in judge.claim("one", 10, 30)))
    waiting.start()
    time.sleep(0.1)
    sidecar.put([escalation("a")])
    waiting.join(20)
    assert got == ["a"]


def test_put_twice_waits_once(store: Store) -> None:
    assert store.put([escalation("a")]) == 1
    assert store.put([escalation("a"), escalation("b")]) == 2
    assert store.depth() == 2
    receipts = [one.receipt for one in store.claim("one", 10, 0)]
    store.settle(receipts)
    store.settle(receipts)
    assert store.stats()["settled"] == 2


def test_what_a_dead_judge_took_goes_to_another_and_at_last_to_the_dead_letters(opener: Opener) -> None:
    store = opener(abandon="200ms", deliveries_max=2)
    store.put([escalation("a")])
    assert store.claim("one", 1, 0)
    assert store.claim("two", 1, 0) == []
    again = store.claim("two", 1, 10)
    assert [(one.escalation.id, one.deliveries) for one in again] == [("a", 2)]
    eventually(lambda: store.claim("three", 1, 0.1) == [] and store.dead())
    [dead] = store.dead()
    assert (dead.escalation, dead.deliveries, dead.error) == (escalation("a"), 2, "taken, but never settled")
    assert store.depth() == 0
    assert store.stats()["reclaimed"] == 1
    assert store.stats()["dead"] == 1
    assert store.retry_dead([dead.id]) == 1
    assert store.retry_dead([dead.id]) == 0
    assert store.dead() == []
    assert [(one.escalation.id, one.deliveries) for one in store.claim("one", 1, 0)] == [("a", 1)]


def test_failed_work_is_tried_again_and_keeps_its_error(opener: Opener) -> None:
    store = opener(abandon="200ms", deliveries_max=2)
    store.put([escalation("a")])
    store.fail(store.claim("one", 1, 0)[0].receipt, "out of memory\n\x1b[31m")
    assert store.claim("one", 1, 0) == []
    [again] = store.claim("one", 1, 10)
    assert again.deliveries == 2
    store.fail(again.receipt, "out of memory again")
    [dead] = store.dead()
    assert (dead.error, dead.deliveries) == ("out of memory again", 2)
    assert store.stats()["failed"] == 2
    store.fail("1", "nobody has it")


def test_an_error_of_an_earlier_try_stands_in_the_dead_letter(opener: Opener) -> None:
    store = opener(abandon="100ms", deliveries_max=2)
    store.put([escalation("a")])
    store.fail(store.claim("one", 1, 0)[0].receipt, "out of\nmemory")
    assert store.claim("one", 1, 10)  # and this one dies
    eventually(lambda: store.claim("two", 1, 0.1) == [] and store.dead())
    assert store.dead()[0].error == "out of memory"


def test_what_waited_too_long_is_dropped(opener: Opener) -> None:
    store = opener(deadline="1s")
    store.put([escalation("a")])
    time.sleep(1.2)
    store.put([escalation("b")])
    assert [one.escalation.id for one in store.claim("one", 10, 0)] == ["b"]
    assert store.stats()["expired"] == 1
    assert store.depth() == 1


def test_one_clients_flood_leaves_room_for_the_others(opener: Opener) -> None:
    store = opener(queue_max=64, per_client_max=16)
    assert store.put([escalation(f"flood-{n}", client=7) for n in range(500)]) < 16
    assert store.put([escalation(f"other-{n}", client=100 + n) for n in range(40)]) == 40
    assert store.put([escalation("flood-again", client=7)]) == 0
    assert store.stats()["shed"] > 480
    # as room is given back the client has its share again
    store.settle([one.receipt for one in store.claim("one", 64, 0)])
    assert store.put([escalation("flood-at-last", client=7)]) == 1


def test_the_bound_holds_and_the_last_places_go_to_new_clients(opener: Opener) -> None:
    store = opener(queue_max=64, per_client_max=16)
    # six clients push at once: none may take the last places while it has others
    for _ in range(20):
        for client in range(1, 7):
            store.put([escalation(f"{client}-{n}", client=client) for n in range(20)])
    room = 64 - store.depth()
    assert room > 0
    assert store.put([escalation(f"new-{n}", client=100 + n) for n in range(100)]) == room
    assert store.depth() == 64


def test_a_client_without_an_address_is_counted_by_its_principal(opener: Opener) -> None:
    store = opener(queue_max=64, per_client_max=2)
    made = [escalation(f"{key}-{n}", client=0, principal_key=key) for n in range(5) for key in (2**64 - 1, 2**63)]
    assert store.put(made) == 4


def test_what_cannot_travel_is_shed(store: Store) -> None:
    made = [
        escalation("surrogate", text="\ud800"),
        escalation("large", reasons=tuple("x" * 250 for _ in range(600))),
        escalation("huge", client=2**64),
        escalation("fine", text="\x00\xff\U0001f600"),
    ]
    assert store.put(made) == 1
    assert store.stats()["shed"] == 3
    assert store.claim("one", 10, 0)[0].escalation == made[3]
    assert store.put([]) == 0


def test_what_is_not_an_escalation_is_a_dead_letter(store: Store) -> None:
    store.put([escalation("bad", score=float("nan")), escalation("good")])
    assert [one.escalation.id for one in store.claim("one", 10, 0)] == ["good"]
    [dead] = store.dead()
    assert dead.escalation is None
    assert "score" in dead.error


# decisions


def test_decide_and_undo(store: Store) -> None:
    made = decision(store, "d")
    assert store.decide(made)
    assert store.get("d") == made
    assert store.active() == [made]
    assert 0 < store.remaining_s(made) <= 600
    undone = store.undo("d", "alice")
    assert undone is not None
    assert undone == replace(made, undone=True, provenance={"n": 1, "undone_by": "alice"})
    assert store.active() == []
    assert store.get("d") == undone
    assert store.remaining_s(undone) == 0
    assert store.undo("d", "alice") is None
    assert store.undo("none", "alice") is None
    assert store.get("none") is None


def test_a_judge_may_only_extend_or_strengthen(store: Store) -> None:
    first = decision(store, "first", action="challenge")
    assert store.decide(first, replace=False)
    weaker = replace(first, id="weaker", action="throttle", expires=first.expires - 10)
    assert not store.decide(weaker, replace=False)
    store.settle([], [weaker, first])
    assert store.active() == [first]
    longer = replace(first, id="longer", action="throttle", expires=first.expires + 100)
    assert store.decide(longer, replace=False)
    assert store.active() == [replace(longer, action="challenge")]
    stronger = replace(first, id="stronger", action="block", expires=first.expires - 100)
    assert store.decide(stronger, replace=False)
    assert store.active() == [replace(stronger, expires=longer.expires)]
    # an earlier id still names it
    assert store.undo("first", "alice") is not None
    assert store.active() == []


def test_an_operator_may_do_more(store: Store) -> None:
    made = decision(store, "judge")
    store.decide(made, replace=False)
    mild = replace(made, id="operator", action="throttle", expires=made.expires - 300)
    assert store.decide(mild)
    assert store.active() == [mild]


def test_what_an_operator_undid_stays_undone(store: Store) -> None:
    made = decision(store, "d")
    store.decide(made, replace=False)
    store.undo("d", "alice")
    store.settle([], [replace(made, id="again", expires=made.expires + 100)])
    assert store.active() == []
    assert store.stats()["refused"] == 1
    assert store.decide(replace(made, id="operator"))
    assert [one.id for one in store.active()] == ["operator"]


def test_decisions_run_out(store: Store) -> None:
    short = decision(store, "short", lasts_s=0.3)
    store.decide(short)
    store.decide(decision(store, "long", key=2))
    assert len(store.active()) == 2
    assert [one.id for one in store.active(now=store.now() + 60)] == ["long"]
    eventually(lambda: [one.id for one in store.active()] == ["long"])
    assert store.get("short") is None
    assert store.remaining_s(short) == 0
    # what ran out hinders nobody
    assert store.decide(replace(short, id="new", action="throttle", expires=store.now() + 60), replace=False)
    assert not store.decide(replace(short, id="late"))


def test_decisions_have_a_bound(opener: Opener) -> None:
    store = opener(decisions_max=16)
    short = [decision(store, f"short-{n}", key=n, lasts_s=0.5) for n in range(4)]
    store.settle([], short + [decision(store, f"d-{n}", key=100 + n) for n in range(20)])
    assert len(store.active()) == 16
    assert store.stats()["refused"] == 8
    assert not store.decide(decision(store, "more", key=1000))
    assert store.decide(decision(store, "same", key=100, lasts_s=700))
    eventually(lambda: len(store.active()) == 12)
    assert store.decide(decision(store, "more", key=1000))


def test_many_decisions_are_read_in_pages(store: Store) -> None:
    store.settle([], [decision(store, f"d-{n}", key=n) for n in range(1000)])
    assert sorted(one.key for one in store.active()) == list(range(1000))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"action": "allow"}, "throttle, challenge, block"),
        ({"scope": "world"}, "scopes are"),
        ({"key": 2**64}, "64 bits"),
        ({"key": -1}, "64 bits"),
        ({"expires": float("nan")}, "366 days"),
        ({"expires": float("inf")}, "366 days"),
        ({"id": ""}, "256 characters"),
        ({"provenance": {"text": "x" * 20000}}, "bytes as JSON"),
        ({"provenance": {"text": object()}}, "as JSON"),
    ],
)
def test_a_wrong_decision_is_refused(store: Store, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(StoreError, match=says):
        store.decide(replace(decision(store, "d"), **wrong))
    assert store.active() == []


def test_followers_hear_of_every_change(opener: Opener) -> None:
    judge, sidecar = opener(), opener()
    judge.decide(decision(judge, "before", key=9))
    heard, here = Heard(), Heard()
    sidecar.follow(heard.change, heard.gap)
    judge.follow(here.change, here.gap)
    made = [decision(judge, f"d-{n}", key=n) for n in range(300)]
    for start in range(0, 300, 10):
        judge.settle([], made[start : start + 10])
    for one in (heard, here):
        eventually(lambda one=one: len(one.ids) >= 300)
        assert one.decisions == made
        assert one.gaps == 0
    undone = sidecar.undo("d-7", "alice")
    assert undone is not None
    eventually(lambda: len(heard.ids) > 300 and len(here.ids) > 300)
    assert heard.decisions[-1] == here.decisions[-1] == undone
    # what changes nothing is not said
    judge.settle([], made[:1])
    judge.decide(decision(judge, "last", key=5000))
    eventually(lambda: heard.ids[-1] == "last")
    assert len(heard.ids) == 302


def test_a_followers_mistake_ends_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    heard = Heard()

    def wrong(decisions: list[Decision]) -> None:
        heard.change(decisions)
        raise RuntimeError("not so")

    store.follow(wrong, heard.gap)
    store.decide(decision(store, "a", key=1))
    eventually(lambda: heard.ids == ["a"])
    store.decide(decision(store, "b", key=2))
    eventually(lambda: heard.ids == ["a", "b"])
    assert "could not take" in caplog.text


def test_a_closed_follower_hears_no_more(store: Store) -> None:
    first, second = Heard(), Heard()
    handle = store.follow(first.change, first.gap)
    store.follow(second.change, second.gap)
    handle.close()
    handle.close()
    store.decide(decision(store, "a"))
    eventually(lambda: second.ids == ["a"])
    assert first.ids == []


# for people


def test_feedback_is_kept_with_its_escalation(store: Store) -> None:
    store.put([escalation("a", text="1' or '1")])
    store.settle([one.receipt for one in store.claim("one", 1, 0)], [], [judgement("a")])
    assert store.feedback("a", "benign", "alice", "our own scanner\nit is")
    assert not store.feedback("gone", "abuse", "bob")
    first, second = list(store.export_feedback())
    assert (first.event, first.label, first.who, first.note) == ("a", "benign", "alice", "our own scanner it is")
    assert (first.escalation, first.judgement) == (escalation("a", text="1' or '1"), judgement("a"))
    assert (second.event, second.escalation, second.judgement) == ("gone", None, None)
    with pytest.raises(StoreError, match="no label"):
        store.feedback("a", "good", "alice")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="name"):
        store.feedback("a", "benign", "")


def test_judgements_and_feedback_have_a_bound(opener: Opener) -> None:
    store = opener(judgements_max=5, feedback_max=7)
    for n in range(12):
        store.put([escalation(str(n))])
        store.settle([one.receipt for one in store.claim("one", 1, 0)], [], [judgement(str(n))])
        store.feedback(str(n), "benign", "alice")
    assert [one.escalation.id for one in store.judgements(100)] == ["11", "10", "9", "8", "7"]
    assert [one.escalation.id for one in store.judgements(2)] == ["11", "10"]
    assert [one.event for one in store.export_feedback()] == [str(n) for n in range(5, 12)]


def test_much_feedback_is_exported_in_pages(store: Store) -> None:
    for n in range(600):
        store.feedback(str(n), "benign", "alice")
    assert [one.event for one in store.export_feedback()] == [str(n) for n in range(600)]


def test_stats_say_how_far_behind(store: Store) -> None:
    store.put([escalation("a")])
    time.sleep(0.1)
    assert store.stats()["lag_s"] >= 0.05
    assert store.stats()["depth"] == 1


def test_everything_is_there_after_opening_anew(opener: Opener) -> None:
    first = opener()
    first.put([escalation("a"), escalation("b")])
    claimed = first.claim("one", 1, 0)
    first.settle([claimed[0].receipt], [decision(first, "d")], [judgement("a")])
    first.feedback("a", "benign", "alice")
    first.close()
    first.close()
    second = opener()
    assert [one.escalation.id for one in second.claim("one", 9, 0)] == ["b"]
    assert [one.id for one in second.active()] == ["d"]
    assert len(second.judgements()) == len(list(second.export_feedback())) == 1


# settings


def test_settings_are_as_written() -> None:
    given = JudgeStore.model_validate({"timeout": "250ms", "deadline": "2m", "abandon": "10s"})
    assert (given.timeout_s, given.deadline_s, given.abandon_s) == (0.25, 120, 10)
    assert all((field.json_schema_extra or {}).get("x-restart") for field in JudgeStore.model_fields.values())  # type: ignore[union-attr]
    assert all(field.description for field in JudgeStore.model_fields.values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backend": "redis"}, "no addresses"),
        ({"backend": "redis", "addresses": ["a:1", "b:1"]}, "2 addresses"),
        ({"backend": "redis", "addresses": ["a:0"]}, "port 0"),
        ({"backend": "redis", "addresses": ["redis"]}, "not a server's address"),
        ({"backend": "redis", "addresses": ["redis://me:sesame@host:1"]}, "login in it"),
        ({"backend": "redis", "addresses": ["a:1"], "cluster": True, "sentinel_master": "m"}, "exclude"),
        ({"backend": "redis", "addresses": ["a:1"], "cluster": True, "database": 1}, "database 0"),
        ({"backend": "redis", "addresses": ["unix:/r"], "cluster": True}, "TCP"),
        ({"backend": "redis", "addresses": ["a:1"], "username": "u"}, "password"),
        ({"backend": "redis", "addresses": ["a:1"], "sentinel_username": "u"}, "password"),
        ({"backend": "redis", "addresses": ["a:1"], "tls": True, "tls_cert_file": "/c"}, "key"),
        ({"backend": "redis", "addresses": ["a:1"], "tls_ca_file": "/c"}, "without TLS"),
        ({"queue_max": 16, "per_client_max": 17}, "above queue_max"),
        ({"backend": "mysql"}, "sqlite"),
        ({"path": "judge.db"}, "absolute"),
        ({"password": "sesame"}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JudgeStore.model_validate(given)
    assert says in str([error["msg"] for error in caught.value.errors()])
    assert not any("sesame" in error["msg"] for error in caught.value.errors())
