"""What the sums of a batch give: the value of a statistic, and the gradient of any of the rows they were made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.dominating import alive, bulk_mean, dominated, largest, squared_norms
from .backends.linalg import at_least, dtypes, fp32_products, inner, scalar, to
from .backends.rows import Rows, Term, weighed
from .moments import MIN_ROWS, ROUNDING, Coefficients, Moments, Scalar, combine
from .sums import Norms, Sums, scaled, times, trace
from .types import Problem


def evaluate(s: Sums, problem: Problem) -> tuple[Scalar, Coefficients, Sums]:
    """The value of ``problem.statistic``, and what `gradient` needs: the coefficients, and the sums that they scale,
    the products in the memory of ``s``.

    The features are brought to a root mean square near 1 by powers of two, so that the squares of the products fit in
    fp32.
    """
    n = scalar(s.n)
    scale_x, scale_y = _unit(s.xx, n), _unit(s.yy, n)
    s = scaled(s, scale_x, scale_y)
    kl, kk, ll = inner(s.xy, s.xy), inner(s.xx, s.xx), inner(s.yy, s.yy)
    sum_k = sum_l = 0.0
    if s.norms is not None and problem.estimator == "unbiased":
        eps, rows = torch.finfo(s.xx.dtype).eps, at_least(MIN_ROWS["unbiased"], n)
        sum_k, sum_l = scalar(trace(s.xx)), scalar(trace(s.yy))
        kl, _ = _u_centred(kl, scalar(s.norms.kl), sum_k * sum_l, rows)
        kk, size_k = _u_centred(kk, scalar(s.norms.kk), sum_k * sum_k, rows)
        ll, size_l = _u_centred(ll, scalar(s.norms.ll), sum_l * sum_l, rows)
        kk = alive(kk, ROUNDING * (2.0 * size_k**0.5 * scalar(s.norms.off_x) + eps * size_k))
        ll = alive(ll, ROUNDING * (2.0 * size_l**0.5 * scalar(s.norms.off_y) + eps * size_l))
    result = combine(Moments(kl, kk, ll), n, problem.statistic, problem.estimator, torch.finfo(s.xx.dtype).eps)
    unscale = 1.0 / (scale_x * scale_y) ** 2 if problem.statistic == "hsic" else 1.0
    coefficients = Coefficients(
        result.d_kl * unscale, result.d_kk, result.d_ll, kl, kk, ll, sum_k, sum_l, scale_x, scale_y,
        at_least(MIN_ROWS[problem.estimator], n),
    )  # fmt: skip
    return result.value * unscale, coefficients, s


def _u_centred(product: Scalar, diagonal: Scalar, total: Scalar, n: Scalar) -> tuple[Scalar, Scalar]:
    """The inner product of two U-centred Gram matrices of centred columns, and the sum of what it is a difference of.

    ``product`` and ``diagonal`` are those of the whole matrices and of their diagonals, ``total`` is the product of
    their traces: the row sums without the diagonal are minus the diagonal.
    """
    total = total / ((n - 1.0) * (n - 2.0))
    return product - diagonal * n / (n - 2.0) + total, product + diagonal + total


def gradient(
    x: Tensor, y: Tensor, mask: Tensor | None, s: Sums, c: Coefficients, upstream: Scalar, *, problem: Problem,
    exact: Sums | None = None,
) -> Tensor:  # fmt: skip
    """dX [m, p] of some rows x [m, p], y [m, q] of those that ``s`` and ``c`` (of `evaluate`) were made from.

    With X, Y about the merged means, alpha = c.d_kl and gamma = c.d_kk, it is Y (2 alpha C) + X (4 gamma A); unbiased,
    see `_rows`. In x's dtype. For dY exchange the sides, by `exchanged`. ``exact`` are the same sums with products in
    fp64 if those of ``s`` were rounded: rows that dominate need them.
    """
    if x.shape[0] == 0:
        return torch.zeros_like(x)
    g = upstream * c.scale_x
    factors = 2.0 * c.d_kl * g, 4.0 * c.d_kk * g
    means = s.mean_x, s.mean_y
    with fp32_products(problem):
        z = backends.rows_of(x, y, mask, problem)
        if problem.estimator == "unbiased":
            d = _unbiased(x, y, mask, s, factors, c, z=z, exact=exact or s)
        elif z is None:
            d = _weighed(_around(x, y, mask, None, means, c, wide=dtypes(problem)[0]), s.xx, s.xy, factors, c)
        else:
            d = _weighed(_Around(x, y, z, means), s.xx, s.xy, factors, c, wide=False)
    if mask is not None:
        d = d.masked_fill(~mask[:, None], 0.0)
    return to(d, x.dtype)


class _Around(NamedTuple):
    """Rows xs [m, p] and ys [m, q] about ``origins`` [p] and [q], times `Coefficients`' scales; fp32 or fp64.

    ``z``: the same rows as `rows.weighed` takes them; None where xs and ys themselves are multiplied.
    """

    xs: Tensor
    ys: Tensor
    z: Rows | None
    origins: tuple[Tensor, Tensor]


def _around(
    x: Tensor, y: Tensor, mask: Tensor | None, z: Rows | None, origins: tuple[Tensor, Tensor], c: Coefficients, *,
    wide: torch.dtype,
) -> _Around:  # fmt: skip
    xs, ys = _about(x, origins[0], c.scale_x, mask, wide), _about(y, origins[1], c.scale_y, mask, wide)
    return _Around(xs, ys, z, origins)


def _weighed(
    rows: _Around, xx: Tensor, xy: Tensor, factors: tuple[Scalar, Scalar], c: Coefficients, wide: bool = True
) -> Tensor:
    """ys (xy factors[0]) + xs (xx factors[1]) of products about the rows' origins; in the features' dtype unless
    ``wide``."""
    xs, ys, z, (origin_x, origin_y) = rows
    if z is None:
        d = ys @ to(xy * factors[0], ys.dtype)
        return torch.addmm(d, xs, to(xx * factors[1], xs.dtype), out=d)
    of_x = Term(to(xx, torch.float32), factors[1] * c.scale_x, origin_x)
    of_y = Term(to(xy, torch.float32), factors[0] * c.scale_y, origin_y)
    return weighed(z, len(xs), of_x, of_y, wide)


def _unbiased(
    x: Tensor, y: Tensor, mask: Tensor | None, s: Sums, factors: tuple[Scalar, Scalar], c: Coefficients, *,
    z: Rows | None, exact: Sums,
) -> Tensor:  # fmt: skip
    """dX [m, p] of rows x [m, p], y [m, q] of the unbiased estimator, in fp32 or fp64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = _around(x, y, mask, z, (s.mean_x, s.mean_y), c, wide=wide)
    norms = squared_norms(rows.xs), squared_norms(rows.ys)
    if x.is_cpu and not any(map(dominated, norms)):
        return _rows(rows, s, None, factors, c)
    few = largest(*norms)
    origins = bulk_mean(to(x, wide), mask)[0].double(), bulk_mean(to(y, wide), mask)[0].double()
    about = (origins[0] - s.mean_x) * c.scale_x, (origins[1] - s.mean_y) * c.scale_y
    d = _rows(_around(x, y, mask, z, origins, c, wide=wide), s, about, factors, c)
    heavy = _around(x[few], y[few], None, None, origins, c, wide=torch.float64)
    return d.index_copy_(0, few, _rows(heavy, exact, about, factors, c).to(d.dtype))


def _rows(
    rows: _Around, s: Sums, about: tuple[Tensor, Tensor] | None, factors: tuple[Scalar, Scalar], c: Coefficients
) -> Tensor:
    r"""dX [m, p] of ``rows`` about an origin that is ``about`` = (u, v) from the merged means; None: there.

    The estimator does not depend on the origin, its rounding does. With a and b the ``factors``, A and C about that
    origin, T = sum(x) = -n u and T' = sum(y) = -n v over all rows, r_i = x_i T - kappa_i and s_i = y_i T' - lambda_i
    the row sums of the Gram matrices without their diagonals, rho = a s + b r and tau = sum(rho) / ((n-1)(n-2))::

        dX_i = y_i a C + x_i b A - (a lambda_i + b kappa_i) x_i
               + (2 rho_i / (n-2) - tau) x_i - (rho_i / (n-2) - tau) T - sum_j(rho_j x_j) / (n-2)
    """
    a, b = factors
    xs, ys = rows.xs, rows.ys
    norms, n = s.norms, c.n
    assert norms is not None
    xx, xy, kx, lx = s.xx, s.xy, norms.kx, norms.lx
    total_k, total_l = -c.sum_k, -c.sum_l  # of the row sums r and s
    column = None
    if about is not None:
        u, v = about
        uu, vv = u @ u, v @ v
        kx = kx - 2.0 * times(xx, u) - u * (c.sum_k + n * uu)
        lx = lx - 2.0 * times(xy.T, v) - u * (c.sum_l + n * vv)
        xx, xy = xx + n * torch.outer(u, u), xy + n * torch.outer(v, u)
        column, other_column = -n * u, -n * v
        total_k, total_l = total_k + n * (n - 1.0) * scalar(uu), total_l + n * (n - 1.0) * scalar(vv)
        kx, lx = kx - times(xx, column), lx - times(xy.T, other_column)
    wide = xs.dtype
    d = _weighed(rows, xx, xy, factors, c)
    diagonal = squared_norms(ys) * a + squared_norms(xs) * b
    rho = -diagonal
    if column is not None:
        rho = rho + (ys @ to(other_column, wide)) * a + (xs @ to(column, wide)) * b
    rest = rho / (n - 2.0) - (a * total_l + b * total_k) / ((n - 1.0) * (n - 2.0))
    d += (rest + rho / (n - 2.0) - diagonal)[:, None] * xs
    d += to((lx * a + kx * b) / (n - 2.0), wide)
    return d if column is None else d.sub_(torch.outer(rest, to(column, wide)))


def exchanged(s: Sums, c: Coefficients) -> tuple[Sums, Coefficients]:
    """The two sides change places."""
    norms = None if s.norms is None else Norms(*(s.norms[i] for i in (3, 2, 1, 0, 6, 5, 4, 8, 7)))
    return (
        Sums(s.n, s.mean_y, s.mean_x, s.yy, s.xy.T, s.xx, norms),
        Coefficients(c.d_kl, c.d_ll, c.d_kk, c.kl, c.ll, c.kk, c.sum_l, c.sum_k, c.scale_y, c.scale_x, c.n),
    )


def _unit(product: Tensor, count: Scalar) -> Scalar:
    """2^k that brings the largest feature's root mean square into [1/2, 1)."""
    peak = product.diagonal().amax()
    if isinstance(count, float):
        square = peak.item() / max(count, 1.0)
        return 2.0 ** -math.frexp(square**0.5)[1] if 0.0 < square < math.inf else 1.0
    peak = (peak.double() / count.clamp(min=1.0)).sqrt()
    finite = torch.isfinite(peak) & (peak > 0.0)
    exponent = torch.frexp(torch.where(finite, peak, 1.0)).exponent
    return scalar(torch.ldexp(torch.ones_like(peak), -exponent))


def _about(x: Tensor, mean: Tensor, scale: Scalar, mask: Tensor | None, wide: torch.dtype) -> Tensor:
    """(x - mean) * scale in ``wide``; the mean in two parts, so that fp32 loses none of its fp64 digits that count."""
    high = mean.to(wide)
    x = (to(x, wide) - high).sub_((mean - high).to(wide)).mul_(scale)
    return x if mask is None else torch.where(mask[:, None], x, 0.0)
