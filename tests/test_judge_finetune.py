"""Fine-tuning a tiny Llama: it learns what its records say, and bad records are named."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="fine-tuning needs torch")
pytest.importorskip("transformers", reason="fine-tuning needs transformers")
pytest.importorskip("peft", reason="fine-tuning needs peft")
pytest.importorskip("ctranslate2", reason="fine-tuning needs ctranslate2")

from test_judge_convert import save_llama

from sidecar.judge.finetune import Settings, finetune
from sidecar.judge.folder import ModelError
from sidecar.judge.model import JudgeModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers


def test_learns_two_classes_and_serves_them(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    records = [([f"GET /users/{n}"], "benign") for n in range(60)]
    records += [([f"id={n}' or 1=1 union select"], "sql_injection") for n in range(60)]
    settings = Settings(rank=8, learning_rate=1e-2, epochs=6, batch=8, minutes_max=2.0, held_back=0.1)
    manifest = finetune(source, records, tmp_path / "judge", settings=settings, device="cpu")
    assert manifest.calibration.temperature > 0
    with JudgeModel.open(tmp_path / "judge", device="cpu") as model:
        benign, hostile = model.judge([["GET /users/77"], ["id=99' or 1=1 union select"]])
    assert (benign.label, hostile.label) == ("benign", "sql_injection")


def test_bad_records_are_named(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    with pytest.raises(ModelError, match="record 1: label 'worm' is none of"):
        finetune(source, [(["x"], "worm")], tmp_path / "judge")
    with pytest.raises(ModelError, match="nothing to tell apart"):
        finetune(source, [(["x"], "benign")] * 20, tmp_path / "judge")
    with pytest.raises(ModelError, match="rank 0"):
        Settings(rank=0)
