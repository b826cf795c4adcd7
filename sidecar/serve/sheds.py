"""Says in the log when a route gives up stages to keep to its budget, and when it takes them back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WATCH_EVERY_S = 1.0

log = logging.getLogger("outrider.latency")


async def watch(routes: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
    """Look once a second, for ever. routes: as ArenaFile.routes()."""
    seen: dict[str, int] = {}
    while True:
        seen = tell(seen, routes())
        await asyncio.sleep(WATCH_EVERY_S)


def tell(seen: Mapping[str, int], routes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Log what changed since `seen` (route name -> shed level) and return what is so now."""
    for route in routes:
        before, after = seen.get(route["name"], 0), route["shed_level"]
        said = {"route": route["name"], "shed": route["shed_now"], "budget_us": route["budget_us"]}
        if after > before:
            log.warning("a route's p99 is over its budget: stages are shed", extra=said)
        elif after < before:
            log.info("a route recovers: a shed stage is tried again", extra=said)
    return {str(route["name"]): int(route["shed_level"]) for route in routes}
