"""Checks a call's arguments once and normalises them to the form that all lower modules expect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from . import backends
from .moments import MIN_ROWS
from .types import PLAIN, RBF, Options, Precision, Problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHOICES: dict[str, tuple[object, ...]] = {
    "kernel": ("linear", "rbf"),
    "estimator": tuple(MIN_ROWS),
    "backend": backends.NAMES,
    "precision": (None, *get_args(Precision)),
}


def prepare(
    x: Tensor, y: Tensor, mask: Tensor | None, options: Options, part: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Problem]:
    """Checked inputs as x [n, p], y [n, q] of one dtype and mask [n], and the `Problem` that describes the call.

    A ``part`` of a batch may have any number of rows; otherwise the estimator's minimum is required.

    Raises:
        TypeError, ValueError: as `bird_kernels.cka_loss`. RuntimeError: under `torch.jit.trace` (`refuse_tracing`).
    """
    statistic, kernel, estimator, row_dims, _, center, backend, precision = options
    if torch.jit.is_tracing() and backend != "reference":
        refuse_tracing()
    rbf = None if kernel == "linear" else parse_kernel(kernel)
    require_choice(estimator=estimator, backend=backend, precision=precision)
    if estimator == "unbiased" and statistic == "sqrt_cka_loss":
        raise ValueError('sqrt=True needs estimator="biased": an unbiased CKA may be negative and has no root')
    if estimator == "unbiased" and not center:
        raise ValueError('center=False needs estimator="biased": the unbiased estimator is one of centred kernels')
    given = x
    x, y, mask = as_rows(x, y, mask, row_dims)
    n, needed = x.shape[0], MIN_ROWS[estimator]
    if n < needed and not part:
        raise ValueError(
            f'estimator="{estimator}" needs at least {needed} rows, got {n} (x has shape {tuple(given.shape)})'
        )
    recording = torch.is_grad_enabled()
    if recording and not torch.compiler.is_compiling() and (x.is_inference() or y.is_inference() or mask is not None):
        # Autograd refuses to save tensors made under torch.inference_mode(), so it gets a copy.
        x, y = (a.clone() if a.is_inference() else a for a in (x, y))
        mask = mask.clone() if mask is not None and mask.is_inference() else mask
    problem = Problem(
        n, x.shape[1], y.shape[1], x.dtype, x.device, statistic, estimator, precision,  # type: ignore[arg-type]
        mask is not None, recording and x.requires_grad, recording and y.requires_grad, rbf, center,
    )  # fmt: skip
    return x, y, mask, problem


def as_rows(x: Tensor, y: Tensor, mask: Tensor | None, row_dims: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked features as x [n, p] and y [n, q] of one dtype, and mask [n]; any number of rows."""
    x, y = require_features(row_dims, x=x, y=y)
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
        mask = _strided("mask", mask) if isinstance(mask, Tensor) and type(mask) not in PLAIN else mask
        require_mask(mask, rows, x.device)
        mask = mask.reshape(n)
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    # Not reshape(n, -1): torch.compile would have to divide by a symbolic size.
    x = x if x.dim() == 2 and row_dims == 1 else x.reshape(n, math.prod(x.shape[row_dims:]))
    y = y if y.dim() == 2 and row_dims == 1 else y.reshape(n, math.prod(y.shape[row_dims:]))
    return x, y, mask


def require_lists(x: object, y: object, row_dims: int) -> list[tuple[Tensor, Tensor]]:
    """The pairs (x[i], y[i]) of two lists of layers.

    Raises:
        TypeError, ValueError: not two lists of the same length, at least 1, or the rows of a pair differ.
    """
    lists = (list, tuple)
    if not (isinstance(x, lists) and isinstance(y, lists)):
        (name, value), other = (("x", x), "y") if isinstance(x, lists) else (("y", y), "x")
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}, because {other} is no list; "
            "for pairs of layers both must be lists of tensors"
        )
    named = {}
    for side, layers in (("x", x), ("y", y)):
        for index, layer in enumerate(layers):
            named[f"{side}[{index}]"] = layer
    found = require_features(row_dims, **named)
    if len(x) != len(y) or not x:
        raise ValueError(f"x and y must list the two sides of at least one pair, got {len(x)} and {len(y)} layers")
    both = list(zip(found[: len(x)], found[len(x) :], strict=True))
    for index, (left, right) in enumerate(both):
        if left.shape[:row_dims] != right.shape[:row_dims]:
            raise ValueError(
                f"x[{index}] and y[{index}] must have the same rows, got {tuple(left.shape[:row_dims])} and "
                f"{tuple(right.shape[:row_dims])} (row_dims={row_dims})"
            )
    return both


def parse_kernel(kernel: object) -> RBF | None:
    """The `RBF` that ``kernel`` names, or None for the linear one; raises a TypeError or ValueError for others."""
    if isinstance(kernel, RBF):
        return kernel
    if callable(kernel):
        raise TypeError(
            f'kernel must be "linear", "rbf" or an RBF(...), got the callable {kernel!r}: gradients are closed forms '
            'of these. If it has a feature map, pass the mapped features with kernel="linear"; other Gram '
            "matrices are compared by bird.cka_from_grams"
        )
    require_choice(kernel=kernel)
    return RBF() if kernel == "rbf" else None


def require_choice(known: Mapping[str, tuple[object, ...]] = CHOICES, /, **chosen: object) -> None:
    """Raise a ValueError that lists the allowed values unless each value is among the ``known`` ones of its name."""
    for name, value in chosen.items():
        if value not in known[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known[name]))}; got {value!r}")


def require_features(row_dims: int, **named: object) -> list[Tensor]:
    """The checked tensors, with the local tensor in place of a replicated DTensor.

    Raises:
        TypeError, ValueError: one is not a strided floating-point tensor with row and feature dimensions.
    """
    found = []
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if type(value) not in PLAIN or value.layout is not torch.strided or value.is_nested:
            value = _strided(name, value)
        if value.dtype not in DTYPES:
            remedy = f"torch.view_as_real({name}).flatten(-2)" if value.is_complex() else f"{name}.float()"
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}; convert it with {remedy}"
            )
        if row_dims < 1 or value.dim() <= row_dims:
            raise ValueError(
                f"{name} must have {row_dims} row dimension{'s' * (row_dims != 1)} (row_dims >= 1) and at least one "
                f"feature dimension, got shape {tuple(value.shape)}"
            )
        if math.prod(value.shape[row_dims:]) == 0:
            raise ValueError(f"{name} has no features: shape {tuple(value.shape)}")
        found.append(value)
    return found


def _strided(name: str, value: Tensor) -> Tensor:
    """A tensor of any subclass or layout as a strided one; raises a TypeError if it has no such form."""
    kind, remedy = None, "convert it with .to_dense()"
    if type(value).__name__ == "MaskedTensor":
        kind, remedy = "masked", "give its data, and as mask= which rows count"
    elif value.is_nested:
        kind, remedy = (
            "nested",
            "pad it, .to_padded_tensor(0.0), and as mask= give which rows count (see token_cka_loss)",
        )
    elif type(value).__name__ == "DTensor":
        if all(placement.is_replicate() for placement in value.placements):  # type: ignore[attr-defined]
            local: Tensor = value.to_local()  # type: ignore[attr-defined]
            return local
        kind = f"sharded ({value.placements})"  # type: ignore[attr-defined]
        remedy = "redistribute it to Replicate(), or give the local rows with group="
    elif value.layout is not torch.strided:
        kind = f"{value.layout}".removeprefix("torch.")
    if kind is not None:
        raise TypeError(f"{name} must be a strided tensor, got a {kind} one: {remedy}")
    return value


def refuse_tracing() -> None:
    """Raise a RuntimeError under `torch.jit.trace`, which would keep this call's numbers as constants."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace (and torch.onnx.export on top of it) would keep this call's numbers as constants: use "
            'torch.export or torch.compile, or backend="reference", which is PyTorch\'s own operations'
        )


def require_mask(mask: object, rows: torch.Size, device: torch.device) -> None:
    """Raise a TypeError or ValueError unless ``mask`` is a bool tensor of shape ``rows`` on ``device``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True keeps a row), got {kind}; convert it with mask.bool()")
    if mask.shape != rows:
        raise ValueError(f"mask must have the shape of the rows, {tuple(rows)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask must be on the features' device {device}, got {mask.device}")
