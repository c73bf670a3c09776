"""Blurs: Gaussian, out of focus, frosted glass, motion, zoom."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .filters import FilterTaps, Level, gaussian_matrix, separable, weighted, zoom_lines
from .random import Noise

ANGLES = 4096  # possible directions of a motion; their sines are tables, so that they are equal on every device
_LEAST = 1e-6  # smaller weights are left out: 1/4000 of one of 255 grey levels


def gaussian_blur(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """A Gaussian filter; the numbers are standard deviations in pixels."""
    return separable(x, level, gaussian_matrix, 0.4, 0.6, 0.7, 0.8, 1.0)


def defocus_blur(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """A lens out of focus: the average over a disk whose edge is softened."""
    return _disks(x.shape[-2:], x.device)(x, level)


@lru_cache(maxsize=8)
def _disks(shape: tuple[int, int], device: torch.device) -> FilterTaps:
    """A disk, convolved with a 3 x 3 Gaussian; beyond the edge the image is mirrored at its last pixel."""
    levels = []
    for radius, alias in ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)):
        reach = int(radius) + 1
        offset = np.arange(-reach, reach + 1)
        disk = (offset[:, None] ** 2 + offset**2 <= radius**2).astype(float)
        side = math.exp(-1 / (2 * alias**2))
        soft = np.array([side, 1, side]) / (1 + 2 * side)
        for axis in (0, 1):
            disk = np.apply_along_axis(np.convolve, axis, disk, soft, mode="same")
        disk[disk < _LEAST * disk.sum()] = 0
        rows, columns = np.nonzero(disk)
        lines = [
            np.pad(np.arange(size), reach, mode="reflect")[start[:, None] + np.arange(size)]
            for size, start in zip(shape, (rows, columns), strict=True)
        ]
        source = lines[0][:, :, None] * shape[1] + lines[1][:, None, :]
        levels.append((source.reshape(len(rows), -1), (disk / disk.sum())[rows, columns, None]))
    return FilterTaps.stack(levels, device)


def glass_blur(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Frosted glass: pixels are replaced by neighbours, between two Gaussian blurs.

    The published loop goes backwards through the pixels and is meant to swap pairs by a tuple assignment. In
    NumPy the second value is a view of what the first has just overwritten: nothing is swapped, a pixel becomes a
    *copy* of itself or of its neighbour to the left, above, or both, which the loop has not reached yet. So a round is
    a choice among four shifted images, independent of order; the official archives were made that way.
    """
    sigmas = (0.05, 0.25, 0.4, 0.25, 0.4)
    height, width = x.shape[-2:]
    x = separable(x, level, gaussian_matrix, *sigmas)
    x = x.mul_(255).add_(2.0**-10).floor_().div_(255)  # bytes; 2^-10 protects integers from rounding errors
    twice = max(level.present) > 2
    steps = noise.integers(4, 2, height - 2, width - 2)
    for turn in range(1 + twice):
        step = steps[:, turn]
        if turn == 1:
            step = step * (level.index > 2).long().view(-1, 1, 1)
        x = _copy_neighbours(x, step)
    return separable(x, level, gaussian_matrix, *sigmas)


def _copy_neighbours(x: Tensor, step: Tensor) -> Tensor:
    """Replace every pixel from row and column 2 on by the one ``step & 1`` to its left and ``step >> 1`` above it."""
    height, width = x.shape[-2:]
    source = torch.arange(height * width, device=x.device).expand(len(x), -1).clone().view(-1, height, width)
    source[:, 2:, 2:] -= (step & 1) + (step >> 1) * width
    return x.flatten(2).gather(2, source.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)).view(x.shape)


def motion_blur(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Camera motion: half a Gaussian along a line, within 45 degrees of the horizontal."""
    angle = noise.integers(ANGLES)
    return streak(x, level, angle, (6, 6, 6, 8, 9), (1.0, 1.5, 2.0, 2.0, 2.5), (-45.0, 45.0))


def streak(
    x: Tensor,
    level: Level,
    angle: Tensor,
    radii: tuple[int, ...],
    sigmas: tuple[float, ...],
    between: tuple[float, float],
) -> Tensor:
    """Blur along a line that begins at the pixel, as ImageMagick's ``MotionBlurImage``.

    Tap ``i`` of ``2 * radius + 1`` has weight ``exp(-i^2 / 2 sigma^2)`` and lies at ``(i cos, i sin)`` of the angle, to
    the nearest pixel; beyond the edge the last pixel is repeated. Relative weights below 1e-6 are left out.

    Args:
        x: float32 ``[n, channels, height, width]``.
        level: selects radius and sigma.
        angle: int64 ``[n]``, the index among 4,096 angles in equal steps.
        radii: five, in pixels.
        sigmas: five, in pixels.
        between: the range of the angles, in degrees, clockwise from the right.
    """
    height, width = x.shape[-2:]
    weights = _streak_weights(radii, sigmas, x.device)
    count = _streak_count(radii, sigmas, level)
    weight = level.of(weights)
    down, right = _streak_lines(between, x.device)[:, angle]
    row = torch.arange(height, device=x.device).view(1, height, 1)
    column = torch.arange(width, device=x.device).view(1, 1, width)
    place = row.new_empty(len(x), height, width)  # the source positions of one tap, reused for all

    def taps(i: int) -> tuple[Tensor, Tensor]:
        rows = (row + down[:, i].view(-1, 1, 1)).clamp_(0, height - 1).mul_(width)
        columns = (column + right[:, i].view(-1, 1, 1)).clamp_(0, width - 1)
        return torch.add(rows, columns, out=place).flatten(1), weight[:, i].view(-1, 1, 1)

    return weighted(x, (taps(i) for i in range(count)))


def _half_gaussian(radius: int, sigma: float) -> np.ndarray:
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weights = weights[weights > _LEAST * weights.sum()]
    return weights / weights.sum()


def _streak_count(radii: tuple[int, ...], sigmas: tuple[float, ...], level: Level) -> int:
    """The taps of the longest streak that may occur."""
    return max(len(_half_gaussian(radii[i], sigmas[i])) for i in level.present)


@lru_cache(maxsize=8)
def _streak_weights(radii: tuple[int, ...], sigmas: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 ``[5, most taps]``, zero where a streak is shorter."""
    lines = [_half_gaussian(radius, sigma) for radius, sigma in zip(radii, sigmas, strict=True)]
    most = max(map(len, lines))
    return torch.from_numpy(np.stack([np.pad(line, (0, most - len(line))) for line in lines])).float().to(device)


@lru_cache(maxsize=8)
def _streak_lines(between: tuple[float, float], device: torch.device) -> Tensor:
    """int64 ``[2, angles, 32]``: offsets of a streak's taps from the pixel, down and to the right."""
    share = (np.arange(ANGLES) + 0.5) / ANGLES
    angle = np.deg2rad(between[0] + (between[1] - between[0]) * share)[:, None]
    line = np.arange(32) * np.stack([np.sin(angle), np.cos(angle)])
    return torch.from_numpy(np.ceil(line - 0.5)).long().to(device)


def zoom_blur(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Motion towards the scene: the average of the image and of its magnified middles."""
    return _zooms(x.shape[-2:], x.device)(x, level)


@lru_cache(maxsize=8)
def _zooms(shape: tuple[int, int], device: torch.device) -> FilterTaps:
    return FilterTaps.stack(
        [_zoom_taps(shape, np.arange(1, end, 0.01)) for end in (1.06, 1.11, 1.16, 1.21, 1.26)], device
    )


def _zoom_taps(shape: tuple[int, int], factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bilinear taps of all zooms, summed per source pixel: (source, weight) ``[taps, height * width]``."""
    height, width = shape
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    reach = math.ceil(max(shape) / 2 * (1 - 1 / factors[-1])) + 2
    side = 2 * reach + 1
    total = np.zeros((height, width, side, side))
    total[:, :, reach, reach] = 1  # the image itself
    for factor in factors:
        (top, below), (left, beside) = (zoom_lines(size, factor) for size in shape)
        for down, right in np.ndindex(2, 2):
            weight = (below if down else 1 - below)[:, None] * (beside if right else 1 - beside)
            dy, dx = top[:, None] + down - rows + reach, left + right - columns + reach
            np.add.at(total, (rows, columns, dy, dx), weight)
    weights = (total / (len(factors) + 1)).reshape(height * width, side * side)
    heaviest = np.argsort(-weights, axis=1, kind="stable")[:, : (weights > 0).sum(1).max()]
    dy, dx = np.divmod(heaviest, side)
    y = (rows.reshape(-1, 1) + dy - reach).clip(0, height - 1)
    x = (columns.reshape(-1, 1) + dx - reach).clip(0, width - 1)
    return (y * width + x).T, np.take_along_axis(weights, heaviest, 1).T
