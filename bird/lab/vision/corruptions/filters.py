"""Linear filters whose result does not depend on the batch: sums of shifted images in fixed order, exact products.

The order of summation in a library matrix product depends on the batch size. In `separable` that has no effect:
pixels and weights are integer multiples of 2^-24, so that fp64 holds every product and every partial sum exactly, and
any order gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_TO_GRID = 1.5 * 2.0**28  # adding and subtracting this in fp64 rounds to multiples of 2^-24


def above(x: Tensor, bar: Tensor | float) -> Tensor:
    """1 where ``x > bar``, else 0, in the dtype of ``x``: on a CPU selecting with bool tensors is many times slower."""
    return (x - bar).sign_().clamp_(min=0)


@dataclass(frozen=True)
class Level:
    """The level of a corruption, severity - 1, for every sample.

    Args:
        index: int64 ``[n]``, 0-4.
        only: the common level of all samples, if it is known on the host: tables are then read once for all.
    """

    index: Tensor
    only: int | None = None

    @property
    def present(self) -> range:
        """The levels that may occur."""
        return range(5) if self.only is None else range(self.only, self.only + 1)

    def of(self, table: Tensor) -> Tensor:
        """Each sample's row of a table ``[5, ...]``: ``[n, ...]``, or ``[1, ...]`` if ``only`` is known."""
        return table[self.index] if self.only is None else table[self.only : self.only + 1]

    def pick(self, *values: float) -> Tensor:
        """Each sample's number among five, one per level: ``[n or 1, 1, 1, 1]``."""
        return self.of(constants(values, self.index.device)).view(-1, 1, 1, 1)


@lru_cache(maxsize=512)
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 constants, cached on the device: copying them there each time would synchronise."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def widest(device: torch.device) -> torch.dtype:
    """fp64; fp32 where there is none (MPS), and there the last bit of an exact filter may depend on the batch."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_grid(x: Tensor) -> Tensor:
    """``x`` in fp64, rounded to multiples of 2^-24; for numbers up to 16. As it is without fp64."""
    return x.double().add_(_TO_GRID).sub_(_TO_GRID) if widest(x.device) is torch.float64 else x


@lru_cache(maxsize=256)
def matrices(
    build: Callable[[int, float], np.ndarray], size: int, values: tuple[float, ...], device: torch.device
) -> Tensor:
    """``build(size, value)`` for each value, ``[values, size, size]``, rounded for `separable`, cached on device."""
    stack = torch.from_numpy(np.stack([build(size, value) for value in values]))
    return (stack * 2.0**24).round_().mul_(2.0**-24).to(widest(device)).to(device)


def separable(x: Tensor, level: Level, build: Callable[[int, float], np.ndarray], *values: float) -> Tensor:
    """A linear filter along the height, then along the width: ``A x B^T`` with a sample's own matrices.

    Args:
        x: float32 ``[n, channels, height, width]``, at most 8.
        level: selects the value of each sample.
        build: from ``(size, value)`` to a matrix ``[size, size]``.
        values: five, one per level.
    """
    rows, columns = (level.of(matrices(build, size, values, x.device)).unsqueeze(1) for size in x.shape[-2:])
    return (rows @ to_grid(to_grid(x) @ columns.mT)).float()


def gaussian_matrix(size: int, sigma: float, truncate: float = 4.0, edge: str = "edge") -> np.ndarray:
    """``[size, size]``: convolution with a Gaussian that sums to one and is cut ``truncate`` sigmas out, as in SciPy.

    Args:
        edge: NumPy's padding mode: "edge" repeats the last pixel, "symmetric" mirrors the image.
    """
    reach = int(truncate * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2)) if reach else np.ones(1)
    source = np.pad(np.arange(size), reach, mode=edge)  # type: ignore[call-overload]
    matrix = np.zeros((size, size))
    for offset, weight in zip(offsets + reach, weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.arange(size), source[offset : offset + size]), weight)
    return matrix


def zoom_lines(size: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Magnifies the middle of an image to its full size, along one axis, by linear interpolation.

    Returns the first of two neighbouring source pixels and the weight of the second, both ``[size]``.

    As published: the middle ``ceil(size / factor)`` pixels, ``scipy.ndimage.zoom`` of order 1, cropped to its middle.
    """
    crop = math.ceil(size / factor)
    zoomed = round(crop * factor)
    target = np.arange(size) + (zoomed - size) // 2
    place = target * (crop - 1) / max(zoomed - 1, 1)
    first = np.minimum(place.astype(int), max(crop - 2, 0))
    return first + (size - crop) // 2, place - first


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """``[size, size]``: `zoom_lines` as a matrix."""
    first, share = zoom_lines(size, factor)
    matrix = np.zeros((size, size))
    matrix[np.arange(size), first] = 1 - share
    np.add.at(matrix, (np.arange(size), np.minimum(first + 1, size - 1)), share)
    return matrix


@dataclass(frozen=True)
class FilterTaps:
    """A filter as a weighted sum of a few source pixels (taps) per pixel, for five levels.

    Args:
        source: int64 ``[5, taps, height * width]``, positions in the flattened image.
        weight: float32 ``[5, taps, height * width]`` or ``[5, taps, 1]``, zero where a level has fewer taps.
        counts: how many taps each level has.
    """

    source: Tensor
    weight: Tensor
    counts: tuple[int, ...]

    @classmethod
    def stack(cls, levels: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> FilterTaps:
        """From (source, weight) ``[taps, ...]`` of each level."""
        most = max(len(weight) for _, weight in levels)

        def padded(part: np.ndarray) -> np.ndarray:
            return np.pad(part, [(0, most - len(part)), (0, 0)])

        source, weight = (np.stack([padded(pair[i]) for pair in levels]) for i in (0, 1))
        return cls(
            torch.from_numpy(source).long().to(device),
            torch.from_numpy(weight).float().to(device),
            tuple(len(weight) for _, weight in levels),
        )

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """Filter float32 ``[n, channels, height, width]``."""
        source, weight = level.of(self.source), level.of(self.weight)
        count = max(self.counts[present] for present in level.present)
        if level.only is None:
            return weighted(x, ((source[:, t], weight[:, t, None]) for t in range(count)))
        pixels = (
            x.flatten(2).flatten(0, 1).T.contiguous()
        )  # one filter for all: whole rows are copied, in half the time
        total = torch.zeros_like(pixels)
        for t in range(count):
            total += pixels.index_select(0, source[0, t]).mul_(weight[0, t, :, None])
        return total.T.reshape(x.shape)


def weighted(x: Tensor, taps: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of ``weight * x[source]`` in the order given.

    Args:
        x: float32 ``[n, channels, height, width]``.
        taps: (source int64 ``[n or 1, height * width]``, weight ``[n or 1, 1, height * width or 1]``).
    """
    flat = x.flatten(2)
    total = torch.zeros_like(flat)
    for source, weight in taps:
        total += flat.gather(2, source.unsqueeze(1).expand(flat.shape)).mul_(weight)
    return total.view(x.shape)
