r"""CKA of every sequence of a padded batch, averaged: batched library products under plain autograd.

The numerics of `library`: columns centred over the tokens of their own sequence before any product, twice; a power of
two for every sequence that keeps squares of squares in range; moments combined in fp64 by `moments.combine`, here with
one entry for each sequence. Ordinary PyTorch operations and one product with a shorter backward: gradients of any
order, torch.func and torch.compile work as for any of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import plan
from .moments import MIN_ROWS, Moments, combine, linear_moments
from .types import Estimator


def mean_cka_loss(x: Tensor, y: Tensor, mask: Tensor | None, estimator: Estimator) -> Tensor:
    """Mean of 1 - CKA over sequences with the rows that ``estimator`` needs; NaN if there are none. 0-d, fp32 or fp64.

    ``x`` [B, T, p], ``y`` [B, T, q], ``mask`` bool [B, T] or None.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    counted = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    count = counted.sum(1, dtype=torch.float64)
    enough = count >= MIN_ROWS[estimator]
    # A sequence left out becomes zeros: its NaN, times zero, must reach no gradient.
    keep = None if mask is None else (mask & enough[:, None])[:, :, None]
    rows = torch.where(enough, count, 4.0)
    xs, ys = (_centred(a.to(wide), keep, rows[:, None]) for a in (x, y))
    route = plan.choose_route(x.shape[1], x.shape[2], y.shape[2])
    moments = _moments(xs, ys, route, estimator)
    losses = combine(moments, rows, "cka_loss", estimator, torch.finfo(wide).eps).value
    total: Tensor = torch.where(enough, losses, 0.0).sum() / enough.sum()
    return total.to(wide)


def _centred(x: Tensor, keep: Tensor | None, rows: Tensor) -> Tensor:
    """Columns minus the mean over their own sequence's ``rows`` [B, 1], times a power of two; zero where not kept.

    Twice, as in `library`: the second mean is the rounding of the first, and no gradient passes through it.
    """
    if keep is not None:
        x = torch.where(keep, x, 0.0)
    for detached in (False, True):
        mean = ((x.detach() if detached else x).sum(1) / rows).to(x.dtype)[:, None]
        # Not torch.where again, which takes seven times as long on a CPU.
        x = x - mean if keep is None else torch.addcmul(x, keep.to(x.dtype), mean, value=-1)
    limit = 250 if x.dtype == torch.float64 else 120
    peak = x.detach().abs().amax((1, 2), keepdim=True)
    exponent = torch.frexp(peak).exponent.clamp(-limit, limit)
    return x * torch.ldexp(torch.ones_like(peak), -exponent)


def _moments(xs: Tensor, ys: Tensor, route: str, estimator: Estimator) -> Moments:
    """Moments of every sequence's two Gram matrices; each [B], fp64."""
    if route == "gram":
        a, b = _self_product(xs), _self_product(ys)
        if estimator == "unbiased":
            diagonal = torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
            a, b = a.masked_fill(diagonal, 0.0), b.masked_fill(diagonal, 0.0)
        kl, kk, ll = _inner(a, b), _inner(a, a), _inner(b, b)
    else:
        c, a, b = ys.mT @ xs, _self_product(xs.mT), _self_product(ys.mT)
        kl, kk, ll = _inner(c, c), _inner(a, a), _inner(b, b)
    if estimator == "biased":
        return linear_moments((kl, kk, ll), None)
    kappa, lam = (torch.linalg.vecdot(side, side).double() for side in (xs, ys))
    norms = (kappa * lam).sum(1), kappa.square().sum(1), lam.square().sum(1), kappa.sum(1), lam.sum(1)
    if route == "cross":
        kl, kk, ll = kl - norms[0], kk - norms[1], ll - norms[2]
    return linear_moments((kl, kk, ll), norms)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b) of every sequence, [B] in fp64: along rows in the dtype of ``a``, from there on in fp64."""
    return torch.linalg.vecdot(a, b).sum(1, dtype=torch.float64)


def _self_product(a: Tensor) -> Tensor:
    product: Tensor = _SelfProduct.apply(a) if a.requires_grad else a @ a.mT
    return product


class _SelfProduct(torch.autograd.Function):
    """a @ a.mT with one product in the backward, where autograd makes one for each factor: 0.83-0.88 of a step on a
    CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a @ a.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        da: Tensor = (grad + grad.mT) @ a
        return da
