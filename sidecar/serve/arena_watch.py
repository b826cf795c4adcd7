"""Keeps an eye on what is shared with proxies: is the arena's file still there and whole, do the models lie beside it?

What is mapped stays ours when the file is deleted, so the sidecar and whoever is attached go on; who comes later
finds nothing. A file that was cut short is the end: the next access behind its end kills the process, at a place and
with a message that nobody chose. Better to end at once and say why: a supervisor starts us again, with a new arena.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from sidecar.serve.errors import EXIT_ARENA
from sidecar.sharing import Presence

if TYPE_CHECKING:
    from sidecar.core import Core

LOOK_EVERY_S = 1.0
PUBLISH_AGAIN_S = 30.0

log = logging.getLogger("outrider.serve")


class ArenaWatch:
    def __init__(self, core: Core) -> None:
        self.core = core
        self.state: Presence = "present"
        self._published_at = time.monotonic()

    @property
    def present(self) -> bool:
        return self.state == "present"

    async def run(self) -> None:
        while True:
            self.look()
            if not self.core.models_published and time.monotonic() - self._published_at >= PUBLISH_AGAIN_S:
                await asyncio.to_thread(self.core.publish_models)
                self._published_at = time.monotonic()
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """Look once; what has changed is said. Ends the process where the file was cut short."""
        place = self.core.place
        if place is None:
            return
        before, self.state = self.state, place.look()
        if self.state == before:
            return
        if self.state == "truncated":
            end(str(place.path))
        if self.state == "present":
            log.info("the arena's file is back", extra={"arena": place.path})
            return
        log.error(
            "the arena's file was %s: proxies that have it open keep deciding with it; workers that start from now on "
            "don't find ours and follow their failure mode. Restart Outrider: it makes a new one, to which all attach",
            self.state,
            extra={"arena": place.path},
        )


def end(path: str) -> NoReturn:
    """Without any of the usual last steps: they would touch the arena."""
    log.critical(
        "the arena's file was cut short while in use: ending before an access to it does. Start Outrider again; it "
        "makes a new one, and what was known of the clients is lost",
        extra={"arena": path, "status": EXIT_ARENA},
    )
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_ARENA)
