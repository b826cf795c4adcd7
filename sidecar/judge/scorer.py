"""The least that asks a judge folder for probabilities: for training and measuring. Serving has model.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.judge.types import LABELS

BATCH = 32


class Scorer:
    """Raw probabilities of the labels, by CTranslate2."""

    def __init__(self, folder: Path) -> None:
        import ctranslate2
        from tokenizers import Tokenizer

        self.generator = ctranslate2.Generator(str(folder), device="cpu", inter_threads=1, intra_threads=1)
        self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        self.names = [self.tokenizer.id_to_token(k) for k in range(self.tokenizer.get_vocab_size())]
        self.labels = [self.tokenizer.token_to_id(f"<|{label}|>") for label in LABELS]

    def probabilities(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.floating[Any]]:
        """(n, labels + 1): shares among the labels, and their mass. Batches are of equal length: others prefill only
        to the shortest prompt and go on token by token."""
        out = np.zeros((len(tokens), len(LABELS) + 1))
        lengths: dict[int, list[int]] = {}
        for k, row in enumerate(tokens):
            lengths.setdefault(len(row), []).append(k)
        for group in lengths.values():
            for at in range(0, len(group), BATCH):
                part = group[at : at + BATCH]
                prompts = [[self.names[t] for t in tokens[k]] for k in part]
                results = self.generator.generate_batch(
                    prompts, max_length=1, include_prompt_in_result=False, return_logits_vocab=True, sampling_topk=1)
                for k, result in zip(part, results, strict=True):
                    logits = np.array(result.logits[0][-1], np.float64)
                    p = np.exp(logits - logits.max())
                    mine = p[self.labels]
                    out[k, :-1] = mine / mine.sum()
                    out[k, -1] = mine.sum() / p.sum()
        return out


def read_manifest(folder: Path) -> dict[str, Any]:
    """judge.json of a folder."""
    manifest: dict[str, Any] = json.loads((folder / "judge.json").read_text())
    return manifest
