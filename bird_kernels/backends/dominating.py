r"""Rows that dominate, and the unbiased estimator, which leaves them out of nothing but the diagonal.

HSIC_1 (Song et al. 2012) has no diagonal: of a row 10^4 times as large as the others the products hold 10^16, and the
value what is left when that is taken off again. In exact arithmetic nothing depends on where the features' origin is;
in fp32 everything does. So the origin is put amid the rows that do not dominate, and those that do are taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moments import ROUNDING, Scalar
from .linalg import exact, mm

GROUPS = 9  # of rows, whose means' median is a location that four of them may spoil
# Rows of the cross route that may dominate: a quarter, at least FEWEST, at most APART. In products of their own k rows
# cost 2k / (p + q) of a forward and k (2p + q) / ((p + q) p) of a backward: on a CPU, which looks first, only those pay
# who have such rows. CUDA always does: 32 of 65,536 x (1,024 + 1,024) are 3 and 5 % of the operations.
FEWEST = 8
APART = {"cpu": 64, "cuda": 32}
UNEVEN = 2.5  # n times the sum of squares over the squared sum of squared norms, from which on rows may dominate


def location(x: Tensor, keep: Tensor | None) -> Tensor:
    """A point amid the rows of x [..., n, d] that few rows cannot move, however large: [..., 1, d].

    The median, column by column, of the means of up to GROUPS groups; the rows that count are dealt to them in turn, so
    that no period of a mask meets theirs. ``keep`` bool [..., n] or [n], or None: which rows count.
    """
    groups = min(GROUPS, x.shape[-2])
    rows = x.shape[-2] // groups * groups
    if keep is not None:  # those that count come first, in their order
        keep, order = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        x = x.take_along_dim(order.expand(x.shape[:-1])[..., None], -2)
    parts = x[..., :rows, :].unflatten(-2, (-1, groups))
    if keep is None:
        means = parts.mean(-3)
    else:
        counted = keep[..., :rows].unflatten(-1, (-1, groups))[..., None].bool()
        means = torch.where(counted, parts, 0.0).sum(-3) / counted.sum(-3)  # NaN of a group without rows
    middle = means.nanmedian(-2, keepdim=True).values
    return torch.where(middle.isnan(), 0.0, middle)  # of no rows; a NaN among the features stays in them


def squared_norms(x: Tensor) -> Tensor:
    """|x_i|^2 of the rows of x [..., n, d]: [..., n]."""
    if x.is_cuda and not x.requires_grad:  # in one pass
        return torch.linalg.vector_norm(x, dim=-1).square()
    return torch.linalg.vecdot(x, x)


def largest(*norms: Tensor) -> Tensor:
    """The rows that may dominate: of the largest squared norms (each [..., n]) over their median; [..., k] indices.

    More rows than these k that dominate are lost, where products are of columns.
    """
    both = torch.stack(norms)
    score = (both / (both.median(-1, keepdim=True).values + 1e-12 * both.amax(-1, keepdim=True))).sum(0)
    return score.topk(how_many(score.shape[-1], score.device)).indices.sort().values


def marked(apart: Tensor) -> Tensor:
    """The rows of `largest` again, from a vector [n] that is 1 for them and 0 for the others."""
    return apart.topk(how_many(len(apart), apart.device)).indices.sort().values


def how_many(n: int, device: torch.device) -> int:
    """Of n rows are taken for such as may dominate."""
    return min(n, max(FEWEST, min(n // 4, APART["cpu" if device.type == "cpu" else "cuda"])))


def dominated(norms: Tensor) -> bool:
    """Whether rows have far more than their share of the sum of these squared norms [n]: a CPU looks before it pays."""
    norms = exact(norms)
    return uneven((norms @ norms).item(), norms.sum().item(), len(norms))


def uneven(squares: float, total: float, n: float) -> bool:
    """The same from the sum of squares and the sum of the squared norms of ``n`` rows.

    With one row whose squared norm is r times the others', squares n / total^2 passes 2.5 where r is about
    1.6 sqrt(n): long before fp32 loses the others beside it. Where m rows have all of it, it is n / m. Normal features
    of one dimension have 3, of two 2, of many 1. About the mean of few rows it cannot grow, by
    ((n-1)^3 + 1) / (n(n-1)): fewer than 8 are never taken for even.
    """
    return n < 8.0 or not squares * n <= min(UNEVEN, n / 4.0) * total * total  # so NaN too


def without(keep: Tensor | None, index: Tensor, n: int) -> Tensor:
    """``keep`` bool [..., n], or all rows, without those of ``index`` [..., k]."""
    shape = (*index.shape[:-1], n)
    keep = torch.ones(shape, dtype=torch.bool, device=index.device) if keep is None else keep.expand(shape)
    return keep.scatter(-1, index, False)


def bulk_mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """The mean of that half of the rows of x [..., n, d] that count which is nearest to their `location`: [..., 1, d],
    in x's dtype. ``keep`` bool [..., n] or None: which rows count.

    The unbiased estimator does not depend on where the features' origin is, its rounding does: about the mean of all
    rows, one that is 10^4 times as large as the others stands in all of them.
    """
    middle = location(x, keep)
    z = x - middle
    norms = squared_norms(z)
    if keep is not None:
        norms = torch.where(keep, norms, torch.nan)
    near = (norms <= norms.nanmedian(-1, keepdim=True).values)[..., None]
    return middle + torch.where(near, z, 0.0).sum(-2, keepdim=True) / near.sum(-2, keepdim=True).clamp(min=1)


def rows_at(x: Tensor, few: Tensor) -> Tensor:
    """Rows ``few`` [..., k] of x [..., n, d]: [..., k, d]."""
    return x.gather(-2, few[..., None].expand(*few.shape, x.shape[-1]))


def columns(x: Tensor, few: Tensor) -> Tensor:
    """Columns ``few`` [..., k] of the Gram matrix of x [..., n, d]: [..., n, k], the diagonal zero; of halves fp32."""
    return mm(x, rows_at(x, few).mT).scatter(-2, few[..., None, :], 0.0)


def u_centred_(gram: Tensor, n: Scalar, keep: Tensor | None) -> Tensor:
    """A Gram matrix [..., m, m] without its diagonal, U-centred (Szekely and Rizzo 2014), in its own memory.

    K_ij - (r_i + r_j) / (n-2) + sum(r) / ((n-1)(n-2)) off the diagonal, with the row sums r: HSIC_1 is an inner product
    of two of them over n (n-3), without another term. ``n`` rows count (at least 3; a number or a tensor [..., 1, 1]),
    those of ``keep`` [..., m]; None: all.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    sums = gram.sum(-1, keepdim=True)
    total = sums.sum(-2, keepdim=True)
    shift = (sums / (n - 2.0) - total / (2.0 * (n - 1.0) * (n - 2.0))).to(gram.dtype)
    gram -= shift
    gram -= shift.mT
    diagonal.zero_()
    return gram if keep is None else gram.masked_fill_(~(keep[..., :, None] & keep[..., None, :]), 0.0)


def noise(sides: Sequence[Tensor], norms: Tensor, few: Tensor | None, eps: float) -> Tensor:
    """Largest <K, K> of the off-diagonal entries of K = X X^T that are rounding alone, for each of the ``sides`` X
    [..., n, d]: [sides, ...], fp64.

    ``norms`` [sides, ..., n] are their squared norms. An entry K_ij is off by some eps sum_k |x_ik x_jk|, which is far
    less than eps |x_i| |x_j| where two rows dominate in different features: it is taken for two of the rows ``few``
    [..., k], None all of them; for others |x_i| |x_j|. ROUNDING eps allows for what centring adds.
    """
    picked = [(x if few is None else rows_at(x, few)).abs() for x in sides]
    among = torch.stack([mm(x, x.mT) for x in picked])
    among.diagonal(dim1=-2, dim2=-1).zero_()
    bound = exact(squared_norms(among)).sum(-1)
    if few is not None:
        norms = exact(norms)
        rest = norms.scatter(-1, few.to(norms.device).expand(*norms.shape[:-1], -1), 0.0)
        total = rest.sum(-1)
        bound += total * (2.0 * norms.sum(-1) - total) - rest.square().sum(-1)
    return (ROUNDING * eps) ** 2 * bound


def alive(kk: Scalar, noise_: Scalar) -> Scalar:
    """``kk``, but zero where it is noise: a side without variance. NaN stays."""
    if isinstance(kk, Tensor):
        return torch.where(kk <= noise_, 0.0, kk)
    return 0.0 if kk <= noise_ else kk
