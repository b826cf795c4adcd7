"""The serving process with stand-ins for core and transport: order of events, reload, probes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.config import Settings
from sidecar.serve import app as serving
from sidecar.serve.errors import EXIT_CONFIG, StartupError


class FakeArena:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.events_given_up = self.escalations_given_up = 0

    def drain(self, most: int) -> list[dict[str, Any]]:
        taken, self.records = self.records[:most], self.records[most:]
        return taken

    def counters(self) -> dict[str, int]:
        return {"requests": 3}

    def histograms(self) -> dict[str, list[int]]:
        return {"total": [1, 2]}

    def routes(self) -> list[dict[str, Any]]:
        return []

    def known_clients(self) -> int:
        return 1


class FakeCore:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.arena = settings, FakeArena()
        self.place, self.models_published = None, True
        self.reloaded: list[Settings] = []
        self.loads = 0
        self.fail_with: Exception | None = None
        self.closed = False

    def reload(self, settings: Settings) -> None:
        self.reloaded.append(settings)
        self.settings = settings

    def load_models(self) -> None:
        self.loads += 1
        if self.fail_with is not None:
            raise self.fail_with

    def close(self) -> None:
        self.closed = True


class FakeTransport:
    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.app: serving.Application | None = None

    async def start(self) -> None:
        self.events.append("start")

    def set_serving(self, serving: bool) -> None:
        self.events.append(f"serving={serving}")

    async def stop(self, grace_s: float) -> None:
        assert self.app is not None
        self.events.append(f"stop ready={self.app.ready()[0]} grace={grace_s:.1f}")

    def hurry(self) -> None:
        self.hurried = True

    def stats(self) -> Mapping[str, float]:
        return {"streams_active": 0}


class World:
    def __init__(self, folder: Path, **over: Any) -> None:
        self.folder = folder
        self.file = folder / "outrider.yaml"
        self.decisions = folder / "decisions.jsonl"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.admin_port = probe.getsockname()[1]
        self.base: dict[str, Any] = {
            "judge": {"enabled": False},
            "listen": {"address": "127.0.0.1:0", "drain": "400ms"},
            "admin": {"address": f"127.0.0.1:{self.admin_port}"},
            "arena": {"path": str(folder / "arena")},
            "decision_log": {"path": str(self.decisions)},
            **over,
        }
        self.base["listen"]["address"] = f"unix:{folder}/s"
        self.write()
        self.events: list[str] = []
        self.cores: list[FakeCore] = []

    def write(self, **over: Any) -> None:
        self.file.write_text(yaml.safe_dump(self.base | over))

    def open_core(self, settings: Settings) -> Any:
        self.cores.append(FakeCore(settings))
        return self.cores[-1]

    def make_transport(self, core: Any, settings: Settings) -> Any:
        self.transport = FakeTransport(self.events)
        return self.transport

    async def get(self, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(self._get, path)

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> World:
    import tempfile

    world = World(Path(tempfile.mkdtemp(prefix="or-", dir=tmp_path_factory.getbasetemp())))
    monkeypatch.setattr(serving, "open_core", world.open_core)
    monkeypatch.setattr(serving, "make_transport", world.make_transport)
    monkeypatch.setattr(serving, "bounds_us", lambda: [10.0])
    return world


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[tuple[serving.Application, asyncio.Task[int]]]:
    app = serving.Application(world.file, serving.read_settings(world.file))
    task = asyncio.create_task(app.run())
    try:
        await until(lambda: app.serving or task.done())
        if task.done():
            task.result()
        world.transport.app = app
        yield app, task
    finally:
        app.stop()
        app.stop()
        await asyncio.wait_for(task, 10)


async def until(check: Callable[[], Any], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_stop_first_says_not_ready_and_then_waits(world: World) -> None:
    async with running(world) as (app, task):
        assert (await world.get("/readyz")) == (200, "ok\n")
        assert (await world.get("/healthz")) == (200, "ok\n")
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: app.draining)
        assert (await world.get("/readyz")) == (503, "draining\n")
        assert (await world.get("/healthz"))[0] == 200
        assert await asyncio.wait_for(task, 10) == 0
    assert world.events == ["start", "serving=False", "stop ready=False grace=0.2"]
    assert world.cores[0].closed


async def test_told_twice_it_does_not_wait(world: World) -> None:
    world.write(listen={"address": f"unix:{world.folder}/s", "drain": "60s"})
    async with running(world) as (app, task):
        begun = time.monotonic()
        app.stop()
        await until(lambda: app.draining)
        app.stop()
        assert await asyncio.wait_for(task, 10) == 0
        assert time.monotonic() - begun < 5
    assert world.events[-1] == "stop ready=False grace=0.0"


async def test_told_again_while_requests_end_it_does_not_wait_either(world: World) -> None:
    world.write(listen={"address": f"unix:{world.folder}/s", "drain": "4s"})
    waiting = asyncio.Event()

    async def stop(grace_s: float) -> None:
        waiting.set()
        await asyncio.wait_for(hurried.wait(), 30)

    hurried = asyncio.Event()
    async with running(world) as (app, task):
        app.transport.stop, app.transport.hurry = stop, hurried.set  # type: ignore[union-attr,method-assign]
        app.stop()
        await asyncio.wait_for(waiting.wait(), 10)
        app.stop()
        assert await asyncio.wait_for(task, 10) == 0
    assert hurried.is_set()


async def test_what_waits_in_the_ring_is_written_before_the_end(world: World) -> None:
    async with running(world):
        world.cores[0].arena.records = [{"id": 1, "action": "block", "reasons": [], "route": 0}]
    (line,) = world.decisions.read_text().splitlines()
    assert json.loads(line)["route"] == "default"


async def test_while_starting_it_is_alive_and_not_ready(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(settings: Settings) -> Any:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10)
        return world.open_core(settings)

    monkeypatch.setattr(serving, "open_core", slow)
    app = serving.Application(world.file, serving.read_settings(world.file))
    task = asyncio.create_task(app.run())
    await until(lambda: app.admin is not None)
    assert (await world.get("/readyz")) == (503, "starting\n")
    assert (await world.get("/healthz"))[0] == 200
    assert (await world.get("/metrics"))[0] == 200
    gate.set()
    await until(lambda: app.serving)
    world.transport.app = app
    app.stop()
    assert await asyncio.wait_for(task, 10) == 0


async def test_a_late_event_loop_is_unhealthy(world: World) -> None:
    async with running(world) as (app, _):
        app.beat = time.monotonic() - 60
        fine, word = app.health()
        assert not fine
        assert "late" in word
        assert not app.ready()[0]


async def test_a_change_of_the_policy_is_taken_over_without_loading_models(world: World) -> None:
    async with running(world) as (app, _):
        world.write(service={"mode": "observe"})
        await until(lambda: world.cores[0].reloaded)
        assert world.cores[0].reloaded[-1].service.mode == "observe"
        assert world.cores[0].loads == 0
        assert 'mode="observe"' in (await world.get("/metrics"))[1]
        assert app.tally.get("config_reloads", "applied") == 1


async def test_models_that_are_refused_keep_the_whole_configuration(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """All of a file is taken over, or nothing."""
    other = world.folder / "bundle"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    async with running(world) as (app, _):
        core = world.cores[0]
        core.fail_with = RuntimeError("not a bundle")
        with caplog.at_level(logging.ERROR, "outrider.serve"):
            world.write(service={"mode": "observe"}, models={"bundle": str(other)})
            await until(lambda: app.tally.get("config_reloads", "refused"))
        assert core.reloaded == []
        assert core.settings is app.settings
        assert app.settings.service.mode == "enforce"
        assert any("not a bundle" in str(vars(record).get("why")) for record in caplog.records)
        core.fail_with = None
        app.hang_up()
        await until(lambda: core.reloaded)
        assert app.settings.models.bundle == str(other)


async def test_what_needs_a_restart_is_said_and_not_done(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(world) as (app, _):
        with caplog.at_level(logging.INFO, "outrider.serve"):
            world.write(listen={"address": "127.0.0.1:9", "drain": "400ms"}, service={"name": "other"})
            await until(lambda: app.settings.service.name == "other")
        assert app.settings.listen.address.startswith("unix:")
        said = [vars(r)["needs_restart"] for r in caplog.records if hasattr(r, "needs_restart")]
        assert "listen.address" in str(said)


async def test_a_bad_file_at_start_names_its_mistakes(world: World) -> None:
    world.file.write_text("service: {mode: sometimes}\n")
    with pytest.raises(StartupError, match="mode") as caught:
        serving.read_settings(world.file)
    assert caught.value.status == EXIT_CONFIG


async def test_a_taken_admin_port_ends_the_start_cleanly(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", world.admin_port))
        taken.listen()
        with pytest.raises(StartupError, match=r"admin\.address"):
            async with running(world):
                raise AssertionError("it started")
    assert world.cores == []


async def test_a_transport_that_cannot_start_gives_everything_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(core: Any, settings: Settings) -> Any:
        transport = world.make_transport(core, settings)

        async def start() -> None:
            raise RuntimeError("no socket today")

        async def stop(grace_s: float) -> None:
            world.events.append("stop")

        transport.start, transport.stop = start, stop
        return transport

    monkeypatch.setattr(serving, "make_transport", broken)
    app = serving.Application(world.file, serving.read_settings(world.file))
    with pytest.raises(StartupError, match="no socket today"):
        await app.run()
    assert world.cores[0].closed
    assert world.events == ["stop"]
    with pytest.raises(ConnectionRefusedError):
        await world.get("/healthz")


class FewEngines:
    """A core whose engines are counted; they decide nothing."""

    def __init__(self) -> None:
        self.made = 0

    def engine(self) -> Any:
        from native.extproc import RecordingHost

        self.made += 1
        return RecordingHost()


def listening(**listen: Any) -> Settings:
    return Settings.model_validate({"listen": {"address": "127.0.0.1:19999", **listen}})


@pytest.mark.parametrize(("listen", "engines"), [
    ({"threads": 3}, 3), ({"transport": "native", "threads": 1}, 1), ({"transport": "grpcio", "threads": 3}, 1)])
async def test_the_transport_that_was_asked_for(listen: dict[str, Any], engines: int) -> None:
    pytest.importorskip("native.http2", reason="native.http2 isn't built: libnghttp2-dev is missing")
    core = FewEngines()
    transport = serving.make_transport(core, listening(**listen))  # type: ignore[arg-type]
    wanted = "GrpcTransport" if listen.get("transport") == "grpcio" else "NativeTransport"
    assert type(transport).__name__ == wanted
    assert core.made == engines


async def test_without_the_library_the_portable_transport_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "native.http2", None)
    monkeypatch.delitem(sys.modules, "sidecar.serve.native_transport", raising=False)
    transport = serving.make_transport(FewEngines(), listening())  # type: ignore[arg-type]
    assert type(transport).__name__ == "GrpcTransport"
    assert "grpcio serves" in caplog.text
    # asked for by name it must not be replaced silently
    with pytest.raises(StartupError, match="libnghttp2-dev"):
        serving.make_transport(FewEngines(), listening(transport="native"))  # type: ignore[arg-type]


async def test_tls_is_served_by_the_portable_transport(tmp_path: Path) -> None:
    (tmp_path / "crt").write_text("C")
    (tmp_path / "key").write_text("K")
    files = {"tls_cert_file": str(tmp_path / "crt"), "tls_key_file": str(tmp_path / "key")}
    transport = serving.make_transport(FewEngines(), listening(**files))  # type: ignore[arg-type]
    assert type(transport).__name__ == "GrpcTransport"
    (tmp_path / "key").unlink()
    with pytest.raises(StartupError, match=r"can't read .*key"):
        serving.make_transport(FewEngines(), listening(**files))  # type: ignore[arg-type]
