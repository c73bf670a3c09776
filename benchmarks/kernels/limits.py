"""What no call can beat: the rates that a device reaches at its best, and the time that follows from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch

from benchmarks.machine import Machine
from benchmarks.rows import Row
from bird_kernels import plan
from bird_kernels.types import Problem

COPIED = (2**18, 2**20, 2**22, 2**24, 2**26, 2**29)  # bytes read and written; the caches are warm
WIDTH = 1536
REPEATS = 5


class Ceilings(NamedTuple):
    """What a device was seen to reach: bytes/s of copies by the bytes they move, flop/s of products by number."""

    copies: dict[int, float]
    products: dict[str, float]  # by "dtype precision"

    def rate(self, number: str) -> float:
        """The flop/s open to a case, whatever way it takes; a float64 copy pays float64's."""
        if number == "float64":
            return self.products[number]
        return max(self.products[number], self.products["float32 ieee"])  # a CPU without units for halves widens them

    def copy(self, moved: int) -> float:
        """Bytes/s open to a case that moves so many: those of a copy no smaller, whose data lie in the same cache."""
        return self.copies[min((size for size in self.copies if size >= moved), default=max(self.copies))]


@contextlib.contextmanager
def fp32_switched(precision: str) -> Iterator[None]:
    """PyTorch's own switch for fp32 products, set as a user would."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def ceilings(number: str) -> Ceilings:
    """Those of this CPU, measured once: of copies, of products of ``number``, and of fp32's and fp64's."""
    return Ceilings(_copies(), {each: _product(each) for each in ("float64", "float32 ieee", number)})


@cache
def _copies() -> dict[int, float]:
    return {size: size / _fastest(copying(torch.device("cpu"), size)) for size in COPIED}


@cache
def _product(number: str) -> float:
    dtype, _, precision = number.partition(" ")
    width = WIDTH // (2 if dtype == "float64" else 1)
    with fp32_switched(precision):
        return (
            2 * width**3 / _fastest(multiplying(torch.device("cpu"), getattr(torch, dtype), width, width, width, False))
        )


def _fastest(call: Callable[[], object]) -> float:
    machine = Machine(torch.device("cpu"))
    return min([machine.seconds(call) for _ in range(REPEATS + 1)][1:])  # the first does not count


def floor(problem: Problem, ceilings: Ceilings) -> Row:
    """Seconds below which no call can be: the cheaper route's products, or the bytes that must move; and the rates."""
    route = plan.route_of(problem, "library")
    flops = plan.route_flops(route, problem.n, problem.p, problem.q, problem.x_grad, problem.y_grad)
    moved = plan.minimum_bytes(problem, route)
    number = f"{str(problem.dtype).removeprefix('torch.')} {problem.precision or ''}".strip()
    copy, rate = ceilings.copy(moved), ceilings.rate(number)
    return {"floor": max(flops / rate, moved / copy), "copy_ceiling": copy, "product_ceiling": rate}
