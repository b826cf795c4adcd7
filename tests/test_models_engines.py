"""Which engine scores a bundle's trees: as the manifest says, as was measured, as this machine allows."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import model_factory as factory
import numpy as np
import pytest
import treelite
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import IsolationForest

from native.engine import ModelError
from native.engine import Models as EngineModels
from native.models import Models
from sidecar import bundle, compilers, engines
from sidecar.bundle import BundleError, engine_plan, load_bundle, prepare_runtime, rewrite_manifest
from sidecar.commands.bundle import command
from sidecar.engines import Choice

SHIPPED_SCHEMA = bundle.behaviour_schema


pytestmark = pytest.mark.usefixtures("factory_schema")


@pytest.fixture(scope="module")
def trained():
    return factory.train(trees=4)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """No program can be found, and nobody may try to compile."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compilers, "compile_tree", lambda *a, **k: pytest.fail("compiled"))


def mapped() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("engine", ["packed", "auto"])
def test_packed_needs_no_compiler_and_opens_no_foreign_code(trained, engine, no_compiler, tmp_path):
    made = factory.write(tmp_path / "b", trained, engine=engine)
    folder = prepare_runtime(made, tmp_path / "cache")
    assert {p.name for p in folder.iterdir()} == {"runtime.bin", "sums.json"}
    rows = compilers.check_rows(trained.forest, 500)
    with Models(folder) as models:
        assert engines.describe(folder) == dict.fromkeys(bundle.TREES, "packed")
        np.testing.assert_allclose(models.predict("forest", rows), compilers.reference(trained.forest, rows), rtol=1e-6)
        assert str(folder) not in mapped()


def test_compiled_opens_its_libraries(trained, tmp_path):
    folder = prepare_runtime(factory.write(tmp_path / "b", trained, engine="compiled"), tmp_path / "cache")
    with Models(folder):
        assert str(folder) in mapped()
    assert engines.describe(folder) == dict.fromkeys(bundle.TREES, "compiled")


def test_both_engines_give_the_same_scores(trained, tmp_path):
    folders = [prepare_runtime(factory.write(tmp_path / e, trained, engine=e), tmp_path / "cache")
               for e in engines.ENGINES]
    for slot in bundle.TREES:
        rows = compilers.check_rows(getattr(trained, slot), 3000)
        scores = []
        for folder in folders:
            with Models(folder) as models:
                scores.append(models.predict(slot, rows))
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


def test_the_default_bundle_is_packed_here_and_known_by_the_data_plane(no_compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "behaviour_schema", SHIPPED_SCHEMA)
    default = load_bundle("default")
    assert default.manifest.engine == "auto"
    assert default.manifest.measured is not None
    assert set(default.manifest.measured.us) == set(default.manifest.trees)
    folder = prepare_runtime(default, tmp_path / "cache")
    assert set(engines.describe(folder).values()) == {"packed"}
    EngineModels().load(folder)


def test_the_data_plane_refuses_packed_trees_for_other_behaviour_rows(trained, tmp_path):
    folder = prepare_runtime(factory.write(tmp_path / "b", trained, engine="packed"), tmp_path / "cache")
    with pytest.raises(ModelError, match="behaviour rows of 12 features"):
        EngineModels().load(folder)


# ---------------------------------------------------------------- the choice

HERE = engines.cpu_name()
FASTER = {"packed": 2.0, "compiled": 1.0}


@pytest.mark.parametrize(("engine", "us", "cpu", "compiler", "want"), [
    ("packed", FASTER, HERE, True, Choice("packed")),
    ("compiled", {"packed": 1.0, "compiled": 2.0}, HERE, True, Choice("compiled")),
    ("compiled", {}, "", False, Choice("compiled")),
    ("auto", FASTER, HERE, True, Choice("compiled", "packed")),
    ("auto", FASTER, HERE, False, Choice("packed", "compiled")),
    ("auto", FASTER, "another processor", True, Choice("packed", "compiled")),
    ("auto", {"packed": 1.0, "compiled": 2.0}, HERE, True, Choice("packed", "compiled")),
    ("auto", {"compiled": 2.0}, HERE, True, Choice("compiled", "packed")),
    ("auto", {"packed": 2.0}, HERE, True, Choice("packed", "compiled")),
    ("auto", {}, "", True, Choice("packed", "compiled")),
])
def test_the_engine_is_chosen_by_manifest_measurement_and_machine(engine, us, cpu, compiler, want, monkeypatch):
    monkeypatch.setattr(engines, "has_compiler", lambda: compiler)
    assert engines.choose(engine, ["forest"], {"forest": us}, cpu) == {"forest": want}


@given(st.lists(st.sampled_from(bundle.TREES), unique=True), st.sampled_from(["auto", "packed", "compiled"]))
def test_every_model_gets_a_choice(slots, engine):
    assert list(engines.choose(engine, slots, None)) == slots


def test_what_was_measured_faster_is_used(trained, tmp_path):
    measured = {"cpu": HERE, "us": {"forest": FASTER, "xgboost": {"packed": 1.0, "compiled": 2.0}}}
    made = factory.write(tmp_path / "b", trained, measured=measured)
    folder = prepare_runtime(made, tmp_path / "cache")
    assert engines.describe(folder) == {"xgboost": "packed", "forest": "compiled", "isolation": "packed"}
    assert [p.name.split("-")[0] for p in folder.glob("*.so")] == ["forest"]


def wide_isolation() -> treelite.Model:
    """128 features: one more than can be packed."""
    rows = np.random.default_rng(0).normal(size=(200, 128))
    return compilers.to_float32(treelite.sklearn.import_model(IsolationForest(n_estimators=3).fit(rows)))


def test_what_cannot_be_packed_is_compiled_where_auto_may(trained, tmp_path, monkeypatch):
    schema = (8, [f"window_{i}" for i in range(128)])
    monkeypatch.setattr(bundle, "behaviour_schema", lambda: schema)
    models = replace(trained, isolation=wide_isolation())
    made = factory.write(tmp_path / "b", models, behaviour=factory.schema(*schema))
    folder = prepare_runtime(made, tmp_path / "cache")
    assert engines.describe(folder) == {"xgboost": "packed", "forest": "packed", "isolation": "compiled"}
    made = rewrite_manifest(made, engine="packed")
    with pytest.raises(BundleError, match=r"isolation: can't be packed: 128 features"):
        prepare_runtime(made, tmp_path / "cache")
    made = rewrite_manifest(made, engine="auto")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BundleError, match=r"can't be packed: 128 features.*nor compiled: no C compiler"):
        prepare_runtime(made, tmp_path / "other cache")


def test_auto_packs_where_compiling_fails(trained, tmp_path, monkeypatch):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo broken && exit\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    made = factory.write(tmp_path / "b", trained, measured={"cpu": HERE, "us": {"forest": FASTER}})
    assert engine_plan(made.manifest)["forest"] == Choice("compiled", "packed")
    assert engines.describe(prepare_runtime(made, tmp_path / "cache"))["forest"] == "packed"


# ---------------------------------------------------------------- measuring and the manifest

@pytest.mark.parametrize("values", [
    {"engine": "fastest"}, {"measured": {"cpu": "x", "us": {"oak": {}}}},
    {"measured": {"cpu": "x", "us": {"forest": {"packed": -1.0}}}},
    {"measured": {"cpu": "x" * 200, "us": {}}}, {"measured": {"us": {}}}])
def test_a_manifest_with_an_impossible_engine_is_refused(trained, tmp_path, values):
    made = factory.write(tmp_path / "b", trained)
    with pytest.raises(BundleError, match=r"engine|measured"):
        rewrite_manifest(made, **values)
    assert load_bundle(made.path) == made
    path = made.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(BundleError, match=r"engine|measured"):
        load_bundle(made.path)


def test_a_manifest_from_before_there_was_a_choice_is_auto(trained, tmp_path):
    made = factory.write(tmp_path / "b", trained)
    assert not {"engine", "measured"} & set(json.loads((made.path / "manifest.json").read_text()))
    assert made.manifest.engine == "auto"


def test_measuring_writes_both_engines_and_keeps_the_rest(trained, tmp_path):
    made = factory.write(tmp_path / "b", trained)
    (made.path / "report").mkdir()
    (made.path / "report" / "report.html").write_text("kept")
    result = CliRunner().invoke(command, ["measure", str(made.path), "--engine", "packed"])
    assert result.exit_code == 0, result.output
    after = load_bundle(made.path)
    assert after.manifest.engine == "packed"
    assert after.manifest.measured.cpu == HERE
    assert {slot: set(us) for slot, us in after.manifest.measured.us.items()} == {
        slot: {"packed", "compiled"} for slot in bundle.TREES}
    assert after.manifest.model_copy(update={"engine": "auto", "measured": None}) == made.manifest
    assert (made.path / "report" / "report.html").read_text() == "kept"
    assert not [p for p in made.path.iterdir() if p.name.startswith(".")]
    shown = CliRunner().invoke(command, ["show", str(made.path)]).output
    assert "engine: packed" in shown
    assert f"{after.manifest.measured.us['forest']['packed']:.3g} us" in shown


def test_measuring_without_a_compiler_times_packed_trees(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    us = engines.measure({"forest": trained.forest.serialize_bytes()}, {})
    assert list(us["forest"]) == ["packed"]


def test_a_bundle_that_cannot_be_written_says_so(trained, tmp_path):
    made = factory.write(tmp_path / "b", trained)
    shutil.rmtree(made.path)
    with pytest.raises(BundleError, match="cannot write it"):
        rewrite_manifest(made, engine="packed")
