"""The store of a mesh: Redis or Valkey.

Keys, all in one slot, {outrider:NAME}: and then: q the queue (a stream with the group "judges"; what was settled is
removed, so that its length is the depth), clients and waiting (hashes: how many per client, which ids), errors (hash),
dead, judged and feedback (streams), d:SCOPE:KEY a decision (hash), id:ID where the decision of that id lies, index (all
decisions by their end), changes (a stream that followers read on from what they saw last) and n (number of the last
change, by which a follower notices that it missed one). Scripts: redis_scripts.py. Without Redis: redis_spool.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from redis.exceptions import RedisError, ResponseError

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.store import redis_scripts as scripts
from sidecar.judge.store.base import (
    ACTIONS,
    CLAIM_MAX,
    DEAD_MAX,
    NOTE_CHARS_MAX,
    PAGE,
    Claimed,
    Closeable,
    Dead,
    Feedback,
    Judged,
    OnChange,
    OnGap,
    Store,
    StoreError,
    StoreUnavailable,
    checked,
    checked_label,
    feedback_of,
    feedback_wire,
    log,
    overlaid,
    printable,
)
from sidecar.judge.store.redis_follow import Follower
from sidecar.judge.store.redis_link import BLOCK_S, Client, Link, read_password
from sidecar.judge.store.redis_spool import Spool
from sidecar.judge.types import NAME_CHARS_MAX, Decision, Escalation, Judgement, Label, WireError

GROUP = "judges"
BATCH = 128  # escalations in one script
CHANGES_MAX = 10000
CLOCK_S = 30.0  # how long the difference between the clocks is taken for the same
CLOCK_RETRY_S = 5.0
QUIET_S = 3600.0  # consumers that long silent, without work, are forgotten


class RedisStore(Store):
    def __init__(self, settings: JudgeStore) -> None:
        """Raises StoreError."""
        super().__init__(settings)
        for path in (settings.password_file, settings.sentinel_password_file):
            if path is not None:
                read_password(path)
        self.prefix = f"{{outrider:{settings.name}}}:"
        self._queue = [self.prefix + name for name in ("q", "clients", "waiting", "errors")]
        self._feed = [self.prefix + name for name in ("index", "changes", "n")]
        self._link = Link(settings, settings.timeout_s, self._count)
        self._waiting = Link(settings, settings.timeout_s + BLOCK_S, self._count)
        self._closed = threading.Event()
        self._followers: list[Follower] = []
        self._cursor, self._reclaimed_at = "0-0", 0.0
        self._clock = threading.Lock()
        self._offset_s: float | None = None
        self._measure_at = 0.0
        self._inspected = False
        if not settings.tls and not settings.addresses[0].startswith(("unix:", "127.", "localhost:", "[::1]")):
            log.warning("no TLS to Redis: whoever is on the way reads requests and can block clients (tls: true)")
        self._spool = Spool(settings, self.push, self._link.breaker.open_s)

    # the queue

    def put(self, escalations: Sequence[Escalation]) -> int:
        self._check_process()
        wires = self._wires(escalations)
        taken = 0
        for start in range(0, len(wires), BATCH):
            part = wires[start : start + BATCH]
            try:
                got = sum(self.push(part, patient=False))
            except StoreError:
                got = self._spool.put(part)
                self._count("spooled", got)
            self._count("put", got)
            self._count("shed", len(part) - got)
            taken += got
        return taken

    def push(self, wires: Sequence[tuple[str, str, bytes]], patient: bool = True) -> list[bool]:
        """put, for at most BATCH of (client, id, JSON); which were taken. Raises StoreUnavailable."""
        limits = [self.settings.queue_max, self.settings.per_client_max]
        values = [value for wire in wires for value in wire]
        taken = self._link.run(scripts.PUT, self._queue[:3], [*limits, *values], patient=patient)
        return [bool(one) for one in taken]

    def claim(self, consumer: str, max_n: int, wait_s: float) -> list[Claimed]:
        self._check_process()
        consumer, most = printable(consumer, NAME_CHARS_MAX), min(max_n, CLAIM_MAX)
        until = time.monotonic() + wait_s
        while not self._closed.is_set():
            left = until - time.monotonic()
            try:
                found = self._take(consumer, most, max(0.0, left))
            except StoreUnavailable:
                found = []
                self._closed.wait(min(max(0.0, until - time.monotonic()), self._waiting.breaker.open_s() or 0.05))
            if found or left <= 0:
                return found
        return []

    def _take(self, consumer: str, most: int, wait_s: float) -> list[Claimed]:
        often_s = max(0.05, min(BLOCK_S, self.settings.abandon_s / 4))
        if time.monotonic() - self._reclaimed_at >= often_s or self._cursor != "0-0":
            self._reclaimed_at = time.monotonic()
            again = self._reclaim(consumer, most)
            if again:
                return again
        block_ms = max(1, round(min(wait_s, often_s) * 1000)) if wait_s else None

        def read(client: Client) -> Any:
            return client.xreadgroup(GROUP, consumer, {self._queue[0]: ">"}, count=most, block=block_ms)

        reply = self._waiting.ask(lambda client: self._grouped(client, read))
        entries = reply[0][1] if reply else []
        return self._claimed([(id.decode(), fields, 1) for id, fields in entries])

    def _reclaim(self, consumer: str, most: int) -> list[Claimed]:
        idle_ms = round(self.settings.abandon_s * 1000)
        quiet_ms = round(max(QUIET_S, 10 * self.settings.abandon_s) * 1000)
        limits = [idle_ms, most, self._cursor, self.settings.deliveries_max, DEAD_MAX, quiet_ms]
        keys = [*self._queue, self.prefix + "dead"]

        def run(client: Client) -> Any:
            return client.eval(scripts.RECLAIM.text, len(keys), *keys, GROUP, consumer, *limits)

        cursor, entries, buried = self._link.ask(lambda client: self._grouped(client, run))
        self._cursor = cursor.decode()
        self._count("dead", buried)
        found = self._claimed(
            [(id.decode(), dict(zip(f[::2], f[1::2], strict=True)), tries) for id, f, tries in entries]
        )
        self._count("reclaimed", len(found))
        return found

    def _grouped(self, client: Client, do: Any) -> Any:
        """do(client), where need be after making the group: at the first start, or after Redis lost it."""
        try:
            return do(client)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
        try:
            client.xgroup_create(self._queue[0], GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        return do(client)

    def _claimed(self, entries: list[tuple[str, dict[bytes, bytes], int]]) -> list[Claimed]:
        if not entries:
            return []
        oldest_ms = (self.now() - self.settings.deadline_s) * 1000
        found, late = [], []
        for id, fields, tries in entries:
            if int(id.split("-")[0]) < oldest_ms:
                late.append(id)
                continue
            try:
                found.append(Claimed(Escalation.from_wire(fields.get(b"e", b"")), id, tries))
            except WireError as error:
                self._fail(id, str(error), 0)
        if late:
            self._count("expired", self._link.run(scripts.EXPIRE, self._queue, [GROUP, *late]))
        self._count("claimed", len(found))
        return found

    def settle(
        self, receipts: Sequence[str], decisions: Sequence[Decision] = (), judgements: Sequence[Judgement] = ()
    ) -> None:
        self._check_process()
        self._settle(receipts, decisions, judgements, "0")

    def _settle(
        self, receipts: Sequence[str], decisions: Sequence[Decision], judgements: Sequence[Judgement], replace: str
    ) -> int:
        now = self.now()
        keys = [*self._queue, self.prefix + "judged", *self._feed]
        values: list[Any] = [GROUP, self.settings.decisions_max, CHANGES_MAX, self.settings.judgements_max, replace]
        values += [len(decisions), len(receipts)]
        for decision in decisions:
            wire = checked(decision, now)
            member = f"{decision.scope}:{decision.key}"
            keys += [f"{self.prefix}d:{member}", f"{self.prefix}id:{decision.id}"]
            values += [member, decision.action, ACTIONS[decision.action], repr(float(decision.expires)), wire]
        values += receipts
        for judgement in judgements:
            values += [judgement.escalation, judgement.to_wire()]
        made, refused, settled = self._link.run(scripts.SETTLE, keys, values)
        self._count("decisions", made)
        self._count("refused", refused)
        self._count("settled", settled)
        return int(made)

    def fail(self, receipt: str, error: str) -> None:
        self._check_process()
        self._count("failed", self._fail(receipt, error, self.settings.deliveries_max) > 0)

    def _fail(self, receipt: str, error: str, tries_max: int) -> int:
        keys = [*self._queue, self.prefix + "dead"]
        values = [GROUP, receipt, printable(error), tries_max, DEAD_MAX]
        done = int(self._link.run(scripts.FAIL, keys, values))
        self._count("dead", done == 2)
        return done

    def depth(self) -> int:
        return int(self._link.ask(lambda client: client.xlen(self._queue[0])))

    def dead(self, limit: int = 100) -> list[Dead]:
        found = []
        for id, fields in self._newest("dead", min(limit, DEAD_MAX)):
            try:
                escalation = Escalation.from_wire(fields[b"e"])
            except WireError:
                escalation = None
            error = fields[b"w"].decode("utf-8", "replace")
            found.append(Dead(id, _at(id), error, int(fields[b"n"]), escalation))
        return found

    def retry_dead(self, ids: Sequence[str]) -> int:
        self._check_process()
        keys = [*self._queue[:3], self.prefix + "dead"]
        return int(self._link.run(scripts.RETRY_DEAD, keys, [self.settings.queue_max, *ids])) if ids else 0

    # decisions

    def decide(self, decision: Decision, *, replace: bool = True) -> bool:
        self._check_process()
        return self._settle((), (decision,), (), "1" if replace else "0") > 0

    def undo(self, id: str, who: str) -> Decision | None:
        self._check_process()
        member = self._link.ask(lambda client: client.get(f"{self.prefix}id:{id}"))
        if member is None:
            return None
        keys = [f"{self.prefix}d:{member.decode()}", *self._feed[1:]]
        row = self._link.run(scripts.UNDO, keys, [printable(who, NAME_CHARS_MAX), CHANGES_MAX])
        if not row:
            return None
        self._count("decisions")
        return decision_of(row)

    def active(self, now: float | None = None) -> list[Decision]:
        at = self.now() if now is None else now
        members = self._link.ask(
            lambda client: client.zrangebyscore(
                self._feed[0], f"({at!r}", "+inf", start=0, num=self.settings.decisions_max
            )
        )
        found = []
        for start in range(0, len(members), PAGE):
            keys = [f"{self.prefix}d:{member.decode()}" for member in members[start : start + PAGE]]
            for row in self._link.run(scripts.READ, keys, []):
                decision = decision_of(row)
                if decision is not None and not decision.undone and decision.expires > at:
                    found.append(decision)
        return found

    def get(self, id: str) -> Decision | None:
        member = self._link.ask(lambda client: client.get(f"{self.prefix}id:{id}"))
        if member is None:
            return None
        found = decision_of(self._link.run(scripts.READ, [f"{self.prefix}d:{member.decode()}"], [])[0])
        return found if found is not None and found.expires > self.now() else None

    def follow(self, on_change: OnChange, on_gap: OnGap) -> Closeable:
        self._check_process()
        link = Link(self.settings, self.settings.timeout_s + BLOCK_S, self._count)
        follower = Follower(link, self._feed[1], on_change, on_gap, self._count)
        self._followers.append(follower)
        return follower

    # for people

    def judgements(self, limit: int = 100) -> list[Judged]:
        rows = self._newest("judged", min(limit, self.settings.judgements_max))
        return [Judged(_at(id), Judgement.from_wire(f[b"j"]), Escalation.from_wire(f[b"e"])) for id, f in rows]

    def feedback(self, event_id: str, label: Label, who: str, note: str = "") -> bool:
        self._check_process()
        checked_label(label, who)
        escalation, judgement = self._judged(event_id)
        wire = feedback_wire(event_id, label, who, note[:NOTE_CHARS_MAX], self.now(), escalation, judgement)
        key, most = self.prefix + "feedback", self.settings.feedback_max
        self._link.ask(lambda client: client.xadd(key, {"f": wire}, maxlen=most, approximate=False))
        return escalation is not None

    def _judged(self, event_id: str) -> tuple[bytes | None, bytes | None]:
        for _, fields in self._newest("judged", self.settings.judgements_max):
            if fields[b"i"] == event_id.encode():
                return fields[b"e"], fields[b"j"]
        return None, None

    def export_feedback(self) -> Iterator[Feedback]:
        key, start = self.prefix + "feedback", "-"
        while True:
            page = self._link.ask(lambda client, at=start: client.xrange(key, at, "+", count=PAGE))  # type: ignore[misc]
            for _, fields in page:
                yield feedback_of(fields[b"f"])
            if len(page) < PAGE:
                return
            start = f"({page[-1][0].decode()}"

    def _newest(self, name: str, limit: int) -> Iterator[tuple[str, dict[bytes, bytes]]]:
        end = "+"
        while limit > 0:
            count = min(limit, PAGE)
            page = self._link.ask(
                lambda client, at=end, n=count: client.xrevrange(self.prefix + name, at, "-", count=n)  # type: ignore[misc]
            )
            for id, fields in page:
                yield id.decode(), fields
            if len(page) < count:
                return
            limit, end = limit - len(page), f"({page[-1][0].decode()}"

    # the rest

    def now(self) -> float:
        """By Redis' clock, asked for now and then; by this machine's until it answered once."""
        with self._clock:
            if time.monotonic() >= self._measure_at:
                self._measure()
            return time.time() if self._offset_s is None else time.monotonic() + self._offset_s

    def _measure(self) -> None:
        before = time.monotonic()
        try:
            seconds, micros = self._link.run(scripts.CLOCK, self._queue[:1], [], patient=False)
        except StoreError:
            self._measure_at = time.monotonic() + CLOCK_RETRY_S
            return
        after = time.monotonic()
        self._offset_s = int(seconds) + int(micros) / 1e6 - (before + after) / 2
        self._measure_at = after + CLOCK_S
        if not self._inspected:
            self._inspected = True
            self._inspect()

    def _inspect(self) -> None:
        """Says once how this Redis may lose what it took."""
        if self.settings.cluster:
            return  # each node may be different

        def ask(client: Client) -> tuple[dict[str, Any], dict[str, Any]]:
            try:
                return client.info("memory"), client.info("persistence")
            except RedisError:
                return {}, {}  # the user may not

        memory, persistence = self._link.ask(ask)
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        if policy != "noeviction":
            log.warning("Redis has maxmemory-policy %s: it may drop decisions (noeviction)", printable(policy, 64))
        if persistence.get("aof_enabled") == 0:
            log.warning("Redis has no append-only file: its restart loses what waits and what holds (appendonly yes)")

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        for follower in self._followers:
            follower.close()
        self._spool.close()
        self._waiting.close()
        self._link.close()

    def stats(self) -> dict[str, int | float]:
        """As Store.stats; spool_depth: how many wait here for Redis."""
        found = super().stats()
        found["expired"] += self._spool.lost()
        found["spool_depth"] = self._spool.depth()
        return found

    def _state(self) -> dict[str, float]:
        def ask(client: Client) -> tuple[int, Any]:
            return client.xlen(self._queue[0]), client.xrange(self._queue[0], count=1)

        depth, first = self._link.ask(ask, patient=False)
        return {"depth": depth, "lag_s": max(0.0, self.now() - _at(first[0][0].decode())) if first else 0.0}


def _at(id: str) -> float:
    """When an entry of a stream was made, by Redis' clock."""
    return int(id.split("-")[0]) / 1000


def decision_of(row: Sequence[bytes | None]) -> Decision | None:
    """From b, a, x, u and w; None where there is none, or an unreadable one."""
    body, action, expires, undone, who = row
    if body is None or action is None or expires is None:
        return None
    try:
        return overlaid(body, action.decode(), float(expires), undone == b"1", (who or b"").decode("utf-8", "replace"))
    except (WireError, ValueError) as error:
        log.error("a stored decision is left out: %s", printable(str(error)))
        return None
