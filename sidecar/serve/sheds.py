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
    seen: dict[str, list[str]] = {}
    while True:
        seen = tell(seen, routes())
        await asyncio.sleep(WATCH_EVERY_S)


def tell(seen: Mapping[str, list[str]], routes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Log what changed since `seen` (route name -> stages shed) and return what is so now."""
    now = {str(route["name"]): list(route["shed_now"]) for route in routes}
    for route in routes:
        before, after = seen.get(route["name"], []), now[route["name"]]
        if after == before:
            continue
        said = {"route": route["name"], "shed": after, "budget_us": route["budget_us"]}
        if len(after) > len(before):
            log.warning("a route's p99 is over its budget: stages are shed", extra=said)
        else:
            log.info("a route recovers: a shed stage is tried again", extra=said)
    return now
