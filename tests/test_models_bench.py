"""The bench of tree models: what it says is of the shape that others read, and every engine gives the same outputs."""
from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from bench import models as bench

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_the_bundles_models_in_json(tmp_path):
    result = CliRunner().invoke(bench.command, [
        "--rounds", "1", "--rows", "300", "--model", "default", "--json", "--cache", str(tmp_path),
        *(word for engine in bench.ENGINES if engine not in ("packed", "packed portable", "GTIL")
          for word in ("--skip", engine))])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(r["model"], r["engine"]) for r in rows] == [
        (f"default: {slot}", engine) for slot in ("xgboost", "forest", "isolation")
        for engine in ("packed", "packed portable", "GTIL")]
    assert all({"p50_us", "p99_us", "mean_us"} <= set(r) for r in rows)
    assert all(0 < r["p50_us"] <= r["p99_us"] for r in rows)
    assert all(r["max_difference"] < 1e-5 for r in rows)


def test_the_table_and_what_was_left_out(tmp_path, monkeypatch):
    def missing(model):
        raise bench.Unavailable("a thing is not installed")

    monkeypatch.setattr(bench, "onnx_runtime", missing)
    monkeypatch.setattr(bench, "CALL_SECONDS", 0.01)
    result = CliRunner().invoke(bench.command, [
        "--quick", "--rounds", "1", "--rows", "300", "--model", "default: forest", "--cache", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "packed portable" in result.stdout
    assert "left out: default: forest: ONNX Runtime: a thing is not installed" in result.stderr
    assert "scikit-learn:" not in result.stderr


@pytest.mark.parametrize("index", range(3))
def test_peers_give_what_treelite_gives(index, tmp_path, monkeypatch):
    """A wrong column or the wrong sign would make a comparison of times worthless."""
    monkeypatch.setattr(bench, "TRAINING_ROWS", 1500)
    monkeypatch.setattr(bench, "CALL_SECONDS", 0.01)
    model = list(bench.usual_models(300, 1).values())[index]()
    own = "XGBoost" if model.xgboost is not None else "scikit-learn"
    rows, left_out = bench.measure(model, ("packed", "GTIL", own, "ONNX Runtime"), 1, tmp_path, lambda text: None)
    assert {r["engine"] for r in rows} >= {"packed", "GTIL", own}
    assert all(r["max_difference"] < 1e-3 for r in rows)
    assert all("not installed" in line for line in left_out)


def test_rows_differ(tmp_path):
    rows, labels = bench.sample(2000, 3)
    assert len(np.unique(rows, axis=0)) == 2000
    assert 0.2 < labels.mean() < 0.8
    assert np.array_equal(rows, bench.sample(2000, 3)[0])


def test_an_unusable_bundle_is_named(tmp_path):
    result = CliRunner().invoke(bench.command, ["--bundle", str(tmp_path / "none"), "--cache", str(tmp_path)])
    assert result.exit_code == 1
    assert "no such folder" in result.stderr
