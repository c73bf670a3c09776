"""The loss of baseline JPEG compression, as Pillow writes and reads it, without a file.

YCbCr, colours at half the resolution (4:2:0), a cosine transform of 8 x 8 blocks, the standard's tables scaled by the
quality, and the inverse, with rounding to bytes between the steps as in libjpeg. Cosines are rounded to multiples of
2^-30, so that fp64 products with integers are exact, and a block is rounded alike in any batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import Level, widest
from .random import Noise

_QUALITIES = (80, 65, 58, 50, 40)
# ITU-T T.81, annex K: tables K.1 (luminance) and K.2 (chrominance), row by row.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)


def jpeg_compression(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Compress and decompress; for grey images only the luminance table is used."""
    x = (x * 255).round_()
    if x.shape[1] == 1:
        return _coded(x, level, chroma=False).div_(255)
    light, *colours = _to_ycc(x)
    light = _coded(light, level, chroma=False)
    shrunk = _coded(torch.cat([_halved(colour) for colour in colours], dim=1), level, chroma=True)
    return _to_rgb(light, _doubled(shrunk)[..., : x.shape[2], : x.shape[3]]).clamp_(0, 255).div_(255)


def quantisation_table(quality: int, *, chroma: bool) -> np.ndarray:
    """``[8, 8]``: the standard's table scaled as libjpeg does, 1 to 255."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((np.array(_CHROMINANCE if chroma else _LUMINANCE) * scale + 50) // 100, 1, 255)


@lru_cache(maxsize=8)
def _tables(chroma: bool, device: torch.device) -> Tensor:
    """float ``[5, 1, 64]``."""
    tables = np.stack([quantisation_table(quality, chroma=chroma) for quality in _QUALITIES])
    return torch.from_numpy(tables).to(widest(device)).view(5, 1, 64).to(device)


@lru_cache(maxsize=8)
def _cosines(device: torch.device) -> Tensor:
    """``[64, 64]``: a block's orthonormal cosine transform, rounded to multiples of 2^-30."""
    k = np.arange(8)
    basis = np.cos(np.pi * (2 * k + 1) * k[:, None] / 16) / 2
    basis[0] /= np.sqrt(2)
    both = np.round(np.kron(basis, basis) * 2.0**30) * 2.0**-30
    return torch.from_numpy(both).to(widest(device)).to(device)


def _coded(x: Tensor, level: Level, *, chroma: bool) -> Tensor:
    """Bytes ``[n, channels, height, width]`` after the quantised transform; incomplete blocks repeat the last pixel."""
    n, channels, height, width = x.shape
    padded = F.pad(x, [0, -width % 8, 0, -height % 8], mode="replicate")
    down, across = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = padded.view(n, channels, down, 8, across, 8).transpose(3, 4).reshape(n, -1, 64)
    cosines = _cosines(x.device)
    table = level.of(_tables(chroma, x.device))
    coefficients = (blocks.to(cosines.dtype).sub_(128) @ cosines.mT).div_(table)
    coefficients = torch.copysign((coefficients.abs() + 0.5).floor_(), coefficients).mul_(table)
    decoded = (coefficients @ cosines).add_(128).round_().clamp_(0, 255).to(x.dtype)
    decoded = decoded.view(n, channels, down, across, 8, 8).transpose(3, 4).reshape(padded.shape)
    return decoded[..., :height, :width]


def _to_ycc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes RGB to bytes YCbCr, ``[n, 1, height, width]`` each (JFIF)."""
    red, green, blue = x.split(1, dim=1)
    light = red * 0.299 + green * 0.587 + blue * 0.114
    cb = (blue - light) * (0.5 / 0.886) + 128
    cr = (red - light) * (0.5 / 0.701) + 128
    return light.round(), cb.round_().clamp_(max=255), cr.round_().clamp_(max=255)


def _to_rgb(light: Tensor, colours: Tensor) -> Tensor:
    """Bytes YCbCr to bytes RGB, not yet clamped."""
    cb, cr = (colours - 128).split(1, dim=1)
    red = light + (cr * 1.402).round_()
    green = light + (cb * -0.344136 - cr * 0.714136).round_()
    blue = light + (cb * 1.772).round_()
    return torch.cat([red, green, blue], dim=1)


def _halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 bytes; along a row, halves are rounded down and up alternately, as in libjpeg."""
    padded = F.pad(x, [0, -x.shape[3] % 16, 0, x.shape[2] % 2], mode="replicate")
    total = padded[..., ::2, ::2] + padded[..., ::2, 1::2] + padded[..., 1::2, ::2] + padded[..., 1::2, 1::2]
    total[..., ::2] += 1
    total[..., 1::2] += 2
    return total.div_(4).floor_()


def _doubled(x: Tensor) -> Tensor:
    """Twice the height and width, 3/4 of the nearer byte and 1/4 of the farther: libjpeg's fancy upsampling."""
    rows = F.pad(x, [0, 0, 1, 1], mode="replicate")
    above, below = x * 3 + rows[..., :-2, :], x * 3 + rows[..., 2:, :]
    tall = torch.stack([above, below], dim=3).flatten(2, 3)
    sides = F.pad(tall, [1, 1, 0, 0], mode="replicate")
    left = (tall * 3 + sides[..., :-2] + 8).div_(16).floor_()
    right = (tall * 3 + sides[..., 2:] + 7).div_(16).floor_()
    return torch.stack([left, right], dim=4).flatten(3, 4)
