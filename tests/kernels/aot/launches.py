"""What to launch so that every Triton kernel of the package runs, in each of the variants that matter: the one list.

A case is a dtype, how its products are multiplied, the estimator, which sides want gradients, and whether there is a
mask. A driver hands problems of a case to launchers of the package, forward and backward, as a call on a GPU would;
what they launch is up to them. A new module with launchers needs a driver here (tests/kernels/test_aot.py says so if a
kernel is never launched). Tensors are on the CPU and nobody writes to them: only shapes, strides and addresses count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bird_kernels.backends import shifted
from bird_kernels.backends import triton as backend
from bird_kernels.backends.triton import symmetric
from bird_kernels.types import RBF, Problem, Route


class Case(NamedTuple):
    """What distinguishes variants beyond sizes; ``precision`` None: the dtype leaves no choice."""

    dtype: torch.dtype
    precision: str | None
    estimator: str
    sides: tuple[bool, bool]  # whether x and y want gradients
    statistic: str = "cka_loss"
    masked: bool = False


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
X, BOTH = (True, False), (True, True)
# Each way to multiply once, each statistic, and each estimator with each choice of sides.
FEW_CASES = (
    Case(FP32, "ieee", "biased", BOTH),
    Case(FP32, "tf32", "unbiased", BOTH, "hsic"),
    Case(FP32, "tf32x3", "biased", X, "cka"),
    Case(BF16, None, "unbiased", X),
    Case(FP16, None, "biased", BOTH, "sqrt_cka_loss"),
    Case(BF16, None, "unbiased", BOTH, masked=True),
)
# For the GPUs beside the one that gets the few: where registers are fewest, and where copies by descriptor are.
FEWEST_CASES = FEW_CASES[2], FEW_CASES[5]
# All combinations, but for statistics, a few scalars at the end, and masks, a load and a select: the same everywhere.
CASES = (
    *FEW_CASES,
    *(
        Case(dtype, precision, estimator, sides)
        for dtype, precision in ((FP32, "ieee"), (FP32, "tf32"), (FP32, "tf32x3"), (BF16, None), (FP16, None))
        for estimator in ("biased", "unbiased")
        for sides in (X, BOTH)
    ),
)

# Route, rows and widths, aligned as in use: products in one part, and (cross, many rows) in several.
SHIFTED: tuple[tuple[Route, int, int, int], ...] = (
    ("gram", 128, 512, 320),
    ("cross", 2048, 64, 128),
    ("cross", 16640, 64, 128),
)
PAIRS = ((64, 512), (128, 512), (512, 1280))  # widths of pairs that share their launches


def library(case: Case) -> None:
    """The library backend's linear kernels on CUDA."""
    for route, n, p, q in SHIFTED:
        problem = problem_of(case, n, p, q)
        x, y, mask = features(case, n, p), features(case, n, q), mask_of(case, n)
        value, stash = shifted.forward(x, y, mask, problem, route)
        shifted.backward(value, x, y, mask, stash, problem, route=route)


def few_rows(case: Case) -> None:
    """The Triton backend's linear kernels, of several pairs where both sides want gradients, else of one."""
    widths = PAIRS if case.sides == BOTH else PAIRS[-1:]
    problems = tuple(problem_of(case, 128, p, q) for p, q in widths)
    tensors = [features(case, 128, d) for pair in widths for d in pair]
    mask = mask_of(case, 128)
    values, stash = backend.forward_together(tensors, mask, problems)
    backend.backward_together(values, tensors, mask, stash, problems)


def rows_at_once(case: Case) -> None:
    """The same of few rows, and of features so wide that a program holds all rows of some of their columns."""
    for n, p, q in ((40, 320, 64), (128, 20480, 17000)):
        problem, mask = problem_of(case, n, p, q), mask_of(case, n)
        x, y = features(case, n, p), features(case, n, q)
        value, stash = backend.forward(x, y, mask, problem, "gram")
        backend.backward(value, x, y, mask, stash, problem, route="gram")


def rbf(case: Case) -> None:
    """RBF kernels: sigma is given where the statistic is HSIC, and found by each rule elsewhere."""
    kernel = RBF(sigma=1.0) if case.statistic == "hsic" else RBF(threshold=1.0 if case.masked else None)
    problem = problem_of(case, 128, 512, 1280)._replace(kernel=kernel)
    x, y, mask = features(case, 128, 512), features(case, 128, 1280), mask_of(case, 128)
    value, stash = backend.forward(x, y, mask, problem, "gram")
    backend.backward(value, x, y, mask, stash, problem, route="gram")


def symmetric_products(case: Case) -> None:
    """Operands of the matrix units: Z^T Z in parts where the estimator is biased, which says nothing here, else Z Z^T.

    In every configuration for this GPU of bf16, in the first alone of the others.
    """
    if case.precision not in (None, "tf32"):
        return
    z = torch.zeros(1024, 512, dtype=case.dtype)
    transposed = case.estimator == "biased"
    configurations = symmetric.fitting(symmetric.capability(z.device))
    for configuration in configurations if case.dtype == BF16 else configurations[:1]:
        symmetric.multiply(z, transposed, 2 if transposed else 1, configuration, case.precision == "tf32")


def layers(case: Case) -> None:
    """The inner products of many layers' Gram matrices, all of their tiles at once."""
    operands = [features(case, 256, width) for width in (512, 64, 320)]
    backend.layer_products(operands, mask_of(case, 256), problem_of(case, 256, 1, 1), 1 << 20)


DRIVERS: tuple[Callable[[Case], None], ...] = (library, few_rows, rows_at_once, rbf, layers, symmetric_products)


def problem_of(case: Case, n: int, p: int, q: int) -> Problem:
    """A problem of the case."""
    of_all = case.dtype, torch.device("cpu"), case.statistic, case.estimator, case.precision, case.masked
    return Problem(n, p, q, *of_all, *case.sides)


def features(case: Case, n: int, d: int) -> Tensor:
    """[n, d] of nothing."""
    return torch.zeros(n, d, dtype=case.dtype)


def mask_of(case: Case, n: int) -> Tensor | None:
    """[n], bool, or None."""
    return torch.ones(n, dtype=torch.bool) if case.masked else None
