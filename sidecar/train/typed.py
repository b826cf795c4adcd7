"""Benign texts as people type them: measures with feet and inches, and the beginnings of searches
that a search box sends with every key. Both look like broken quotes to a model that has seen none."""
from __future__ import annotations

import random
from collections.abc import Sequence

from sidecar.train.dataset import LabelledText
from sidecar.train.grammar import WORDS

MEASURES = 1500
BEGINNINGS = 4000
LONGEST = 60                      # characters of a text that may have been typed into a search box


def _measure(rng: random.Random) -> str:
    a, b, c = rng.randrange(1, 13), rng.randrange(1, 13), rng.choice((2, 4, 8, 16))
    size = rng.choice((
        f"{a}'", f"{a}'{b}\"", f"{a}' {b}\"", f"{a}' x {b}'", f"{a}'x{b}'", f"{a}\" x {b}\"", f"{a}\"", f"{a} 1/{c}\"",
        f"1/{c}\"", f"1/{c}\" -> {a}/{c}\"", f"{a}ft {b}in", f"{a}.{b}\"", f"{a}={b}", f"{a}+{b}", f"(set of {a})",
        f"<-> {a}", f"(pack of {a})", f"{a}% off", f"{a}-{b}\""))
    word = rng.choice(WORDS)
    return rng.choice((size, f"{size} {word}", f"{word} {size}", f"{word} {size} {rng.choice(WORDS)}"))


def typed_texts(benign: Sequence[LabelledText], seed: int) -> list[LabelledText]:
    """Measures, and beginnings of measures and of the short benign texts given; all for training."""
    rng = random.Random(f"{seed}:typed")
    measures = [_measure(rng) for _ in range(MEASURES)]
    short = [t.text for t in benign if 4 <= len(t.text) <= LONGEST]
    whole = [*measures, *rng.sample(short, min(len(short), BEGINNINGS))]
    begun = [text[:rng.randrange(1, len(text) + 1)] for text in whole for _ in range(2)]
    return [LabelledText(text, 0, "typed_grammar", group, "train", group)
            for group, texts in (("measures", measures), ("beginnings", begun)) for text in dict.fromkeys(texts)]
