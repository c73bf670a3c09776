"""Rows of both sides as matrix units multiply them: shifted, and so as exact as the features, where centred rows would
have to be rounded.

A column's shift is a number of the features' own dtype, so that x - shift is exact in it, or as good as exact; what is
left of the mean is taken off the products, and a gradient gets it as one row more of the matrix that multiplies z. In
half precision a column keeps its location where that is within six spreads: small entries would lose bits to the shift.
Here this is done in plain PyTorch; `triton.shift` makes the same rows in two launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import ROUNDING, Scalar
from .dominating import location
from .linalg import PART, mm, pack, padded, power_of_two, self_product
from .sides import kept

NEAR = 7.5  # mean distances from a location, six standard deviations of a normal distribution


class Columns(NamedTuple):
    """One side of `Rows`: columns ``place`` of z hold (x - shift) scale and have the sums ``total``.

    ``shift`` [d], ``total`` [d] and the power of two ``scale`` (0-d) are fp64.
    """

    place: slice
    shift: Tensor
    scale: Tensor
    total: Tensor


class Rows(NamedTuple):
    """z [rows, *] in the features' dtype: y's columns, x's, each padded to a multiple of 8, and 1 1 0 0 0 0 0 0.

    Rows that do not count are zero, and there may be more of them than the features have. ``n`` (0-d, fp64) is the
    number of those that do.
    """

    z: Tensor
    n: Tensor
    x: Columns
    y: Columns


def described(z: Tensor, shifts: Tensor, scales: Tensor, totals: Tensor, p: int, q: int) -> Rows:
    """`Rows` from z, the shifts [*] and column sums [*] of its columns, and the scales [2] of x and y."""
    places = slice(padded(q), padded(q) + p), slice(0, q)
    x, y = (Columns(at, shifts[at].double(), scales[i].double(), totals[at]) for i, at in enumerate(places))
    return Rows(z, totals[-8], x, y)


def shifted(x: Tensor, y: Tensor, mask: Tensor | None) -> Rows:
    """x [n, p] and y [n, q], fp32 or half precision, with mask bool [n] or None, in plain PyTorch."""
    (n, p), q = x.shape, y.shape[1]
    z = x.new_zeros(n, padded(q) + padded(p) + 8)
    counted = z[:, -8:-6]
    counted.fill_(1.0) if mask is None else counted.copy_(mask[:, None])  # an assigned number is copied from the host
    shifts, scales = torch.zeros(z.shape[1], device=x.device), []
    for side, start in ((x, padded(q)), (y, 0)):
        wide = side.float()
        shift = location(wide, mask)[0]
        if side.dtype != torch.float32:
            far = shift.abs() > NEAR * location((wide - shift).abs(), mask)[0]
            shift = torch.where(far, shift.to(side.dtype).float(), 0.0)
        wide = kept(wide - shift, mask)
        scales.append(power_of_two(wide))
        place = slice(start, start + side.shape[1])
        z[:, place], shifts[place] = wide * scales[-1], shift
    return described(z, shifts, pack(tuple(scales), x.device), z.sum(0, dtype=torch.float32).double(), p, q)


def mean(rows: Rows, side: Columns) -> Tensor:
    """The mean of the features of one side, fp64 [d]."""
    return side.shift + side.total / rows.n.clamp(min=1.0) / side.scale


def products(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Zx^T Zx, Zy^T Zx and Zy^T Zy of columns about their means, fp32; zero of a side that is rounding alone."""
    x, y = rows.x, rows.y
    totals: list[Tensor] = []
    for part in rows.z.split(PART):
        zx, zy = part[:, x.place], part[:, y.place]
        each = self_product(zx.T), mm(zy.T, zx), self_product(zy.T)
        totals = [a + b for a, b in zip(totals, each, strict=True)] if totals else list(each)
    xx, xy, yy = totals
    mean_x, mean_y = (side.total / rows.n.clamp(min=1.0) for side in (x, y))
    room_x, room_y = xx.trace(), yy.trace()
    for product, left, right in ((xx, x.total, mean_x), (xy, y.total, mean_x), (yy, y.total, mean_y)):
        product.addr_(left.float(), right.float(), alpha=-1)
    noise = ROUNDING * torch.finfo(torch.float32).eps
    alive_x, alive_y = (~(a.norm() <= noise * room) for a, room in ((xx, room_x), (yy, room_y)))  # NaN is
    return xx.mul_(alive_x), xy.mul_(alive_x & alive_y), yy.mul_(alive_y)


def centred(rows: Rows, side: Columns) -> Tensor:
    """Z of one side about its mean, fp32 [rows, d]; zero where a row does not count."""
    z = rows.z[:, side.place].float()
    return z.addr(rows.z[:, -8].float(), (side.total / rows.n.clamp(min=1.0)).float(), alpha=-1)


class Term(NamedTuple):
    """(x - origin) matrix factor, a summand of `weighed`; [n, p] of matrix fp32 [d, p] and origin fp64 [d]."""

    matrix: Tensor
    factor: Scalar
    origin: Tensor


def weighed(rows: Rows, n: int, of_x: Term, of_y: Term, wide: bool) -> Tensor:
    """The sum of both terms for the first ``n`` rows, in one product with z: [n, p].

    In fp32 if ``wide``, else in the features' dtype.
    """
    z, p = rows.z, of_x.matrix.shape[1]
    w = of_x.matrix.new_zeros(z.shape[1], padded(p))
    means = w.new_zeros(z.shape[1])
    for side, term in ((rows.x, of_x), (rows.y, of_y)):
        w[side.place, :p] = term.matrix * (term.factor / side.scale)
        means[side.place] = (side.shift - term.origin) * side.scale
    near: Scalar = 1.0
    if z.dtype == torch.float16:  # its range is short: weights and bias are brought near 1, the result back in fp32
        w[-8] = torch.mv(w.T, means)
        near = power_of_two(w)
    w = (w * near).to(z.dtype)
    w[-8:].zero_()
    bias = torch.mv(w.float().T, means)  # of the rounded weights, in two numbers of their dtype
    w[-8] = bias
    w[-7] = bias - w[-8].float()
    return mm(z, w)[:n, :p] / near if wide else rounded_product(z, w, 1.0 / near, n, p)


def rounded_product(a: Tensor, b: Tensor, factor: Scalar, n: int, width: int) -> Tensor:
    """The first ``n`` rows and ``width`` columns of a @ b in their dtype, dense; of fp16 times ``factor``."""
    if a.dtype != torch.float16:
        out = a @ b if a.is_cuda else mm(a, b).to(a.dtype)
        return out[:n, :width].contiguous()  # a copy only where the width is no multiple of 8
    return torch.mul(mm(a, b)[:n, :width], factor, out=a.new_empty((n, width)))
