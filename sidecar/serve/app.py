"""The serving process from start to drain: `run` is its life, top to bottom.

check addresses -> open the core (arena, policy, models) -> transport, admin, decision log
  -> serve; reload on SIGHUP or when the file changes
  -> SIGTERM: not ready, wait for the proxy to look away, finish what is in progress, close
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.config import ConfigError, Settings, load
from sidecar.config.changes import Changes
from sidecar.config.listen import Listen
from sidecar.config.watch import ConfigWatcher
from sidecar.serve import addresses, logs, sheds
from sidecar.serve.admin import AdminServer
from sidecar.serve.arena_watch import ArenaWatch
from sidecar.serve.decisions import DecisionLog, Plan
from sidecar.serve.errors import EXIT_CONFIG, EXIT_MODELS, StartupError
from sidecar.serve.metrics import Outrider, Tally, make_registry
from sidecar.serve.transport import Limits, Tls, Transport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector

    from sidecar.core import Core
    from sidecar.serve.auth_request import AuthServer
    from sidecar.serve.judging import Judging

HEARTBEAT_S = 0.5
HEARTBEAT_STALE_S = 10.0  # an event loop this late isn't serving: /healthz fails
LOOK_AWAY_S = 2.5  # at most: Envoy's health check is told twice, a second apart
WATCH_EVERY_S = 1.0
SWEEP_EVERY_S = 5.0
DESCRIPTORS_BESIDE = 128  # arena, logs, admin connections, compilers' pipes, configuration being read
THREADS_AUTO_MAX = 4  # one thread serves more than four workers of Envoy can ask

log = logging.getLogger("outrider.serve")


def version() -> str:
    try:
        return importlib.metadata.version("outrider")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def read_settings(path: Path) -> Settings:
    """The settings in the file; StartupError listing every mistake."""
    try:
        return load(path)
    except ConfigError as error:
        raise StartupError(str(error), EXIT_CONFIG) from error


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced or rewritten; None where there is none. Follows links, so that
    the atomic link swap of a Kubernetes ConfigMap is seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


class Application:
    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.tally = Tally()
        self.started = time.time()
        self.serving = False
        self.draining = False
        self.beat = time.monotonic()
        self.stopping = asyncio.Event()
        self.hurry = asyncio.Event()
        self.watcher = ConfigWatcher(path, settings, self.changed, self.refused)
        self.core: Core | None = None
        self.transport: Transport | None = None
        self.auth: AuthServer | None = None
        self.decisions: DecisionLog | None = None
        self.admin: AdminServer | None = None
        self.arena_watch: ArenaWatch | None = None
        self.judging: Judging | None = None
        self.registry: CollectorRegistry | None = None
        self.last_reload_fine = True
        self.tasks: list[asyncio.Task[None]] = []

    # ---- life

    async def run(self) -> int:
        """Serve until told to stop; the exit status. StartupError when it can't start."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.hang_up)
        try:
            await self.start()
            await self.stopping.wait()
            await self.drain()
        finally:
            await self.close()
        return 0

    async def start(self) -> None:
        listen = addresses.parse(self.settings.listen.address)
        addresses.check(listen, "listen.address")
        wanted = self.settings.listen.auth_request
        if wanted is not None:
            addresses.check(addresses.parse(wanted), "listen.auth_request")
        # before the core: probes are answered (not ready) while models are compiled
        self.core = None
        if self.settings.admin.address is not None:
            self.registry = make_registry(
                Outrider(
                    self._counters,
                    self._histograms,
                    bounds_us(),
                    self._transport_stats,
                    self.tally,
                    self._gauges,
                    version(),
                    lambda: self.settings.service.mode,
                    self._routes,
                    lambda: self.auth.stats() if self.auth is not None else {},
                )
            )
            self.admin = AdminServer(
                addresses.parse(self.settings.admin.address), self.registry, self.health, self.ready
            )
        self.core = await asyncio.to_thread(open_core, self.settings)
        self.arena_watch = ArenaWatch(self.core)
        self.decisions = DecisionLog(self.core.arena, self.plan(), self.tally, sentence())
        self.decisions.start()
        self.transport = make_transport(self.core, self.settings)
        try:
            await self.transport.start()
        except (OSError, RuntimeError) as error:
            raise StartupError(f"listen.address: can't listen on {listen}: {error}") from error
        if listen.path is not None:
            with contextlib.suppress(OSError):
                os.chmod(listen.path, addresses.SOCKET_MODE)
        if wanted is not None:
            auth = make_auth_server(self.core, self.settings)
            try:
                await auth.start()
            except OSError as error:
                raise StartupError(f"listen.auth_request: can't listen on {wanted}: {error}") from error
            self.auth = auth
        self.spawn(self.heartbeat())
        self.spawn(self.watcher.run())
        self.spawn(self.watch_models())
        self.spawn(self.arena_watch.run())
        if self.settings.judge.enabled:
            await self._start_judging()
        self.spawn(sheds.watch(self._routes))
        self.serving = True
        log.info(
            "serving",
            extra={
                "version": version(),
                "address": str(listen),
                "auth_request": wanted,
                "admin": self.settings.admin.address,
                "arena": self.settings.arena.path,
                "mode": self.settings.service.mode,
                "failure": self.settings.service.failure,
                "config": self.path,
                "pid": os.getpid(),
            },
        )

    async def _start_judging(self) -> None:
        """After all that answers requests: the judge may be late, and may fail, without them."""
        assert self.core is not None
        self.judging = await asyncio.to_thread(make_judging, self.core, self.settings, self.path)
        await asyncio.to_thread(self.judging.start)
        if self.registry is not None:
            self.registry.register(judge_metrics(self.judging))
        self.spawn(self.judging.run())
        self.spawn(self._sweep_blocked())

    async def _sweep_blocked(self) -> None:
        """Entries that have run out make room, and a list without any costs nothing again."""
        assert self.core is not None
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            self.core.arena.sweep_blocked()

    async def drain(self) -> None:
        """Not ready first, so that the proxy stops asking; then finish what is in progress."""
        assert self.transport is not None
        self.draining = True
        limit_s = self.settings.listen.drain_s
        begun = time.monotonic()
        log.info("draining", extra={"limit_s": limit_s})
        self.transport.set_serving(False)
        if self.auth is not None:
            self.auth.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.hurry.wait(), min(LOOK_AWAY_S, limit_s / 2))
        left_s = 0.0 if self.hurry.is_set() else limit_s - (time.monotonic() - begun)
        stopping = asyncio.ensure_future(self.transport.stop(max(0.0, left_s)))
        hurried = asyncio.ensure_future(self.hurry.wait())
        await asyncio.wait([stopping, hurried], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            self.transport.hurry()
        hurried.cancel()
        await stopping
        if self.auth is not None:
            await self.auth.stop()
        log.info("drained", extra={"seconds": round(time.monotonic() - begun, 3)})

    async def close(self) -> None:
        self.serving = False
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.transport is not None and not self.draining:
            await self.transport.stop(0.0)
        if self.auth is not None:
            await self.auth.stop()
        if self.judging is not None:
            await asyncio.to_thread(self.judging.close)
        if self.decisions is not None:
            await asyncio.to_thread(self.decisions.close)
        if self.admin is not None:
            await asyncio.to_thread(self.admin.close)
        if self.core is not None:
            self.core.close()
            self.core = None

    def stop(self) -> None:
        """SIGTERM or Ctrl-C: drain; told a second time: without waiting."""
        if self.stopping.is_set():
            self.hurry.set()
        self.stopping.set()

    def hang_up(self) -> None:
        """SIGHUP: reopen the decision log (rotation) and read the configuration again."""
        if self.decisions is not None:
            self.decisions.reopen()
        self.watcher.reload()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self.tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("a background task failed: stopping", exc_info=task.exception())
            self.stop()

    # ---- probes

    async def heartbeat(self) -> None:
        while True:
            self.beat = time.monotonic()
            await asyncio.sleep(HEARTBEAT_S)

    def health(self) -> tuple[bool, str]:
        """Whether the process is worth keeping; asked from the admin server's threads."""
        late = time.monotonic() - self.beat
        if self.serving and late > HEARTBEAT_STALE_S:
            return False, f"the event loop is {late:.0f} s late"
        return True, "ok"

    def ready(self) -> tuple[bool, str]:
        if self.draining or self.stopping.is_set():
            return False, "draining"
        if not self.serving:
            return False, "starting"
        return self.health()

    # ---- reload

    async def changed(self, fresh: Settings, changes: Changes) -> None:
        """The watcher has good new settings: take them over. Raising refuses them."""
        assert self.core is not None
        assert self.decisions is not None
        before = self.settings
        if fresh.models != before.models:
            # the slow part (compiling) and the one that can fail comes first, in a thread
            self.core.settings = fresh
            try:
                await asyncio.to_thread(self.core.load_models)
            except BaseException:
                self.core.settings = before
                raise
        self.core.reload(fresh)
        self.settings = fresh
        logs.set_up(fresh.log.level, fresh.log.format)
        self.decisions.configure(self.plan())
        if self.judging is not None:
            self.judging.configure(fresh)
        self.last_reload_fine = True
        self.tally.add("config_reloads", "applied" if changes.applied else "unchanged")
        log.info(
            "configuration reloaded",
            extra={
                "config": self.path,
                "changed": [str(change) for change in changes.applied],
                "needs_restart": [str(change) for change in changes.needs_restart],
            },
        )

    def refused(self, error: ConfigError) -> None:
        self.last_reload_fine = False
        self.tally.add("config_reloads", "refused")
        log.error(
            "configuration refused, the running one is kept",
            extra={"config": self.path, "why": str(error)},
        )

    async def watch_models(self) -> None:
        """Load the models anew when their bundle's manifest changes (it is written last)."""
        seen = self.bundle_stamp()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            now = self.bundle_stamp()
            if now is not None and now != seen and self.settings.models.watch:
                seen = now
                await self.reload_models()

    def bundle_stamp(self) -> tuple[int, int, int] | None:
        bundle = self.settings.models.bundle
        return None if bundle == "default" else stamp(Path(bundle) / "manifest.json")

    async def reload_models(self) -> None:
        assert self.core is not None
        try:
            await asyncio.to_thread(self.core.load_models)
        except Exception as error:
            self.tally.add("model_reloads", "refused")
            log.error(
                "model bundle refused, the running models are kept",
                extra={"bundle": self.settings.models.bundle, "why": f"{type(error).__name__}: {error}"},
            )
            return
        self.tally.add("model_reloads", "applied")
        log.info("models reloaded", extra={"bundle": self.settings.models.bundle})

    # ---- what metrics and logs read

    def plan(self) -> Plan:
        wanted = self.settings.decision_log
        return Plan(
            path=wanted.path,
            actions=frozenset(wanted.actions),
            sample=wanted.sample,
            service=self.settings.service.name,
            routes=tuple(route.name for route in self.settings.effective_routes()),
        )

    def _counters(self) -> Mapping[str, int]:
        core = self.core
        if core is None:
            return {}
        # those given up are known to the rings' only reader, which is this process
        return {
            **core.arena.counters(),
            "events_given_up": core.arena.events_given_up,
            "escalations_given_up": core.arena.escalations_given_up,
        }

    def _histograms(self) -> Mapping[str, list[int]]:
        core = self.core
        return core.arena.histograms() if core is not None else {}

    def _routes(self) -> Sequence[Mapping[str, Any]]:
        core = self.core
        return core.arena.routes() if core is not None else ()

    def _transport_stats(self) -> Mapping[str, float]:
        return self.transport.stats() if self.transport is not None else {}

    def _gauges(self) -> Mapping[str, tuple[str, float]]:
        core = self.core
        return {
            "ready": ("1 while requests are accepted.", float(self.ready()[0])),
            "config_last_reload_successful": (
                "0 after a refused configuration.",
                float(self.last_reload_fine),
            ),
            "start_time_seconds": ("When this process started, unix seconds.", self.started),
            "arena_present": (
                "0 while the arena's file is not where proxies look for it.",
                float(self.arena_watch.present if self.arena_watch else False),
            ),
            "models_published": (
                "0 while the models in use don't lie beside the arena for proxies.",
                float(core.models_published if core else False),
            ),
            "clients_limit": ("Client entries that the arena has room for.", self.settings.arena.clients),
            "clients": ("Client entries in use.", core.arena.known_clients() if core else 0),
        }


# ---- the seams to the other parts


def open_core(settings: Settings) -> Core:
    """sidecar.core.open_core, what can be expected to go wrong as StartupError."""
    # here, not above: the native modules and numpy take a while, a wrong configuration doesn't need them
    from sidecar import core
    from sidecar.bundle import BundleError
    from sidecar.compilers import CompileError

    try:
        return core.open_core(settings)
    except MemoryError as error:
        raise StartupError(f"arena.path: not enough memory for the arena: {error}") from error
    except (core.ArenaError, OSError) as error:
        raise StartupError(f"arena: {error}") from error
    except (BundleError, CompileError, core.ModelError) as error:
        raise StartupError(f"models.bundle: {error}", EXIT_MODELS) from error


def read_tls(listen: Listen) -> Tls | None:
    """The files of the listener's TLS; StartupError naming the one that can't be read."""
    if listen.tls_cert_file is None or listen.tls_key_file is None:
        return None

    def read(name: str) -> bytes:
        try:
            return Path(name).read_bytes()
        except OSError as error:
            raise StartupError(f"listen: can't read {name}: {error.strerror}") from error

    ca = None if listen.tls_client_ca_file is None else read(listen.tls_client_ca_file)
    return Tls(read(listen.tls_cert_file), read(listen.tls_key_file), ca)


def room_for(connections: int, servers: int = 1) -> int:
    """Raises the limit of open descriptors so that so many connections to each server fit beside what the process needs
    itself; returns how many do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections * servers + DESCRIPTORS_BESIDE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return connections
    fits = max(1, (soft - DESCRIPTORS_BESIDE) // servers)
    log.warning(
        "fewer connections than listen.max_connections: the limit of open files is too low",
        extra={"max_connections": connections, "taken": fits, "nofile": soft},
    )
    return fits


def servers_of(listen: Listen) -> int:
    """How many addresses proxies can connect to."""
    return 1 if listen.auth_request is None else 2


def make_transport(core: Core, settings: Settings) -> Transport:
    """The transport that the settings ask for; StartupError where this build doesn't have it."""
    listen = settings.listen
    limits = Limits(
        max_message_bytes=listen.max_message_bytes,
        max_streams=listen.max_streams,
        max_connections=room_for(listen.max_connections, servers_of(listen)),
        stream_idle_s=listen.stream_idle_s,
    )
    tls = read_tls(listen)
    if listen.transport != "grpcio" and tls is None:
        try:
            from sidecar.serve.native_transport import NativeTransport
        except ImportError as error:
            if listen.transport == "native":
                raise StartupError(
                    f"listen.transport: native isn't available here: {error} (install libnghttp2-dev and build again, "
                    "or say auto or grpcio)"
                ) from error
            log.warning("the native transport isn't available: grpcio serves, more slowly", extra={"why": str(error)})
        else:
            # one engine per thread
            threads = listen.threads or max(1, min(THREADS_AUTO_MAX, len(os.sched_getaffinity(0))))
            return NativeTransport(listen.address, [core.engine() for _ in range(threads)], limits)
    from native.extproc import ExtProcStream
    from sidecar.serve.grpc_transport import GrpcTransport

    # one engine, as all streams are handled on the one event loop
    engine = core.engine()
    host = engine.host_address()
    return GrpcTransport(listen.address, lambda: ExtProcStream(host, engine), limits, tls)


def make_auth_server(core: Core, settings: Settings) -> AuthServer:
    """The server that listen.auth_request asks for, not started."""
    from native.subrequest import HeaderJudge
    from sidecar.serve.auth_request import AuthServer

    listen = settings.listen
    assert listen.auth_request is not None
    engine = core.engine()
    judge = HeaderJudge(engine.host_address(), engine)
    connections = room_for(listen.max_connections, servers_of(listen))
    return AuthServer(listen.auth_request, judge, connections, listen.stream_idle_s)


def make_judging(core: Core, settings: Settings, config: Path) -> Judging:
    """StartupError where judge_store can't work."""
    from sidecar.judge.store import StoreError
    from sidecar.serve.judging import Judging

    try:
        return Judging(core, settings, config)
    except StoreError as error:
        raise StartupError(f"judge_store: {error}", EXIT_CONFIG) from error


def judge_metrics(judging: Judging) -> Collector:
    from sidecar.serve.judging import JudgeMetrics

    return JudgeMetrics(judging)


def bounds_us() -> list[float]:
    from native.engine import HISTOGRAM_BOUNDS_US

    return [float(bound) for bound in HISTOGRAM_BOUNDS_US]


def sentence() -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
    from sidecar import reasons

    return reasons.sentence
