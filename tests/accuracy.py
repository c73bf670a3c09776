r"""What tests and benchmarks share: features, plain PyTorch to be compared with, errors against fp64, poisoned memory.

Accuracy is judged by comparison: whatever a backend rounds, its error against the fp64 truth must not exceed twice that
of plain PyTorch *in the same dtype*, plus a floor. Plain PyTorch here is the best that its users could write by hand
(centred first, statistics in fp32, products in the features' dtype), under autograd.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bird_kernels import ops, reference
from bird_kernels.types import RBF, Estimator, Precision, Problem, Route, Statistic

Function = Callable[[Tensor, Tensor], Tensor]


class Result(NamedTuple):
    """A value, 0-d, and its gradients with respect to x [n, p] and y [n, q]; None for one that was not asked for."""

    value: Tensor
    dx: Tensor | None
    dy: Tensor | None


def features(
    n: int,
    p: int,
    q: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    mean: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """x [n, p] and y [n, q] that share part of their geometry: standard normal entries, plus ``mean``."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, min(p, q), dtype=torch.float64, generator=generator)

    def side(width: int) -> Tensor:
        own = torch.randn(n, width, dtype=torch.float64, generator=generator)
        own[:, : shared.shape[1]] += shared
        return (own / own.std() + mean).to(device=device, dtype=dtype)

    return side(p), side(q)


def operator(
    route: Route,
    backend: str,
    estimator: Estimator = "biased",
    statistic: Statistic = "cka_loss",
    precision: Precision | None = None,
    mask: Tensor | None = None,
    kernel: RBF | None = None,
    center: bool = True,
) -> Function:
    """The operator with its route and backend forced, as a function of x [n, p] and y [n, q] of one dtype."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        problem = Problem(
            x.shape[0], x.shape[1], y.shape[1], x.dtype, x.device, statistic, estimator, precision, mask is not None,
            x.requires_grad, y.requires_grad, kernel, center,
        )  # fmt: skip
        return ops.alignment(x, y, mask, ops.Call(problem, route, backend))

    return function


def described(
    route: Route,
    backend: str,
    estimator: Estimator = "biased",
    wanted: tuple[bool, bool] = (True, True),
    kernel: RBF | None = None,
    center: bool = True,
) -> tuple[Any, ...]:
    """What both operators take behind their tensors for a CKA loss; sizes, dtype and device are the tensors' own."""
    problem = Problem(1, 1, 1, torch.float32, torch.device("cpu"), "cka_loss", estimator, None, False, *wanted)
    problem = problem._replace(kernel=kernel, center=center)
    return ops.flattened(ops.Call(problem, route, backend))


def plain(route: str, estimator: str = "biased") -> Function:
    """1 - CKA as it is best written by hand, from Gram matrices or from products of features; fp32 or fp64 result."""
    return {"gram": _plain_gram, "cross": _plain_cross}[route](estimator)


def _plain_gram(estimator: str) -> Function:
    def hsic(k: Tensor, l: Tensor) -> Tensor:
        if estimator == "biased":
            return (k * l).sum()
        n = k.shape[0]
        k, l = (a - a.diagonal().diag() for a in (k, l))
        totals = k.sum() * l.sum() / ((n - 1) * (n - 2))
        return (k * l).sum() + totals - 2 / (n - 2) * (k.sum(0) @ l.sum(0))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = ops.value_dtype(x.dtype)
        k, l = ((a @ a.T).to(wide) for a in map(_centred, (x, y)))
        return 1 - hsic(k, l) / (hsic(k, k).sqrt() * hsic(l, l).sqrt())

    return loss


def _plain_cross(estimator: str) -> Function:
    def hsic(a: Tensor, b: Tensor) -> Tensor:
        wide = ops.value_dtype(a.dtype)
        product = (a.T @ b).to(wide).square().sum()
        if estimator == "biased":
            return product
        n = a.shape[0]
        kappa, lam = (c.to(wide).square().sum(1) for c in (a, b))
        return product - n / (n - 2) * (kappa @ lam) + kappa.sum() * lam.sum() / ((n - 1) * (n - 2))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = _centred(x), _centred(y)
        return 1 - hsic(y, x) / (hsic(x, x).sqrt() * hsic(y, y).sqrt())

    return loss


def plain_rbf(kernel: RBF, estimator: str = "biased") -> Function:
    """1 - CKA of Gaussian kernels as best written by hand: centred features, the published median as a constant."""

    def gram(x: Tensor, sigma: float | None) -> Tensor:
        x = _centred(x).to(ops.value_dtype(x.dtype))
        norms = x.square().sum(1)
        distances = (norms[:, None] + norms - 2 * x @ x.T).clamp(min=0)
        distances = distances - distances.diagonal().diag()
        if sigma is None:
            counted = distances.detach().flatten() if kernel.threshold else distances.detach()[distances > 0]
            square = counted.median() * (kernel.threshold or 1.0) ** 2
        else:
            square = torch.tensor(sigma**2)
        return (-distances / (2 * square)).exp()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        k, l = (gram(a, s) for a, s in zip((x, y), kernel.sigmas or (None, None), strict=True))
        n = k.shape[0]
        if estimator == "biased":
            k, l = (a - a.mean(0) - a.mean(1, keepdim=True) + a.mean() for a in (k, l))
        else:
            k, l = (a - a.diagonal().diag() for a in (k, l))
            rows = [a.sum(0) / (n - 2) for a in (k, l)]
            k, l = (a - r[:, None] - r + r.sum() / (n - 1) for a, r in zip((k, l), rows, strict=True))
            k, l = (a - a.diagonal().diag() for a in (k, l))
        return 1 - (k * l).sum() / ((k * k).sum().sqrt() * (l * l).sum().sqrt())

    return loss


def _centred(x: Tensor) -> Tensor:
    wide = x.to(ops.value_dtype(x.dtype))
    return (wide - wide.mean(0)).to(x.dtype)


def evaluate(function: Function, x: Tensor, y: Tensor, sides: str = "xy", upstream: float = 1.0) -> Result:
    """``function(x, y)`` and the gradients of the ``sides`` named, for an upstream gradient of ``upstream``."""
    x, y = (t.detach().requires_grad_(name in sides) for name, t in (("x", x), ("y", y)))
    value = function(x, y)
    wanted = [t for t in (x, y) if t.requires_grad]
    gradients = iter(torch.autograd.grad(value, wanted, torch.full_like(value, upstream)) if wanted else ())
    return Result(value.detach(), *(next(gradients) if t.requires_grad else None for t in (x, y)))


def truth(
    x: Tensor,
    y: Tensor,
    estimator: str = "biased",
    statistic: str = "cka_loss",
    mask: Tensor | None = None,
    sides: str = "xy",
    upstream: float = 1.0,
    kernel: RBF | None = None,
    center: bool = True,
) -> Result:
    """What `evaluate` should have given, from the literal formula in fp64 under autograd."""
    literal = getattr(reference, statistic)
    return evaluate(
        lambda a, b: literal(a, b, mask, estimator, kernel, center), x.double(), y.double(), sides, upstream
    )


def errors(result: Result, true: Result) -> dict[str, float]:
    """Absolute error of the value, relative errors in norm of the gradients that ``result`` has; inf for NaN."""
    found = {"value": (result.value.double() - true.value).abs()}
    for name in ("dx", "dy"):
        got, want = getattr(result, name), getattr(true, name)
        if got is not None:
            found[name] = (got.double() - want).norm() / want.norm()
    return {name: error.nan_to_num(nan=torch.inf).item() for name, error in found.items()}


def assert_no_worse(
    results: Sequence[Result], plains: Sequence[Result], truths: Sequence[Result], floor: float = 1e-6
) -> None:
    """Each error of ``results`` is at most twice that of ``plains`` (same features, same dtype) plus ``floor``.

    Every sequence has one entry per draw of features, and medians are compared: of two roundings that are equally good,
    either may be lucky on one draw (at n = 4, unbiased, by a factor of 20).

    Raises:
        AssertionError: an error is larger; or the comparison would mean nothing, plain PyTorch being lost itself.
    """
    ours, theirs = _medians(results, truths), _medians(plains, truths)
    for name, error in ours.items():
        assert theirs[name] < 0.1, f"plain PyTorch is no measure here: error {theirs[name]:.2g} of its {name}"
        allowed = 2 * theirs[name] + floor
        assert error <= allowed, f"{name}: error {error:.3g}, plain PyTorch {theirs[name]:.3g}, allowed {allowed:.3g}"


def _medians(results: Sequence[Result], truths: Sequence[Result]) -> dict[str, float]:
    found = [errors(*pair) for pair in zip(results, truths, strict=True)]
    return {name: torch.tensor([each[name] for each in found]).median().item() for name in found[0]}


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Uninitialised memory from PyTorch holds NaN, or the largest integer, so that whatever reads it shows."""
    options = torch.utils.deterministic
    filled = options.fill_uninitialized_memory  # type: ignore[attr-defined]
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Deterministic behavior was enabled", UserWarning)  # cuBLAS
        # Memory is filled in deterministic mode only; warnings and not errors, which would stop cuBLAS.
        torch.use_deterministic_algorithms(True, warn_only=True)
        options.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=was_warning)
            options.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
