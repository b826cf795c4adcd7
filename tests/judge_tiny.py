"""A judge's folder with random weights, made without torch: what the tests of judging ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sidecar.judge.folder import write_manifest
from sidecar.judge.types import LABELS

ENTRY, VERDICT, PAD = "<|entry|>", "<|verdict|>", "<|pad|>"
CONTROL = (PAD, ENTRY, VERDICT, *(f"<|{label}|>" for label in LABELS))
HIDDEN, LAYERS, HEADS, INNER = 32, 2, 4, 64

FIELDS: dict[str, Any] = {
    "kind": "embedded",
    "name": "tiny",
    "prefix": [ENTRY],
    "suffix": [VERDICT],
    "labels": {label: f"<|{label}|>" for label in LABELS},
    "max_tokens": 128,
    "min_mass": 0.0,
    "thresholds": {"malicious": {"0.01": 0.9}},
}


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["GET /users/1 select from where", "POST /login union script alert"], trainer)
    return made


def tokens_of(made: Tokenizer) -> list[str]:
    return [made.id_to_token(number) for number in range(made.get_vocab_size())]


def save_model(
    folder: Path, vocabulary: list[str], seed: int = 5, like: float = 3.0, quantization: str = "int8"
) -> None:
    """like: how much the labels' outputs are favoured (their rows of the projection are made larger)."""
    rng = np.random.default_rng(seed)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        LAYERS,
        HEADS,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
    )

    def drawn(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = drawn(len(vocabulary), HIDDEN) * 5
    for layer in decoder.layer:
        layer.self_attention.layer_norm.gamma = np.ones(HIDDEN, dtype=np.float32)
        layer.ffn.layer_norm.gamma = np.ones(HIDDEN, dtype=np.float32)
        layer.self_attention.linear[0].weight = drawn(3 * HIDDEN, HIDDEN)
        layer.self_attention.linear[1].weight = drawn(HIDDEN, HIDDEN)
        layer.ffn.linear_0.weight = drawn(INNER, HIDDEN)
        layer.ffn.linear_0_noact.weight = drawn(INNER, HIDDEN)
        layer.ffn.linear_1.weight = drawn(HIDDEN, INNER)
    decoder.layer_norm.gamma = np.ones(HIDDEN, dtype=np.float32)
    decoder.projection.weight = drawn(len(vocabulary), HIDDEN)
    labels = [number for number, token in enumerate(vocabulary) if token in CONTROL[3:]]
    decoder.projection.weight[labels] *= like
    spec.register_vocabulary(vocabulary)
    spec.config.layer_norm_epsilon = 1e-5
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = ENTRY, VERDICT, PAD
    spec.validate()
    spec.optimize(quantization=quantization)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def make(folder: Path, **changes: Any) -> Path:
    made = tokenizer()
    options = {key: changes.pop(key) for key in ("seed", "like", "quantization") if key in changes}
    save_model(folder, tokens_of(made), **options)
    made.save(str(folder / "tokenizer.json"))
    write_manifest(folder, {**FIELDS, **changes})
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    """judge.json with other fields, its hashes made anew."""
    fields = json.loads((folder / "judge.json").read_text())
    for name in ("format", "files"):
        fields.pop(name)
    write_manifest(folder, {**fields, **changes})
