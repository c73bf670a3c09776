"""The ways in which the package computes an alignment, each as one function of features; and what they share."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bird_kernels import RBF, backends, from_sums, sums
from bird_kernels.backends import rows
from bird_kernels.types import Problem, Route
from tests.accuracy import Result, evaluate, operator
from tests.kernels.gaussian import MEMORIES, RULES

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_NATIVE = importlib.util.find_spec("bird_kernels._native") is not None
# Allowed error of a value, relative error of a gradient. In halves a gradient is a product of rounded matrices that is
# rounded itself: sqrt(2) times the spread of a rounding, 0.0017 and 0.0002.
ALLOWED = {F64: (1e-12, 1e-12), F32: (1e-6, 3e-6), BF16: (3e-6, 4e-3), F16: (3e-6, 5e-4)}
FUSED_HALVES = {BF16: (5e-4, 8e-3), F16: (6e-5, 1e-3)}  # centred features are rounded, and so multiplied


class Way(NamedTuple):
    """``run(x, y, mask, estimator, statistic, center, sides, upstream)`` gives a Result; ``shape`` is n, p, q."""

    run: Callable[..., Result]
    shape: tuple[int, int, int] = (37, 21, 30)
    dtypes: tuple[torch.dtype, ...] = (F64, F32, BF16, F16)
    statistics: tuple[str, ...] = ("cka_loss", "cka", "hsic", "sqrt_cka_loss")
    kernel: RBF | None = None
    emulated: bool = False  # on a CPU, and slow

    def allowed(self, dtype: torch.dtype) -> tuple[float, float]:
        return (ALLOWED | FUSED_HALVES if self.emulated else ALLOWED)[dtype]


def by_operator(
    route: Route, backend: str, kernel: RBF | None, memory: str, x: Tensor, y: Tensor, mask: Tensor | None = None,
    estimator: str = "biased", statistic: str = "cka_loss", center: bool = True, sides: str = "xy",
    upstream: float = 1.0,
) -> Result:  # fmt: skip
    function = operator(route, backend, estimator, statistic, None, mask, kernel, center)  # type: ignore[arg-type]
    with MEMORIES[memory]():
        return evaluate(function, x, y, sides, upstream)


def by_shifting(
    route: Route, x: Tensor, y: Tensor, mask: Tensor | None = None, estimator: str = "biased",
    statistic: str = "cka_loss", sides: str = "xy", upstream: float = 1.0, precision: Any = None, symmetric: Any = None,
) -> Result:  # fmt: skip
    """`backends.shifted`; it announces what it keeps, and all of it is contiguous, as the fake operators say."""
    shifted = importlib.import_module("bird_kernels.backends.shifted")
    problem = Problem(
        *x.shape, y.shape[1], x.dtype, x.device, statistic, estimator, precision, mask is not None, "x" in sides,
        "y" in sides,
    )  # fmt: skip
    value, stash = shifted.forward(x, y, mask, problem, route, symmetric)
    shapes = shifted.stash_shapes(problem, route)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stash._asdict().items()} == shapes
    dx, dy = shifted.backward(torch.full_like(value, upstream), x, y, mask, stash, problem, route=route)
    assert all(tensor.is_contiguous() for tensor in (*stash, dx, dy))
    return Result(value, dx if "x" in sides else None, dy if "y" in sides else None)


def by_sums(
    gpu: str, x: Tensor, y: Tensor, mask: Tensor | None = None, estimator: str = "biased",
    statistic: str = "cka_loss", sides: str = "xy", upstream: float = 1.0, cuts: list[int] | None = None,
) -> Result:  # fmt: skip
    """From merged sums of parts, one of a row and one of none; on a CPU, or ``gpu``: with Triton or without."""
    cuts = cuts or [0, 1, len(x) // 2, len(x) // 2, len(x)]
    problem = Problem(*x.shape, y.shape[1], x.dtype, x.device, statistic, estimator, masked=mask is not None)
    parts = [(x[a:b], y[a:b], None if mask is None else mask[a:b]) for a, b in pairwise(cuts)]
    with pytest.MonkeyPatch.context() as patch:
        if gpu:
            patch.setattr(rows, "wanted", lambda problem: problem.dtype != F64)
            patch.setattr(backends, "_shifts", lambda dtype, device: gpu == "triton")
        value, c, s = from_sums.value_of(
            reduce(sums.include, [sums.sums_of(*part, problem) for part in parts]), problem
        )
        exchanged = from_sums.exchanged(s, c)
        dx = torch.cat([from_sums.gradient(a, b, m, s, c, upstream, problem=problem) for a, b, m in parts])
        dy = torch.cat([from_sums.gradient(b, a, m, *exchanged, upstream, problem=problem) for a, b, m in parts])
    assert dx.dtype == dy.dtype == x.dtype
    return Result(torch.as_tensor(value, dtype=F64), dx if "x" in sides else None, dy if "y" in sides else None)


NARROW = (F32, BF16, F16)
LINEAR = {
    "library gram": Way(partial(by_operator, "gram", "library", None, "kept")),
    "library cross": Way(partial(by_operator, "cross", "library", None, "kept")),
    "sums": Way(partial(by_sums, ""), (70, 13, 21), (F64, F32, F16), ("cka_loss", "cka", "hsic")),
    "sums, plain": Way(partial(by_sums, "plain"), (70, 13, 21), NARROW, ("cka_loss", "cka", "hsic")),
}
FUSED = {name: rule for name, rule in RULES.items() if not rule.flow} | {"large": RBF(sigma=1e4)}  # K is 1 but for 1e-7
GAUSSIAN = {
    f"rbf {name}, {memory}": Way(partial(by_operator, "gram", "library", rule, memory), dtypes=(F64, F32), kernel=rule)
    for name, rule in RULES.items()
    for memory in MEMORIES
}
if HAS_NATIVE:
    run = partial(by_operator, "gram", "native", None, "kept")
    LINEAR["native"] = Way(run, dtypes=NARROW, statistics=("cka_loss", "cka", "hsic"), emulated=True)
if HAS_TRITON:
    run = partial(by_operator, "gram", "triton", None, "kept")
    LINEAR["triton"] = Way(run, dtypes=NARROW, emulated=True)
    LINEAR["sums, triton"] = Way(partial(by_sums, "triton"), (70, 13, 21), NARROW, ("cka_loss", "cka", "hsic"))
    LINEAR["shifted gram"] = Way(partial(by_shifting, "gram"), (37, 70, 41), NARROW)
    LINEAR["shifted cross"] = Way(partial(by_shifting, "cross"), (70, 13, 21), NARROW)
    for name, rule in FUSED.items():
        run = partial(by_operator, "gram", "triton", rule, "kept")
        GAUSSIAN[f"fused rbf {name}"] = Way(run, dtypes=NARROW, kernel=rule, emulated=True)
WAYS = LINEAR | GAUSSIAN
