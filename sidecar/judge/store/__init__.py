"""What sidecars and judges share: a bounded queue of escalations, and the decisions that hold.

base.py says what a store is; sqlite.py keeps it in a file of one box, redis.py in Redis or Valkey for a mesh.
"""

from __future__ import annotations

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.store.base import Claimed, Dead, Feedback, Judged, Store, StoreError, StoreUnavailable

__all__ = ["Claimed", "Dead", "Feedback", "Judged", "Store", "StoreError", "StoreUnavailable", "open_store"]


def open_store(settings: JudgeStore) -> Store:
    """Raises StoreError where the settings can't work (file of something else, unreadable password); a Redis that can't
    be reached yet is no error."""
    if settings.backend == "redis":
        from sidecar.judge.store.redis import RedisStore  # only here: a box with a file needs no client for Redis

        return RedisStore(settings)
    from sidecar.judge.store.sqlite import SqliteStore

    return SqliteStore(settings)
