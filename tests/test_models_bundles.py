"""Bundles and the cache: good ones are used, every kind of bad one is refused with a reason."""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import model_factory as factory
import pytest
from click.testing import CliRunner

from native.models import Models
from sidecar import bundle, compilers
from sidecar.bundle import BundleError, load_bundle, prepare_runtime
from sidecar.commands.bundle import command

pytestmark = pytest.mark.usefixtures("factory_schema")


@pytest.fixture(scope="module")
def trained():
    return factory.train(trees=4)


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """For the compiled engine: what can go wrong in a cache can go wrong with it."""
    return factory.write(tmp_path_factory.mktemp("made") / "bundle", trained, engine="compiled")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def change(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# ---------------------------------------------------------------- bundles

def test_a_bundle_reads_back_as_it_was_written(made, trained):
    again = load_bundle(made.path)
    assert again == made
    assert again.files == factory.files(trained)
    assert again.generation == int(again.sha256[:16], 16)


def test_writing_again_replaces_the_old_bundle_and_nothing_else(trained, tmp_path):
    first = factory.write(tmp_path / "b", trained)
    second = factory.write(tmp_path / "b", trained, name="second")
    assert second.sha256 != first.sha256
    assert load_bundle(tmp_path / "b").manifest.name == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is no bundle"):
        factory.write(tmp_path / "mine", trained)
    assert (tmp_path / "mine" / "thesis.txt").exists()


BAD_MANIFESTS = {
    "not json": ("{", "not a valid manifest"),
    "empty": ("", "not a valid manifest"),
    "a list": ("[]", "not a valid manifest"),
    "binary": ("\x00\x01\x02", "not a valid manifest"),
    "deep": ("[" * 100_000, "not a valid manifest"),
    "nan": ('{"version": NaN}', "not a valid manifest"),
    "huge": (" " * (2 << 20), "larger than"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_garbage_manifest_is_refused(copy, case):
    content, says = BAD_MANIFESTS[case]
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=says) as caught:
        load_bundle(copy)
    assert "manifest.json" in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(("values", "says"), [
    ({"version": 2}, "version"),
    ({"format": "zip"}, "format"),
    ({"surprise": 1}, "surprise"),
    ({"trees": {"xgboost": "../../etc/passwd"}}, "trees.xgboost"),
    ({"trees": {"oak": "forest.treelite.gz"}}, "trees.oak"),
    ({"trees": {}}, "isolation"),
    ({"combination": {}}, "combination must be given"),
    ({"calibration": {}}, "calibration must be given"),
    ({"text": None, "behaviour": None}, "neither"),
])
def test_a_manifest_that_does_not_add_up_is_refused(copy, values, says):
    change(copy, **values)
    with pytest.raises(BundleError, match=says):
        load_bundle(copy)


@pytest.mark.parametrize("name", [
    "../outside.bin", "/etc/passwd", "a/b", ".hidden", "x" * 80, "", "A.bin", "a\0b"])
def test_a_file_name_cannot_leave_the_folder(copy, name):
    files = manifest_of(copy)["files"]
    change(copy, files={**files, name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(BundleError, match="files"):
        load_bundle(copy)


@pytest.mark.parametrize("knots", [
    [[0, 0]], [[0, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 0], [1, 2]], [[float(i), i / 40] for i in range(17)]])
def test_a_calibration_that_does_not_rise_is_refused(copy, knots):
    calibration = manifest_of(copy)["calibration"]
    change(copy, calibration={**calibration, "all": {"knots": knots}})
    with pytest.raises(BundleError, match=r"calibration\.all"):
        load_bundle(copy)


def test_missing_changed_and_linked_files_are_refused(copy):
    path = copy / "forest.treelite.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"forest\.treelite\.gz: not the file"):
        load_bundle(copy)
    path.unlink()
    with pytest.raises(BundleError, match=r"forest\.treelite\.gz: missing"):
        load_bundle(copy)
    path.symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="no links"):
        load_bundle(copy)
    path.unlink()
    os.mkfifo(path)                                  # must not wait for a writer
    with pytest.raises(BundleError, match="not a regular file"):
        load_bundle(copy)


def test_a_bundle_for_other_features_is_refused_but_can_be_looked_at(copy):
    names = factory.BEHAVIOUR[1][:-1]
    change(copy, behaviour=factory.schema(factory.BEHAVIOUR[0], names))
    with pytest.raises(BundleError, match="train the bundle again"):
        load_bundle(copy)
    assert load_bundle(copy, schemas=False).manifest.behaviour.features == names
    change(copy, behaviour={**factory.schema(7, names), "sha256": "0" * 64})
    with pytest.raises(BundleError, match="not that of the features"):
        load_bundle(copy, schemas=False)


def test_no_folder_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        load_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match="incomplete"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(("content", "says"), [
    (b"not gzip", "not a gzip file"),
    (bundle.pack_checkpoint(b"nothing like a forest" * 100), "not a Treelite checkpoint"),
    (bundle.pack_checkpoint(b""), "isolation"),
])
def test_a_garbage_checkpoint_is_refused_and_leaves_nothing(trained, tmp_path, content, says):
    files = {**factory.files(trained), "isolation.treelite.gz": content}
    bad = bundle.write_bundle(tmp_path / "b", factory.manifest(), files)
    with pytest.raises(BundleError, match=says):
        prepare_runtime(bad, tmp_path / "cache")
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.startswith(".lock")]
    assert left == []


def test_a_checkpoint_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(bundle, "CHECKPOINT_BYTES_MAX", 1 << 20)
    with pytest.raises(BundleError, match="unpacks to more than"):
        bundle.unpack_checkpoint("x.gz", bundle.pack_checkpoint(bytes((1 << 20) + 1)))


def test_linear_weights_for_other_features_are_refused_and_leave_nothing(trained, tmp_path):
    files = {**factory.files(trained), "linear.bin": b"ORLINEAR" + bytes(81976)}
    bad = bundle.write_bundle(tmp_path / "b", factory.manifest(), files)
    with pytest.raises(BundleError, match="linear text model"):
        prepare_runtime(bad, tmp_path / "cache")
    assert [p for p in (tmp_path / "cache" / "runtime").iterdir() if p.is_dir()] == []


# ---------------------------------------------------------------- the cache

def test_the_second_time_comes_from_the_cache(made, cache, monkeypatch):
    folder = prepare_runtime(made, cache)
    monkeypatch.setattr(compilers, "compile_tree", lambda *a: pytest.fail("compiled again"))
    assert prepare_runtime(made, cache) == folder
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["library", "runtime.bin", "sums.json", "extra"])
def test_a_damaged_cache_is_made_again(made, cache, damage):
    folder = prepare_runtime(made, cache)
    path = next(folder.glob("xgboost-*.so")) if damage == "library" else folder / damage
    path.write_bytes(b"damaged")
    assert prepare_runtime(made, cache) == folder
    assert compilers.verify_folder(folder) is None
    Models(folder).close()


def _prepare(path: Path, cache: Path, queue: multiprocessing.Queue) -> None:
    bundle.behaviour_schema = lambda: factory.BEHAVIOUR
    queue.put(str(prepare_runtime(load_bundle(path), cache)))


def test_processes_that_start_together_share_one_compilation(made, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    cache = tmp_path / "cache"
    workers = [context.Process(target=_prepare, args=(made.path, cache, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    folders = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(folders) == 1
    assert [str(p) for p in (cache / "runtime").iterdir() if p.is_dir()] == list(folders)


def test_a_cache_that_others_may_write_is_refused(made, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(BundleError, match="others may write"):
        prepare_runtime(made, tmp_path / "cache")


def test_the_cache_is_where_the_desktop_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert compilers.cache_root() == tmp_path / "x" / "outrider"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")          # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compilers.cache_root() == tmp_path / "home" / ".cache" / "outrider"


def test_without_a_compiler_it_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BundleError, match=r"no C compiler.*apt-get install gcc"):
        prepare_runtime(made, tmp_path / "cache")
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(BundleError, match="CC=no-such-compiler"):
        prepare_runtime(made, tmp_path / "cache")


def test_a_compiler_that_fails_is_quoted(made, tmp_path, monkeypatch):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo broken && exit\n"
                      "echo 'no such luck' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(BundleError, match="no such luck"):
        prepare_runtime(made, tmp_path / "cache")


# ---------------------------------------------------------------- the command

def test_the_command_shows_verifies_and_compiles(made, cache):
    run = CliRunner().invoke
    shown = run(command, ["show", str(made.path)])
    assert shown.exit_code == 0
    assert made.sha256 in shown.output.replace("\n", "")
    assert json.loads(run(command, ["show", "--json", str(made.path)]).output)["name"] == "test"
    assert "good" in run(command, ["verify", str(made.path)]).output
    compiled = run(command, ["compile", str(made.path), "--cache", str(cache)])
    assert compiled.exit_code == 0
    assert Path(compiled.stdout.strip()).parent == cache / "runtime"


def test_the_command_refuses_with_a_reason_and_status_1(tmp_path):
    for verb in ("show", "verify", "compile"):
        result = CliRunner().invoke(command, [verb, str(tmp_path / "none")])
        assert result.exit_code == 1
        assert "no such folder" in result.stderr


def test_a_hostile_manifest_cannot_drive_the_terminal(trained, tmp_path):
    made = factory.write(tmp_path / "b", trained, name="\x1b[2J[bold]name")
    shown = CliRunner().invoke(command, ["show", str(made.path)])
    assert "\x1b[2J" not in shown.output
    assert "[bold]name" in shown.output
