"""Shifted rows: operands z of matrix units in the features' own dtype, where centred rows would have to be rounded.

From each column its shift is subtracted, a number of the features' dtype near the column's location (a robust mean), so
that x - shift is nearly exact. The remaining mean is subtracted from the products; in gradients it is an additional row
of the matrix that multiplies z. In half precision a column is not shifted if its location is within six standard
deviations of 0: small entries would lose bits. This is the PyTorch version; `triton.shift` does it in two launches.

Rows that may dominate (`dominating`) are separated: in z they are zero, and their values are kept in a second matrix in
fp32 or fp64, since they may be too large for z's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..moments import ROUNDING, Scalar
from ..types import Problem
from .dominating import largest, location
from .linalg import PART, at_least, kept, lesser, mm, padded, power_of_two, row_count, scalar, self_product, to

NEAR = 7.5  # in mean distances from the location: six standard deviations of a normal distribution
ROOM = 2.0**15  # fp16: entries up to this many times the spread fit into its range


class Columns(NamedTuple):
    """One side of `ShiftedRows`: columns ``place`` of z hold (x - shift) * scale, and ``total`` are their sums.

    ``shift`` [d] and ``total`` [d] are fp32 or fp64, ``scale`` is a power of two.
    """

    place: slice
    shift: Tensor
    scale: Scalar
    total: Tensor


class ShiftedRows(NamedTuple):
    """z [rows, *] in the features' dtype: y's columns, x's, each padded to a multiple of 8, and 1 1 0 0 0 0 0 0.

    Masked rows are zero, ones included, and further rows of zeros may follow. ``n`` is the number of rows that are not
    masked."""

    z: Tensor
    n: Scalar
    x: Columns
    y: Columns

    def mean(self, side: Columns) -> Tensor:
        """The means of one side's columns of z, [d], in fp32 or fp64."""
        return to(side.total / at_least(1.0, self.n), wide_of(self.z))


def wanted(problem: Problem) -> bool:
    """Whether products use shifted rows by default: on a GPU, except for fp64, where centring loses no
    digits."""
    return problem.device.type == "cuda" and problem.dtype != torch.float64


def wide_of(z: Tensor) -> torch.dtype:
    """The dtype of products and sums: fp32, or fp64 if z is."""
    return torch.promote_types(z.dtype, torch.float32)


def places(p: int, q: int) -> tuple[slice, slice]:
    """The columns of z that are x's, and y's."""
    return slice(padded(q), padded(q) + p), slice(0, q)


def described(
    z: Tensor, n: Scalar, shifts: Tensor, scales: tuple[Scalar, Scalar], totals: Tensor, *, p: int, q: int
) -> ShiftedRows:
    """`ShiftedRows` from z, the shifts [*] and sums [*] of all its columns, and the scales of x and y."""
    sides = zip(places(p, q), scales, strict=True)
    return ShiftedRows(z, n, *(Columns(place, shifts[place], scale, totals[place]) for place, scale in sides))


def shifted(x: Tensor, y: Tensor, mask: Tensor | None) -> ShiftedRows:
    """The `ShiftedRows` of x [n, p] and y [n, q] of one dtype, with mask bool [n] or None, in plain PyTorch."""
    (n, p), q, wide = x.shape, y.shape[1], wide_of(x)
    z = x.new_zeros(n, padded(q) + padded(p) + 8)
    counted = z[:, -8:-6]
    counted.fill_(1.0) if mask is None else counted.copy_(mask[:, None])  # fill_: assignment would copy from the host
    shifts, scales = torch.zeros(z.shape[1], dtype=wide, device=x.device), []
    for side, place in zip((x, y), places(p, q), strict=True):
        own = to(side, wide)
        shift = spread = location(own, mask)[0]
        if side.dtype != wide:
            spread = location((own - shift).abs(), mask)[0]
            shift = torch.where(shift.abs() > NEAR * spread, to(to(shift, side.dtype), wide), 0.0)
        own = kept(own - shift, mask)
        scale = power_of_two(own)
        if side.dtype == torch.float16:  # scaled by the largest entry alone, the others would lose bits
            scale = lesser(scale * ROOM, power_of_two(spread))
        z[:, place], shifts[place] = own * scale, shift
        scales.append(scale)
    return described(z, row_count(x, mask), shifts, (scales[0], scales[1]), z.sum(0, dtype=wide), p=p, q=q)


def apart(rows: ShiftedRows, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[ShiftedRows, Tensor, Tensor, Tensor]:
    """Separate the rows that may dominate: the rest (z is zero in their place), their indices [k], and their values.

    These are of x [k, p] and of y [k, q], minus the means of the rest; fp32 or fp64, zero where masked.
    """
    z, wide = rows.z, wide_of(rows.z)
    near = (z[: len(x), side.place] for side in (rows.x, rows.y))
    few = largest(*(torch.linalg.vector_norm(a, dim=1, dtype=wide).square() for a in near))
    z.index_fill_(0, few, 0.0)
    totals = z.sum(0, dtype=wide)
    of_x, of_y = (side._replace(total=totals[side.place]) for side in (rows.x, rows.y))
    rest = ShiftedRows(z, scalar(totals[-8]), of_x, of_y)
    known = None if mask is None else mask[few]
    heavy_x, heavy_y = (
        kept((to(features[few], wide) - side.shift) * side.scale - rest.mean(side), known)
        for side, features in ((rest.x, x), (rest.y, y))
    )
    return rest, few, heavy_x, heavy_y


def mean(rows: ShiftedRows, side: Columns) -> Tensor:
    """The mean of the features of one side, fp64 [d]."""
    return side.shift.double() + side.total.double() / at_least(1.0, rows.n) / side.scale


def products(rows: ShiftedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Zx^T Zx, Zy^T Zx and Zy^T Zy of centred columns, in fp32 or fp64; zero for a side whose variance is rounding
    only."""
    x, y, wide = rows.x, rows.y, wide_of(rows.z)
    totals: list[Tensor] = []
    for part in rows.z.split(PART):
        zx, zy = part[:, x.place], part[:, y.place]
        each = self_product(zx.T), mm(zy.T, zx), self_product(zy.T)
        totals = [a + b for a, b in zip(totals, each, strict=True)] if totals else list(each)
    xx, xy, yy = totals
    mean_x, mean_y = rows.mean(x), rows.mean(y)
    room_x, room_y = xx.trace(), yy.trace()
    for product, left, right in ((xx, x.total, mean_x), (xy, y.total, mean_x), (yy, y.total, mean_y)):
        product.addr_(to(left, wide), right, alpha=-1)
    noise = ROUNDING * torch.finfo(wide).eps
    alive_x, alive_y = (~(a.norm() <= noise * room) for a, room in ((xx, room_x), (yy, room_y)))  # True for NaN
    return xx.mul_(alive_x), xy.mul_(alive_x & alive_y), yy.mul_(alive_y)


def centred(z: Tensor, place: slice, mean: Tensor) -> Tensor:
    """Columns ``place`` of z minus ``mean`` [d], in fp32 or fp64; zero in masked rows."""
    return torch.addcmul(z[:, place], z[:, -8, None], mean, value=-1.0)


def beside_z(rows: ShiftedRows, heavy_x: Tensor, heavy_y: Tensor) -> Tensor:
    """The separated rows of `apart`, and below them the means, with columns as in z: [k + 1, *]."""
    x, y = (torch.cat([a, rows.mean(side)[None]]) for a, side in ((heavy_x, rows.x), (heavy_y, rows.y)))
    return torch.cat([pad(y, (0, rows.x.place.start - rows.y.place.stop)), x], 1)


def whole(z: Tensor, place: slice, beside: Tensor, few: Tensor) -> Tensor:
    """Columns ``place`` of z, centred, with the separated rows ``few`` put back from ``beside``: [n, d]."""
    return centred(z, place, beside[-1]).index_copy_(0, few, beside[:-1])


class Term(NamedTuple):
    """A summand of `weighed`: (columns ``place`` of z minus ``mean`` [d]) @ ``matrix`` [d, p]; fp32 or fp64."""

    place: slice
    mean: Tensor
    matrix: Tensor


def weighed(z: Tensor, n: int, terms: tuple[Term, ...], wide: bool = True) -> Tensor:
    """The sum of the terms for the first ``n`` rows, by one product with z of `ShiftedRows`: [n, p].

    In fp32 (fp64 for fp64) if ``wide``, else in the features' dtype.
    """
    p = terms[0].matrix.shape[1]
    w = terms[0].matrix.new_zeros(z.shape[1], padded(p))
    means = w.new_zeros(z.shape[1])
    for place, mean_, matrix in terms:
        w[place, :p], means[place] = matrix, mean_
    near: Scalar = 1.0
    if z.dtype == torch.float16:  # its range is small: weights and bias are scaled near 1, and unscaled in fp32
        w[-8] = torch.mv(w.T, means)
        near = power_of_two(w)
    w = (w * near).to(z.dtype)
    w[-8:].zero_()
    bias = torch.mv(to(w, means.dtype).T, means)  # of the rounded weights; stored as two numbers of z's dtype
    w[-8] = -bias
    w[-7] = -bias - to(w[-8], means.dtype)
    return mm(z, w)[:n, :p] / near if wide else rounded_product(z, w, 1.0 / near, n, p)


def rounded_product(a: Tensor, b: Tensor, factor: Scalar, n: int, width: int) -> Tensor:
    """The first ``n`` rows and ``width`` columns of a @ b in their dtype, contiguous; for fp16 times ``factor``."""
    if a.dtype != torch.float16:
        out = a @ b if a.is_cuda else mm(a, b).to(a.dtype)
        return out[:n, :width].contiguous()  # copies only if the width is not a multiple of 8
    return torch.mul(mm(a, b)[:n, :width], factor, out=a.new_empty((n, width)))
