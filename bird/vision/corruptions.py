"""Common corruptions of images in plain batched PyTorch: seeded per sample, on any device, nothing on disk.

The kinds and their strengths follow Hendrycks and Dietterich (2019), "Benchmarking Neural Network Robustness
to Common Corruptions and Perturbations". Noise and tone take ImageNet-C's five severities, which do not
depend on the size of a picture; blurs and pixelation are rescaled to small pictures (28 to 32 pixels).
Their ``saturate`` does nothing to grey images; among the held-out corruptions ``fog`` takes its place.

Every random number is a hash of (seed, kind, severity, sample index, position), so that a sample meets the
same noise in any batch, in any order. A corruption takes a batch ``x` ``[n, channels, height, width]`, one
severity per sample (int64 ``[n]``, 0-4 inside this file), and a source of noise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF


def _hash(value: Any) -> Any:
    """Scramble 32-bit numbers, an int or an int64 tensor of them: "lowbias32" of Wellons' hash-prospector."""
    value = value & _MASK
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def _keys(index: Tensor, *parts: int | Tensor) -> Tensor:
    """One 32-bit key per sample, int64 ``[n]``, from its index and from what else the noise depends on."""
    key: int | Tensor = 0
    for part in (*parts, index):
        key = _hash(key ^ part)
    return torch.as_tensor(key)


class Noise:
    """Random numbers that depend on the sample and on nothing else; each call draws fresh ones.

    Args:
        keys: int64 ``[n]``, one 32-bit key per sample.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """float32 ``[n, *shape]``, uniform on the open interval (0, 1)."""
        count = math.prod(shape)
        position = torch.arange(self._drawn, self._drawn + count, device=self._keys.device)
        self._drawn += count
        bits = _hash(_hash(position) ^ self._keys[:, None])
        return ((bits >> 9).float() + 0.5).mul_(2.0**-23).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """float32 ``[n, *shape]``, standard normal (Box and Muller)."""
        half = (math.prod(shape) + 1) // 2
        radius = self.uniform(half).log_().mul_(-2).sqrt_()
        angle = self.uniform(half).mul_(2 * math.pi)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, : math.prod(shape)].reshape(-1, *shape)


@lru_cache(maxsize=256)
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A table of constants, kept on the device: building it anew would wait for the device each time."""
    return torch.tensor(values, device=device)


def _pick(x: Tensor, level: Tensor, values: tuple[float, ...]) -> Tensor:
    """Each sample's value for its level, ``[n, 1, 1, 1]``."""
    return _table(values, x.device)[level].view(-1, 1, 1, 1)


def _gaussian_matrix(size: int, sigma: float) -> Tensor:
    """``[size, size]``: convolution with a Gaussian that sums to one; beyond the edge its pixels repeat."""
    reach = int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.softmax(-(offsets.double() ** 2) / (2 * sigma**2), dim=0)
    target = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, target, weights.expand(size, -1))


def _unit_gaussian_matrix(size: int, sigma: float) -> Tensor:
    """The same, scaled so that white noise of variance 1 keeps variance 1."""
    matrix = _gaussian_matrix(size, sigma)
    return matrix / matrix.norm(dim=1, keepdim=True)


def _cell_matrix(size: int, scale: float) -> Tensor:
    """``[size, size]``: every pixel gets the average of its cell, one of ``ceil(size * scale)`` of them."""
    cells = math.ceil(size * scale)
    edges = torch.arange(cells + 1, dtype=torch.float64) * size / cells
    pixel = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    down = overlap.clamp(min=0) * cells / size
    return down[((pixel + 0.5) * cells / size).long()]


def _disk(size: int, radius: float) -> Tensor:
    """``[size, size]``: a disk whose edge fades over one pixel, summing to one."""
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    distance = (offset[:, None] ** 2 + offset**2).sqrt()
    disk = (radius + 0.5 - distance).clamp(0, 1)
    return disk / disk.sum()


@lru_cache(maxsize=256)
def _stack(build: Callable[[int, float], Tensor], size: int, values: tuple[float, ...], device: torch.device) -> Tensor:
    """``build(size, value)`` for each value, ``[values, size, size]``, kept on the device."""
    return torch.stack([build(size, value) for value in values]).to(_wide(device)).to(device)


def _wide(device: torch.device) -> torch.dtype:
    """fp64 where there is one: neither TF32 nor how a batch was grouped shows in the pixels then."""
    return torch.float32 if device.type == "mps" else torch.float64


def _separable(x: Tensor, level: Tensor, build: Callable[[int, float], Tensor], values: tuple[float, ...]) -> Tensor:
    """A linear filter along the height, then along the width: ``A x B^T`` with a sample's own matrices."""
    rows, columns = (_stack(build, size, values, x.device)[level].unsqueeze(1) for size in x.shape[-2:])
    return (rows @ x.to(rows.dtype) @ columns.mT).to(x.dtype)


def gaussian_noise(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """A weak or cold sensor: the same noise everywhere."""
    return x + _pick(x, level, (0.08, 0.12, 0.18, 0.26, 0.38)) * noise.normal(*x.shape[1:])


def shot_noise(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """Photon counting: ``Poisson(photons * x) / photons``, by inversion of the distribution function."""
    photons = (60.0, 25.0, 12.0, 5.0, 3.0)
    per_unit = _pick(x, level, photons)
    rate = x * per_unit
    uniform = noise.uniform(*x.shape[1:])
    probability = torch.exp(-rate)
    below = probability.clone()
    count = torch.zeros_like(x)
    brightest = max(photons)
    for k in range(1, int(brightest + 6 * math.sqrt(brightest)) + 1):
        count += uniform > below
        probability *= rate / k
        below += probability
    return count / per_unit


def impulse_noise(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """Salt and pepper: a share of the pixels becomes black or white."""
    share = _pick(x, level, (0.03, 0.06, 0.09, 0.17, 0.27))
    uniform = noise.uniform(*x.shape[1:])
    return torch.where(uniform < share, (uniform < share / 2).to(x.dtype), x)


def speckle_noise(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """Noise in proportion to the light."""
    return x + x * _pick(x, level, (0.15, 0.2, 0.35, 0.45, 0.6)) * noise.normal(*x.shape[1:])


def gaussian_blur(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """A soft picture; the numbers are standard deviations in pixels."""
    return _separable(x, level, _gaussian_matrix, (0.6, 0.9, 1.2, 1.6, 2.0))


def defocus_blur(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """A lens out of focus: the average over a disk."""
    radii, size = (0.8, 1.2, 1.7, 2.3, 3.0), 7
    height, width = x.shape[-2:]
    disks = _stack(_disk, size, radii, x.device)[level].to(x.dtype).view(-1, size, size, 1, 1, 1)
    padded = F.pad(x, [size // 2] * 4, mode="replicate")
    blurred = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            blurred += disks[:, i, j] * padded[..., i : i + height, j : j + width]
    return blurred


def brightness(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """Overexposure."""
    return x + _pick(x, level, (0.1, 0.2, 0.3, 0.4, 0.5))


def contrast(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """Everything nearer to the mean of the picture."""
    mean = x.mean(dim=(-2, -1), keepdim=True)
    return (x - mean) * _pick(x, level, (0.4, 0.3, 0.2, 0.1, 0.05)) + mean


def fog(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """Light from a smooth random field on top, the whole dimmed so that white stays white."""
    thick = _pick(x, level, (0.2, 0.5, 0.75, 1.0, 1.5))
    coarse, fine = (
        _separable(noise.normal(1, *x.shape[2:]), level, _unit_gaussian_matrix, (sigma,) * 5) for sigma in (5.0, 1.5)
    )
    light = 1 / (1 + torch.exp(-coarse - fine / 2))  # torch.sigmoid rounds by an element's place in the batch
    return (x + thick * light) / (1 + thick)


def pixelate(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """A picture taken with fewer pixels."""
    return _separable(x, level, _cell_matrix, (0.75, 0.6, 0.5, 0.4, 0.3))


def spatter(x: Tensor, level: Tensor, noise: Noise) -> Tensor:
    """Drops of water (severities 1-3, light) or mud (4-5, dark) where a smooth random field is high."""
    field = _separable(noise.normal(1, *x.shape[2:]), level, _unit_gaussian_matrix, (0.8, 0.8, 0.9, 1.1, 1.1))
    cover = (2 * (field - _pick(x, level, (1.6, 1.3, 1.0, 0.8, 0.4)))).clamp(0, 1)
    return x + cover * (_pick(x, level, (0.8, 0.8, 0.8, 0.1, 0.1)) - x)


Corruption = Callable[[Tensor, Tensor, Noise], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        brightness,
        contrast,
        pixelate,
        speckle_noise,
        gaussian_blur,
        spatter,
        fog,
    )
}
TEACHER_CORRUPTIONS = tuple(CORRUPTIONS)[:7]
HELD_OUT_CORRUPTIONS = tuple(CORRUPTIONS)[7:]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(x: Tensor, name: str, severity: int | Tensor, *, index: Tensor, seed: int = 0) -> Tensor:
    """Corrupt a batch of images.

    Args:
        x: float32 ``[n, channels, height, width]`` in 0-1, any device.
        name: a key of `CORRUPTIONS`.
        severity: 1 (mild) to 5 (strong), 0 for none: one for all, or int64 ``[n]`` on the device of ``x``
            (what is outside 0-5 is then clamped, since looking at it would wait for the device).
        index: int64 ``[n]``, which sample each image is. Equal seed, name, severity and index give equal
            noise, in any batch.
        seed: any whole number.

    Returns:
        float32 ``[n, channels, height, width]`` in 0-1, a new tensor.

    Raises:
        ValueError: unknown name, severity out of range, a shape or dtype other than the above.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}; known are {', '.join(CORRUPTIONS)}")
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 [n, channels, height, width] in 0-1, got {x.dtype} {tuple(x.shape)}")
    if index.shape != x.shape[:1]:
        raise ValueError(f"index must hold one number per image, [{len(x)}], got {list(index.shape)}")
    if isinstance(severity, int):
        if not 0 <= severity <= 5:
            raise ValueError(f"severity must be 0 to 5, got {severity}")
        severity = torch.full((len(x),), severity, device=x.device)
    severity = severity.clamp(0, 5)
    noise = Noise(_keys(index.to(x.device), seed, zlib.crc32(name.encode()), severity))
    corrupted = CORRUPTIONS[name](x, (severity - 1).clamp(min=0), noise).clamp(0, 1)
    return torch.where(severity.view(-1, 1, 1, 1) == 0, x, corrupted)


class Mixture:
    """An augmentation: every sample meets one of several corruptions, at a random severity from 0 to 5.

    The corruptions take turns along the batch, whose order is random already: each gets its equal share, and
    nothing waits for the device.

    Args:
        names: keys of `CORRUPTIONS`.
        seed: of severities and noise; the same sample meets something else in every epoch.
    """

    def __init__(self, names: Sequence[str] = TEACHER_CORRUPTIONS, *, seed: int = 0) -> None:
        self.names, self.seed = tuple(names), seed

    def __call__(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Corrupt a batch; ``x` and ``index` as in `corrupt`."""
        index = index.to(x.device)
        seed = 1_000_003 * self.seed + epoch
        severity = (6 * Noise(_keys(index, seed)).uniform()).long()
        mixed = torch.empty_like(x)
        for turn, name in enumerate(self.names):
            mine = slice(turn, None, len(self.names))
            if turn < len(x):
                mixed[mine] = corrupt(x[mine], name, severity[mine], index=index[mine], seed=seed)
        return mixed
