"""What other users and containers get of the arena, and what happens when its file is tampered with: real sidecars."""
from __future__ import annotations

import asyncio
import grp
import os
import re
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_sidecar import Sidecar, until

from native.engine import ArenaError
from native.models import Models
from sidecar import sharing
from sidecar.config import Settings
from sidecar.core import open_core
from sidecar.serve import arena_watch
from sidecar.serve.errors import EXIT_ARENA, EXIT_CONFIG

Make = Callable[..., Sidecar]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to other groups and users takes root")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Sidecar] = []

    def start(**over: Any) -> Sidecar:
        made.append(Sidecar(tmp_path, **over))
        return made[-1]

    yield start
    for sidecar in made:
        if sidecar.process is not None and sidecar.process.poll() is None:
            sidecar.process.kill()
            sidecar.process.wait()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def settings(folder: Path, **arena: Any) -> Settings:
    return Settings.model_validate({"arena": {"path": str(folder / "arena"), "clients": 1024, **arena}})


def runtime(folder: Path, content: bytes = b"models") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "runtime.bin").write_bytes(content)
    (folder / "isolation-ab.so").write_bytes(b"library")
    (folder / "sums.json").write_text("{}")
    return folder


def published(arena: Path) -> set[str]:
    return {entry.name for entry in sharing.models_folder(arena).iterdir()}


# ---- the models beside the arena


def test_models_lie_beside_the_arena_and_are_named_relative_to_it(make: Make) -> None:
    sidecar = make().start()
    from native.arenafile import ArenaFile

    relative, generation = ArenaFile.open(sidecar.arena).published_models
    assert re.fullmatch(r"arena\.models/[0-9a-f]{16}", relative)
    folder = sidecar.folder / relative
    assert [entry.name for entry in folder.iterdir()] == ["runtime.bin"]
    assert generation != 0
    Models(folder).close()                        # as a proxy's plugin opens it
    assert (mode(folder.parent), mode(folder), mode(folder / "runtime.bin")) == (0o700, 0o700, 0o600)
    assert mode(sidecar.arena) == 0o600
    assert sidecar.metric("outrider_models_published") == 1


def test_a_private_core_shares_nothing(tmp_path: Path) -> None:
    core = open_core(settings(tmp_path), private=True)
    assert core.arena.published_models == ("", 0)
    assert list(tmp_path.iterdir()) == []
    core.close()


def test_the_current_and_the_previous_are_kept(tmp_path: Path) -> None:
    arena = tmp_path / "a"
    names = []
    for number in range(4):
        relative = sharing.publish(runtime(tmp_path / "runtime", b"%d" % number), arena, None)
        sharing.prune(arena, relative)
        names.append(Path(relative).name)
        assert published(arena) == set(names[-2:])
    # back to the one before: both stay
    relative = sharing.publish(runtime(tmp_path / "runtime", b"2"), arena, None)
    sharing.prune(arena, relative)
    assert (Path(relative).name, published(arena)) == (names[2], set(names[-2:]))
    assert (tmp_path / relative / "isolation-ab.so").read_bytes() == b"library"
    assert not (tmp_path / relative / "sums.json").exists()


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "runtime.bin").write_bytes(b"other"),
    lambda folder: (folder / "runtime.bin").unlink(),
    lambda folder: (folder / "more.so").write_bytes(b"x")], ids=["changed", "missing", "added"])
def test_a_spoilt_copy_is_made_again(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    arena = tmp_path / "a"
    source = runtime(tmp_path / "runtime")
    folder = tmp_path / sharing.publish(source, arena, None)
    spoil(folder)
    assert tmp_path / sharing.publish(source, arena, None) == folder
    assert {entry.name for entry in folder.iterdir()} == {"runtime.bin", "isolation-ab.so"}
    assert (folder / "runtime.bin").read_bytes() == b"models"


def test_what_was_left_unfinished_goes_at_the_start(tmp_path: Path) -> None:
    left = tmp_path / "arena.models" / ".making-1234"
    kept = tmp_path / "arena.models" / "0123456789abcdef"
    for folder in (left, kept):
        folder.mkdir(parents=True)
        (folder / "runtime.bin").write_bytes(b"x")
    core = open_core(settings(tmp_path), load_models=False)
    assert (left.exists(), kept.exists()) == (False, True)
    core.close()


def test_a_foreign_models_folder_is_not_used(tmp_path: Path) -> None:
    """In /dev/shm anybody may have made it first."""
    arena, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    elsewhere.mkdir()
    sharing.models_folder(arena).symlink_to(elsewhere)
    with pytest.raises(sharing.ShareError, match="cannot be written"):
        sharing.publish(runtime(tmp_path / "runtime"), arena, None)
    assert list(elsewhere.iterdir()) == []
    sharing.prune(arena, "a.models/x")            # nor is anything removed through it
    assert elsewhere.exists()


@AS_ROOT
def test_a_models_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    arena = tmp_path / "a"
    sharing.models_folder(arena).mkdir()
    os.chown(sharing.models_folder(arena), 65534, 65534)
    with pytest.raises(sharing.ShareError, match="belongs to user 65534"):
        sharing.publish(runtime(tmp_path / "runtime"), arena, None)


def test_models_that_cannot_be_shared_do_not_stop_the_sidecar(make: Make) -> None:
    sidecar = make()
    sharing.models_folder(sidecar.arena).write_text("in the way")
    sidecar.start()
    (line,) = sidecar.said("can't be shared with proxies")
    assert "arena.models" in line["why"]
    assert line["level"] == "error"
    assert sidecar.metric("outrider_models_published") == 0
    assert sidecar.metric("outrider_ready") == 1


async def test_models_are_put_there_again_when_that_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_watch, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(arena_watch, "PUBLISH_AGAIN_S", 0.05)
    in_the_way = sharing.models_folder(tmp_path / "arena")
    in_the_way.write_text("x")
    core = open_core(settings(tmp_path))
    assert not core.models_published
    watching = asyncio.create_task(arena_watch.ArenaWatch(core).run())
    try:
        in_the_way.unlink()
        for _ in range(2):
            async with asyncio.timeout(30):
                while not core.models_published:
                    await asyncio.sleep(0.01)
            relative, generation = core.arena.published_models
            assert (generation, (tmp_path / relative / "runtime.bin").is_file()) == (core.models.generation, True)
            shutil.rmtree(in_the_way)             # somebody tidies up
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    core.close()


@AS_ROOT
def test_a_full_volume_does_not_stop_the_sidecar(make: Make, tmp_path: Path) -> None:
    import subprocess

    volume = tmp_path / "volume"
    volume.mkdir()
    sidecar = make(arena={"path": str(volume / "arena"), "events": 64, "blocklist": 1024})
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", volume], check=False, capture_output=True)
    if made.returncode:
        pytest.skip(f"can't mount a tmpfs here: {made.stderr.decode().strip()}")
    try:
        filler = volume / "filler"
        sidecar.start()
        sidecar.stop()
        for folder in (volume / "arena.models").iterdir():
            (folder / "runtime.bin").unlink()
        room = os.statvfs(volume)
        filler.write_bytes(b"x" * (room.f_bavail * room.f_frsize - (64 << 10)))
        sidecar.start()
        assert any("No space left" in line["why"] for line in sidecar.said("can't be shared"))
        assert sidecar.metric("outrider_models_published") == 0
        assert not [entry for entry in (volume / "arena.models").iterdir() if entry.name.startswith(".")]
    finally:
        sidecar.stop(signal.SIGKILL)
        subprocess.run(["umount", volume], check=True)


# ---- the group


@AS_ROOT
def test_the_group_gets_the_arena_and_the_models(make: Make) -> None:
    name = "www-data"
    gid = grp.getgrnam(name).gr_gid
    sidecar = make(arena={"group": name}).start()
    (folder,) = sharing.models_folder(sidecar.arena).iterdir()
    for path, wanted in ((sidecar.arena, 0o660), (folder.parent, 0o750), (folder, 0o750),
                         (folder / "runtime.bin", 0o640)):
        assert (path.stat().st_gid, mode(path)) == (gid, wanted), path
    # the same arena, opened again without: closed again
    sidecar.stop()
    inode = sidecar.arena.stat().st_ino
    del sidecar.config["arena"]["group"]
    sidecar.write()
    sidecar.start()
    assert (sidecar.arena.stat().st_ino, mode(sidecar.arena), mode(folder / "runtime.bin")) == (inode, 0o600, 0o600)
    # and with its number
    sidecar.stop()
    sidecar.write(arena={"group": gid})
    sidecar.start()
    assert (sidecar.arena.stat().st_ino, mode(sidecar.arena), sidecar.arena.stat().st_gid) == (inode, 0o660, gid)


def test_an_unknown_group(make: Make) -> None:
    sidecar = make(arena={"group": "no-such-group"}).start(ready=False)
    assert sidecar.wait() == EXIT_CONFIG
    assert re.search(r"arena\.group: there is no group 'no-such-group' on this machine", sidecar.log.read_text())
    assert not sidecar.arena.exists()


@AS_ROOT
@pytest.mark.parametrize("stands", [False, True], ids=["new", "there already"])
def test_a_group_that_outrider_is_not_in(tmp_path: Path, stands: bool) -> None:
    """In a child: it gives its privileges up."""
    for parent in (tmp_path.parent, tmp_path.parent.parent, tmp_path.parent.parent.parent):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            os.chmod(parent, mode(parent) | 0o011)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chmod(tmp_path, 0o777)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            here = tmp_path / "deep"
            here.mkdir()
            if stands:
                open_core(settings(here), load_models=False).close()
            try:
                open_core(settings(here, group=grp.getgrnam("www-data").gr_gid), load_models=False)
            except ArenaError as error:
                told = "arena.group" in str(error) and "as a member of that group" in str(error)
                status = 0 if told and (stands or not (here / "arena").exists()) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- the file is tampered with


def test_a_deleted_arena_is_told_once_and_served_on(make: Make) -> None:
    sidecar = make().start()
    assert sidecar.metric("outrider_arena_present") == 1
    moved = sidecar.arena.with_name("moved")
    sidecar.arena.rename(moved)
    until(lambda: sidecar.metric("outrider_arena_present") == 0, "the gauge falls")
    until(lambda: sidecar.metric("outrider_requests_total") is not None, "it counts on")
    moved.rename(sidecar.arena)
    until(lambda: sidecar.metric("outrider_arena_present") == 1, "the gauge rises")
    assert [line["level"] for line in sidecar.said("the arena's file was deleted")] == ["error"]
    assert len(sidecar.said("the arena's file is back")) == 1
    assert sidecar.stop() == 0


def test_a_replaced_arena_is_told(make: Make) -> None:
    sidecar = make().start()
    other = sidecar.arena.with_name("other")
    other.write_bytes(b"x" * sidecar.arena.stat().st_size)
    other.rename(sidecar.arena)
    until(lambda: sidecar.said("the arena's file was replaced"), "it is told")
    assert sidecar.metric("outrider_arena_present") == 0
    assert sidecar.stop() == 0


@pytest.mark.parametrize("size", [0, 100, 4096, -4096])
def test_a_truncated_arena_ends_the_sidecar_and_the_next_start_makes_a_new_one(make: Make, size: int) -> None:
    sidecar = make().start()
    whole = sidecar.arena.stat().st_size
    os.truncate(sidecar.arena, size if size >= 0 else whole + size)
    # reading a counter in the same second may meet the gap first: then it is the signal
    assert sidecar.wait() in (EXIT_ARENA, -signal.SIGBUS)
    sidecar.start()
    assert sidecar.arena.stat().st_size == whole
    assert sidecar.metric("outrider_arena_present") == 1


def test_the_end_over_a_truncated_arena_is_explained(make: Make) -> None:
    """Its last page, which nobody touches while there are no clients."""
    sidecar = make(arena={"clients": 65536}).start()
    os.truncate(sidecar.arena, sidecar.arena.stat().st_size - 4096)
    assert sidecar.wait() == EXIT_ARENA
    (line,) = sidecar.said("cut short while in use")
    assert (line["level"], line["status"]) == ("critical", EXIT_ARENA)
