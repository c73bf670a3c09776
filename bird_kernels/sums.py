r"""Sums over rows that determine CKA and HSIC and can be merged: the statistics of the cross route.

For rows of X [n, p] and Y [n, q] about their means, with kappa_i = |x_i|^2 and lambda_i = |y_i|^2::

    n, mean x, mean y,  A = X^T X,  C = Y^T X,  B = Y^T Y                              (biased)
    sum(kappa x), sum(kappa y), sum(lambda x), sum(lambda y),
    sum(kappa^2), sum(kappa lambda), sum(lambda^2)                                     (unbiased as well)

For the unbiased estimator dominating rows (`backends.dominating`) are summed separately in fp64, because the value is a
small difference of their fourth powers. From 10^7 times the others' size on no digit of it is left.

About another centre, i.e. of x + u and y + v with u = old mean - new mean, the sums are (sum(x) = sum(y) = 0 before)::

    A + n u u^T,   C + n v u^T,   B + n v v^T,   kappa -> kappa + 2 x.u + |u|^2,  and so on

and about a common centre the sums of two sets are added. So any split of a batch, over chunks or over processes, gives
the statistic of the whole; the gradient of a row needs only the merged sums and that row (`from_sums.gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, distributed
from .backends import rows
from .backends.dominating import squared_norms, uneven
from .backends.linalg import (
    as_tensor,
    at_least,
    centre,
    dtypes,
    fp32_products,
    mm,
    read,
    row_count,
    scalar,
    self_product,
    to,
)  # fmt: skip
from .moments import Scalar
from .transport import upper_blocks, upper_size
from .types import Problem


class Norms(NamedTuple):
    """Sums of products of the squared row norms kappa, lambda with the rows and each other; fp64, [p], [q] or 0-d.

    ``off_x`` and ``off_y`` bound the Frobenius norm of the rounding errors of ``xx`` and ``yy``.
    """

    kx: Tensor
    ky: Tensor
    lx: Tensor
    ly: Tensor
    kk: Tensor
    kl: Tensor
    ll: Tensor
    off_x: Tensor
    off_y: Tensor


class Sums(NamedTuple):
    """The sums of the module's docstring about the rows' means; ``norms`` is None for the biased estimator.

    ``n`` (0-d), ``mean_x`` [p] and ``mean_y`` [q] are fp64; ``xx`` [p, p], ``xy`` [q, p] and ``yy`` [q, q] fp32 or
    fp64.
    """

    n: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor
    norms: Norms | None

    def named(self) -> dict[str, Tensor]:
        """The tensors by name; those of ``norms`` are "norms.kx" and so on."""
        own = {name: value for name, value in self._asdict().items() if name != "norms"}
        return own | {f"norms.{name}": value for name, value in (self.norms._asdict() if self.norms else {}).items()}

    def copy(self) -> Sums:
        """The same sums with products of their own, since `include` and `from_sums.value_of` write to them."""
        return self._replace(xx=self.xx.clone(), xy=self.xy.clone(), yy=self.yy.clone())

    def to(self, dtype: torch.dtype) -> Sums:
        """The same sums with the products in another dtype."""
        return self._replace(xx=self.xx.to(dtype), xy=self.xy.to(dtype), yy=self.yy.to(dtype))


def sums_of(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> Sums:
    """The sums of x [n, p] and y [n, q] of one dtype, mask bool [n] or None; norms if the estimator is "unbiased".

    Products are fp32 (fp64 for fp64, and if dominating rows are summed separately) and not scaled, so that those of
    several sets can be added. They are NaN if all features are below 2^-46 (1.4e-14) or any reaches 2^46; in fp64
    2^-240 and 2^240."""
    unbiased = problem.estimator == "unbiased"
    if len(x) == 0:
        return no_rows(x.shape[1], y.shape[1], x.device, dtypes(problem)[0], unbiased)
    with fp32_products(problem):
        z = backends.shifted_rows(x, y, mask, problem)
        if z is None and not (unbiased and x.is_cuda):
            found = _of_centred(x, y, mask, problem)
            if found is not None:
                return found
        if z is None:
            wide, _ = dtypes(problem)
            z = rows.shifted(to(x, wide), to(y, wide), mask)
        if not unbiased:
            return _of_rows(z, problem)
        bulk, few, *_ = rows.apart(z, x, y, mask)
        heavy = rows.shifted(x[few].double(), y[few].double(), None if mask is None else mask[few])
        return include(_of_rows(bulk, problem).to(torch.float64), _of_rows(heavy, problem))


def _of_rows(z: rows.ShiftedRows, problem: Problem) -> Sums:
    """`sums_of` shifted rows, none of them treated as dominating."""
    norms = None
    if problem.estimator == "unbiased":
        xs, ys = (rows.centred(z.z, side.place, z.mean(side)) for side in (z.x, z.y))
        norms = _norms(xs, ys)
    sums = Sums(as_tensor(z.n, z.z.device), rows.mean(z, z.x), rows.mean(z, z.y), *rows.products(z), norms)
    return scaled(sums, *(_unscaled(side.scale, sums.xx.dtype) for side in (z.x, z.y)))


def _of_centred(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> Sums | None:
    """`sums_of` rows by centring them first; for the unbiased estimator None if some rows dominate."""
    count, norms = row_count(x, mask), None
    (xs, scale_x, means_x), (ys, scale_y, means_y) = (centre(a, mask, count, problem) for a in (x, y))
    if problem.estimator == "unbiased":
        norms = _norms(xs, ys, look=xs.dtype != torch.float64)
        if norms is None:
            return None
    mean_x, mean_y = (first.double() + second.double() for first, second in (means_x, means_y))
    products = self_product(xs.T), mm(ys.T, xs), self_product(ys.T)
    sums = Sums(as_tensor(count, x.device), mean_x, mean_y, *products, norms)
    return scaled(sums, *(_unscaled(scale, problem.dtype) for scale in (scale_x, scale_y)))


def _unscaled(scale: Scalar, dtype: torch.dtype) -> Scalar:
    """1 / scale, but NaN if the squares of the features leave the range of the products, or their fourth powers
    that of fp64."""
    limit = 2.0**240 if dtype == torch.float64 else 2.0**46
    if isinstance(scale, Tensor):
        return torch.where((scale >= 1.0 / limit) & (scale <= limit), 1.0 / scale, torch.nan)
    return 1.0 / scale if 1.0 / limit <= scale <= limit else math.nan


def include(total: Sums, part: Sums) -> Sums:
    """The sums of the union of two disjoint sets of rows; products are added in place to those of ``total``.

    A set without rows changes nothing, and equal means are kept exactly: a constant side stays constant.
    """
    part = part if part.xx.dtype == total.xx.dtype else part.to(total.xx.dtype)  # once, as norms need it too
    ours, theirs = scalar(total.n), scalar(part.n)
    rows = at_least(1.0, ours + theirs)
    dx, dy = part.mean_x - total.mean_x, part.mean_y - total.mean_y
    share, rest = theirs / rows, ours / rows
    norms = None
    if total.norms is not None and part.norms is not None:
        both = moved_norms(total, dx * -share, dy * -share), moved_norms(part, dx * rest, dy * rest)
        norms = Norms(*(i + j for i, j in zip(*both, strict=True)))
    far_x, far_y = dx * (theirs * rest), dy * (theirs * rest)
    for product, other, left, right in (
        (total.xx, part.xx, far_x, dx),
        (total.xy, part.xy, far_y, dx),
        (total.yy, part.yy, far_y, dy),
    ):
        product.add_(other).addr_(to(left, product.dtype), to(right, product.dtype))
    means = total.mean_x + dx * share, total.mean_y + dy * share
    return Sums(total.n + part.n, *means, total.xx, total.xy, total.yy, norms)


def totals_of(s: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """n [1] and the sums of the rows, [p] and [q]: what `merged` needs the sums of over all ranks."""
    return s.n[None], s.mean_x * s.n, s.mean_y * s.n


def merged(own: list[Sums], totals: Tensor, group: Any) -> list[Sums]:
    """The sums of the union of the rows of all ranks of a ProcessGroup, bitwise equal on each rank, of one set or more.

    ``totals`` are those of `totals_of` of each set in turn, summed over the ranks; everything else is reduced here,
    about the common means, of all sets together in their widest dtype. So two all-reduces merge them, whose size does
    not depend on the number of ranks. With a slot per rank for its means one would suffice, but at 4096 ranks of 512 +
    512 features the slots take 34 MB and the products 2.4. ``own`` is emptied: besides its products only the
    communicated buffer is in memory, then that buffer and the results.
    """
    dtypes, common = [s.xx.dtype for s in own], [*_common(own, totals)]
    layouts = [_layout(len(s.mean_x), len(s.mean_y), s.norms is not None) for s in own]
    flat = totals.new_empty(sum(map(sum, layouts)), dtype=torch.float64 if torch.float64 in dtypes else torch.float32)
    parts = flat.split([*map(sum, layouts)])
    for part, layout, means in zip(parts, layouts, common, strict=True):
        _write_moved(own.pop(0), *means[1:], part.split(layout))
    distributed.all_reduce(flat, group)
    whole = zip(common, parts, layouts, dtypes, strict=True)
    return [_as_sums(*means, part.split(layout)).to(dtype) for means, part, layout, dtype in whole]


def _common(own: Sequence[Sums], totals: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """n, 0-d, and the means [p] and [q] of all ranks' rows, of each set."""
    for s in own:
        n, sum_x, sum_y, totals = totals.tensor_split([1, 1 + len(s.mean_x), 1 + len(s.mean_x) + len(s.mean_y)])
        yield n[0], sum_x / n.clamp(min=1.0), sum_y / n.clamp(min=1.0)


def _layout(p: int, q: int, norms: bool) -> list[int]:
    """How many numbers the upper blocks of ``xx``, ``xy``, the upper blocks of ``yy`` and the `Norms` are."""
    return [upper_size(p), p * q, upper_size(q), *((p, q, p, q, 1, 1, 1, 1, 1) if norms else ())]


def _write_moved(s: Sums, mean_x: Tensor, mean_y: Tensor, into: Sequence[Tensor]) -> None:
    """Write the products and norms of the same rows about other means, as `_layout` has them."""
    u, v = s.mean_x - _own_if_equal(s.mean_x, mean_x), s.mean_y - _own_if_equal(s.mean_y, mean_y)
    for out, value in zip(into[3:], moved_norms(s, u, v) if s.norms else (), strict=True):
        out.copy_(value)
    u_n, v_n, u, v = (a.to(s.xx.dtype) for a in (u * s.n, v * s.n, u, v))  # rounded here: no fp64 copy of a product
    for flat, product, left, right, blocks in (
        (into[0], s.xx, u_n, u, upper_blocks(len(u))),
        (into[1], s.xy, v_n, u, [(0, len(v))]),
        (into[2], s.yy, v_n, v, upper_blocks(len(v))),
    ):
        firsts = [0 if product is s.xy else i for i, _ in blocks]
        sizes = [(j - i) * (len(right) - first) for (i, j), first in zip(blocks, firsts, strict=True)]
        for (i, j), first, out in zip(blocks, firsts, flat.split(sizes), strict=True):
            block = out.view(j - i, -1)
            torch.addr(product[i:j, first:], left[i:j], right[first:], out=block)


def _as_sums(n: Tensor, mean_x: Tensor, mean_y: Tensor, parts: Sequence[Tensor]) -> Sums:
    """The sums that `_write_moved` wrote, in memory of their own."""
    p, q, norms = len(mean_x), len(mean_y), parts[3:]
    xx, xy, yy = _symmetric(parts[0], p), parts[1].view(q, p).clone(), _symmetric(parts[2], q)
    own = (norm.clone() if i < 4 else norm[0].clone() for i, norm in enumerate(norms))
    return Sums(n, mean_x, mean_y, xx, xy, yy, Norms(*own) if norms else None)


def moved_norms(s: Sums, u: Tensor, v: Tensor) -> Norms:
    """The `Norms` of the rows x + u and y + v; u [p], v [q], fp64."""
    assert s.norms is not None
    kx, ky, lx, ly, kk, kl, ll, off_x, off_y = s.norms
    n, kappa, lam = scalar(s.n), scalar(trace(s.xx)), scalar(trace(s.yy))
    xx_u, xy_u = times(s.xx, u), times(s.xy, u)
    yx_v, yy_v = times(s.xy.T, v), times(s.yy, v)
    uu, xxu_u, kx_u, lx_u = read(torch.stack([u, xx_u, kx, lx]) @ u)
    vv, yyv_v, xyu_v, ky_v, ly_v = read(torch.stack([v, yy_v, xy_u, ky, ly]) @ v)
    of_k, of_l = kappa + n * uu, lam + n * vv
    return Norms(
        kx + 2.0 * xx_u + u * of_k,
        ky + 2.0 * xy_u + v * of_k,
        lx + 2.0 * yx_v + u * of_l,
        ly + 2.0 * yy_v + v * of_l,
        kk + (4.0 * (xxu_u + kx_u) + uu * (kappa + of_k)),
        kl + (4.0 * xyu_v + 2.0 * (ky_v + lx_u) + vv * kappa + uu * of_l),
        ll + (4.0 * (yyv_v + ly_v) + vv * (lam + of_l)),
        off_x,
        off_y,
    )


def _own_if_equal(own: Tensor, common: Tensor) -> Tensor:
    """The common mean, replaced by the rank's own where they differ by rounding only: of 100 fp64 constants, 25 are
    changed by a weighted mean, and the difference would count as variance."""
    return torch.where((own - common).abs() <= 4.0 * torch.finfo(own.dtype).eps * common.abs(), own, common)


def _symmetric(flat: Tensor, width: int) -> Tensor:
    """The symmetric matrix [width, width] whose upper blocks are ``flat``."""
    blocks = upper_blocks(width)
    out = flat.new_empty(width, width)
    for (i, j), part in zip(blocks, flat.split([(j - i) * (width - i) for i, j in blocks]), strict=True):
        out[i:j, i:] = part.view(j - i, width - i)
        out[j:, i:j] = out[i:j, j:].T
    return out


def no_rows(p: int, q: int, device: torch.device, wide: torch.dtype = torch.float64, norms: bool = True) -> Sums:
    """The sums of no rows, with products in ``wide``."""
    zeros = partial(torch.zeros, dtype=torch.float64, device=device)
    sizes = (p, q, p, q, (), (), (), (), ())
    xx, xy, yy = (zeros(size, dtype=wide) for size in ((p, p), (q, p), (q, q)))
    return Sums(zeros(()), zeros(p), zeros(q), xx, xy, yy, Norms(*map(zeros, sizes)) if norms else None)


def _norms(xs: Tensor, ys: Tensor, look: bool = False) -> Norms | None:
    """The `Norms` of centred rows; with ``look`` (it synchronises) None if some rows dominate."""
    norms = torch.stack([squared_norms(xs), squared_norms(ys)])
    powers = torch.cat([norms, torch.ones_like(norms[:1])]).double()
    powers = torch.mm(powers, powers.T)
    if look:
        (squares_k, _, sum_k), (_, squares_l, sum_l), _ = powers.tolist()
        if uneven(squares_k, sum_k, len(xs)) or uneven(squares_l, sum_l, len(xs)):
            return None
    kk, kl, k, _, ll, l, *_ = powers.view(-1).unbind()
    eps = torch.finfo(xs.dtype).eps
    (kx, lx), (ky, ly) = (mm(norms, rows).double().unbind() for rows in (xs, ys))
    return Norms(kx, ky, lx, ly, kk, kl, ll, eps * k, eps * l)


def scaled(s: Sums, a: Scalar, b: Scalar) -> Sums:
    """The sums of a x and b y, except the means, which stay those of x and y; products are scaled in place."""
    if isinstance(a, float) and a == b == 1.0:
        return s
    norms = s.norms
    if norms is not None:
        powers = (a**3, a * a * b, a * b * b, b**3, a**4, (a * b) ** 2, b**4, a**2, b**2)
        norms = Norms(*(value * power for value, power in zip(norms, powers, strict=True)))
    return s._replace(xx=s.xx.mul_(a**2), xy=s.xy.mul_(a * b), yy=s.yy.mul_(b**2), norms=norms)


def trace(product: Tensor) -> Tensor:
    """The trace of a matrix, 0-d, fp64."""
    return product.diagonal().sum(dtype=torch.float64)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix @ vector in fp64, since features of 1e12 enter cubed; 1,024 rows at a time, to avoid an fp64 copy."""
    if len(matrix) <= 1024 or matrix.dtype == torch.float64:
        return torch.mv(to(matrix, torch.float64), vector)
    return torch.cat([rows.double() @ vector for rows in matrix.split(1024)])
