"""Random draws for one actor, fast enough to be made one at a time."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 96


class Draws:
    """Numbers from one numpy Generator, drawn in blocks: a scalar call costs ten times as much.

    Every actor has its own stream, keyed by (seed, family, number), so what one does doesn't change
    the others.
    """

    __slots__ = ("_generator", "_left", "_normals")

    def __init__(self, seed: int, family: int, number: int) -> None:
        self._generator = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(family, number))))
        self._left: list[float] = []
        self._normals: list[float] = []

    def u(self) -> float:
        """Uniform in [0, 1)."""
        left = self._left
        if not left:
            left.extend(self._generator.random(_BLOCK).tolist())
        return left.pop()

    def chance(self, p: float) -> bool:
        return self.u() < p

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.u()

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return low + int((high - low + 1) * self.u())

    def wait(self, mean: float) -> float:
        """Exponential: the time to the next arrival."""
        return -mean * math.log(1.0 - self.u())

    def lognormal(self, median: float, sigma: float) -> float:
        normals = self._normals
        if not normals:
            normals.extend(self._generator.standard_normal(_BLOCK).tolist())
        return median * math.exp(sigma * normals.pop())

    def count(self, mean: float, most: int) -> int:
        """Geometric from 0, at most `most`."""
        return min(most, int(self.wait(1.0) / -math.log(mean / (1.0 + mean)))) if mean > 0 else 0

    def pick(self, items: Sequence[T]) -> T:
        return items[int(len(items) * self.u())]

    def zipf(self, n: int) -> int:
        """0..n-1, the small ones far more often: what people look at."""
        return min(n - 1, int(n ** self.u()) - 1) if n > 1 else 0

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[i] for i in self._generator.permutation(len(items)).tolist()]

    def hex(self, digits: int) -> str:
        return self._generator.bytes((digits + 1) // 2).hex()[:digits]
