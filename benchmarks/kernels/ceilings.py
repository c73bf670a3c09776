"""What this device reaches at its best, measured in the same run: a big copy, and big products of every number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import fp32_products

COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes: past every cache
WIDTH = {"cuda": 8192, "cpu": 1536}
REPEATS = 5


def measured(device: torch.device, numbers: Iterable[str]) -> Ceilings:
    """The ceilings of a device for these numbers ("dtype precision"), and those that every estimate needs."""
    wanted = {"float64", "float32 ieee", *numbers}
    if "float32 tf32x3" in wanted:
        wanted = (wanted - {"float32 tf32x3"}) | {"float32 tf32"}
    return Ceilings(_copy(device), {number: _products(device, number) for number in sorted(wanted)})


def _copy(device: torch.device) -> float:
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _fastest(device, lambda: target.copy_(source))


def _products(device: torch.device, number: str) -> float:
    dtype, _, precision = number.partition(" ")
    width = WIDTH[device.type] // (2 if dtype == "float64" else 1)
    a, b = (torch.randn(width, width, device=device).to(getattr(torch, dtype)) for _ in range(2))
    with fp32_products(precision):
        return 2 * width**3 / _fastest(device, lambda: a @ b)


def _fastest(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, the first of which does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
