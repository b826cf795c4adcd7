"""Converting a Llama with scaled rotary positions: logits as transformers has them, which the converter alone loses."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecar.judge import convert as converting
from sidecar.judge.convert import convert, instruction, rope_parameters, template
from sidecar.judge.folder import ModelError
from sidecar.judge.model import JudgeModel
from sidecar.judge.types import LABELS

torch = pytest.importorskip("torch", reason="converting needs torch")
pytest.importorskip("transformers", reason="converting needs transformers")
ctranslate2 = pytest.importorskip("ctranslate2", reason="converting needs ctranslate2")
tokenizers = pytest.importorskip("tokenizers", reason="converting needs tokenizers")

CONTROL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers


def save_llama(folder: Path, rope: dict[str, Any] | None = None, seed: int = 3) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=[tokenizers.AddedToken(token, special=True, normalized=False) for token in CONTROL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([instruction()], trainer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 3,  # the real ones have room to spare too
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters=rope or ROPE,
        initializer_range=0.2,  # so that attention, and with it the positions, matters
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=CONTROL[0], eos_token=CONTROL[4]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "tiny-instruct")


def errors(source: Path, out: Path) -> list[float]:
    """Relative error of the logits after 40 tokens (within the length trained for) and after 700."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    vocabulary = json.loads((out / "vocabulary.json").read_text())
    generator = ctranslate2.Generator(str(out), device="cpu", compute_type="float32")
    found = []
    for length in (40, 700):
        ids = np.random.default_rng(length).integers(5, len(vocabulary) - 3, length)
        with torch.inference_mode():
            wanted = model(torch.tensor(ids[None])).logits[0, -1].double().numpy()
        got = np.array(generator.forward_batch([[vocabulary[number] for number in ids]]))[0, -1]
        found.append(float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)))
    return found


@pytest.mark.parametrize("theta", [500000.0, 10000.0])
def test_logits_are_those_of_transformers_beyond_the_length_trained_for(tmp_path: Path, theta: float) -> None:
    source = save_llama(tmp_path / "source", {**ROPE, "rope_theta": theta})
    convert(source, tmp_path / "judge", "float32")
    assert max(errors(source, tmp_path / "judge")) < 1e-3


def test_without_the_repair_they_are_not(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the converter has learned it, and the repair can go."""
    monkeypatch.setattr(converting, "repaired", lambda parameters: nullcontext())
    with pytest.raises(ModelError, match="was written with"):
        convert(source, tmp_path / "judge", "float32")
    assert not (tmp_path / "judge").exists()
    monkeypatch.setattr(converting, "check_rope", lambda model, parameters: None)
    convert(source, tmp_path / "judge", "float32")
    assert max(errors(source, tmp_path / "judge")) > 0.05


def test_a_llama_without_scaling_converts(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", {"rope_type": "default", "rope_theta": 10000.0})
    convert(source, tmp_path / "judge", "float32")
    assert max(errors(source, tmp_path / "judge")) < 1e-3


def test_the_folder_judges_by_letters(source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path / "judge", "int8")
    assert manifest.labels == dict(zip(LABELS, "ABCDEFGH", strict=True))
    assert manifest.kind == "instruct"
    typed = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA"
    texts = ["GET /users/1\n", "POST /login\n" + "x" * 300, typed]
    with JudgeModel.open(tmp_path / "judge", device="cpu", compute_type="float32") as model:
        for text in texts:
            for prompt in model._prompter.cut(text).prompts:
                assert sum(token in CONTROL for token in prompt) == 3
        answers = model.judge([[text] for text in texts])
    assert all(not answer.error and sum(answer.probabilities.values()) == pytest.approx(1) for answer in answers)


def test_every_label_is_explained_and_letters_are_enough() -> None:
    assert set(converting.MEANINGS) == set(LABELS)
    made = template()
    assert len(set(made["labels"].values())) == len(LABELS)
    for label, letter in made["labels"].items():
        assert f"\n{letter}: {converting.MEANINGS[label]}" in instruction()


def test_a_folder_that_is_no_llama_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        convert(tmp_path, tmp_path / "judge")
    config = json.loads((source / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ModelError, match="only Llamas"):
        convert(other, tmp_path / "judge")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        convert(other, tmp_path / "judge")
    (other / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be converted"):
        convert(other, tmp_path / "judge")
    with pytest.raises(ModelError, match="quantization"):
        convert(source, tmp_path / "judge", "int3")
    assert not (tmp_path / "judge").exists()


def test_rope_parameters_of_both_spellings() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in ROPE.items() if k != "rope_theta"}}
    assert rope_parameters(old) == rope_parameters({"rope_parameters": ROPE})
    assert rope_parameters({}) == {"rotary_base": 10000.0}
    with pytest.raises(ModelError, match="factor"):
        rope_parameters({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}})
    with pytest.raises(ModelError, match="'yarn'"):
        rope_parameters({"rope_parameters": {"rope_type": "yarn"}})
