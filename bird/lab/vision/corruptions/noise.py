"""Noise of sensors and wires: Gaussian, shot, impulse, speckle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .filters import Level, above
from .random import Noise, quantile

_FEW = 4.0  # expected photons: below this probabilities are summed, above it the quantile is expanded


def gaussian_noise(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Additive Gaussian noise of equal strength in all pixels."""
    return noise.normal(*x.shape[1:]).mul_(level.pick(0.04, 0.06, 0.08, 0.09, 0.10)).add_(x)


def speckle_noise(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Gaussian noise proportional to the pixel's value."""
    return noise.normal(*x.shape[1:]).mul_(level.pick(0.06, 0.1, 0.12, 0.16, 0.2)).mul_(x).add_(x)


def impulse_noise(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Salt and pepper noise: a share of the values becomes 0 or 1, half of them each."""
    share = level.pick(0.01, 0.02, 0.03, 0.05, 0.07)
    uniform = noise.uniform(*x.shape[1:])
    salt, struck = above(share / 2, uniform), above(share, uniform)
    return (1 - struck).mul_(x).add_(salt)


def shot_noise(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Photon counting: ``Poisson(photons * x) / photons``."""
    photons = level.pick(500, 250, 100, 75, 50)
    return poisson(x * photons, noise.bits(*x.shape[1:])) / photons


def poisson(rate: Tensor, bits: Tensor) -> Tensor:
    """Poisson numbers by inversion of the distribution function: 32 bits each, no rejection, no synchronisation.

    Above `_FEW` the quantile is expanded around the normal one, ``w``, to order 1 / rate (Cornish and Fisher; Giles
    2016, "Algorithm 955"), which is off by one in 0.2 % of draws at `_FEW`, and less often above.
    Below, probabilities are summed.

    Args:
        rate: float32, not negative.
        bits: int32 of the same shape.

    Returns:
        float32 tensor of integers, of the same shape.
    """
    few = _summed(rate.clamp(max=_FEW), ((bits >> 8) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24))
    many = _expanded(rate.clamp(min=_FEW), quantile((bits >> 16) & 0xFFFF))
    return many.sub_(few).mul_(above(rate, _FEW)).add_(few)


def _summed(rate: Tensor, uniform: Tensor) -> Tensor:
    """The least number whose cumulative probability is at least ``uniform``."""
    probability = torch.exp(-rate)
    below, count, step = probability.clone(), torch.zeros_like(rate), torch.empty_like(rate)
    for k in range(1, int(_FEW + 6 * math.sqrt(_FEW)) + 1):
        count += torch.sub(uniform, below, out=step).ceil_()  # 1 where uniform is greater, else 0
        below += probability.mul_(rate).mul_(1 / k)
    return count.clamp_(min=0)  # uniform - below may be rounded to -1, and so may its ceiling be


def _expanded(rate: Tensor, w: Tensor) -> Tensor:
    """``rate + root w + (w^2 + 2) / 6 - (w^3 + 2 w) / 72 root + (3 w^4 + 7 w^2 - 16) / 810 rate``, rounded down."""
    root, square = rate.sqrt(), w * w
    many = square.mul(3).add_(7).mul_(square).sub_(16).mul_(1 / 810).div_(root)
    square += 2
    many.sub_((square * w).mul_(1 / 72)).div_(root)
    return many.add_(square.mul_(1 / 6)).add_(w.mul_(root)).add_(rate).floor_().clamp_(min=0)
