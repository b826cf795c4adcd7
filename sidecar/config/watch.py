"""Take up a changed configuration while serving.

The folder is watched, not the file: editors replace files by renaming, and Kubernetes swaps the
`..data` link beside a ConfigMap's files, which a watch on the file itself would miss. What counts is
the content: every event, and a slow poll for file systems without events, leads to one comparison of
the file's bytes with those seen last.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from watchfiles import awatch

from sidecar.config import checks
from sidecar.config.changes import Changes, diff, take_up
from sidecar.config.load import loads, read
from sidecar.config.problems import ConfigError, Problem, dotted, printable
from sidecar.config.settings import Settings

OnChange = Callable[[Settings, Changes], Awaitable[None] | None]
OnError = Callable[[ConfigError], Awaitable[None] | None]

SETTLE_S = 0.05  # a file that is being written is read again after this
SETTLE_TRIES = 20
POLL_S = 5.0
RETRY_S = 1.0  # after a watch that could not be set up


class ConfigWatcher:
    """Watches one configuration file.

    on_change(settings, changes): a good configuration that differs from the running one. `settings` can
    be applied as it is: what needs a restart has its running value, and is named in
    changes.needs_restart. Raising refuses it: the running settings stay.
    on_error(error): a configuration that cannot be taken up, with all its problems; told once per content
    of the file, and again after reload(). Both may be plain or async functions, and are never called
    at the same time.

        watcher = ConfigWatcher(path, settings, on_change, on_error)
        task = asyncio.create_task(watcher.run())
        loop.add_signal_handler(signal.SIGHUP, watcher.reload)
        ...
        task.cancel()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        running: Settings,
        on_change: OnChange,
        on_error: OnError,
        *,
        environment: bool = True,
        poll_s: float = POLL_S,
    ) -> None:
        self.path = Path(os.path.abspath(path))  # not resolved: the links are what changes
        self.running = running
        self.on_change = on_change
        self.on_error = on_error
        self.environment = environment
        self.poll_s = poll_s
        self._seen: bytes | None = None
        self._pending: Changes = Changes((), ())
        self._failed = False
        self._lock = asyncio.Lock()
        self._forced = asyncio.Event()

    def reload(self) -> None:
        """Read the file now, also if it has not changed (SIGHUP). From the event loop's thread."""
        self._forced.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._on_demand())
            group.create_task(self._watch())

    async def check(self, *, force: bool = False) -> bool:
        """Compare the file with what was seen last and take it up; True if new settings run now."""
        async with self._lock:
            try:
                content = await self._settled()
            except ConfigError as error:
                await self._report(error, str(error).encode("utf-8", "replace"), force)
                return False
            digest = hashlib.sha256(content).digest()
            if digest == self._seen and not force:
                return False
            try:
                new, changes = await asyncio.to_thread(self._prepare, content)
            except ConfigError as error:
                await self._report(error, content, force)
                return False
            self._seen = digest
            if not changes.applied and changes == self._pending and not self._failed and not force:
                return False
            try:
                await _called(self.on_change(new, changes))
            except ConfigError as error:
                await self._report(error, content, True)
                return False
            except Exception as error:
                problem = Problem(
                    printable(str(self.path)),
                    None,
                    None,
                    "",
                    f"the settings could not be applied: {printable(str(error))[:300]}",
                    "the running settings stay",
                )
                await self._report(ConfigError([problem]), content, True)
                return False
            self._pending = Changes((), changes.needs_restart)
            self._failed = False
            self.running = new
            return bool(changes.applied)

    def _prepare(self, content: bytes) -> tuple[Settings, Changes]:
        """In a thread: a megabyte of YAML takes seconds, and requests must not wait for it."""
        source = str(self.path)
        loaded = loads(content, source, environment=self.environment)
        changes = diff(self.running, loaded)
        new = take_up(self.running, loaded)
        problems = (
            [
                Problem(
                    printable(source),
                    None,
                    None,
                    dotted(finding.paths[0]),
                    f"together with settings that wait for a restart: {finding.what}",
                    "restart Outrider, or change these settings in two steps",
                )
                for finding in checks.between(new)
            ]
            if changes.needs_restart
            else []
        )
        if problems:
            raise ConfigError(problems)
        return new, changes

    async def _report(self, error: ConfigError, content: bytes, force: bool) -> None:
        digest = hashlib.sha256(content).digest()
        if digest == self._seen and not force:
            return
        self._seen = digest
        self._failed = True
        await _called(self.on_error(error))

    async def _settled(self) -> bytes:
        """The file's bytes, once they have stopped changing."""
        last: bytes | ConfigError | None = None
        for _ in range(SETTLE_TRIES):
            current: bytes | ConfigError
            try:
                current = await asyncio.to_thread(read, self.path)
            except ConfigError as error:
                current = error
            if isinstance(current, bytes) and current == last:
                return current
            if isinstance(current, ConfigError) and isinstance(last, ConfigError):
                raise current
            last = current
            await asyncio.sleep(SETTLE_S)
        if isinstance(last, ConfigError):
            raise last
        return last or b""

    async def _on_demand(self) -> None:
        while True:
            await self._forced.wait()
            self._forced.clear()
            await self.check(force=True)

    async def _watch(self) -> None:
        while True:
            folders = await asyncio.to_thread(self._folders)
            await self.check()
            if not folders:
                await asyncio.sleep(RETRY_S)
                continue
            try:
                async for _ in awatch(
                    *folders,
                    watch_filter=None,
                    recursive=False,
                    debounce=400,
                    step=20,
                    rust_timeout=int(self.poll_s * 1000),
                    yield_on_timeout=True,
                ):
                    await self.check()
                    if await asyncio.to_thread(self._folders) != folders:
                        break
            except (OSError, RuntimeError):
                # a folder went away, or no watches are left: the poll above goes on
                await asyncio.sleep(RETRY_S)

    def _folders(self) -> list[str]:
        """The folder of the file, of every link on the way to it, and of what they lead to."""
        folders: list[str] = []
        current = self.path
        for _ in range(16):
            if str(current.parent) not in folders and current.parent.is_dir():
                folders.append(str(current.parent))
            try:
                target = os.readlink(current)
            except OSError:
                break
            current = Path(os.path.normpath(current.parent / target))
        resolved = os.path.dirname(os.path.realpath(self.path))
        if resolved not in folders and os.path.isdir(resolved):
            folders.append(resolved)
        return folders


async def _called(result: Awaitable[None] | None) -> None:
    if inspect.isawaitable(result):
        await result
