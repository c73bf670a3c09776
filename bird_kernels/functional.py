r"""The functions that users call: validate, plan, call.

Everywhere, ``x`` has shape [n, ...] and ``y`` [n, ...]: the first ``row_dims`` dimensions index rows (samples), the
rest is flattened to features; the two widths may differ. Columns are centred over the rows of the call.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from . import backends, ops, plan, reference
from .estimators import MIN_ROWS
from .types import Plan, Precision, Problem

if TYPE_CHECKING:
    from .types import Statistic

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PRECISIONS = (None, *get_args(Precision))


def cka_loss(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    r"""1 - CKA(x, y): the representation loss of BIRD (ICLR 2026).

    .. math::  1 - \frac{\langle K, L\rangle}{\sqrt{\langle K, K\rangle \langle L, L\rangle}},
               \quad K = X X^\top,\; L = Y Y^\top,\; \text{columns of } X, Y \text{ centred}

    (Kornblith et al. 2019, eq. 4; the formula above is the biased estimator). Exactly invariant to rotations, shifts
    and isotropic scale of either side.

    Args:
        x: student features, shape [n, ...]; fp64, fp32, bf16 or fp16.
        y: teacher features, shape [n, ...]; its width and dtype may differ (dtypes are promoted). A side that does not
            require grad costs no gradient.
        kernel: "linear".
        estimator: "biased" is the published loss. "unbiased" is Song et al. 2012 (HSIC_1): for unrelated features the
            loss is 1 on average, whatever n; it may exceed 1 and is never clamped. Needs n >= 4.
        mask: bool, shape of the leading ``row_dims`` dimensions; False leaves a row out (its contents, NaN too, do not
            matter, its gradient is zero). Equal to the call on the selected rows; shapes do not change and nothing is
            read back from the device, so fewer selected rows than the estimator needs give NaN instead of an error.
        row_dims: how many leading dimensions index rows; 2 for tokens [batch, time, width].
        backend: "auto" (the best that can run), "native", "triton", "eager" or "reference" (fp64, literal, slow).
        precision: of fp32 products: None (PyTorch's own switch), "ieee", "tf32" or "tf32x3".

    Returns:
        0-d tensor, fp32 (fp64 if either input is), in [0, 1] up to rounding when biased. A side without variance has
        CKA 0: loss 1, zero gradient. NaN or Inf in gives NaN. Sums are accumulated in fp32 or better for every dtype.

    Raises:
        TypeError: inputs that are not floating-point tensors, a mask that is not bool.
        ValueError: row counts, devices or mask shapes that do not fit, too few rows, an unknown option, a backend that
            cannot run here (with the reason).

    Example:
        >>> loss = 0.1 * task + 0.9 * cka_loss(student_features, teacher_features)
    """
    return _evaluate("cka_loss", x, y, kernel, estimator, mask, row_dims, backend, precision)


def cka(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    """Centred kernel alignment of x [n, ...] and y [n, ...] (Kornblith et al. 2019); arguments as `cka_loss`.

    Returns:
        0-d tensor, fp32 (fp64 if either input is): 1 for representations of equal geometry.
    """
    return _evaluate("cka", x, y, kernel, estimator, mask, row_dims, backend, precision)


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    r"""Hilbert-Schmidt independence criterion of x [n, ...] and y [n, ...]; arguments as `cka_loss`.

    .. math::  \mathrm{HSIC} = \frac{\mathrm{tr}(K H L H)}{(n-1)^2}

    for "biased" (Gretton et al. 2005, eq. 9); Song et al. 2012, eq. 5, for "unbiased". In units of the squares of both
    sides' features.

    Returns:
        0-d tensor, fp32 (fp64 if either input is).
    """
    return _evaluate("hsic", x, y, kernel, estimator, mask, row_dims, backend, precision)


def centered_gram(x: Tensor, *, kernel: str = "linear") -> Tensor:
    r"""H X X^T H of x [n, ...]: the Gram matrix of the column-centred features, [n, n], fp32 (fp64 for fp64).

    Centred before the product, so that a large mean costs no accuracy. Differentiable to any order.

    Raises:
        TypeError, ValueError: as `cka_loss`.
    """
    _require_choice("kernel", kernel, ("linear",))
    _require_features("x", x, 1)
    with ops.without_autocast(x.device):
        x = x.flatten(1).to(ops.value_dtype(x.dtype))
        x = x - x.mean(0)
        x = x - x.mean(0)
        return x @ x.T


def explain(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    backend: str = "auto",
    precision: str | None = None,
) -> Plan:
    """How `cka_loss` would compute this call; ``print`` the result. Takes its arguments, runs nothing.

    Returns:
        Plan with route, backend, tiles, floating-point operations, bytes, workspace, the floor time on known devices,
        and why better backends were not taken.
    """
    x, y, mask, problem = _prepare("cka_loss", x, y, kernel, estimator, mask, row_dims, backend, precision)
    name, rejected = backends.choose(problem.dtype, problem.device, plan.are_few(problem.n), backend)
    measured = ""
    if backend == "auto":
        name, measured = backends.prefer(problem, name)
    route = plan.choose_route(problem.n, problem.p, problem.q, name)
    device_name = torch.cuda.get_device_name(x.device) if x.is_cuda else ""
    return plan.describe(problem, route, name, dict(rejected), device_name, measured)


def _evaluate(
    statistic: Statistic,
    x: Tensor,
    y: Tensor,
    kernel: str,
    estimator: str,
    mask: Tensor | None,
    row_dims: int,
    backend: str,
    precision: str | None,
) -> Tensor:
    x, y, mask, problem = _prepare(statistic, x, y, kernel, estimator, mask, row_dims, backend, precision)
    if backend == "reference":
        with ops.without_autocast(x.device):
            value: Tensor = getattr(reference, statistic)(x, y, mask, estimator)
        return value.to(ops.value_dtype(x.dtype))
    name, _ = backends.choose(problem.dtype, problem.device, plan.are_few(problem.n), backend)
    if backend == "auto" and x.is_cuda and not torch.compiler.is_compiling():  # compiled, sizes may be symbolic
        name, _ = backends.prefer(problem, name)
    route = plan.choose_route(problem.n, problem.p, problem.q, name)
    return ops.alignment(x, y, mask, problem, route, name)


def _prepare(
    statistic: Statistic,
    x: Tensor,
    y: Tensor,
    kernel: str,
    estimator: str,
    mask: Tensor | None,
    row_dims: int,
    backend: str,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Problem]:
    """Checked inputs as x [n, p], y [n, q] of one dtype and mask [n], and the problem they pose."""
    _require_choice("kernel", kernel, ("linear",))
    _require_choice("estimator", estimator, tuple(MIN_ROWS))
    _require_choice("backend", backend, backends.NAMES)
    _require_choice("precision", precision, _PRECISIONS)
    _require_features("x", x, row_dims)
    _require_features("y", y, row_dims)
    rows = x.shape[:row_dims]
    if y.shape[:row_dims] != rows:
        raise ValueError(
            f"x and y must have the same rows, got {tuple(rows)} for x and {tuple(y.shape[:row_dims])} for y "
            f"(shapes {tuple(x.shape)} and {tuple(y.shape)}, row_dims={row_dims})"
        )
    n = math.prod(rows)
    if n < MIN_ROWS[estimator]:
        raise ValueError(
            f'estimator="{estimator}" needs at least {MIN_ROWS[estimator]} rows, got {n} (x has shape {tuple(x.shape)})'
        )
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got x on {x.device} and y on {y.device}")
    if mask is not None:
        _require_mask(mask, rows, x.device)
        mask = mask.reshape(n)
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    # Not (n, -1): torch.compile would have to divide by a symbolic size.
    x = x if x.dim() == 2 and row_dims == 1 else x.reshape(n, math.prod(x.shape[row_dims:]))
    y = y if y.dim() == 2 and row_dims == 1 else y.reshape(n, math.prod(y.shape[row_dims:]))
    recording = torch.is_grad_enabled()
    problem = Problem(
        n, x.shape[1], y.shape[1], x.dtype, x.device, statistic, estimator, precision,  # type: ignore[arg-type]
        mask is not None, recording and x.requires_grad, recording and y.requires_grad,
    )  # fmt: skip
    return x, y, mask, problem


def _require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _require_features(name: str, value: object, row_dims: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}; convert it with {name}.float()"
        )
    if row_dims < 1 or value.dim() <= row_dims:
        raise ValueError(
            f"{name} must have {row_dims} row dimension{'s' * (row_dims != 1)} (row_dims >= 1) and at least one "
            f"feature dimension, got shape {tuple(value.shape)}"
        )
    if math.prod(value.shape[row_dims:]) == 0:
        raise ValueError(f"{name} has no features: shape {tuple(value.shape)}")


def _require_mask(mask: object, rows: torch.Size, device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True keeps a row), got {kind}; convert it with mask.bool()")
    if mask.shape != rows:
        raise ValueError(f"mask must have the shape of the rows, {tuple(rows)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask must be on the features' device {device}, got {mask.device}")
