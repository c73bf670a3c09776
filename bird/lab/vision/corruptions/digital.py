"""Digital: brightness, contrast, saturation, elastic deformation, pixelation. JPEG is in `jpeg`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import Level, gaussian_matrix, separable
from .random import Noise


def brightness(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Overexposure: increases the value in HSV and keeps hue and saturation; grey images become lighter."""
    value = x.amax(dim=1, keepdim=True)
    lighter = (value + level.pick(0.05, 0.1, 0.15, 0.2, 0.3)).clamp_(max=1)
    black = (value == 0).to(x.dtype)
    return (x + black) * (lighter / (value + black))


def saturate(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Weaker or stronger colours: saturation in HSV, times a factor plus a constant. Grey images do not change.

    As published, a grey pixel of a colour image has hue 0 (red) and becomes reddish if the constant is not 0.
    """
    value, least = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    spread = value - least
    grey = (spread == 0).to(x.dtype)
    black = (value == 0).to(x.dtype)
    saturation = spread / (value + black)
    stronger = saturation * level.pick(0.3, 0.1, 1.5, 2, 2.5) + level.pick(0, 0, 0, 0.1, 0.2)
    missing = (value - x) / (spread + grey)  # of each colour: 0 for the strongest, 1 for the weakest
    missing[:, 1:] += grey
    return value * (1 - missing * stronger.clamp_(0, 1))


def contrast(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Reduces the distance of all pixels from the mean of their channel."""
    share = level.pick(0.75, 0.5, 0.4, 0.3, 0.15)
    whole = (x * 2.0**24).long().sum(dim=(2, 3), keepdim=True)  # integers, so the order of the sum does not matter
    mean = (whole / (x.shape[2] * x.shape[3])).to(x.dtype) * 2.0**-24
    return (x - mean) * share + mean


def pixelate(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Reduces the resolution."""
    return separable(x, level, _cell_matrix, 0.95, 0.9, 0.85, 0.75, 0.65)


def _cell_matrix(size: int, share: float) -> np.ndarray:
    """``[size, size]``: to ``int(size * share)`` pixels and back, both with Pillow's box filter."""
    return _box_matrix(int(size * share), size) @ _box_matrix(size, int(size * share))


def _box_matrix(source: int, target: int) -> np.ndarray:
    """``[target, source]``: Pillow's ``Image.BOX``, the mean of the source pixels whose centre is in a target pixel."""
    scale = source / target
    reach = max(scale, 1) / 2
    centre = (np.arange(target)[:, None] + 0.5) * scale
    offset = np.arange(source) + 0.5 - centre
    inside = ((offset > -reach) & (offset <= reach)).astype(float)
    return inside / inside.sum(axis=1, keepdims=True)


def elastic_transform(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Elastic deformation: an affine map moves three points, then every pixel moves along a smooth random field.

    Both steps interpolate between four pixels; the first mirrors at the last pixel, the second at the image's edge.
    """
    height, width = x.shape[-2:]
    side = min(height, width)
    jitter = (
        noise.uniform(3, 2).mul_(2).sub_(1) * level.pick(0.08, 0.07, 0.06, 0.05, 0.03).flatten(1)[:, :, None] * side
    )
    x = _sampled(x, *_affine_sources(jitter, height, width), mirror_last=True)
    if level.present == range(1):
        return x
    field = noise.uniform(2, height, width).mul_(2).sub_(1)
    field = separable(field, level, _mirrored_gaussian, *(side * share for share in (0, 0.2, 0.06, 0.04, 0.03)))
    right, down = (field * (level.pick(0, 0.05, 0.08, 0.1, 0.1) * side)).unbind(1)
    rows = torch.arange(height, device=x.device, dtype=x.dtype).view(1, -1, 1)
    columns = torch.arange(width, device=x.device, dtype=x.dtype).view(1, 1, -1)
    moved = _sampled(x, rows + down, columns + right, mirror_last=False)
    return moved if level.only is not None else torch.where(level.index.view(-1, 1, 1, 1) == 0, x, moved)


def _mirrored_gaussian(size: int, sigma: float) -> np.ndarray:
    return gaussian_matrix(size, sigma, truncate=3, edge="symmetric")


def _affine_sources(jitter: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The source position of each pixel, rows and columns ``[n, height, width]``, under an affine map.

    It moves three corners of a central square by ``jitter`` ``[n, 3, 2]`` (columns, then rows, in pixels).

    With the moved corners p, u = p0 - p1 and v = p2 - p1, a pixel p1 + a u + b v (a and b by Cramer's rule) comes from
    the same a and b with the original corners, where u points down and v to the left.
    """
    third = min(height, width) // 3
    x1, y1 = width // 2 + third, height // 2 - third
    px, py = (jitter[:, :, i].reshape(-1, 3, 1, 1) for i in (0, 1))
    ux, uy = px[:, 0] - px[:, 1], py[:, 0] - py[:, 1] + 2 * third
    vx, vy = px[:, 2] - px[:, 1] - 2 * third, py[:, 2] - py[:, 1]
    qy = torch.arange(height, device=jitter.device, dtype=jitter.dtype).view(1, -1, 1) - y1 - py[:, 1]
    qx = torch.arange(width, device=jitter.device, dtype=jitter.dtype).view(1, 1, -1) - x1 - px[:, 1]
    area = ux * vy - uy * vx
    a, b = (qx * vy - qy * vx) / area, (ux * qy - uy * qx) / area
    return y1 + 2 * third * a, x1 - 2 * third * b


def _sampled(x: Tensor, rows: Tensor, columns: Tensor, *, mirror_last: bool) -> Tensor:
    """Interpolate at positions ``[n, height, width]``, mirrored at the last pixel's centre or at its edge."""
    places = []
    for place, size in zip((columns, rows), (x.shape[3], x.shape[2]), strict=True):
        places.append(place * (2 / (size - 1)) - 1 if mirror_last else (place * 2 + 1) / size - 1)
    return F.grid_sample(x, torch.stack(places, dim=3), padding_mode="reflection", align_corners=mirror_last)
