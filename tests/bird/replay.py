"""Our random numbers, recorded, and played back to code that draws from NumPy's generator for one picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.stats
from torch import Tensor

from bird.lab.vision.corruptions.random import Noise


class Recorder(Noise):
    """Noise that keeps what it has drawn: (numbers ``[n, ...]``, number of choices of whole numbers or None)."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__(keys)
        self.drawn: list[tuple[np.ndarray, int | None]] = []

    def uniform(self, *shape: int) -> Tensor:
        return self._kept(super().uniform, shape)

    def normal(self, *shape: int) -> Tensor:
        return self._kept(super().normal, shape)

    def integers(self, choices: int, *shape: int) -> Tensor:
        return self._kept(super().integers, (choices, *shape), choices)

    def bits(self, *shape: int) -> Tensor:
        return self._kept(super().bits, shape)

    def _kept(self, draw: Any, arguments: tuple[int, ...], choices: int | None = None) -> Tensor:
        before = len(self.drawn)
        numbers = draw(*arguments)
        del self.drawn[before:]  # what it was made of
        self.drawn.append((numbers.numpy().copy(), choices))
        return numbers


class Replay:
    """Draws like a `numpy.random.Generator` what a `Recorder` has drawn for one sample, in the same order."""

    def __init__(self, recorder: Recorder, sample: int) -> None:
        self._left = [(numbers[sample], choices) for numbers, choices in recorder.drawn]

    def normal(self, loc: float = 0, scale: float = 1, *, size: tuple[int, ...]) -> np.ndarray:
        return loc + scale * self._next(size)[0].astype(np.float64)

    def uniform(self, low: float, high: float, size: tuple[int, ...] = ()) -> np.ndarray:
        numbers, choices = self._next(size)
        share = numbers if choices is None else (numbers + 0.5) / choices
        return low + (high - low) * np.asarray(share, dtype=np.float64)

    def integers(self, low: int, high: int, size: int | None = None) -> Any:
        if size is None:
            numbers, choices = self._next(())
            assert choices == high - low
            return low + int(numbers)
        assert (low, high, size) == (-1, 1, 2)  # of glass blur: one of four, and the loop goes backwards
        numbers, choices = self._left[0]
        if numbers.ndim == 3:
            self._left[0] = (numbers[:, ::-1, ::-1].reshape(-1), choices)
        step = int(self._next(())[0])
        return -(step & 1), -(step >> 1)

    def poisson(self, rate: np.ndarray) -> np.ndarray:
        """The exact quantile of the uniform numbers that ours started from."""
        bits, _ = self._next(rate.shape)
        return scipy.stats.poisson.ppf((((bits.astype(np.int64) >> 8) & 0xFFFFFF) + 0.5) / 2**24, rate)

    def _next(self, size: tuple[int, ...]) -> tuple[np.ndarray, int | None]:
        numbers, choices = self._left[0]
        if len(size) == 3 and numbers.shape == (size[2], size[0], size[1]):  # of channels first, channels last
            self._left.pop(0)
            return np.moveaxis(numbers, 0, 2), choices
        flat, count = numbers.reshape(-1), math.prod(size)
        if flat.size > count:
            self._left[0] = (flat[count:], choices)
        else:
            self._left.pop(0)
        return flat[:count].reshape(size), choices
