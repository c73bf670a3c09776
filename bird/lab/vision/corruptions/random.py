"""Counter-based random numbers per sample, bitwise equal in any batch and on every device.

Every number is a hash of (seed, kind, severity, sample index, position), so that a sample gets the same noise in any
batch, in any order. Only integer arithmetic and tables are used: logarithms and cosines round
differently from device to device, some even depending on an element's position in a tensor.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_HALF = 1 << 31


def hash32(value: Any) -> Any:
    """Hash 32-bit numbers, an int or an int64 tensor of them: "lowbias32" of Wellons' hash-prospector."""
    value = value & _MASK
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def _hash32_(bits: Tensor) -> Tensor:
    """`hash32` in place on int32, whose products wrap and whose shifts extend the sign: in a third of the time."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x846CA68B - (1 << 32)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def keys(index: Tensor, *parts: int | Tensor) -> Tensor:
    """One 32-bit key per sample, int64 ``[n]``, from its index and all else that the noise depends on."""
    key: int | Tensor = 0
    for part in (*parts, index):
        key = hash32(key ^ part)
    return torch.as_tensor(key)


def _signed(bits: Tensor) -> Tensor:
    """32-bit numbers in int64 as int32 with the same bits."""
    return ((bits + _HALF) % (1 << 32) - _HALF).to(torch.int32)


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    """float32 ``[65536]``: standard normal quantiles at the centres of 65,536 equal intervals, scaled to variance 1."""
    share = (torch.arange(32768, dtype=torch.float64) + 0.5) / 65536
    lower = torch.tensor([NormalDist().inv_cdf(p) for p in share.tolist()], dtype=torch.float64)
    both = torch.cat([lower, -lower.flip(0)])
    return (both / both.square().mean().sqrt()).float().to(device)


def quantile(share: Tensor) -> Tensor:
    """The standard normal quantile for int32 numbers 0 to 65535, float32 of the same shape."""
    return _quantiles(share.device).index_select(0, share.flatten()).view(share.shape)


class Noise:
    """Random numbers that depend on the samples' keys only; each call draws new ones.

    Args:
        keys: int64 ``[n]``, one 32-bit key per sample.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = _signed(keys)[:, None]
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._keys)

    def bits(self, *shape: int) -> Tensor:
        """int32 ``[n, *shape]``, 32 random bits each."""
        count = math.prod(shape)
        position = torch.arange(self._drawn, self._drawn + count, device=self._keys.device)
        self._drawn += count
        return _hash32_(_signed(hash32(position)) ^ self._keys).view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """float32 ``[n, *shape]``, uniform on the open interval (0, 1), in steps of 2^-23."""
        return (((self.bits(*shape) >> 9) & 0x7FFFFF).float() + 0.5).mul_(2.0**-23)

    def integers(self, choices: int, *shape: int) -> Tensor:
        """int64 ``[n, *shape]``, uniform on 0 to ``choices`` - 1; probabilities are multiples of 1 / 65536."""
        return (((self.bits(*shape) >> 16) & 0xFFFF).long() * choices) >> 16

    def normal(self, *shape: int) -> Tensor:
        """float32 ``[n, *shape]``, standard normal in 65,536 steps, at most 4.3; 16 bits make a number."""
        count = math.prod(shape)
        halves = self.bits((count + 1) // 2).view(torch.int16)[:, :count]
        return quantile(halves.int().add_(32768)).view(-1, *shape)
