"""What a call's arguments must be: checked once, and brought to the one form that everything below expects."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from . import backends
from .moments import MIN_ROWS
from .types import RBF, Precision, Problem, Statistic

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = (None, *get_args(Precision))


def prepare(
    statistic: Statistic,
    x: Tensor,
    y: Tensor,
    kernel: str | RBF,
    estimator: str,
    mask: Tensor | None,
    row_dims: int,
    backend: str,
    precision: str | None,
    center: bool = True,
    *,
    part: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Problem]:
    """Checked inputs as x [n, p], y [n, q] of one dtype and mask [n], and the problem they pose.

    A ``part`` of a batch may have any number of rows.
    """
    rbf = parse_kernel(kernel)
    require_choice("estimator", estimator, tuple(MIN_ROWS))
    if estimator == "unbiased" and statistic == "sqrt_cka_loss":
        raise ValueError('sqrt=True needs estimator="biased": an unbiased CKA may be negative and has no root')
    if estimator == "unbiased" and not center:
        raise ValueError('center=False needs estimator="biased": the unbiased estimator is one of centred kernels')
    require_choice("backend", backend, backends.NAMES)
    require_choice("precision", precision, PRECISIONS)
    given = x
    x, y, mask = as_rows(x, y, mask, row_dims)
    n, needed = x.shape[0], MIN_ROWS[estimator]
    if n < needed and not part:
        raise ValueError(
            f'estimator="{estimator}" needs at least {needed} rows, got {n} (x has shape {tuple(given.shape)})'
        )
    recording = torch.is_grad_enabled()
    problem = Problem(
        n, x.shape[1], y.shape[1], x.dtype, x.device, statistic, estimator, precision,  # type: ignore[arg-type]
        mask is not None, recording and x.requires_grad, recording and y.requires_grad, rbf, center,
    )  # fmt: skip
    return x, y, mask, problem


def as_rows(x: Tensor, y: Tensor, mask: Tensor | None, row_dims: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked features as x [n, p] and y [n, q] of one dtype, and mask [n]; any number of rows."""
    require_features("x", x, row_dims)
    require_features("y", y, row_dims)
    rows = x.shape[:row_dims]
    if y.shape[:row_dims] != rows:
        raise ValueError(
            f"x and y must have the same rows, got {tuple(rows)} for x and {tuple(y.shape[:row_dims])} for y "
            f"(shapes {tuple(x.shape)} and {tuple(y.shape)}, row_dims={row_dims})"
        )
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got x on {x.device} and y on {y.device}")
    n = math.prod(rows)
    if mask is not None:
        require_mask(mask, rows, x.device)
        mask = mask.reshape(n)
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    # Not (n, -1): torch.compile would have to divide by a symbolic size.
    x = x if x.dim() == 2 and row_dims == 1 else x.reshape(n, math.prod(x.shape[row_dims:]))
    y = y if y.dim() == 2 and row_dims == 1 else y.reshape(n, math.prod(y.shape[row_dims:]))
    return x, y, mask


def parse_kernel(kernel: object) -> RBF | None:
    """The `RBF` that ``kernel`` names, or None for the linear one; raises a TypeError or ValueError for others."""
    if isinstance(kernel, RBF):
        return kernel
    if callable(kernel):
        raise TypeError(
            f'kernel must be "linear", "rbf" or an RBF(...), got the callable {kernel!r}: gradients are closed forms '
            'of these. If it has a feature map, pass the mapped features with kernel="linear"; other Gram matrices can '
            "be centred and compared by PyTorch's own operations, under autograd"
        )
    require_choice("kernel", kernel, ("linear", "rbf"))
    return RBF() if kernel == "rbf" else None


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises a ValueError that lists what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def require_features(name: str, value: object, row_dims: int) -> None:
    """Raises a TypeError or ValueError unless ``value`` is a floating-point tensor of rows with features."""
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


def require_mask(mask: object, rows: torch.Size, device: torch.device) -> None:
    """Raises a TypeError or ValueError unless ``mask`` is a bool tensor of these rows."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True keeps a row), got {kind}; convert it with mask.bool()")
    if mask.shape != rows:
        raise ValueError(f"mask must have the shape of the rows, {tuple(rows)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask must be on the features' device {device}, got {mask.device}")
