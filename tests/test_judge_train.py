"""A tiny judge from tiny data: everything that training promises but skill."""
from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from sidecar.judge.examples import CLASSES, Example, entries, placed, values_of, worst_value
from sidecar.judge.folder import MANIFEST, digest
from sidecar.judge.train import (
    JudgeTrainingError,
    Shape,
    calibrated,
    reliability,
    threshold_at,
    train,
    worst_of,
)
from sidecar.judge.types import LABELS, Escalation

TINY = Shape(vocabulary=400, hidden=32, layers=1, heads=2, inner=64, steps_rows=300, batch_tokens=1024, minutes_max=1.0,
             attacks=150, benign=100, grammar_texts=400)


def files(folder: Path) -> list[Path]:
    rng = random.Random(1)
    benign = folder / "benign.jsonl"
    with benign.open("w") as f:
        for k in range(400):
            f.write(json.dumps({"method": "GET", "url": f"/items/{k}?q={rng.choice('abc')}{k}", "label": 0,
                                "headers": {"user-agent": "curl/8"}, "meta": {"site": f"site{k % 20}"}}) + "\n")
    attacks = folder / "attacks.jsonl"
    with attacks.open("w") as f:
        for k in range(300):
            f.write(json.dumps({"src": "x", "cls": rng.choice(["sqli", "xss"]), "file": f"list{k % 20}.txt",
                                "payload": f"' or {k}={k}-- <b>{'x' * (k % 50)}"}) + "\n")
    return [benign, attacks]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="training needs torch")
    pytest.importorskip("transformers", reason="training needs transformers")
    pytest.importorskip("ctranslate2", reason="training converts with ctranslate2")
    folder = tmp_path_factory.mktemp("judge")
    train(files(folder), folder / "out", shape=TINY, licences={"benign.jsonl": "CC0-1.0"}, name="tiny")
    return folder / "out"


def test_folder_is_whole(made: Path) -> None:
    manifest = json.loads((made / MANIFEST).read_text())
    assert set(manifest["files"]) == {p.name for p in made.iterdir()} - {MANIFEST}
    assert all(digest(made / name) == wanted for name, wanted in manifest["files"].items())
    assert tuple(manifest["labels"]) == LABELS
    assert (manifest["name"], manifest["kind"]) == ("tiny", "embedded")
    assert manifest["training"]["sources"]["benign.jsonl"]["licence"] == "CC0-1.0"
    assert manifest["training"]["sources"]["attacks.jsonl"]["licence"] == "not stated"
    assert manifest["thresholds"]["malicious"].keys() == {"0.01", "0.001"}
    assert not list(made.parent.glob(".*.new"))


def test_the_serving_side_takes_it(made: Path) -> None:
    from sidecar.judge.model import JudgeModel

    with JudgeModel.open(made, device="cpu") as model:
        (answer,) = model.judge([["GET / 200\nraw: <<< x >>>\n"]])
    assert not answer.error
    assert abs(sum(answer.probabilities.values()) - 1.0) < 1e-6


def test_int8_says_what_float32_says(made: Path) -> None:
    found = json.loads((made / MANIFEST).read_text())["metrics"]["int8"]
    assert found["windows"] > 20
    assert found["probability_change_max"] < 0.06


def test_same_seed_same_model(made: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(TINY, steps_rows=60)
    for name in ("a", "b"):
        train(files(made.parent), tmp_path / name, shape=short, seed=3)
    train(files(made.parent), tmp_path / "c", shape=short, seed=4)
    a, b, c = ((tmp_path / name / "model.bin").read_bytes() for name in "abc")
    assert a == b != c


def test_what_cannot_be_trained_from(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch")
    with pytest.raises(JudgeTrainingError, match=r"no such file.*absent"):
        train([tmp_path / "absent.jsonl"], tmp_path / "out")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"what": 1}\n')
    with pytest.raises(JudgeTrainingError, match="unknown format"):
        train([bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_of_a_request() -> None:
    record = {"method": "POST", "url": "/a/b?x=1%27&y",
              "headers": {"Content-Type": "application/json", "Cookie": "s=1; t=<"},
              "body": '{"u": {"n": "a\\"b", "k": [1, "z"]}}'}
    assert values_of(record) == [("path", "/a/b"), ("query.x", "1%27"), ("query.y", "y"), ("json.u.n", 'a\\"b'),
                                 ("json.u.k", "z"),
                                 ("cookie.s", "1"), ("cookie.t", "<")]
    assert worst_value(record, lambda texts: [len(t) for t in texts]) == ("path", "/a/b")
    assert len(values_of({"url": "/?" + "&".join(f"a{k}=1" for k in range(500))})) == 64


def test_classes_lead_to_labels() -> None:
    assert set(CLASSES.values()) == set(LABELS) - {"benign", "abuse"}


def test_training_windows_of_an_attack_show_it() -> None:
    rng = random.Random(2)
    text = "a" * 900 + "' union select 1" + "b" * 900
    e = Escalation(id="1", ts=0.0, service="s", method="GET", path="/", place="query.q", text=text)
    shown = entries(Example(e, "sql_injection", "x", core="' union select 1"), rng)
    assert shown
    assert all("' union select 1" in entry for entry in shown)


def test_placed_texts_come_back() -> None:
    from sidecar.judge.render import decoded

    rng = random.Random(3)
    for _ in range(300):
        place, sent = placed(rng, "' or \"1\"='1")
        assert decoded(sent, place).replace('\\"', '"').endswith("' or \"1\"='1"), (place, sent)


def test_thresholds_and_calibration() -> None:
    scores = np.arange(1000) / 1000.0
    assert threshold_at(scores, 0.01) == 0.99
    assert threshold_at(np.zeros(0), 0.01) == 1.0
    p = np.array([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    assert np.allclose(worst_of(p, [0, 0, 1], 2), [[0.2, 0.8], [0.5, 0.5]])
    assert np.allclose(calibrated(p, 1.0, [0.0, 0.0]), p)
    assert calibrated(p, 4.0, [0.0, 0.0])[1, 1] < 0.8
    error, bins = reliability(np.array([0.0, 0.0, 1.0, 1.0]), np.array([False, False, True, False]))
    assert error == 0.25
    assert [b["n"] for b in bins] == [2, 2]
