"""Spatter: drops of water (severities 1-3) or mud (4-5) where a smooth random field is high.

The published water uses five steps of OpenCV on bytes: Canny's edges of the drops, the distance to them, histogram
equalisation, an emboss, a blur. They are implemented here for batches, in integers, as OpenCV defines them. There are
two differences: Canny's weak edges join a strong one over at most eight pixels (over two, 3.6 % of 2,000 fields of
severity 3 differ from OpenCV's; over eight, none), and a field above 1 is a full drop, where the published byte wraps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import Level, above, gaussian_matrix, separable
from .random import Noise
from .weather import LUMA

_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
_MUD = (63 / 255, 42 / 255, 20 / 255)
_WEAK, _STRONG, _HOPS = 50.0, 150.0, 8
_EMBOSS = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
# Lengths of a diagonal and a knight's move in the 5 x 5 distance mask, in OpenCV's 16 fractional bits.
_DIAGONAL, _KNIGHT = 91750 / 65536, 143976 / 65536
_FAR, _FARTHEST = 8192.0, 20.0


def spatter(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Drops: water adds its colour, mud covers with its own; on grey images the luminance of the colour is used."""
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
        return cover * sum(share * light for share, light in zip(LUMA, colour, strict=True))
    return torch.cat([cover * light for light in colour], dim=1)


def _mud(x: Tensor, field: Tensor, bar: Tensor, level: Level) -> Tensor:
    cover = separable(above(field, bar), level, gaussian_matrix, 0.5, 0.5, 0.5, 0.6, 0.6)
    cover = cover * (1 - above(-cover, -0.8))
    return x * (1 - cover) + _coloured(cover, _MUD, x.shape[1])


def _water(x: Tensor, field: Tensor, bar: Tensor, level: Level) -> Tensor:
    drops = (field * (1 - above(bar, field))).mul_(255).floor_().clamp_(0, 255)
    distance = distance_to(edges(drops))
    relief = _convolved(equalised(_blurred(distance).floor_()), _EMBOSS).clamp_(0, 255)
    cover = drops * _blurred(relief).round_()
    highest = cover.amax(dim=(2, 3), keepdim=True)
    return x + _coloured(cover / highest.clamp(min=1) * 0.5, _WATER, x.shape[1])


def _convolved(x: Tensor, kernel: tuple[tuple[int, ...], ...]) -> Tensor:
    """A 3 x 3 filter with integer weights; beyond the edge the image is mirrored at its last pixel."""
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
        x: float32 ``[n, 1, height, width]``, integers 0-255.
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

    def highest(down: int, right: int) -> Tensor:  # compared with the pixels on both sides; the second may be equal
        return above(norm, at(-down, -right)) * (1 - above(at(down, right), norm))

    across, steep = dx.abs() * 13573, dy.abs() * 32768  # tan 22.5 degrees in 15 bits
    flat, upright = above(across, steep), above(steep, across + dx.abs() * 65536)
    rising = above(0 * dx, dx * dy)
    diagonal = rising * above(norm, at(-1, 1)) * above(norm, at(1, -1))
    diagonal += (1 - rising) * above(norm, at(-1, -1)) * above(norm, at(1, 1))
    thin = flat * highest(0, 1) + upright * highest(1, 0) + (1 - flat - upright) * diagonal
    weak = thin * above(norm, _WEAK)
    edge = weak * above(norm, _STRONG)
    for _ in range(_HOPS):
        edge = _spread(_spread(edge, 2), 3) * weak
    return edge


def _spread(x: Tensor, dim: int) -> Tensor:
    """The maximum of each pixel and its two neighbours along an axis."""
    size = x.shape[dim]
    highest = x.clone()
    after, before = highest.narrow(dim, 1, size - 1), highest.narrow(dim, 0, size - 1)
    torch.maximum(after, x.narrow(dim, 0, size - 1), out=after)
    torch.maximum(before, x.narrow(dim, 1, size - 1), out=before)
    return highest


def distance_to(edge: Tensor) -> Tensor:
    """Each pixel's distance, up to `_FARTHEST`, to the nearest edge (1 in ``edge`` ``[n, 1, height, width]``).

    OpenCV's distance with mask 5 counts straight, diagonal and knight's moves; it is the maximum of four linear
    functions of ``(across, down)``. It grows with ``across``, so in every row only the nearest edge matters.
    """
    height, width = edge.shape[-2:]
    ramp = torch.arange(width, device=edge.device, dtype=edge.dtype)
    far = (1 - edge) * _FAR
    left = (far - ramp).cummin(dim=3).values + ramp
    right = ((far + ramp).flip(3).cummin(dim=3).values.flip(3)) - ramp
    across = torch.minimum(left, right)
    # The linear functions for across >= down; those for across < down are the same with both exchanged.
    faces = ((1.0, _KNIGHT - 2), (_KNIGHT - _DIAGONAL, 2 * _DIAGONAL - _KNIGHT))
    parts = [(across * a, b) for a, b in (*faces, *(face[::-1] for face in faces))]
    distance = across.clamp(max=_FARTHEST)
    for down in range(1, min(height, int(_FARTHEST))):
        step = parts[0][0] + parts[0][1] * down
        for part, slope in parts[1:]:
            torch.maximum(step, part + slope * down, out=step)
        for target, source in ((slice(down, None), slice(None, -down)), (slice(None, -down), slice(down, None))):
            rows = distance[:, :, target]
            torch.minimum(rows, step[:, :, source], out=rows)
    return distance


def equalised(x: Tensor) -> Tensor:
    """OpenCV's histogram equalisation of integers 0-20, to integers 0-255."""
    values = x.flatten(1).long()
    bins = torch.zeros(len(x), int(_FARTHEST) + 1, device=x.device)
    bins.scatter_add_(1, values, torch.ones_like(values, dtype=bins.dtype))
    upto = bins.cumsum(1)
    least = upto + (upto == 0) * (2 * values.shape[1])
    lowest = least.amin(1, keepdim=True)  # the pixels of the lowest value, which becomes 0
    rest = values.shape[1] - lowest
    scaled = ((upto - lowest).clamp(min=0) * (255 / rest.clamp(min=1))).round_()
    lowest_value = x.flatten(1).amin(1, keepdim=True)
    scaled = torch.where(rest == 0, lowest_value, scaled)  # an image of a single value is not changed
    return scaled.gather(1, values).view(x.shape)
