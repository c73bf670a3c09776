r"""The mean over the sequences of a padded batch of each sequence's CKA loss: batched products under plain autograd.

The numerics are those of `library`: the columns of each sequence are centred, twice, before any product; each sequence
is scaled by a power of two that keeps fourth powers in range; moments are combined in fp64 by `moments.combine`, here
with one entry per sequence. All of it is ordinary PyTorch operations and one product with a cheaper backward, so
gradients of any order, torch.func and torch.compile work. For rows that *dominate* see `backends.dominating`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import plan
from .backends.dominating import UNEVEN, alive, bulk_mean, columns, largest, noise, squared_norms, u_centred_, without
from .backends.linalg import LIMIT, require_fp64, unit_of
from .moments import MIN_ROWS, Moments, combine
from .types import Estimator


def mean_cka_loss(x: Tensor, y: Tensor, mask: Tensor | None, estimator: Estimator) -> Tensor:
    """Mean of 1 - CKA over the sequences that have enough tokens for ``estimator``; NaN if none has. 0-d, fp32 or fp64.

    ``x`` [B, T, p], ``y`` [B, T, q], ``mask`` bool [B, T] or None. ValueError on a device without fp64.
    """
    require_fp64('tokens="sequence"', x.device)
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    counted = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    count = counted.sum(1, dtype=torch.float64)
    enough = count >= MIN_ROWS[estimator]
    # Sequences that are too short become zeros: a NaN in them, times zero, would be NaN in the gradient.
    keep = None if mask is None else (mask & enough[:, None])[:, :, None]
    rows = torch.where(enough, count, 4.0)
    route = plan.choose_route(x.shape[1], x.shape[2], y.shape[2])
    x, y = x.to(wide), y.to(wide)
    if estimator == "biased":
        xs, ys = (_scaled(_centred(a, keep, rows[:, None])) for a in (x, y))
        moments = _moments(xs, ys, route)
    else:
        xs, ys = (_scaled(_centred(a, keep, rows[:, None])) for a in (x, y)) if _can_read(x, y) else (x, y)
        if xs is not x and _are_even(xs, rows, enough) and _are_even(ys, rows, enough):
            moments = _plain_moments(xs, ys, route)
        else:
            xs, ys = (_scaled(_about_bulk(a, keep)) for a in (x, y))
            moments = _unbiased_moments(xs, ys, keep, rows, route)
    losses = combine(moments, rows, "cka_loss", estimator, torch.finfo(wide).eps).value
    total: Tensor = torch.where(enough, losses, 0.0).sum() / enough.sum()
    return total.to(wide)


def _centred(x: Tensor, keep: Tensor | None, rows: Tensor) -> Tensor:
    """x minus the column means of each sequence, whose row counts are ``rows`` [B, 1]; zero where ``keep`` is False.

    Twice, as in `linalg.centre`: the second mean is the rounding error of the first, and needs no gradient.
    """
    if keep is not None:
        x = torch.where(keep, x, 0.0)
    for detached in (False, True):
        mean = ((x.detach() if detached else x).sum(1) / rows).to(x.dtype)[:, None]
        # torch.where would take seven times as long on a CPU.
        x = x - mean if keep is None else torch.addcmul(x, keep.to(x.dtype), mean, value=-1)
    return x


def _about_bulk(x: Tensor, keep: Tensor | None) -> Tensor:
    """x minus the mean of those tokens of each sequence that do not dominate; zero where ``keep`` is False.

    The unbiased estimator does not depend on the origin, so the mean needs no gradient.
    """
    x = x - bulk_mean(x.detach(), None if keep is None else keep[:, :, 0])
    return x if keep is None else torch.where(keep, x, 0.0)


def _scaled(x: Tensor) -> Tensor:
    """Each sequence times the power of two that brings its largest magnitude into [0.5, 1)."""
    peaks = x.detach().abs().amax((1, 2), keepdim=True)
    return x * unit_of(peaks, LIMIT[x.dtype]).to(x.dtype)


def _moments(xs: Tensor, ys: Tensor, route: str) -> Moments:
    """<K,L>, <K,K> and <L,L> of every sequence; each [B], fp64."""
    if route == "gram":
        a, b = _self_product(xs), _self_product(ys)
        return Moments(_inner(a, b), _inner(a, a), _inner(b, b))
    c, a, b = ys.mT @ xs, _self_product(xs.mT), _self_product(ys.mT)
    return Moments(_inner(c, c), _inner(a, a), _inner(b, b))


def _can_read(*sides: Tensor) -> bool:
    """Whether values can be read without synchronising: plain tensors on a CPU, outside any trace or transform."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not traced and all(side.is_cpu and type(side) is Tensor for side in sides)


def _are_even(x: Tensor, rows: Tensor, enough: Tensor) -> bool:
    """Whether no token dominates in any of the sequences that are long ``enough`` (`dominating.uneven`)."""
    norms = squared_norms(x.detach()).double()
    even = norms.square().sum(1) * rows <= (rows / 4.0).clamp(max=UNEVEN) * norms.sum(1).square()
    return bool((~enough | (even & (rows >= 8.0))).all())


def _plain_moments(xs: Tensor, ys: Tensor, route: str) -> Moments:
    """The moments of Gram matrices without diagonals, of centred columns: their row sums are minus the diagonals."""
    kappa, lam = (squared_norms(side).double() for side in (xs, ys))
    if route == "gram":
        diagonal = torch.eye(xs.shape[1], dtype=torch.bool, device=xs.device)
        a, b = (_self_product(side).masked_fill(diagonal, 0.0) for side in (xs, ys))
        kl, kk, ll = _inner(a, b), _inner(a, a), _inner(b, b)
    else:
        kl, kk, ll, *_ = _moments(xs, ys, route)
        kl, kk, ll = kl - (kappa * lam).sum(1), kk - kappa.square().sum(1), ll - lam.square().sum(1)
    norms = (kappa * lam).sum(1), kappa.square().sum(1), lam.square().sum(1)
    return Moments(kl, kk, ll, *norms, -kappa.sum(1), -lam.sum(1))


def _unbiased_moments(xs: Tensor, ys: Tensor, keep: Tensor | None, rows: Tensor, route: str) -> Moments:
    """The moments of U-centred Gram matrices; zero where only rounding is left (`backends.dominating`)."""
    kappa, lam = squared_norms(xs), squared_norms(ys)
    kept = None if keep is None else keep[:, :, 0]
    few = largest(kappa.detach(), lam.detach()) if route == "cross" or not xs.is_cpu else None
    if route == "gram":
        n = rows[:, None, None]
        a, b = (u_centred_(_self_product(side), n, kept) for side in (xs, ys))
        kl, kk, ll = _inner(a, b), _inner(a, a), _inner(b, b)
    else:
        assert few is not None
        kl, kk, ll = _apart(xs, ys, kappa, lam, few, rows)
    eps = torch.finfo(xs.dtype).eps
    noises = noise((xs.detach(), ys.detach()), torch.stack([kappa, lam]).detach(), few, eps)
    return Moments(kl, alive(kk, noises[0]), alive(ll, noises[1]))


def _apart(
    xs: Tensor, ys: Tensor, kappa: Tensor, lam: Tensor, few: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """kl, kk, ll of U-centred matrices [B] on the cross route, as in `library`: products of the columns of all tokens
    except the ``few`` [B, k] (indices) that may dominate, of which the columns of the Gram matrices are formed."""
    rest = without(None, few, xs.shape[1])
    bulk = [torch.where(rest[:, :, None], side, 0.0) for side in (xs, ys)]
    heavy = [columns(side, few) for side in (xs, ys)]
    norms = [torch.where(rest, a, 0.0).double() for a in (kappa, lam)]
    totals = [side.sum(1, keepdim=True) for side in bulk]
    sums = [
        (side * total).sum(2).double() - norm + column.sum(2).double()
        for side, total, norm, column in zip((xs, ys), totals, norms, heavy, strict=True)
    ]
    # An entry of two tokens, one of them in `few`, is formed once and occurs twice in the symmetric matrix.
    twice = torch.where(rest, 2.0, 1.0).double()
    found = []
    for i, j in ((0, 1), (0, 0), (1, 1)):
        product = _inner(*(bulk[j].mT @ bulk[i],) * 2) if i != j else _inner(*(_self_product(bulk[i].mT),) * 2)
        product = product - (norms[i] * norms[j]).sum(1)
        product = product + ((heavy[i] * heavy[j]).sum(2).double() * twice).sum(1)
        total = sums[i].sum(1) * sums[j].sum(1) / ((rows - 1.0) * (rows - 2.0))
        found.append(product - 2.0 * (sums[i] * sums[j]).sum(1) / (rows - 2.0) + total)
    return found[0], found[1], found[2]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b) of each sequence, [B], fp64: each row is summed in the dtype of ``a``, the rows' sums in fp64."""
    return torch.linalg.vecdot(a, b).sum(1, dtype=torch.float64)


def _self_product(a: Tensor) -> Tensor:
    product: Tensor = _SelfProduct.apply(a) if a.requires_grad else a @ a.mT
    return product


class _SelfProduct(torch.autograd.Function):
    """a @ a.mT with one product in the backward instead of autograd's two: 0.83-0.88 of a step's time on a CPU."""

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
