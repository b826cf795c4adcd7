"""Reload: renames, in-place writes, ConfigMap link swaps, SIGHUP; bad files keep what runs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sidecar.config import ConfigError, Settings, loads
from sidecar.config.changes import Changes, diff, take_up
from sidecar.config.watch import ConfigWatcher

PATIENCE_S = 15.0
# what the tests write needs no folders; the poll is slow, so that events are what is tested
QUICK = {"environment": False, "poll_s": 60.0}


class Seen:
    """What a watcher said, in order."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[Settings, Changes] | ConfigError] = asyncio.Queue()

    async def changed(self, settings: Settings, changes: Changes) -> None:
        await self.events.put((settings, changes))

    def failed(self, error: ConfigError) -> None:
        self.events.put_nowait(error)

    async def change(self) -> tuple[Settings, Changes]:
        event = await asyncio.wait_for(self.events.get(), PATIENCE_S)
        assert not isinstance(event, ConfigError), str(event)
        return event

    async def error(self) -> ConfigError:
        event = await asyncio.wait_for(self.events.get(), PATIENCE_S)
        assert isinstance(event, ConfigError)
        return event

    async def nothing(self) -> None:
        await asyncio.sleep(0.7)
        assert self.events.empty()


@asynccontextmanager
async def watching(path: Path, **more: object) -> AsyncIterator[tuple[ConfigWatcher, Seen]]:
    seen = Seen()
    running = loads(path.read_text())
    watcher = ConfigWatcher(path, running, seen.changed, seen.failed, **{**QUICK, **more})  # type: ignore[arg-type]
    task = asyncio.create_task(watcher.run())
    await asyncio.sleep(0.4)  # let the watch be set up
    try:
        yield watcher, seen
        assert not task.done()
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "outrider.yaml"
    path.write_text("service: {mode: enforce}\n")
    return path


def replace(path: Path, text: str) -> None:
    new = path.with_name("new.tmp")
    new.write_text(text)
    new.rename(path)


async def test_nothing_at_the_start(file: Path) -> None:
    async with watching(file) as (_, seen):
        await seen.nothing()


async def test_rename_and_write_in_place(file: Path) -> None:
    async with watching(file) as (watcher, seen):
        replace(file, "service: {mode: observe}\n")
        found, changes = await seen.change()
        assert found.service.mode == "observe"
        assert [str(change) for change in changes.applied] == ['service.mode: "enforce" -> "observe"']
        file.write_text("service: {mode: observe, name: other}\n")
        found, changes = await seen.change()
        assert found.service.name == "other"
        assert [change.path for change in changes.applied] == ["service.name"]
        assert watcher.running == found


async def test_config_map(tmp_path: Path) -> None:
    """As the kubelet does it: the file links into ..data, which links to a dated folder and is swapped."""

    def publish(stamp: str, text: str) -> None:
        folder = tmp_path / f"..{stamp}"
        folder.mkdir()
        (folder / "outrider.yaml").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(folder.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("2026_1", "service: {mode: enforce}\n")
    path = tmp_path / "outrider.yaml"
    path.symlink_to("..data/outrider.yaml")
    async with watching(path) as (_, seen):
        for number, name in enumerate(("a", "b", "c"), 2):
            publish(f"2026_{number}", f"service: {{name: {name}}}\n")
            old = tmp_path / f"..2026_{number - 1}"
            (old / "outrider.yaml").unlink()
            old.rmdir()
            found, _ = await seen.change()
            assert found.service.name == name


async def test_link_to_another_folder(tmp_path: Path) -> None:
    """The file behind a link is changed where it really is."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "x.yaml").write_text("{}\n")
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc" / "outrider.yaml"
    path.symlink_to(real / "x.yaml")
    async with watching(path) as (_, seen):
        (real / "x.yaml").write_text("service: {name: other}\n")
        found, _ = await seen.change()
        assert found.service.name == "other"


async def test_bad_file_is_told_once_and_keeps_what_runs(file: Path) -> None:
    async with watching(file) as (watcher, seen):
        before = watcher.running
        replace(file, "service: {mode: enforc}\nlatency: {budget: 5}\n")
        error = await seen.error()
        assert [problem.path for problem in error.problems] == ["service.mode", "latency.budget"]
        assert error.problems[0].where == f"{file}:1:17"
        assert watcher.running is before
        os.utime(file)
        await seen.nothing()
        watcher.reload()  # asked for, so told again
        assert len((await seen.error()).problems) == 2
        # back to what runs: no changes, but said, because it was bad in between
        replace(file, "service: {mode: enforce}\n")
        found, changes = await seen.change()
        assert found == before
        assert not changes


async def test_missing_file(file: Path) -> None:
    async with watching(file) as (_, seen):
        file.unlink()
        assert "No such file" in str(await seen.error())
        await seen.nothing()
        file.write_text("service: {name: back}\n")
        assert (await seen.change())[0].service.name == "back"


async def test_half_written_file_is_waited_for(file: Path) -> None:
    async with watching(file) as (_, seen):
        with file.open("w") as half:
            half.write("service: {na")
            half.flush()
            await asyncio.sleep(0.02)
            half.write("me: whole}\n")
        assert (await seen.change())[0].service.name == "whole"
        await seen.nothing()


async def test_same_meaning_is_no_change(file: Path) -> None:
    async with watching(file) as (_, seen):
        replace(file, "# a comment\nservice:\n  mode: enforce\n")
        await seen.nothing()


async def test_hang_up(file: Path) -> None:
    async with watching(file) as (watcher, seen):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, watcher.reload)
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            found, changes = await seen.change()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
        assert found == watcher.running
        assert not changes


async def test_restart_settings_keep_their_running_value(file: Path) -> None:
    async with watching(file) as (watcher, seen):
        replace(file, "service: {name: other}\narena: {clients: 1024}\nlisten: {max_streams: 5}\n")
        found, changes = await seen.change()
        assert found.service.name == "other"
        assert found.arena.clients == 65536
        assert found.listen.max_streams == 4096
        assert [change.path for change in changes.applied] == ["service.name"]
        assert [change.path for change in changes.needs_restart] == ["listen.max_streams", "arena.clients"]
        # still waiting, and not told again by an unrelated event
        os.utime(file)
        await seen.nothing()
        # back to what runs: nothing waits any more
        replace(file, "service: {name: other}\n")
        _, changes = await seen.change()
        assert not changes
        assert watcher.running == found


async def test_settings_that_only_fit_after_a_restart(file: Path) -> None:
    file.write_text("listen: {max_message: 128KiB}\n")
    async with watching(file) as (watcher, seen):
        replace(file, "listen: {max_message: 2MiB}\ntext: {body: 1MiB}\n")
        error = await seen.error()
        assert [problem.path for problem in error.problems] == ["text.body"]
        assert "restart" in error.problems[0].remedy
        assert watcher.running.text.body_bytes == 65536


async def test_refused_by_who_applies_it(file: Path) -> None:
    complaints: list[ConfigError] = []

    def refuse(settings: Settings, changes: Changes) -> None:
        raise RuntimeError("no such bundle \x1b[31m")

    watcher = ConfigWatcher(file, loads("{}"), refuse, complaints.append, environment=False)
    file.write_text("service: {name: other}\n")
    assert await watcher.check() is False
    assert watcher.running == Settings()
    assert "no such bundle" in str(complaints[0])
    assert "\x1b" not in str(complaints[0])
    assert await watcher.check() is False
    assert len(complaints) == 1


async def test_poll_finds_what_events_miss(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where events say nothing (network file systems), the poll does."""
    empty = file.parent / "empty"
    empty.mkdir()
    monkeypatch.setattr(ConfigWatcher, "_folders", lambda self: [str(empty)])
    async with watching(file, poll_s=0.2) as (_, seen):
        replace(file, "service: {name: polled}\n")
        assert (await seen.change())[0].service.name == "polled"


# ---- comparison


def test_diff_names_routes() -> None:
    old = loads("routes: [{name: a, path: /a}, {name: b, path: /b, thresholds: {tag: null}}]")
    new = loads("routes: [{name: b, path: /b}, {name: a, path: /a, budget: 2ms}, {name: c, path: /c}]")
    found = {change.path: (change.old, change.new) for change in diff(old, new).applied}
    assert found["routes[a].budget"] == ("null", '"2ms"')
    assert found["routes[b].thresholds.tag"] == ("null", "(none)")
    assert found["routes[c].path"] == ("(none)", '"/c"')
    assert found["routes (order)"] == ('["a", "b"]', '["b", "a", "c"]')
    assert not diff(old, old)


def test_diff_of_emptied_routes() -> None:
    old = loads("routes: [{name: a, path: /a}]")
    assert "routes (order)" in {change.path for change in diff(old, Settings()).applied}


def test_diff_cuts_long_values() -> None:
    new = loads("lists: {block: [" + ", ".join(f"10.0.{n}.0/24" for n in range(0, 200, 2)) + "]}")
    (change,) = diff(Settings(), new).applied
    assert change.path == "lists.block"
    assert len(change.new) == 80


def test_take_up_without_changes_is_the_same_object() -> None:
    new = loads("service: {name: x}")
    assert take_up(Settings(), new) is new
