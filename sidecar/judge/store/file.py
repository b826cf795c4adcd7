"""The SQLite file: opened, checked, shared between processes, and moved aside when it is damaged.

WAL mode with synchronous=NORMAL: a commit lies in the kernel's cache when it returns, so killing the process loses
nothing. Loss of power may take back the commits since the last checkpoint, never a part of one: escalations are worth
no fsync each, and a decision taken back is one that would have run out.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator

from sidecar.judge.store.base import StoreError, StoreUnavailable, log, printable

LAYOUT = 1
APPLICATION = 0x4F757472  # "Outr", in the file's header
ASIDE_MAX = 2
WAL_BYTES_MAX = 16 << 20
HEADER = b"SQLite format 3\0"

SCHEMA = """
CREATE TABLE counter (n INTEGER NOT NULL);
INSERT INTO counter VALUES (0);
CREATE TABLE queue (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, client TEXT NOT NULL, queued REAL NOT NULL,
    claimed REAL, consumer TEXT, deliveries INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '',
    body BLOB NOT NULL);
CREATE INDEX queue_client ON queue (client);
CREATE INDEX queue_claimed ON queue (claimed, seq);
CREATE TABLE dead (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, client TEXT NOT NULL, at REAL NOT NULL,
    error TEXT NOT NULL, deliveries INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE decisions (
    scope TEXT NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL, action TEXT NOT NULL, expires REAL NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0, who TEXT NOT NULL DEFAULT '', body BLOB NOT NULL, PRIMARY KEY (scope, key));
CREATE UNIQUE INDEX decisions_seq ON decisions (seq);
CREATE INDEX decisions_expires ON decisions (expires);
CREATE TABLE ids (id TEXT PRIMARY KEY, scope TEXT NOT NULL, key TEXT NOT NULL, expires REAL NOT NULL);
CREATE INDEX ids_expires ON ids (expires);
CREATE TABLE judged (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, at REAL NOT NULL, judgement BLOB NOT NULL,
    body BLOB NOT NULL);
CREATE INDEX judged_id ON judged (id);
CREATE TABLE feedback (seq INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
"""


class File:
    """One connection for all threads of a process, one transaction at a time."""

    def __init__(self, path: str, timeout_s: float, replaced: Callable[[], None]) -> None:
        """replaced is called after a damaged file has made way. Raises StoreError."""
        self.path, self.timeout_s, self._replaced = path, timeout_s, replaced
        self._lock = threading.RLock()
        self._inode = (0, 0)
        self._db: sqlite3.Connection | None = None
        self._closed = False
        with self._lock:
            self._connection()

    @contextlib.contextmanager
    def transaction(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        """Raises StoreUnavailable where SQLite can't: locked for too long, disk full, file damaged (it's replaced)."""
        with self._lock:
            db = self._connection()
            try:
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield db
                db.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                self._rollback(db)
                if _damaged(error):
                    self._replace(error)
                raise StoreUnavailable(f"{self.path}: {error}") from None
            except BaseException:
                self._rollback(db)
                raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._forget()

    def _connection(self) -> sqlite3.Connection:
        """Also after another process has moved the file aside."""
        if self._db is not None:
            with contextlib.suppress(OSError):
                status = os.stat(self.path)
                if (status.st_dev, status.st_ino) == self._inode:
                    return self._db
            self._forget()
            self._open()
            self._replaced()
        elif self._closed:
            raise StoreUnavailable(f"{self.path} is closed")
        else:
            self._open()
        assert self._db is not None
        return self._db

    def _open(self) -> None:
        self._inode = (0, 0)
        try:
            self._try_open()
        except sqlite3.DatabaseError as error:
            self._forget()
            if not _damaged(error):
                raise self._refusal(str(error)) from None
            if not self._ours():
                raise StoreError(f"{self.path} is not a store of Outrider's: name another file") from None
            self._replace(error)

    def _refusal(self, why: str) -> StoreError:
        return StoreUnavailable(
            f"{self.path} can't be opened: {why}: give Outrider's user write permission on file and folder, and room"
        )

    def _try_open(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_mode & 0o077:
                    os.fchmod(file.fileno(), 0o600)
        except OSError as error:
            raise self._refusal(error.strerror or str(error)) from None
        db = sqlite3.connect(self.path, timeout=self.timeout_s, isolation_level=None, check_same_thread=False)
        self._db, self._inode = db, (status.st_dev, status.st_ino)
        application = db.execute("PRAGMA application_id").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and application != APPLICATION:
            self._forget()
            raise StoreError(f"{self.path} is another program's SQLite file: name another one")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
        db.execute("BEGIN IMMEDIATE")
        layout = db.execute("PRAGMA user_version").fetchone()[0]  # another process may have been first
        if not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            for statement in SCHEMA.split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {LAYOUT}")
        elif layout != LAYOUT:
            db.execute("ROLLBACK")
            self._forget()
            raise StoreError(
                f"{self.path} has layout {layout}, this Outrider speaks {LAYOUT}: stop the other version and move the "
                "file away, or name another one"
            )
        db.execute("COMMIT")
        for table in ("queue", "decisions", "counter"):
            db.execute(f"SELECT count(*) FROM {table}").fetchone()

    def _ours(self) -> bool:
        """Whether a damaged file was once a store: nobody else's file is moved."""
        if os.path.isdir(self.path + ".wake"):
            return True
        try:
            with open(self.path, "rb") as file:
                header = file.read(72)
        except OSError:
            return False
        return header.startswith(HEADER) and header[68:72] == APPLICATION.to_bytes(4, "big")

    def _replace(self, error: sqlite3.DatabaseError) -> None:
        """A damaged file makes way for an empty one. Two processes that find it so move it once."""
        inode = self._inode
        self._forget()
        aside = f"{self.path}.damaged-{time.time_ns() // 1000000}"
        try:
            with open(os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                status = os.stat(self.path)
                if inode in ((0, 0), (status.st_dev, status.st_ino)):
                    for end in ("", "-wal", "-shm"):
                        with contextlib.suppress(FileNotFoundError):
                            os.rename(self.path + end, aside + end)
                    log.error(
                        "%s is damaged (%s): moved to %s, what waited and what held in it is lost",
                        self.path, printable(str(error)), aside,
                    )  # fmt: skip
                    self._tidy()
                try:
                    self._try_open()
                except sqlite3.DatabaseError as again:
                    self._forget()
                    raise self._refusal(str(again)) from None
        except OSError as problem:
            raise StoreUnavailable(
                f"{self.path} is damaged and can't be moved aside: {problem.strerror}: move it away"
            ) from None
        self._replaced()

    def _tidy(self) -> None:
        found = sorted(glob.glob(glob.escape(self.path) + ".damaged-*[0-9]"))
        for old in found[: max(0, len(found) - ASIDE_MAX)]:
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    os.unlink(old + end)

    def _forget(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    @staticmethod
    def _rollback(db: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")


def _damaged(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
