"""What to launch so that every Triton kernel of the package runs, in each of the variants that matter: the one list.

A case is a dtype, how its products are multiplied, the estimator, which sides want gradients, and whether there is a
mask. A driver hands problems of a case to launchers of the package, forward and backward, as a call on a GPU would;
what they launch is up to them. A new module with launchers needs a driver here (tests/kernels/test_aot.py says so if a
kernel is never launched). Tensors are on the CPU and nobody writes to them: only shapes, strides and addresses count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bird_kernels.backends import triton as backend
from bird_kernels.backends.triton import gaussian
from bird_kernels.types import RBF, Problem, Route


class Case(NamedTuple):
    """What distinguishes variants beyond sizes; ``precision`` None: the dtype leaves no choice."""

    dtype: torch.dtype
    precision: str | None
    estimator: str
    sides: tuple[bool, bool]  # whether x and y want gradients
    masked: bool = False


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
X, BOTH = (True, False), (True, True)
# Each way to multiply once, and each estimator with each choice of sides.
FEW_CASES = (
    Case(FP32, "ieee", "biased", BOTH),
    Case(FP32, "tf32", "unbiased", BOTH),
    Case(FP32, "tf32x3", "biased", X),
    Case(BF16, None, "unbiased", X),
    Case(FP16, None, "biased", BOTH),
    Case(BF16, None, "unbiased", BOTH, masked=True),
)
# All combinations, but for masks, which add a load and a select, to all dtypes the same.
CASES = (
    *(
        Case(dtype, precision, estimator, sides)
        for dtype, precision in ((FP32, "ieee"), (FP32, "tf32"), (FP32, "tf32x3"), (BF16, None), (FP16, None))
        for estimator in ("biased", "unbiased")
        for sides in (X, BOTH)
    ),
    FEW_CASES[-1],
)

# Route, rows and widths. The products are split over the inner dimension or not, on each route, and centred by those
# who multiply (gram, 128); widths are aligned, as in use.
LINEAR: tuple[tuple[Route, int, int, int], ...] = (
    ("gram", 128, 512, 1280),
    ("gram", 640, 512, 1024),
    ("gram", 2048, 2048, 2048),
    ("cross", 4096, 64, 128),
    ("cross", 4096, 1024, 1024),
)
PAIRS = ((64, 512), (128, 512), (512, 1280))  # widths of pairs that share their launches


def linear(case: Case) -> None:
    """The routes of the linear kernel, one pair at a time."""
    # One entry into its storage x cannot be described; nothing else depends on where it begins.
    for (route, n, p, q), start in itertools.product(LINEAR, (0, 1)):
        problem = problem_of(case, n, p, q)
        x, y, mask = features(case, n, p, start), features(case, n, q), mask_of(case, n)
        value, stash = backend.forward(x, y, mask, problem, route)
        backend.backward(value, x, y, mask, stash, problem, route)


def rbf(case: Case) -> None:
    """RBF kernels. Their bandwidth is given: the median of memory that nobody wrote is nothing."""
    problem = problem_of(case, 128, 512, 1280)._replace(kernel=RBF(sigma=1.0))
    x, y, mask = features(case, 128, 512), features(case, 128, 1280), mask_of(case, 128)
    value, stash = gaussian.forward(x, y, mask, problem, "gram")
    gaussian.backward(value, x, y, mask, stash, problem, "gram")


def pairs(case: Case) -> None:
    """Pairs that share their launches."""
    problems = tuple(problem_of(case, 128, p, q) for p, q in PAIRS)
    tensors = [features(case, 128, d) for widths in PAIRS for d in widths]
    mask = mask_of(case, 128)
    values, stash = backend.forward_together(tensors, mask, problems)
    backend.backward_together(values, tensors, mask, stash, problems)


DRIVERS: tuple[Callable[[Case], None], ...] = (linear, rbf, pairs)


def problem_of(case: Case, n: int, p: int, q: int) -> Problem:
    """A problem of the case."""
    device = torch.device("cpu")
    return Problem(n, p, q, case.dtype, device, "cka_loss", case.estimator, case.precision, case.masked, *case.sides)


def features(case: Case, n: int, d: int, start: int = 0) -> Tensor:
    """[n, d] that begin ``start`` entries into their storage, uninitialised."""
    return torch.empty(start + n * d, dtype=case.dtype)[start:].view(n, d)


def mask_of(case: Case, n: int) -> Tensor | None:
    """[n], bool, or None."""
    return torch.ones(n, dtype=torch.bool) if case.masked else None
