"""What this device reaches at its best, measured in the same run: a big copy, and big products of every number."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import fp32_products
from benchmarks.machine import Machine

# Bytes read and written. On a GPU past its cache, which is cold when a call is timed; a CPU's is warm.
COPIED = {"cuda": (2**31,), "cpu": (2**18, 2**20, 2**22, 2**24, 2**26, 2**29)}
WIDTH = {"cuda": 8192, "cpu": 1536}
REPEATS = 5


def measured(device: torch.device, numbers: Iterable[str]) -> Ceilings:
    """The ceilings of a device for these numbers ("dtype precision"), and those that every estimate needs."""
    wanted = {"float64", "float32 ieee", *numbers}
    if "float32 tf32x3" in wanted:
        wanted = (wanted - {"float32 tf32x3"}) | {"float32 tf32"}
    copies = {size: _copy(device, size) for size in COPIED[device.type]}
    return Ceilings(copies, {number: _products(device, number) for number in sorted(wanted)})


def _copy(device: torch.device, moved: int) -> float:
    # Ones: what was never written but with zeros may be one page of memory, over and over.
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return moved / _fastest(device, lambda: target.copy_(source))


def _products(device: torch.device, number: str) -> float:
    dtype, _, precision = number.partition(" ")
    width = WIDTH[device.type] // (2 if dtype == "float64" else 1)
    a, b = (torch.randn(width, width, device=device).to(getattr(torch, dtype)) for _ in range(2))
    with fp32_products(precision):
        return 2 * width**3 / _fastest(device, lambda: a @ b)


def _fastest(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, the first of which does not count."""
    machine = Machine(device)
    return min([machine.seconds(call) for _ in range(REPEATS + 1)][1:])
