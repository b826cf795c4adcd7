"""What processes of other users and in other containers get of the arena: its group, and the models beside it.

A proxy's plugin opens the arena by itself, wherever its folder is mounted, and finds the models in
`<arena>.models/<16 hexadecimal digits>/`, a copy of the runtime folder. The arena names it relative to its own
folder. The copy is complete when it has its name; the latest two are kept, so that whoever has just read the name
still finds the files.
"""
from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Literal

SUFFIX = ".models"
UNFINISHED = ".making-"
KEPT = 2                          # published folders: the current one and the one before
FILES_MAX = 16
FILE_BYTES_MAX = 256 << 20

Presence = Literal["present", "deleted", "replaced", "truncated"]


class ShareError(Exception):
    """Something can't be shared; the text says what, why, and the remedy."""


def group_id(group: int | str | None) -> int | None:
    """The number of a group given by name or number. KeyError where the name isn't known here."""
    return grp.getgrnam(group).gr_gid if isinstance(group, str) else group


def give(fd: int, mode: int, gid: int | None) -> None:
    """Set group and mode of an open file or folder, where they are others. OSError where that isn't permitted."""
    state = os.fstat(fd)
    if gid is not None and state.st_gid != gid:
        os.fchown(fd, -1, gid)
    if stat.S_IMODE(state.st_mode) != mode:
        os.fchmod(fd, mode)


# ---------------------------------------------------------------- the arena's file

def arena_mode(gid: int | None) -> int:
    return 0o600 if gid is None else 0o660


def give_arena(path: Path, gid: int | None) -> None:
    """The same for an arena that stands there already. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        give(fd, arena_mode(gid), gid)
    finally:
        os.close(fd)


class ArenaPlace:
    """Looks whether the arena that we have mapped still stands where others look for it, and is whole.

    An open descriptor keeps hold of the file itself, so that its size is seen whatever stands at the path now."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def look(self) -> Presence:
        """truncated: the pages behind its end are gone; touching one kills the process (SIGBUS)."""
        ours = os.fstat(self._fd)
        if ours.st_size < self.size:
            return "truncated"
        try:
            there = self.path.stat()
        except OSError:
            return "deleted"
        return "present" if os.path.samestat(ours, there) else "replaced"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


# ---------------------------------------------------------------- the models

def models_folder(arena: Path) -> Path:
    return arena.with_name(arena.name + SUFFIX)


def read_runtime(runtime: Path) -> dict[str, bytes]:
    """What a runtime folder holds for the data plane: runtime.bin and libraries. ShareError."""
    files: dict[str, bytes] = {}
    try:
        for entry in sorted(os.scandir(runtime), key=lambda entry: entry.name):
            if not (entry.name == "runtime.bin" or entry.name.endswith(".so")):
                continue
            if len(files) == FILES_MAX or entry.stat().st_size > FILE_BYTES_MAX:
                raise ShareError(f"{runtime}: more than {FILES_MAX} files, or one above {FILE_BYTES_MAX >> 20} MiB")
            files[entry.name] = Path(entry).read_bytes()
    except OSError as error:
        raise ShareError(f"{runtime}: cannot be read: {error.strerror}") from error
    return files


def content_name(files: dict[str, bytes]) -> str:
    """The published folder's name: 16 hexadecimal digits that stand for all it holds."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _open_root(arena: Path, gid: int | None) -> Path:
    """`<arena>.models`, ours and closed to others; made if need be."""
    root = models_folder(arena)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise ShareError(f"{root}: belongs to user {os.fstat(fd).st_uid}, and what lies in it decides: remove it, "
                             "or set arena.path to a folder of this user")
        give(fd, 0o700 if gid is None else 0o750, gid)
    finally:
        os.close(fd)
    return root


def _is_whole(folder: Path, files: dict[str, bytes]) -> bool:
    try:
        if {entry.name for entry in os.scandir(folder)} != set(files):
            return False
        return all((folder / name).read_bytes() == content for name, content in files.items())
    except OSError:
        return False


def _give_folder(folder: Path, files: dict[str, bytes], gid: int | None) -> None:
    for name, mode in [*((name, 0o640 if gid is not None else 0o600) for name in files),
                       (".", 0o750 if gid is not None else 0o700)]:
        fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            give(fd, mode, gid)
        finally:
            os.close(fd)


def publish(runtime: Path, arena: Path, gid: int | None) -> str:
    """Copy a runtime folder beside the arena; its path relative to the arena's folder.

    Raises ShareError, leaving what was published before."""
    files = read_runtime(runtime)
    name = content_name(files)
    try:
        root = _open_root(arena, gid)
        final = root / name
        if not _is_whole(final, files):
            work = root / f"{UNFINISHED}{secrets.token_hex(4)}"
            work.mkdir(mode=0o700)
            try:
                for file, content in files.items():
                    (work / file).write_bytes(content)
                _give_folder(work, files, gid)
                if final.exists():
                    os.rename(final, root / f"{UNFINISHED}{secrets.token_hex(4)}")  # damaged: out of the way
                os.rename(work, final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        else:
            _give_folder(final, files, gid)
        os.utime(final)
    except OSError as error:
        raise ShareError(
            f"{models_folder(arena)}: cannot be written: {error.strerror} (give the volume of arena.path some "
            f"{sum(map(len, files.values())) + (1 << 20) >> 20} MiB more for each of {KEPT} bundles, and see that "
            "Outrider may write there)"
        ) from error
    return f"{root.name}/{name}"


def prune(arena: Path, current: str | None = None) -> None:
    """Remove what was left unfinished and, where `current` (as publish() gave it) is known, all published folders
    but that one and the latest beside it. The caller holds the arena's lock."""
    root = models_folder(arena)
    try:
        if root.is_symlink() or root.stat().st_uid != os.geteuid():
            return
        entries = [entry for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
        old = [entry for entry in entries if current is not None and entry.name != Path(current).name
               and not entry.name.startswith(UNFINISHED)]
        old.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    except OSError:
        return                                    # there is none, or it is gone
    for entry in [*(entry for entry in entries if entry.name.startswith(UNFINISHED)), *old[KEPT - 1:]]:
        shutil.rmtree(entry, ignore_errors=True)
