"""The store of one box: a SQLite file that its processes share (file.py), woken by datagrams (wake.py)."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.store.base import (
    ACTIONS,
    CLAIM_MAX,
    DEAD_MAX,
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
    share_of,
    tell,
    tell_gap,
)
from sidecar.judge.store.file import File
from sidecar.judge.store.wake import Wake
from sidecar.judge.types import NAME_CHARS_MAX, Decision, Escalation, Judgement, Label, WireError

LOOK_S = 1.0  # how often to look unasked: for work whose judge died, or if waking doesn't work
WAITING = "FROM queue WHERE claimed IS NULL ORDER BY seq LIMIT ?"
ABANDONED = "FROM queue WHERE claimed < ? ORDER BY seq LIMIT ?"
STORED = "SELECT body, action, expires, undone, who FROM decisions"


class SqliteStore(Store):
    def __init__(self, settings: JudgeStore) -> None:
        """Raises StoreError."""
        super().__init__(settings)
        self._epoch = 0
        self._closed = threading.Event()
        self._followers: list[_Follower] = []
        self._trouble = False
        assert settings.path is not None
        self._file = File(settings.path, settings.timeout_s, self._replaced)
        try:
            self._wake = Wake(settings.path + ".wake")
        except OSError as error:
            self._file.close()
            raise StoreError(
                f"{settings.path}.wake, where processes wake one another, can't be made: {error.strerror}"
            ) from None

    def now(self) -> float:
        return time.time()

    def put(self, escalations: Sequence[Escalation]) -> int:
        self._check_process()
        wires = self._wires(escalations)
        if not wires:
            return 0
        try:
            taken = sum(self.push(wires))
        except StoreError as error:
            self._in_trouble(error)
            self._count("shed", len(wires))
            return 0
        self._trouble = False
        self._count("put", taken)
        self._count("shed", len(wires) - taken)
        return taken

    def push(self, wires: Sequence[tuple[str, str, bytes]]) -> list[bool]:
        """put, for (client, id, JSON); which were taken. Raises StoreError."""
        now, taken, fresh = self.now(), [], 0
        with self._file.transaction() as db:
            depth = _one(db, "SELECT count(*) FROM queue")
            for client, id, wire in wires:
                room = self.settings.queue_max - depth
                known = _one(db, "SELECT count(*) FROM queue WHERE id = ?", id) > 0
                fits = room > 0 and (
                    _one(db, "SELECT count(*) FROM queue WHERE client = ?", client)
                    < share_of(room, self.settings.per_client_max)
                )
                taken.append(known or fits)
                if fits and not known:
                    db.execute(
                        "INSERT INTO queue (id, client, queued, body) VALUES (?, ?, ?, ?)", (id, client, now, wire)
                    )
                    depth += 1
                    fresh += 1
        if fresh:
            self._wake.ring("q")
        return taken

    def claim(self, consumer: str, max_n: int, wait_s: float) -> list[Claimed]:
        self._check_process()
        until = time.monotonic() + wait_s
        self._listen()
        while not self._closed.is_set():
            turn = self._wake.turn("q")
            try:
                found = self._take(consumer[:NAME_CHARS_MAX], min(max_n, CLAIM_MAX))
            except StoreError as error:
                self._in_trouble(error)
                found = []
            left = until - time.monotonic()
            if found or left <= 0:
                return found
            self._wake.wait("q", turn, min(left, LOOK_S, max(0.05, self.settings.abandon_s / 4)))
        return []

    def _take(self, consumer: str, most: int) -> list[Claimed]:
        abandoned = self.now() - self.settings.abandon_s
        with self._file.transaction(write=False) as db:
            if not (
                _one(db, f"SELECT count(*) FROM (SELECT 1 {WAITING})", 1)
                or _one(db, f"SELECT count(*) FROM (SELECT 1 {ABANDONED})", abandoned, 1)
            ):
                return []
        found: list[Claimed] = []
        again = expired = 0
        with self._file.transaction() as db:
            now = self.now()
            expired = self._expire(db, now)
            rows = db.execute(f"SELECT seq, deliveries, error, body {ABANDONED}", (abandoned, most)).fetchall()
            rows += db.execute(f"SELECT seq, deliveries, error, body {WAITING}", (most - len(rows),)).fetchall()
            for seq, deliveries, error, body in rows:
                if deliveries >= self.settings.deliveries_max:
                    self._bury(db, seq, error or "taken, but never settled")
                    continue
                try:
                    found.append(Claimed(Escalation.from_wire(body), str(seq), deliveries + 1))
                except WireError as problem:
                    self._bury(db, seq, str(problem))
                    continue
                db.execute(
                    "UPDATE queue SET claimed = ?, consumer = ?, deliveries = deliveries + 1 WHERE seq = ?",
                    (now, consumer, seq),
                )
                again += deliveries > 0
        self._count("expired", expired)
        self._count("claimed", len(found))
        self._count("reclaimed", again)
        return found

    def _expire(self, db: sqlite3.Connection, now: float) -> int:
        """What waited too long goes; it stands at the front."""
        oldest = now - self.settings.deadline_s
        return db.execute(
            "DELETE FROM queue WHERE queued < ? AND (claimed IS NULL OR claimed < ?) "
            "AND (SELECT queued FROM queue ORDER BY seq LIMIT 1) < ?",
            (oldest, now - self.settings.abandon_s, oldest),
        ).rowcount

    def _bury(self, db: sqlite3.Connection, seq: int, error: str) -> None:
        db.execute(
            "INSERT INTO dead (id, client, at, error, deliveries, body) "
            "SELECT id, client, ?, ?, deliveries, body FROM queue WHERE seq = ?",
            (self.now(), printable(error), seq),
        )
        db.execute("DELETE FROM queue WHERE seq = ?", (seq,))
        _trim(db, "dead", DEAD_MAX)
        self._count("dead")

    def settle(
        self, receipts: Sequence[str], decisions: Sequence[Decision] = (), judgements: Sequence[Judgement] = ()
    ) -> None:
        self._check_process()
        now = self.now()
        wires = [(decision, checked(decision, now)) for decision in decisions]
        made = settled = 0
        with self._file.transaction() as db:
            for decision, wire in wires:
                made += self._decide(db, decision, wire, False, now)
            bodies: dict[str, bytes] = {}
            for seq in receipts:
                rows = db.execute("DELETE FROM queue WHERE seq = ? RETURNING id, body", (int(seq),)).fetchall()
                bodies.update(rows)
                settled += len(rows)
            for judgement in judgements:
                if judgement.escalation in bodies:
                    db.execute(
                        "INSERT INTO judged (id, at, judgement, body) VALUES (?, ?, ?, ?)",
                        (judgement.escalation, now, judgement.to_wire(), bodies[judgement.escalation]),
                    )
            _trim(db, "judged", self.settings.judgements_max)
        self._count("settled", settled)
        self._count("decisions", made)
        if made:
            self._wake.ring("d")

    def fail(self, receipt: str, error: str) -> None:
        self._check_process()
        with self._file.transaction() as db:
            row = db.execute("SELECT deliveries FROM queue WHERE seq = ?", (int(receipt),)).fetchone()
            if row is None:
                return
            if row[0] >= self.settings.deliveries_max:
                self._bury(db, int(receipt), error)
            else:
                db.execute("UPDATE queue SET error = ? WHERE seq = ?", (printable(error), int(receipt)))
        self._count("failed")

    def depth(self) -> int:
        with self._file.transaction(write=False) as db:
            return _one(db, "SELECT count(*) FROM queue")

    def dead(self, limit: int = 100) -> list[Dead]:
        with self._file.transaction(write=False) as db:
            rows = db.execute(
                "SELECT seq, at, error, deliveries, body FROM dead ORDER BY seq DESC LIMIT ?", (max(0, limit),)
            ).fetchall()
        return [Dead(str(seq), at, error, tries, readable(body)) for seq, at, error, tries, body in rows]

    def retry_dead(self, ids: Sequence[str]) -> int:
        self._check_process()
        moved = 0
        with self._file.transaction() as db:
            for id in ids:
                if _one(db, "SELECT count(*) FROM queue") >= self.settings.queue_max:
                    break
                row = db.execute("DELETE FROM dead WHERE seq = ? RETURNING id, client, body", (int(id),)).fetchone()
                if row is not None:
                    moved += db.execute(
                        "INSERT OR IGNORE INTO queue (id, client, queued, body) VALUES (?, ?, ?, ?)",
                        (row[0], row[1], self.now(), row[2]),
                    ).rowcount
        if moved:
            self._wake.ring("q")
        return moved

    def decide(self, decision: Decision, *, replace: bool = True) -> bool:
        self._check_process()
        now = self.now()
        wire = checked(decision, now)
        with self._file.transaction() as db:
            made = self._decide(db, decision, wire, replace, now)
        self._count("decisions", made)
        if made:
            self._wake.ring("d")
        return bool(made)

    def _decide(self, db: sqlite3.Connection, decision: Decision, wire: bytes, replace: bool, now: float) -> int:
        if decision.expires <= now:
            return 0
        place = (decision.scope, str(decision.key))
        old = db.execute(
            "SELECT action, expires, undone FROM decisions WHERE scope = ? AND key = ? AND expires > ?", (*place, now)
        ).fetchone()
        action, expires = decision.action, decision.expires
        if old is not None and not replace:
            if old[2]:
                self._count("refused")
                return 0
            if old[1] >= expires and ACTIONS[old[0]] >= ACTIONS[action]:
                return 0
            expires = max(expires, old[1])
            action = max(action, old[0], key=ACTIONS.__getitem__)
        elif old is None:
            db.execute("DELETE FROM decisions WHERE expires <= ?", (now,))
            db.execute("DELETE FROM ids WHERE expires <= ?", (now,))
            if _one(db, "SELECT count(*) FROM decisions") >= self.settings.decisions_max:
                self._count("refused")
                return 0
        db.execute(
            "INSERT OR REPLACE INTO decisions (scope, key, seq, action, expires, body) VALUES (?, ?, ?, ?, ?, ?)",
            (*place, _next(db), action, expires, wire),
        )
        db.execute("INSERT OR REPLACE INTO ids VALUES (?, ?, ?, ?)", (decision.id, *place, expires))
        return 1

    def undo(self, id: str, who: str) -> Decision | None:
        self._check_process()
        with self._file.transaction() as db:
            row = db.execute(
                "UPDATE decisions SET undone = 1, who = ?, seq = ? WHERE undone = 0 AND expires > ? "
                "AND (scope, key) = (SELECT scope, key FROM ids WHERE id = ?) "
                "RETURNING body, action, expires, undone, who",
                (printable(who, NAME_CHARS_MAX), _next(db), self.now(), id),
            ).fetchone()
        if row is None:
            return None
        self._count("decisions")
        self._wake.ring("d")
        return overlaid(row[0], row[1], row[2], bool(row[3]), row[4])

    def active(self, now: float | None = None) -> list[Decision]:
        at = self.now() if now is None else now
        with self._file.transaction(write=False) as db:
            rows = db.execute(
                f"{STORED} WHERE expires > ? AND undone = 0 ORDER BY expires LIMIT ?",
                (at, self.settings.decisions_max),
            ).fetchall()
        return _decisions(rows)

    def get(self, id: str) -> Decision | None:
        with self._file.transaction(write=False) as db:
            rows = db.execute(
                f"{STORED} WHERE expires > ? AND (scope, key) = (SELECT scope, key FROM ids WHERE id = ?)",
                (self.now(), id),
            ).fetchall()
        found = _decisions(rows)
        return found[0] if found else None

    def changes(self, since: int | None) -> tuple[int, list[Decision]]:
        """The number of the last change, and what changed after `since` (None: nothing)."""
        with self._file.transaction(write=False) as db:
            last = _one(db, "SELECT n FROM counter")
            rows = [] if since is None else db.execute(f"{STORED} WHERE seq > ? ORDER BY seq", (since,)).fetchall()
        return last, _decisions(rows)

    def follow(self, on_change: OnChange, on_gap: OnGap) -> Closeable:
        self._check_process()
        self._listen()
        follower = _Follower(self, on_change, on_gap)
        self._followers.append(follower)
        return follower

    def judgements(self, limit: int = 100) -> list[Judged]:
        with self._file.transaction(write=False) as db:
            rows = db.execute(
                "SELECT at, judgement, body FROM judged ORDER BY seq DESC LIMIT ?", (max(0, limit),)
            ).fetchall()
        return [Judged(at, Judgement.from_wire(judgement), Escalation.from_wire(body)) for at, judgement, body in rows]

    def feedback(self, event_id: str, label: Label, who: str, note: str = "") -> bool:
        self._check_process()
        checked_label(label, who)
        with self._file.transaction() as db:
            row = db.execute(
                "SELECT body, judgement FROM judged WHERE id = ? ORDER BY seq DESC LIMIT 1", (event_id,)
            ).fetchone() or (None, None)
            wire = feedback_wire(event_id, label, who, note, self.now(), *row)
            db.execute("INSERT INTO feedback (body) VALUES (?)", (wire,))
            _trim(db, "feedback", self.settings.feedback_max)
        return row[0] is not None

    def export_feedback(self) -> Iterator[Feedback]:
        last = -1
        while True:
            with self._file.transaction(write=False) as db:
                rows = db.execute(
                    "SELECT seq, body FROM feedback WHERE seq > ? ORDER BY seq LIMIT ?", (last, PAGE)
                ).fetchall()
            if not rows:
                return
            for last, body in rows:  # noqa: B007
                yield feedback_of(body)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.close()
        for follower in self._followers:
            follower.close()
        self._file.close()

    def _state(self) -> dict[str, float]:
        with self._file.transaction(write=False) as db:
            depth = _one(db, "SELECT count(*) FROM queue")
            row = db.execute("SELECT queued FROM queue ORDER BY seq LIMIT 1").fetchone()
        return {"depth": depth, "lag_s": max(0.0, self.now() - row[0]) if row else 0.0}

    def _listen(self) -> None:
        try:
            self._wake.listen()
        except OSError as error:
            self._in_trouble(StoreUnavailable(f"no waking by other processes: {error.strerror}"))

    def _replaced(self) -> None:
        self._count("replaced")
        self._epoch += 1

    def _in_trouble(self, error: StoreError) -> None:
        self._count("errors")
        if not self._trouble:
            self._trouble = True
            log.error("%s", printable(str(error)))


class _Follower:
    def __init__(self, store: SqliteStore, on_change: OnChange, on_gap: OnGap) -> None:
        """Raises StoreError."""
        self._store, self._on_change, self._on_gap = store, on_change, on_gap
        self._epoch = store._epoch
        self._last: int | None = store.changes(None)[0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="judge-store-follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if not self._store._closed.is_set():
            self._store._wake._turn("d")
        if self._thread is not threading.current_thread():
            self._thread.join(self._store.settings.timeout_s + LOOK_S)

    def _run(self) -> None:
        store = self._store
        while not (self._stop.is_set() or store._closed.is_set()):
            turn = store._wake.turn("d")
            try:
                last, changed = store.changes(self._last)
            except StoreError as error:
                if not store._closed.is_set():
                    store._in_trouble(error)
                store._closed.wait(0.1)
                continue
            gap = self._epoch != store._epoch or (self._last is not None and last < self._last)
            self._epoch, self._last = store._epoch, last
            if gap:
                store._count("gaps")
                tell_gap(self._on_gap)
            elif changed:
                tell(self._on_change, changed)
            store._wake.wait("d", turn, LOOK_S)


def readable(body: bytes) -> Escalation | None:
    try:
        return Escalation.from_wire(body)
    except WireError:
        return None


def _one(db: sqlite3.Connection, query: str, *values: object) -> int:
    found: int = db.execute(query, values).fetchone()[0]
    return found


def _next(db: sqlite3.Connection) -> int:
    return _one(db, "UPDATE counter SET n = n + 1 RETURNING n")


def _trim(db: sqlite3.Connection, table: str, most: int) -> None:
    db.execute(f"DELETE FROM {table} WHERE seq <= (SELECT max(seq) FROM {table}) - ?", (most,))


def _decisions(rows: list[tuple[bytes, str, float, int, str]]) -> list[Decision]:
    found = []
    for body, action, expires, undone, who in rows:
        try:
            found.append(overlaid(body, action, expires, bool(undone), who))
        except WireError as error:
            log.error("a stored decision is left out: %s", printable(str(error)))
    return found
