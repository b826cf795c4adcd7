"""The judge beside the sidecar: a process of its own that is started, watched, and started again when it dies.

It gives way to everybody else (judge.nice, judge.cpus) and ends when the sidecar does, whatever way that ends: its
standard input closes then. What it counts it says on its standard output, a line of JSON a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidecar.config.judge import Judge
from sidecar.serve.metrics import Tally

AGAIN_FIRST_S, AGAIN_MAX_S = 0.5, 60.0
LIVED_S = 60.0  # one that lived so long had a sound start
END_WAIT_S = 5.0
LINE_BYTES_MAX = 64 * 1024

log = logging.getLogger("outrider.judge")


def chosen_cpus(judge: Judge) -> frozenset[int]:
    """Those that the judge may use: judge.cpus, or the last of ours, where proxies and sidecar are least at work."""
    ours = os.sched_getaffinity(0)
    if judge.cpus is not None:
        return frozenset(judge.cpus) & ours or frozenset(ours)
    return frozenset((max(ours),))


class JudgeChild:
    def __init__(self, config: Path, tally: Tally) -> None:
        self._config, self._tally = config, tally
        self._process: asyncio.subprocess.Process | None = None
        self.status: Mapping[str, Any] = {}

    @property
    def ready(self) -> bool:
        """Its models are loaded and it takes work."""
        return bool(self.status.get("ready"))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Until cancelled."""
        wait_s = AGAIN_FIRST_S
        try:
            while True:
                begun = time.monotonic()
                status = await self._once()
                self.status = {}
                self._tally.add("judge_restarts")
                lived_s = time.monotonic() - begun
                wait_s = AGAIN_FIRST_S if lived_s >= LIVED_S else min(AGAIN_MAX_S, wait_s * 2)
                log.error(
                    "the judge ended: starting it again; what it was at is judged then",
                    extra={"status": status, "lived_s": round(lived_s, 1), "again_in_s": wait_s},
                )
                await asyncio.sleep(wait_s)
        finally:
            await self._end()

    async def _once(self) -> int:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sidecar.judge.process",
            str(self._config),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
        )
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # a line beyond the limit: none of ours
            async for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError):
                    said = json.loads(line)
                    if isinstance(said, dict):
                        self.status = said
        return await process.wait()

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), END_WAIT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
