"""Frost textures, drawn by code: needles of ice that branch at 60 degrees, over a haze.

The published corruption crops photographs, whose licence does not allow redistribution. As there, a random part of
one of five images is used, with the published weights. The textures are periodic, so that a part may start anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .random import hash32

SIDE = 128  # of a texture, in pixels
_PICTURES = 5
_NUCLEI = 14  # crystals per texture
_LENGTHS = (10.0, 34.0)  # of a crystal's six arms, in pixels
_SPACING = 3.5  # between the branches of an arm


class _Dice:
    """A sequence of uniform random numbers from `hash32`."""

    def __init__(self, seed: int) -> None:
        self._seed, self._count = hash32(seed + 1), 0

    def __call__(self, low: float, high: float) -> float:
        self._count += 1
        return low + (high - low) * hash32(hash32(self._count) ^ self._seed) / 2**32

    def field(self, side: int) -> np.ndarray:
        return np.array([self(-1, 1) for _ in range(side * side)]).reshape(side, side)


@lru_cache(maxsize=8)
def textures(device: torch.device) -> Tensor:
    """The textures, float32 ``[5, 128, 128]`` in 0-1, cached on the device."""
    return torch.from_numpy(np.stack([_picture(_Dice(i)) for i in range(_PICTURES)])).float().to(device)


def _picture(dice: _Dice) -> np.ndarray:
    ice = np.zeros((SIDE, SIDE))
    for _ in range(_NUCLEI):
        for y, x, angle, length, light in _crystal(dice):
            _draw(ice, y, x, angle, length, light)
    return np.clip(0.35 + 0.14 * _haze(dice) + 0.65 * ice, 0, 1)


def _crystal(dice: _Dice) -> Iterator[tuple[float, float, float, float, float]]:
    """Needles as (y, x, angle, length, brightness): six arms with branches on both sides that shorten outwards."""
    y, x, turn = dice(0, SIDE), dice(0, SIDE), dice(0, math.pi / 3)
    for arm in range(6):
        angle, length = turn + arm * math.pi / 3, dice(*_LENGTHS)
        yield y, x, angle, length, 1.0
        for k in range(1, int(length / _SPACING)):
            along = k * _SPACING + dice(-1, 1)
            for side in (-1, 1):
                branch = 0.45 * (length - along) * dice(0.5, 1)
                yield (
                    y + along * math.sin(angle),
                    x + along * math.cos(angle),
                    angle + side * math.pi / 3,
                    branch,
                    dice(0.4, 0.9),
                )


def _draw(ice: np.ndarray, y: float, x: float, angle: float, length: float, light: float) -> None:
    """Draw a fading needle into the texture by the maximum of both; beyond an edge it continues at the opposite
    one."""
    reach = math.ceil(length) + 2
    offset = np.arange(-reach, reach + 1)
    rows, columns = int(y) + offset, int(x) + offset
    dy, dx = (rows - y)[:, None], (columns - x)[None, :]
    along = dx * math.cos(angle) + dy * math.sin(angle)
    across = dy * math.cos(angle) - dx * math.sin(angle)
    beyond = along - np.clip(along, 0, length)
    fade = 1 - 0.6 * np.clip(along / max(length, 1), 0, 1)
    needle = light * fade * np.exp(-(across**2 + beyond**2) / (2 * 0.6**2))
    where = np.ix_(rows % SIDE, columns % SIDE)
    ice[where] = np.maximum(ice[where], needle)


def _haze(dice: _Dice) -> np.ndarray:
    """A smooth random field of mean 0 and variance 1: noise on coarse grids, interpolated by cosines."""
    total = np.zeros((SIDE, SIDE))
    for side, weight in ((4, 1.0), (8, 0.7), (16, 0.4), (64, 0.25)):
        total += weight * _enlarged(dice.field(side))
    return (total - total.mean()) / total.std()


def _enlarged(grid: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        place = np.arange(SIDE) * grid.shape[axis] / SIDE
        first = place.astype(int)
        share = (0.5 - 0.5 * np.cos(np.pi * (place - first))).reshape((-1, 1) if axis == 0 else (1, -1))
        second = (first + 1) % grid.shape[axis]
        grid = grid.take(first, axis) * (1 - share) + grid.take(second, axis) * share
    return grid
