"""The native backend: C++ and CUDA in csrc/, if built (``BIRD_BUILD_EXT=1 pip install --no-build-isolation .``).

It takes at most 512 rows, where launches and host code cost more than arithmetic: two launches forward (unbiased
three), one backward, for a list of pairs as for one; autograd in C++, always the gram route. The unbiased
estimator follows `dominating`: its origin is a location that a few rows far larger than the others do not move, and
diagonals are left out of all sums.
Half-precision features are multiplied as tf32, which has fp16's mantissa and fp32's range.

For tests, the same kernels run on CPU tensors, emulated thread by thread, if ``BIRD_EMULATE=1`` is set.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from ..moments import Coefficients
from ..plan import FEW_ROWS, MOST_PAIRS, ceil_div
from ..types import Problem, Route, Shapes, Stash, Statistic

_STATISTICS = get_args(Statistic)  # the enum in csrc/kernels.h has the first three of them, in this order

_CHUNK = 32  # features that a block of the kernels holds at a time

_module: ModuleType | None
try:
    _module = importlib.import_module("bird_kernels._native")
except ImportError as error:
    _module = None
    _missing = (
        "is not built: BIRD_BUILD_EXT=1 pip install --no-build-isolation ."
        if isinstance(error, ModuleNotFoundError)
        else f"was built for another PyTorch or CUDA: {error}"
    )
else:
    assert (FEW_ROWS, MOST_PAIRS["native"]) == (_module.MAX_ROWS, _module.MAX_PAIRS)


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None if these kernels can run products of ``dtype`` on ``device``, else the reason."""
    if _module is None:
        return _missing
    if dtype == torch.float64:
        return "has no fp64 kernels"
    if device.type == "cpu":
        return None if os.environ.get("BIRD_EMULATE") == "1" else "needs CUDA tensors, these are on the CPU"
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, these tensors are on {device}"
    if not _module.CUDA:
        return "was built without CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, this GPU has {'.'.join(map(str, capability))}"
    return None


def statistic_of(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> Tensor:
    """The statistic (0-d, fp32) of x [n, p], y [n, q] and mask [n] or None, differentiable by C++ autograd."""
    value: Tensor = _native().alignment(x, y, mask, *_options(problem))
    return value


def differentiate_backward_with(function: Callable[..., Any]) -> None:
    """Set the function that computes a backward under ``create_graph`` or a dispatch mode, or for a lazy negative.

    ``function(grad, x, y, mask, coefficients, locations, grams, statistic, unbiased, exact, x_grad, y_grad)`` returns
    dx and dy, None if not wanted.
    """
    _native().set_differentiable_backward(function)


def at_once_where(
    most: Callable[[str, torch.dtype, torch.device], int], shares: Callable[..., bool]
) -> Callable[..., Tensor | None]:
    """A function of x, y, a mask or None, and `Options` that makes a whole public call in C++, checks included.

    It returns None if Python must make the call (csrc/at_once.h): no plain matrices, too many rows, unusual options, a
    wrong argument, more numbers in x and y together than ``most(backend, dtype, device)``, or two lists that do not
    share native launches by ``shares(x, y, mask, options)``. Both answers are cached.
    """
    at_once: Callable[..., Tensor | None] = _native().at_once_where(most, shares)
    return at_once


def ask_again() -> None:
    """Ask again what calls that C++ makes on its own were told: something was measured, or failed."""
    if _module is not None:
        _module.forget()


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash."""
    chunks = ceil_div(problem.p, _CHUNK) + ceil_div(problem.q, _CHUNK)
    return dict.fromkeys(Stash._fields, ((0,), torch.float32)) | dict(
        coefficients=((1, len(Coefficients._fields)), torch.float64),
        xs=((2 * _CHUNK * chunks,), torch.float32),
        xx=((1, 2, problem.n, problem.n), torch.float32),
    )


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    return forward_together((x, y), mask, (problem,))


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    dx, dy = backward_together(grad, (x, y), mask, stash, (problem,))
    return x.new_empty(0) if dx is None else dx, y.new_empty(0) if dy is None else dy


def forward_together(
    tensors: Sequence[Tensor], mask: Tensor | None, problems: tuple[Problem, ...]
) -> tuple[Tensor, Stash]:
    """Values [pairs] (0-d for one), fp32, and stash; ``tensors`` are x and y of each pair (see `plan.together`)."""
    values, *kept = _native().forward(tensors, mask, *_options(problems[0]))
    return values, stash_of(*kept)


def backward_together(
    grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: Stash, problems: tuple[Problem, ...]
) -> list[Tensor | None]:
    """The gradients of the tensors times the upstream ``grad`` [pairs], by one launch; None where not wanted."""
    wanted = [side for problem in problems for side in (problem.x_grad, problem.y_grad)]
    kept = stash.coefficients, stash.xs, stash.xx
    found: list[Tensor | None] = _native().backward(grad, tensors, mask, *kept, *_options(problems[0])[1:], wanted)
    return found


def stash_of(coefficients: Tensor, locations: Tensor, grams: Tensor) -> Stash:
    """The stash made of what the extension returns: coefficients fp64 [pairs, 11], what was subtracted from features,
    in the order of the kernels, and K and L, fp32 [pairs, 2, n, n]."""
    ys, yy, xy, rows = (grams.new_empty(0) for _ in range(4))
    return Stash(coefficients, locations, ys, grams, yy, xy, rows)


def _native() -> ModuleType:
    assert _module is not None
    return _module


def _options(problem: Problem) -> tuple[int, bool, bool]:
    """(the statistic's number, unbiased, exact): exact fp32 products, which also stand in for tf32x3."""
    precision = problem.precision or torch.backends.cuda.matmul.fp32_precision
    exact = problem.dtype == torch.float32 and precision != "tf32"
    return _STATISTICS.index(problem.statistic), problem.estimator == "unbiased", exact
