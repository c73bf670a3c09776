"""What to launch so that every Triton kernel of the package runs, in each of the variants that matter: the one list.

A case is a dtype, how its products are multiplied, the estimator, and whether there is a mask. A driver hands problems
of a case to launchers of the package, forward and backward, as a call on a GPU would; what they launch is up to them. A
new module with launchers needs a driver here (tests/kernels/test_aot.py says so if a kernel is never launched).
Tensors are on the CPU and nobody writes to them: only their shapes, strides and addresses count.
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
    masked: bool


PRODUCTS = (
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.bfloat16, None),
    (torch.float16, None),
)
# Masks add a load and a select, to all dtypes the same: one case shows it.
MASKED = Case(torch.bfloat16, None, "unbiased", True)
CASES = (
    *(Case(*product, estimator, False) for product in PRODUCTS for estimator in ("biased", "unbiased")),
    MASKED,
)
# Each way to multiply once, the estimators in turn.
FEW_CASES = (
    *(Case(*product, ("biased", "unbiased")[i % 2], False) for i, product in enumerate(PRODUCTS)),
    MASKED,
)

# Route, rows, widths, and which sides want gradients. They are split over the inner dimension or not, on each route, and
# centred by those who multiply (gram, 128); widths are aligned, as in use.
LINEAR: tuple[tuple[Route, int, int, int, tuple[bool, bool]], ...] = (
    ("gram", 128, 512, 1280, (True, False)),
    ("gram", 128, 512, 1280, (True, True)),
    ("gram", 640, 512, 1024, (True, False)),
    ("gram", 2048, 2048, 2048, (False, True)),
    ("cross", 4096, 64, 128, (True, True)),
    ("cross", 4096, 1024, 1024, (True, True)),
)
PAIRS = ((64, 512), (128, 512), (512, 1280))  # widths of pairs that share their launches


def linear(case: Case) -> None:
    """The routes of the linear kernel, one pair at a time."""
    # One entry into its storage x cannot be described; nothing else depends on where it begins.
    for (route, n, p, q, sides), start in itertools.product(LINEAR, (0, 1)):
        problem = problem_of(case, n, p, q, sides)
        x, y, mask = features(case, n, p, start), features(case, n, q), mask_of(case, n)
        value, stash = backend.forward(x, y, mask, problem, route)
        backend.backward(value, x, y, mask, stash, problem, route)


def rbf(case: Case) -> None:
    """RBF kernels. Their bandwidth is given: the median of memory that nobody wrote is nothing."""
    for sides in ((True, False), (True, True)):
        problem = problem_of(case, 128, 512, 1280, sides)._replace(kernel=RBF(sigma=1.0))
        x, y, mask = features(case, 128, 512), features(case, 128, 1280), mask_of(case, 128)
        value, stash = gaussian.forward(x, y, mask, problem, "gram")
        gaussian.backward(value, x, y, mask, stash, problem, "gram")


def pairs(case: Case) -> None:
    """Pairs that share their launches."""
    for sides in ((True, False), (True, True)):
        problems = tuple(problem_of(case, 128, p, q, sides) for p, q in PAIRS)
        tensors = [features(case, 128, d) for widths in PAIRS for d in widths]
        mask = mask_of(case, 128)
        values, stash = backend.forward_together(tensors, mask, problems)
        backend.backward_together(values, tensors, mask, stash, problems)


DRIVERS: tuple[Callable[[Case], None], ...] = (linear, rbf, pairs)


def problem_of(case: Case, n: int, p: int, q: int, sides: tuple[bool, bool]) -> Problem:
    """A problem of the case; ``sides``: whether x and y want gradients."""
    device = torch.device("cpu")
    return Problem(n, p, q, case.dtype, device, "cka_loss", case.estimator, case.precision, case.masked, *sides)


def features(case: Case, n: int, d: int, start: int = 0) -> Tensor:
    """[n, d] that begin ``start`` entries into their storage, uninitialised."""
    return torch.empty(start + n * d, dtype=case.dtype)[start:].view(n, d)


def mask_of(case: Case, n: int) -> Tensor | None:
    """[n], bool, or None."""
    return torch.ones(n, dtype=torch.bool) if case.masked else None
