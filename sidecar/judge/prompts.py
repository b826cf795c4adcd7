"""Entries to prompts, as tokens: the constant beginning, the entry's text, the constant end.

Whatever an entry holds becomes text tokens. The tokenizer's own notion (encode_special_tokens) is set at every load,
since it isn't saved; that it works is checked once for every control token, and every prompt is looked through again.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sidecar.judge.folder import TOKENIZER, VOCABULARY, Manifest, ModelError, Text
from sidecar.judge.types import LABELS

ENTRY_CHARS_MAX = 65536
WINDOWS_OF_ENTRY_MAX = 16
OVERLAP_SHARE = 0.25
ROOM_MIN = 16  # tokens that must be left for an entry


@dataclass(frozen=True, slots=True)
class Cut:
    """One entry's prompts, without the constant beginning. left_out: tokens that no prompt shows."""

    prompts: list[list[str]]
    left_out: int = 0


class Prompter:
    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises ModelError when tokenizer, vocabulary and manifest don't fit each other."""
        tokenizers = importlib.import_module("tokenizers")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library raises Exception itself
            raise ModelError(f"{folder / TOKENIZER}: not a tokenizer: {str(error)[:200]}") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary = read_vocabulary(folder / VOCABULARY)
        numbers = {token: number for number, token in enumerate(self.vocabulary)}
        if len(numbers) != len(self.vocabulary):
            raise ModelError(f"{folder / VOCABULARY}: a token stands there twice; convert the model again")
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if numbers.get(token) != number:
                raise ModelError(
                    f"{folder}: {TOKENIZER} has {token[:40]!r} as number {number}, {VOCABULARY} as "
                    f"{numbers.get(token, 'none')}: they are of different models; convert the model again"
                )
        control = [token for token in (*manifest.prefix, *manifest.suffix) if isinstance(token, str)]
        wanted = [*control, *manifest.labels.values(), *([manifest.padding.token] if manifest.padding else [])]
        for token in wanted:
            if token not in numbers:
                raise ModelError(
                    f"{folder}: {token[:40]!r} isn't in the model's vocabulary; its judge.json is another model's"
                )
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._control = {token.content for token in added if token.special} | set(control)
        for token in self._control:
            if token in self._text(token):
                raise ModelError(
                    f"{folder}: a client that types {token[:40]!r} would write a control token: it must be a special "
                    f"token in {TOKENIZER}"
                )
        self.label_numbers = [numbers[manifest.labels[label]] for label in LABELS]
        self.prefix = self._pieces(manifest.prefix)
        self.suffix = self._pieces(manifest.suffix)
        self._padding = manifest.padding
        self._room = manifest.max_tokens - len(self.prefix) - len(self.suffix)
        if self._padding is not None:
            self._room -= self._padding.multiple - 1
        if self._room < ROOM_MIN:
            raise ModelError(f"{folder}: max_tokens {manifest.max_tokens} leaves {self._room} for an entry; raise it")

    def _text(self, text: str) -> list[str]:
        tokens: list[str] = self._tokenizer.encode(text, add_special_tokens=False).tokens
        return tokens

    def _pieces(self, pieces: Sequence[str | Text]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            out += [piece] if isinstance(piece, str) else self._text(piece.text)
        return out

    def cut(self, entry: str) -> Cut:
        """An entry that doesn't fit comes as overlapping windows of tokens; beyond WINDOWS_OF_ENTRY_MAX they are spread
        over the entry, with its beginning and end, and what is left out is counted. Raises ValueError."""
        if len(entry) > ENTRY_CHARS_MAX:
            raise ValueError(f"an entry of {len(entry)} characters: at most {ENTRY_CHARS_MAX} are taken")
        try:
            tokens = self._text(entry)
        except (UnicodeError, TypeError):  # a lone surrogate
            tokens = self._text(entry.encode("utf-8", "backslashreplace").decode())
        if not self._control.isdisjoint(tokens):  # cannot be, after what __init__ checked
            raise ValueError("an entry became a control token")
        if len(tokens) <= self._room:
            return Cut([self._finish(tokens)])
        last = len(tokens) - self._room
        stride = max(1, int(self._room * (1 - OVERLAP_SHARE)))
        starts = [*range(0, last, stride), last]
        if len(starts) > WINDOWS_OF_ENTRY_MAX:
            starts = [round(last * k / (WINDOWS_OF_ENTRY_MAX - 1)) for k in range(WINDOWS_OF_ENTRY_MAX)]
        gaps = sum(max(0, b - a - self._room) for a, b in pairwise(starts))
        return Cut([self._finish(tokens[start : start + self._room]) for start in starts], gaps)

    def _finish(self, tokens: list[str]) -> list[str]:
        if self._padding is not None:
            whole = len(self.prefix) + len(tokens) + len(self.suffix)
            tokens = tokens + [self._padding.token] * (-whole % self._padding.multiple)
        return tokens + self.suffix


def read_vocabulary(path: Path) -> list[str]:
    """Raises ModelError."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a vocabulary: {error}") from None
    if not isinstance(found, list) or not found or not all(isinstance(token, str) for token in found):
        raise ModelError(f"{path}: not a list of tokens; convert the model again")
    return found
