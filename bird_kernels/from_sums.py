"""The value of a statistic from the sums of a batch (`sums`), and the gradient of any of its rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import backends
from .backends.dominating import alive, dominated, squared_norms
from .backends.linalg import LIMIT, at_least, fp32_products, inner, kept, scalar, to, unit_of
from .backends.rows import ShiftedRows, Term, apart, centred, mean, shifted, weighed, wide_of
from .moments import MIN_ROWS, ROUNDING, Coefficients, Moments, Scalar, combine
from .sums import Norms, Sums, scaled, times, trace
from .types import Problem


def value_of(s: Sums, problem: Problem) -> tuple[Scalar, Coefficients, Sums]:
    """The value of ``problem.statistic``, and what `gradient` needs: coefficients and scaled sums (``s`` is scaled in
    place).

    The features are scaled by powers of two to a root mean square near 1, so that the squares of the products fit in
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
        result.d_kl * unscale,
        result.d_kk,
        result.d_ll,
        kl,
        kk,
        ll,
        sum_k,
        sum_l,
        scale_x,
        scale_y,
        at_least(MIN_ROWS[problem.estimator], n),
    )
    return result.value * unscale, coefficients, s


def _u_centred(product: Scalar, diagonal: Scalar, total: Scalar, n: Scalar) -> tuple[Scalar, Scalar]:
    """The inner product of two U-centred Gram matrices of centred columns, and the sum of its terms' absolute values.

    ``product`` and ``diagonal`` are the inner products of the whole matrices and of their diagonals, ``total`` is the
    product of their traces: since columns are centred, the row sums without the diagonal are minus the diagonal.
    """
    total = total / ((n - 1.0) * (n - 2.0))
    return product - diagonal * n / (n - 2.0) + total, product + diagonal + total


def gradient(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    s: Sums,
    c: Coefficients,
    upstream: Scalar,
    *,
    problem: Problem,
    exact: Sums | None = None,
) -> Tensor:
    """dX [m, p] in x's dtype for rows x [m, p], y [m, q] that are part of ``s``; ``s`` and ``c`` are from `value_of`.

    With X, Y about the merged means, alpha = c.d_kl and gamma = c.d_kk, it is Y (2 alpha C) + X (4 gamma A); for the
    unbiased estimator see `_rows`. For dY swap the sides by `exchanged`. ``exact`` are the same sums with products in
    fp64, if those of ``s`` were rounded: dominating rows need them.
    """
    if x.shape[0] == 0:
        return torch.zeros_like(x)
    g = upstream * c.scale_x
    factors = 2.0 * c.d_kl * g, 4.0 * c.d_kk * g
    with fp32_products(problem):
        z = backends.shifted_rows(x, y, mask, problem)
        if problem.estimator == "unbiased":
            d = _unbiased(x, y, mask, z, s, factors, c=c, exact=exact or s)
        elif z is None:
            d = _products(*_about(x, y, mask, s, c), s.xx, s.xy, factors)
        else:
            d = weighed(z.z, len(x), _terms(z, (s.mean_x, s.mean_y), s.xx, s.xy, factors, c), wide=False)
    if mask is not None:
        d = d.masked_fill(~mask[:, None], 0.0)
    return to(d, x.dtype)


def _about(x: Tensor, y: Tensor, mask: Tensor | None, s: Sums, c: Coefficients) -> tuple[Tensor, Tensor]:
    """Both sides minus the merged means, times the scales of ``c``, in fp32 or fp64; the fp64 means are subtracted in
    two fp32 parts, so that their digits are not lost."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xs, ys = (
        kept((to(a, wide) - to(mean, wide)).sub_(to(mean - to(mean, wide), wide)).mul_(scale), mask)
        for a, mean, scale in ((x, s.mean_x, c.scale_x), (y, s.mean_y, c.scale_y))
    )
    return xs, ys


def _products(xs: Tensor, ys: Tensor, xx: Tensor, xy: Tensor, factors: tuple[Scalar, Scalar]) -> Tensor:
    """ys (xy factors[0]) + xs (xx factors[1]), where all are about the same origin."""
    d = ys @ to(xy * factors[0], ys.dtype)
    return torch.addmm(d, xs, to(xx * factors[1], xs.dtype), out=d)


def _terms(
    z: ShiftedRows,
    origins: tuple[Tensor, Tensor],
    xx: Tensor,
    xy: Tensor,
    factors: tuple[Scalar, Scalar],
    c: Coefficients,
) -> tuple[Term, Term]:
    """The two summands of `_products` for shifted rows, as terms of `weighed`."""
    each = (z.x, origins[0], xx, factors[1] * c.scale_x), (z.y, origins[1], xy, factors[0] * c.scale_y)
    wide = wide_of(z.z)
    x, y = (
        Term(side.place, to((origin - side.shift) * side.scale, wide), to(matrix, wide) * (factor / side.scale))
        for side, origin, matrix, factor in each
    )
    return x, y


def _unbiased(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    z: ShiftedRows | None,
    s: Sums,
    factors: tuple[Scalar, Scalar],
    *,
    c: Coefficients,
    exact: Sums,
) -> Tensor:
    """dX [m, p] of rows x [m, p], y [m, q] of the unbiased estimator, in fp32 or fp64."""
    if z is None:
        xs, ys = _about(x, y, mask, s, c)
        if not x.is_cuda and not any(dominated(squared_norms(a)) for a in (xs, ys)):  # a test that synchronises
            return _rows(lambda xx, xy: _products(xs, ys, xx, xy, factors), xs, ys, s, None, factors, c=c)
        z = shifted(to(x, xs.dtype), to(y, xs.dtype), mask)
    z, few, *_ = apart(z, x, y, mask)
    origins = mean(z, z.x), mean(z, z.y)
    about = (origins[0] - s.mean_x) * c.scale_x, (origins[1] - s.mean_y) * c.scale_y
    xs, ys = (
        centred(z.z, side.place, z.mean(side))[: len(x)] * (scale / side.scale)
        for side, scale in ((z.x, c.scale_x), (z.y, c.scale_y))
    )
    d = _rows(
        lambda xx, xy: weighed(z.z, len(x), _terms(z, origins, xx, xy, factors, c)), xs, ys, s, about, factors, c=c
    )
    xs, ys = ((a[few].double() - origins[i]) * (c.scale_x, c.scale_y)[i] for i, a in enumerate((x, y)))
    heavy = _rows(lambda xx, xy: _products(xs, ys, xx, xy, factors), xs, ys, exact, about, factors, c=c)
    return d.index_copy_(0, few, to(heavy, d.dtype))


def _rows(
    product: Callable[[Tensor, Tensor], Tensor],
    xs: Tensor,
    ys: Tensor,
    s: Sums,
    about: tuple[Tensor, Tensor] | None,
    factors: tuple[Scalar, Scalar],
    *,
    c: Coefficients,
) -> Tensor:
    r"""dX [m, p] of rows xs, ys about an origin that is ``about`` = (u, v) from the merged means; None: u = v = 0.

    The estimator does not depend on the origin, but its rounding does. With a and b the ``factors``, A and C about that
    origin, T = sum(x) = -n u and T' = sum(y) = -n v over all rows, r_i = x_i T - kappa_i and s_i = y_i T' - lambda_i
    the row sums of the Gram matrices without their diagonals, rho = a s + b r and tau = sum(rho) / ((n-1)(n-2))::

        dX_i = y_i a C + x_i b A - (a lambda_i + b kappa_i) x_i
               + (2 rho_i / (n-2) - tau) x_i - (rho_i / (n-2) - tau) T - sum_j(rho_j x_j) / (n-2)

    ``product(A, C)`` computes the first two terms.
    """
    a, b = factors
    norms, n = s.norms, c.n
    assert norms is not None
    xx, xy, kx, lx = s.xx, s.xy, norms.kx, norms.lx
    total_k, total_l, column = -c.sum_k, -c.sum_l, None  # of the row sums r and s
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
    d = product(xx, xy)
    diagonal = squared_norms(ys) * a + squared_norms(xs) * b
    rho = -diagonal
    if column is not None:
        rho = rho + (ys @ to(other_column, wide)) * a + (xs @ to(column, wide)) * b
    rest = rho / (n - 2.0) - (a * total_l + b * total_k) / ((n - 1.0) * (n - 2.0))
    d.addcmul_((rest + rho / (n - 2.0) - diagonal)[:, None], xs)
    d += to((lx * a + kx * b) / (n - 2.0), wide)
    return d if column is None else d.addr_(rest, to(column, wide), alpha=-1)


def exchanged(s: Sums, c: Coefficients) -> tuple[Sums, Coefficients]:
    """``s`` and ``c`` with the sides x and y swapped."""
    norms = None if s.norms is None else Norms(*(s.norms[i] for i in (3, 2, 1, 0, 6, 5, 4, 8, 7)))
    return (
        Sums(s.n, s.mean_y, s.mean_x, s.yy, s.xy.T, s.xx, norms),
        Coefficients(c.d_kl, c.d_ll, c.d_kk, c.kl, c.ll, c.kk, c.sum_l, c.sum_k, c.scale_y, c.scale_x, c.n),
    )


def _unit(product: Tensor, count: Scalar) -> Scalar:
    """2^k that brings the root mean square of the largest feature into [1/2, 1); 1 if that is 0."""
    square = scalar(product.diagonal().amax()) / at_least(1.0, count)
    return unit_of(square**0.5, LIMIT[torch.float64])
