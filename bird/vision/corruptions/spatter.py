"""Spatter: drops of water (severities 1-3) or mud (4-5) where a smooth random field is high.

The published water takes five steps of OpenCV on bytes: Canny's edges of the drops, the distance to them, histogram
equalisation, an emboss, a blur. They are written here for batches, in whole numbers, as OpenCV defines them, with one
difference, which is ours: Canny's weak edges join a strong one over at most eight pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import Level, gaussian_matrix, separable
from .random import Noise

_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
_MUD = (63 / 255, 42 / 255, 20 / 255)
_LUMA = (0.299, 0.587, 0.114)
_WEAK, _STRONG, _HOPS = 50.0, 150.0, 8
_EMBOSS = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
# Steps of the 5 x 5 distance mask, in OpenCV's 16 fractional bits: straight, diagonal, knight's move.
_STRAIGHT, _DIAGONAL, _KNIGHT = 1.0, 91750 / 65536, 143976 / 65536
_FAR, _FARTHEST = 8192.0, 20.0


def spatter(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Water adds its colour, mud covers with its own; grey pictures take the colours' luminance."""
    field = noise.normal(1, *x.shape[2:]) * level.pick(0.1, 0.1, 0.3, 0.1, 0.1)
    field = separable(field + level.pick(0.62, 0.65, 0.65, 0.65, 0.65), level, gaussian_matrix, 0.7, 0.8, 1, 0.7, 0.5)
    bar = level.pick(0.7, 0.7, 0.69, 0.69, 0.68)
    if level.present[-1] < 3:
        return _water(x, field, bar, level)
    if level.present[0] > 2:
        return _mud(x, field, bar, level)
    return torch.where(level.index.view(-1, 1, 1, 1) < 3, _water(x, field, bar, level), _mud(x, field, bar, level))


def _coloured(cover: Tensor, colour: tuple[float, float, float], channels: int) -> Tensor:
    """``cover`` times the colour, ``[n, channels, height, width]``."""
    if channels == 1:
        return cover * sum(share * light for share, light in zip(_LUMA, colour, strict=True))
    return torch.cat([cover * light for light in colour], dim=1)


def _mud(x: Tensor, field: Tensor, bar: Tensor, level: Level) -> Tensor:
    cover = separable((field > bar).float(), level, gaussian_matrix, 0.5, 0.5, 0.5, 0.6, 0.6)
    cover = cover * (cover >= 0.8).float()
    return x * (1 - cover) + _coloured(cover, _MUD, x.shape[1])


def _water(x: Tensor, field: Tensor, bar: Tensor, level: Level) -> Tensor:
    drops = (field * (field >= bar).float()).mul_(255).floor_().clamp_(0, 255)
    distance = distance_to(edges(drops)).clamp_(max=_FARTHEST)
    relief = _convolved(equalised(_blurred(distance).floor_()), _EMBOSS).clamp_(0, 255)
    cover = drops * _blurred(relief).round_()
    highest = cover.amax(dim=(2, 3), keepdim=True)
    return x + _coloured(cover / highest.clamp(min=1) * 0.5, _WATER, x.shape[1])


def _convolved(x: Tensor, kernel: tuple[tuple[int, ...], ...]) -> Tensor:
    """A 3 x 3 filter of whole numbers; beyond the edge the picture is mirrored at its last pixel."""
    height, width = x.shape[-2:]
    padded = F.pad(x, [1] * 4, mode="reflect")
    total = torch.zeros_like(x)
    for i, line in enumerate(kernel):
        for j, weight in enumerate(line):
            if weight:
                part = padded[..., i : i + height, j : j + width]
                total += part if weight == 1 else part * weight
    return total


def _blurred(x: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels."""
    return _convolved(x, ((1, 1, 1),) * 3).div_(9)


def edges(x: Tensor) -> Tensor:
    """Canny's edges with OpenCV's rules (Sobel 3 x 3, L1 norm, thresholds 50 and 150), 0 or 1.

    Args:
        x: float32 ``[n, 1, height, width]``, whole numbers 0-255.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, [1] * 4, mode="replicate")
    smooth_down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    dx = smooth_down[..., 2:] - smooth_down[..., :-2]
    smooth_across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    dy = smooth_across[..., 2:, :] - smooth_across[..., :-2, :]
    norm = dx.abs() + dy.abs()
    around = F.pad(norm, [1] * 4)

    def at(down: int, right: int) -> Tensor:
        return around[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    across, steep = dx.abs() * 13573, dy.abs() * 32768  # tan 22.5 degrees in 15 bits
    flat, upright = steep < across, steep > across + dx.abs() * 65536
    diagonal = torch.where(
        dx * dy < 0, (norm > at(-1, 1)) & (norm > at(1, -1)), (norm > at(-1, -1)) & (norm > at(1, 1))
    )
    thin = torch.where(upright, (norm > at(-1, 0)) & (norm >= at(1, 0)), diagonal)
    thin = torch.where(flat, (norm > at(0, -1)) & (norm >= at(0, 1)), thin)
    weak = (thin & (norm > _WEAK)).float()
    edge = weak * (norm > _STRONG).float()
    for _ in range(_HOPS):
        edge = F.max_pool2d(edge, 3, stride=1, padding=1) * weak
    return edge


def distance_to(edge: Tensor) -> Tensor:
    """Each pixel's distance to the nearest edge (1 in ``edge`` ``[n, 1, height, width]``), as OpenCV's with mask 5.

    Two sweeps over the rows, down and up; within a row the nearest from one side is a running minimum.
    """
    height, width = edge.shape[-2:]
    ramp = torch.arange(width, device=edge.device, dtype=edge.dtype) * _STRAIGHT
    distance = (1 - edge[:, 0]) * _FAR
    for turn in range(2):
        rows: list[Tensor] = []
        for y in range(height):
            row = distance[:, y]
            if y > 0:
                row = torch.minimum(row, _from_above(rows[y - 1], (_DIAGONAL, _KNIGHT)))
                row = torch.minimum(row, rows[y - 1] + _STRAIGHT)
            if y > 1:
                row = torch.minimum(row, _from_above(rows[y - 2], (_KNIGHT,)))
            rows.append((row - ramp).cummin(dim=1).values + ramp)
        distance = torch.stack(rows, dim=1).flip(1, 2)
    return distance[:, None]


def _from_above(row: Tensor, steps: tuple[float, ...]) -> Tensor:
    """The least of a row's pixels, 1, 2, ... to the side, plus the step."""
    least = torch.full_like(row, _FAR)
    for shift, step in enumerate(steps, start=1):
        least[:, shift:] = torch.minimum(least[:, shift:], row[:, :-shift] + step)
        least[:, :-shift] = torch.minimum(least[:, :-shift], row[:, shift:] + step)
    return least


def equalised(x: Tensor) -> Tensor:
    """OpenCV's histogram equalisation of whole numbers 0-20, to whole numbers 0-255."""
    values = x.flatten(1).long()
    bins = torch.zeros(len(x), int(_FARTHEST) + 1, device=x.device)
    bins.scatter_add_(1, values, torch.ones_like(values, dtype=bins.dtype))
    upto = bins.cumsum(1)
    least = upto + (upto == 0) * (2 * values.shape[1])
    lowest = least.amin(1, keepdim=True)  # the pixels of the lowest value, which becomes 0
    rest = values.shape[1] - lowest
    scaled = ((upto - lowest).clamp(min=0) * (255 / rest.clamp(min=1))).round_()
    lowest_value = values.amin(1, keepdim=True).float()
    scaled = torch.where(rest == 0, lowest_value, scaled)  # one value only stays what it is
    return scaled.gather(1, values).view(x.shape)
