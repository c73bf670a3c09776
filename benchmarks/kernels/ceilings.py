"""What a device reaches at its best: copies and products to time, and what a CPU made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import fp32_switched
from benchmarks.machine import Machine

COPIED = (2**18, 2**20, 2**22, 2**24, 2**26, 2**29)  # bytes read and written; the caches are warm
WIDTH = 1536
REPEATS = 5


def copying(device: torch.device, moved: int) -> Callable[[], object]:
    """A copy that reads and writes ``moved`` bytes."""
    # Ones: what was never written but with zeros may be one page of memory, over and over.
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def multiplying(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, wide: bool) -> Callable[[], object]:
    """The product [m, k] x [k, n] of this dtype; ``wide``: to fp32."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((k, m), (k, n)))
    if wide and device.type == "cpu":
        return lambda: torch.mm(a.T, b).float()  # it has no such products
    return partial(torch.mm, a.T, b, **({"out_dtype": torch.float32} if wide else {}))


def measured_ceilings(numbers: Iterable[str]) -> Ceilings:
    """The ceilings of this CPU for these numbers ("dtype precision"), and those that every estimate needs."""
    machine, products = Machine(torch.device("cpu")), {}

    def fastest(call: Callable[[], object]) -> float:
        return min([machine.seconds(call) for _ in range(REPEATS + 1)][1:])  # the first does not count

    for number in sorted({"float64", "float32 ieee", *numbers}):
        dtype, _, precision = number.partition(" ")
        width = WIDTH // (2 if dtype == "float64" else 1)
        with fp32_switched(precision):
            call = multiplying(machine.device, getattr(torch, dtype), width, width, width, False)
            products[number] = 2 * width**3 / fastest(call)
    return Ceilings({size: size / fastest(copying(machine.device, size)) for size in COPIED}, products)
