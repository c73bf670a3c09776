r"""Dominating rows, a few whose norms are far larger than the others', and the unbiased estimator's accuracy with them.

HSIC_1 (Song et al. 2012) excludes the Gram matrices' diagonals: a row 10^4 times as large as the others adds 10^16 to
the products, which is then subtracted again. In exact arithmetic the value does not depend on the features' origin; in
fp32 its accuracy does. So the origin is a robust centre of the rows, and those that dominate are treated separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moments import ROUNDING, Scalar
from .linalg import exact, mm

GROUPS = 9  # of rows; the location is the median of their means, so outliers in up to four groups do not move it
# The number of rows that the cross route treats as dominating: a quarter, at least FEWEST, at most APART. Separate
# products for k rows cost 2k / (p + q) of a forward and k (2p + q) / ((p + q) p) of a backward. A CPU computes them
# only if a test finds such rows; CUDA always does: 32 of 65,536 x (1,024 + 1,024) are 3 and 5 % of the operations.
FEWEST = 8
APART = {"cpu": 64, "cuda": 32}
UNEVEN = 2.5  # rows may dominate if n sum(norms^2) / sum(norms)^2 of the squared norms exceeds this


def location(x: Tensor, keep: Tensor | None) -> Tensor:
    """The location, a robust centre of the rows of x [..., n, d] that few large rows do not change: [..., 1, d].

    It is the median, column by column, of the means of up to GROUPS groups. Kept rows are assigned to the groups in
    turn, so that a periodic mask does not empty one. ``keep`` bool [..., n] or [n], or None: which rows are kept.
    """
    groups = min(GROUPS, x.shape[-2])
    rows = x.shape[-2] // groups * groups
    if keep is not None:  # kept rows first, in their order
        keep, order = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        x = x.take_along_dim(order.expand(x.shape[:-1])[..., None], -2)
    parts = x[..., :rows, :].unflatten(-2, (-1, groups))
    if keep is None:
        means = parts.mean(-3)
    else:
        counted = keep[..., :rows].unflatten(-1, (-1, groups))[..., None].bool()
        means = torch.where(counted, parts, 0.0).sum(-3) / counted.sum(-3)  # NaN of a group without rows
    middle = means.nanmedian(-2, keepdim=True).values
    return torch.where(middle.isnan(), 0.0, middle)  # NaN if no row is kept; NaN features show up in x - location


def squared_norms(x: Tensor) -> Tensor:
    """|x_i|^2 of the rows of x [..., n, d]: [..., n]."""
    if x.is_cuda and not x.requires_grad:  # reads x once
        return torch.linalg.vector_norm(x, dim=-1).square()
    return torch.linalg.vecdot(x, x)


def largest(*norms: Tensor) -> Tensor:
    """Indices [..., k] of the rows that may dominate: those of the largest ratio of squared norms to their median.

    Each of ``norms`` is [..., n]; ratios are summed. On the cross route accuracy is lost if more than k rows dominate.
    """
    both = torch.stack(norms)
    score = (both / (both.median(-1, keepdim=True).values + 1e-12 * both.amax(-1, keepdim=True))).sum(0)
    return score.topk(how_many(score.shape[-1], score.device)).indices.sort().values


def marked(apart: Tensor) -> Tensor:
    """The indices of `largest` from a vector [n] that is 1 for these rows and 0 for the others."""
    return apart.topk(how_many(len(apart), apart.device)).indices.sort().values


def how_many(n: int, device: torch.device) -> int:
    """The number k of n rows that are treated as dominating."""
    return min(n, max(FEWEST, min(n // 4, APART["cpu" if device.type == "cpu" else "cuda"])))


def dominated(norms: Tensor) -> bool:
    """Whether some rows dominate the sum of these squared norms [n]. Synchronises, so it is for the CPU."""
    norms = exact(norms)
    return uneven((norms @ norms).item(), norms.sum().item(), len(norms))


def uneven(squares: float, total: float, n: float) -> bool:
    """`dominated` from the sum of the squares and the sum of the squared norms of ``n`` rows.

    If one row's squared norm is r times the others', squares n / total^2 exceeds 2.5 from r of about 1.6 sqrt(n) on:
    long before fp32 loses the others. If m rows have the whole sum, it is n / m. Normal features of one dimension
    have 3, of two 2, of many 1. For few rows about their mean it is at most ((n-1)^3 + 1) / (n (n-1)), too small for
    the test: fewer than 8 rows always count as uneven.
    """
    return n < 8.0 or not squares * n <= min(UNEVEN, n / 4.0) * total * total  # so NaN too


def without(keep: Tensor | None, index: Tensor, n: int) -> Tensor:
    """``keep`` bool [..., n] (None: all rows) with the rows ``index`` [..., k] set to False."""
    shape = (*index.shape[:-1], n)
    keep = torch.ones(shape, dtype=torch.bool, device=index.device) if keep is None else keep.expand(shape)
    return keep.scatter(-1, index, False)


def bulk_mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """The mean of the half of the kept rows of x [..., n, d] that is nearest to their `location`: [..., 1, d], in x's
    dtype. ``keep`` bool [..., n] or None: which rows are kept.

    The unbiased estimator does not depend on the features' origin, but its rounding does: about the mean of all rows,
    one that is 10^4 times as large as the others would be added to all of them.
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
    """Columns ``few`` [..., k] of the Gram matrix of x [..., n, d], diagonal zero: [..., n, k], at least fp32."""
    return mm(x, rows_at(x, few).mT).scatter(-2, few[..., None, :], 0.0)


def u_centred_(gram: Tensor, n: Scalar, keep: Tensor | None) -> Tensor:
    """U-centre a Gram matrix [..., m, m] in place, without its diagonal (Szekely and Rizzo 2014), and return it.

    K_ij - (r_i + r_j) / (n-2) + sum(r) / ((n-1)(n-2)) off the diagonal, with the row sums r: HSIC_1 is the inner
    product of two such matrices over n (n-3). ``n`` is the number of kept rows (at least 3; a number or a tensor
    [..., 1, 1]), which are those of ``keep`` [..., m]; None: all.
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
    """A bound of <K, K> over the off-diagonal entries of K = X X^T if they are rounding errors only, for each of the
    ``sides`` X [..., n, d]: [sides, ...], fp64.

    ``norms`` [sides, ..., n] are the squared row norms. The error of an entry K_ij is about eps sum_k |x_ik x_jk|, far
    less than eps |x_i| |x_j| if two rows dominate in different features: the sum is used for pairs of the rows ``few``
    [..., k] (None: all), and |x_i| |x_j| for other pairs. ROUNDING eps allows for the errors of centring.
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
    """``kk``, but zero where it is at most ``noise_``, as for a side without variance; NaN stays NaN."""
    if isinstance(kk, Tensor):
        return torch.where(kk <= noise_, 0.0, kk)
    return 0.0 if kk <= noise_ else kk
