"""The core as the sidecar holds it: arena, policy and models, put together from the settings and
kept up to date."""
from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from native.arenafile import ArenaFile
from native.engine import ArenaError, Engine, ModelError, Models
from sidecar import sharing
from sidecar.memory import memory_folder
from sidecar.policy import compile_policy

if TYPE_CHECKING:
    from sidecar.config import Settings

logger = logging.getLogger(__name__)
DEFAULT_BUNDLE = Path(__file__).parent / "default_bundle"


class ArenaBusy(ArenaError):  # type: ignore[misc]
    """Another sidecar owns the arena."""


def default_cache() -> Path:
    """Where compiled models are kept unless models.cache says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "outrider"


def hash_key(settings: Settings) -> bytes | None:
    """16 bytes out of client.key_file, or None for a random key."""
    if settings.client.key_file is None:
        return None
    return hashlib.blake2b(Path(settings.client.key_file).read_bytes(), digest_size=16, person=b"outrider").digest()


class Core:
    """Arena, policy and models. `engine()` makes one Engine per thread.

    place: where others find the arena; None for a private core, which shares nothing."""

    def __init__(
        self,
        settings: Settings,
        arena: ArenaFile,
        models: Models,
        lock_fd: int | None = None,
        place: sharing.ArenaPlace | None = None,
    ) -> None:
        self.settings = settings
        self.arena = arena
        self.models = models
        self.place = place
        self.group = settings.arena.group         # as opened: a new one takes a restart
        self._published: Path | None = None
        self._publishing = threading.Lock()       # loading and trying again are different threads' work
        self._lock_fd = lock_fd
        # nobody waits on a private core: results must not depend on how busy the machine is
        self._unhurried = lock_fd is None
        arena.write_policy(compile_policy(settings))

    def engine(self, keep_features: bool = False) -> Engine:
        return Engine(self.arena, self.models, keep_features, self._unhurried)

    def reload(self, settings: Settings) -> None:
        """Take over new settings: policy at once, models where the bundle changed. What needs a restart
        (arena, listen, admin) is left as it was."""
        self.arena.write_policy(compile_policy(settings))
        bundle_moved = settings.models != self.settings.models
        self.settings = settings
        if bundle_moved:
            self.load_models()

    def load_models(self) -> None:
        """Compile the bundle for this machine where that is still to be done, and swap it in.

        Raises sidecar.bundle.BundleError or ModelError, keeping what is in use."""
        from sidecar.bundle import load_bundle, prepare_runtime

        bundle = load_bundle(bundle_path(self.settings))
        cache = Path(self.settings.models.cache) if self.settings.models.cache else default_cache()
        runtime = prepare_runtime(bundle, cache)
        self.models.load(runtime)
        logger.info("models loaded", extra={"bundle": str(bundle_path(self.settings)), "runtime": str(runtime)})
        self.publish_models()

    @property
    def models_published(self) -> bool:
        """Do the models in use lie where proxies look for them?"""
        published = self._published
        return published is not None and (published / "runtime.bin").is_file()

    def publish_models(self) -> None:
        """Put the models in use beside the arena, for proxies' plugins. Where that fails it is said and the sidecar
        serves on: it has its own."""
        if self.place is None:
            return
        with self._publishing:
            try:
                relative = sharing.publish(Path(self.models.folder), self.place.path, sharing.group_id(self.group))
                self.arena.publish_models(relative, self.models.generation)
            except (sharing.ShareError, KeyError, ValueError) as error:
                self._published = None
                logger.error(
                    "the models can't be shared with proxies: those attached keep what they have, new ones decide by "
                    "lists and detectors only",
                    extra={"why": str(error)},
                )
                return
            self._published = self.place.path.parent / relative
            sharing.prune(self.place.path, relative)

    def close(self) -> None:
        if self.place is not None:
            self.place.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def bundle_path(settings: Settings) -> Path:
    return DEFAULT_BUNDLE if settings.models.bundle == "default" else Path(settings.models.bundle)


def open_arena(settings: Settings) -> ArenaFile:
    """The sidecar's arena: what stands at arena.path where it fits this build and these settings, so that
    a restart keeps what is known of the clients; else a new one. A file that is no arena is not touched."""
    path = Path(settings.arena.path)
    key = hash_key(settings)
    wanted = settings.arena
    try:
        gid = sharing.group_id(wanted.group)
    except KeyError:
        raise ArenaError(
            f"arena.group: there is no group {wanted.group} on this machine (create it, or give its number)"
        ) from None
    # we hold the lock: whoever was making an arena here was killed at it, and memory is dear
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.new"):
        with contextlib.suppress(OSError):
            left.unlink()
    sharing.prune(path)
    if path.exists():
        try:
            arena = ArenaFile.open(path)
        except ArenaError as error:
            if "wrong magic" in str(error) or "cannot open" in str(error):
                raise
            logger.warning("the arena is replaced: %s", error)
        else:
            shape = arena.shape
            fits = (shape["clients"], shape["events"], shape["escalations"], shape["blocklist"]) == (
                wanted.clients,
                wanted.events,
                wanted.escalations,
                wanted.blocklist,
            )
            if fits and (key is None or arena.key == key):
                try:
                    sharing.give_arena(path, gid)
                except OSError as error:
                    raise ArenaError(not_given(path, wanted.group, error)) from error
                return arena
            logger.warning("the arena is replaced: its sizes or its key differ from the settings")
    try:
        return ArenaFile.create(
            path,
            wanted.clients,
            wanted.events,
            wanted.blocklist,
            key=key,
            reserve=True,
            mode=sharing.arena_mode(gid),
            gid=gid,
            escalations=wanted.escalations,
        )
    except PermissionError as error:
        raise ArenaError(not_given(path, wanted.group, error)) from error


def not_given(path: Path, group: int | str | None, error: OSError) -> str:
    """Why the arena's group or mode can't be set, in words."""
    if group is None:
        return f"{path}: its mode can't be set to 0600: {error.strerror} (remove it, or run as the user that made it)"
    return (
        f"arena.group: {path} can't be given to group {group}: {error.strerror} (run Outrider as a member of that "
        "group: usermod -aG, or supplementalGroups in a pod)"
    )


def open_core(settings: Settings, *, private: bool = False, load_models: bool = True) -> Core:
    """The core for these settings.

    private: an arena of its own that nobody else sees (training, replay, scoring files); else the shared
    one at arena.path, owned by one sidecar at a time (ArenaBusy). Raises ArenaError, BundleError, ModelError."""
    lock_fd: int | None = None
    place: sharing.ArenaPlace | None = None
    if private:
        # a sparse file: twice the entries' size is ample for all regions but the escalations
        folder = memory_folder(settings.arena.clients * 2048 + settings.arena.escalations * 12288)
        path = Path(folder) / f"outrider-{os.getpid()}-{os.urandom(4).hex()}.arena"
        arena = ArenaFile.create(
            path,
            settings.arena.clients,
            settings.arena.events,
            settings.arena.blocklist,
            key=hash_key(settings),
            escalations=settings.arena.escalations,
        )
        path.unlink()  # the mapping lives on; nothing is left behind however we end
    else:
        lock_path = f"{settings.arena.path}.lock"
        try:
            lock_fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ArenaError(
                f"{lock_path}: cannot create: {error.strerror} (make the folder, or set arena.path)"
            ) from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            raise ArenaBusy(
                f"{settings.arena.path}: another sidecar is using this arena (give each its own arena.path)"
            ) from None
        try:
            arena = open_arena(settings)
            place = sharing.ArenaPlace(Path(settings.arena.path), arena.bytes)
        except BaseException:
            os.close(lock_fd)
            raise
    core = Core(settings, arena, Models(), lock_fd, place)
    if load_models:
        try:
            core.load_models()
        except BaseException:
            core.close()
            raise
    return core


__all__ = ["ArenaBusy", "ArenaError", "Core", "ModelError", "bundle_path", "default_cache", "open_arena", "open_core"]
