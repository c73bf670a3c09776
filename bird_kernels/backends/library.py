r"""Library matrix products and closed-form gradients. Any device, any dtype, both routes.

With X, Y centred, alpha = d value/d<K,L> and gamma = d value/d<K,K> (`moments.combine`), the gradient is::

    gram    dX = (2 alpha L + 4 gamma K) X             one product instead of autograd's four
    cross   dX = Y (2 alpha C) + X (4 gamma A)

The unbiased estimator leaves out the diagonals of K and L, kappa_i = |x_i|^2 and lambda_i = |y_i|^2. The derivative of
its value with respect to K is M = 2 alpha L' + 4 gamma K' with K' and L' U-centred (`dominating.u_centred`)::

    gram    dX = M X                                   with M formed
    cross   dX = Y (2 alpha C) + X (4 gamma A) + E X_S + diag(w) X - u T - 1 V

where the few rows S that dominate (`dominating`) are in no product but E = 2 alpha L_S + 4 gamma K_S, their columns of
the Gram matrices without a diagonal. With the row sums r of the hollow matrices, rho = 2 alpha r_L + 4 gamma r_K and
tau = sum(rho) / ((n-1)(n-2)): u = rho/(n-2) - tau, w = u + rho/(n-2), and - (2 alpha lambda + 4 gamma kappa) for the
rows that are not in S; T = sum(x), V = sum(rho x)/(n-2).

On the CPU scalars are read and combined as Python floats; on CUDA nothing leaves the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import MIN_ROWS, Coefficients, Moments, Scalar, combine
from ..types import Problem, Route, Shapes, Stash
from .dominating import (
    alive,
    bulk_mean,
    dominated,
    largest,
    location,
    marked,
    noise,
    squared_norms,
    u_centred_,
    without,
)
from .linalg import (
    add_scaled_mm,
    at_least,
    centre,
    dtypes,
    exact,
    fp32_products,
    inner,
    inner_products,
    lesser,
    mm,
    pack,
    power_of_two,
    read,
    row_count,
    scalar,
    scaled_mm,
    self_product,
    self_product_norm,
    subtract_mean,
    to,
    weighted_sum,
    write,
)


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """The library backend runs everywhere."""
    return None


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash."""
    n, p, q = problem.n, problem.p, problem.q
    wide, operand = dtypes(problem)
    gram = route == "gram"
    keep_y = problem.y_grad or not gram
    return dict(
        coefficients=((len(Coefficients._fields),), torch.float64),
        xs=((n, p), operand),
        ys=((n, q) if keep_y else (0,), operand),
        xx=((n, n) if gram else (p, p), wide),
        yy=((n, n) if gram else ((q, q) if problem.y_grad else (0,)), wide),
        xy=((0, 0) if gram else (q, p), wide),
        rows=((3, n) if problem.estimator == "unbiased" and not gram else (0,), wide),
    )


class _Sides(NamedTuple):
    """Both sides, centred and scaled, and what the backward needs of their products; fields as in `Stash`.

    ``kl``, ``kk`` and ``ll`` are <K,L>, <K,K> and <L,L> of centred matrices; unbiased: of U-centred ones. ``rows``
    [3, n] (unbiased, cross) holds kappa, lambda, and 1 for the rows that are apart.
    """

    xs: Tensor
    ys: Tensor
    scale_x: Scalar
    scale_y: Scalar
    kl: Scalar
    kk: Scalar
    ll: Scalar
    xx: Tensor
    yy: Tensor
    xy: Tensor
    rows: Tensor


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32 or fp64) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    wide, _ = dtypes(problem)
    count = row_count(x, mask)
    with fp32_products(problem):
        sides = _looked(x, y, count, problem, route) if mask is None and x.is_cpu else None
        if sides is None:
            sides = (_careful if problem.estimator == "biased" else _amid)(x, y, mask, count, problem, route)
    products = Moments(sides.kl, sides.kk, sides.ll)
    result = combine(products, count, problem.statistic, problem.estimator, torch.finfo(wide).eps)
    value, d_kl, d_kk, d_ll = result
    if problem.statistic in ("hsic", "gram_mse"):  # have units
        value, d_kl, d_kk, d_ll = (_unscaled(a, sides.scale_x, sides.scale_y) for a in result)
    coefficients = Coefficients(
        d_kl, d_kk, d_ll, sides.kl, sides.kk, sides.ll, 0.0, 0.0, sides.scale_x, sides.scale_y,
        at_least(MIN_ROWS[problem.estimator], count),  # with fewer the derivatives are NaN already
    )  # fmt: skip
    ys = sides.ys if problem.y_grad or route == "cross" else sides.ys.new_empty(0)
    stash = Stash(pack(coefficients, x.device), sides.xs, ys, sides.xx, sides.yy, sides.xy, sides.rows)
    return write(value, wide, x.device), stash


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    c = Coefficients(*read(stash.coefficients))
    upstream = scalar(grad)
    dx = dy = None
    gram = route == "gram"
    with fp32_products(problem):
        if problem.x_grad:
            products = (stash.yy, stash.xx) if gram else (stash.xy, stash.xx)
            own = _Side(stash.xs, stash.ys, *products, stash.rows, c.scale_x, c.n)
            dx = _gradient(own, 2.0 * c.d_kl * upstream, 4.0 * c.d_kk * upstream, mask, route)
        if problem.y_grad:
            products = (stash.xx, stash.yy) if gram else (stash.xy.T, stash.yy)
            rows = torch.stack([stash.rows[i] for i in (1, 0, 2)]) if len(stash.rows) else stash.rows
            own = _Side(stash.ys, stash.xs, *products, rows, c.scale_y, c.n)
            dy = _gradient(own, 2.0 * c.d_kl * upstream, 4.0 * c.d_ll * upstream, mask, route)
    return x.new_empty(0) if dx is None else to(dx, x.dtype), y.new_empty(0) if dy is None else to(dy, y.dtype)


class _Side(NamedTuple):
    """What the gradient of one side is made of; ``cross`` is the other Gram matrix, or other^T own."""

    own: Tensor
    other: Tensor
    cross: Tensor
    product: Tensor
    rows: Tensor
    scale: Scalar
    n: Scalar


def _gradient(side: _Side, d_cross: Scalar, d_own: Scalar, mask: Tensor | None, route: Route) -> Tensor:
    """Gradient of one side, by the formulas of the module."""
    # A scale is up to 2^1000: folded into the products' factors only where these stay in fp32's range.
    small = isinstance(side.scale, float) and side.scale < 1e18
    if small:
        d_cross, d_own = d_cross * side.scale, d_own * side.scale
    if route == "gram":
        d = scaled_mm(weighted_sum(side.cross, d_cross, side.product, d_own), side.own)
    else:
        d = add_scaled_mm(scaled_mm(side.other, side.cross * d_cross), side.own, side.product * d_own)
        if len(side.rows):
            d = _add_rows(d, side, d_cross, d_own)
    if not small:
        d = d * side.scale
    return d if mask is None else d.masked_fill_(~mask[:, None], 0.0)


def _add_rows(d: Tensor, side: _Side, d_cross: Scalar, d_own: Scalar) -> Tensor:
    """The unbiased estimator's share of dX by products of columns: what stands behind the first two terms."""
    own, n = to(side.own, d.dtype), at_least(4.0, side.n)
    kappa, lam, apart = side.rows
    diagonal = lam * d_cross + kappa * d_own
    if apart.is_cpu and not apart.any():
        rho = -diagonal
    else:
        few = marked(apart)
        heavy = own[few]
        e = _without_diagonal(own @ heavy.T, few) * d_own
        other = to(side.other, d.dtype)
        e += _without_diagonal(other @ other[few].T, few) * d_cross
        d = torch.addmm(d, e, heavy)
        diagonal = diagonal * (1.0 - apart)
        rho = e.sum(1) - diagonal
    share = rho / (n - 2.0)
    u = share - exact(rho).sum().to(d.dtype) / ((n - 1.0) * (n - 2.0))
    d += (u + share - diagonal)[:, None] * own
    d -= torch.outer(u, own.sum(0))
    d -= share @ own
    return d


def _without_diagonal(columns: Tensor, few: Tensor) -> Tensor:
    """Columns ``few`` [k] of a Gram matrix, [n, k], the diagonal zero."""
    return columns.scatter_(0, few[None, :], 0.0)


def _looked(x: Tensor, y: Tensor, n: float, problem: Problem, route: Route) -> _Sides | None:
    """A plain subtraction of the means, if its outcome says that this was good enough; a CPU can look.

    To centre with care takes a third as long as the products at 128 x 512.
    """
    wide, _ = dtypes(problem)
    (xs, x_sum), (ys, y_sum) = (subtract_mean(to(a, wide), problem.center) for a in (x, y))
    if problem.estimator == "unbiased" and route == "cross":  # takes row sums of K for zero: n eps |mean| counts
        (xs, x_sum), (ys, y_sum) = subtract_mean(xs), subtract_mean(ys)
    if problem.estimator == "biased":
        sides = _products(xs, ys, 1.0, 1.0, problem, route)
    else:
        found = (_u_products if route == "gram" else _hollow_products)(xs, ys, n, problem)
        if found is None:
            return None
        sides = found
    return sides if _sound(sides.kk, x_sum, n) and _sound(sides.ll, y_sum, n) else None


def _sound(kk: float, total: Tensor, n: float) -> bool:
    """Whether a plain subtraction of the mean was good enough, judged by its outcome (CPU).

    The subtraction leaves a residual of about eps |mean|, the same in every row. It enters <K,L> not at all (L is
    centred), <K,K> by its square, and the gradient to first order as a constant: eps |mean| / spread. Up to 16 eps of
    that are let pass, spread being the fourth root of <K,K> over sqrt(n). Anything else (larger means, a constant side,
    squares of squares that leave fp32's range, NaN) takes the careful way.
    """
    return 1e-25 < kk < 1e25 and 256.0 * n * math.sqrt(kk) > torch.dot(total, total).item()


def _careful(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> _Sides:
    """Columns minus their means, with care, brought near 1; biased."""
    xs, scale_x, _ = centre(x, mask, count, problem)
    ys, scale_y, _ = centre(y, mask, count, problem)
    if problem.statistic == "gram_mse":  # K - L needs one scale for both
        scale = lesser(scale_x, scale_y)
        xs, ys, scale_x, scale_y = xs * (scale / scale_x), ys * (scale / scale_y), scale, scale
    return _products(xs, ys, scale_x, scale_y, problem, route)


def _products(xs: Tensor, ys: Tensor, scale_x: Scalar, scale_y: Scalar, problem: Problem, route: Route) -> _Sides:
    """The products of one route and their inner products; biased."""
    if route == "gram":
        xx, yy, xy = self_product(xs), self_product(ys), _empty(xs, (0, 0))
        if problem.statistic == "gram_mse":  # the difference itself is exact where the matrices agree
            difference = xx - yy
            kk = inner(difference, difference)
            kl = ll = 0.0 * kk
        else:
            kl, kk, ll = inner_products(xx, yy)
    else:
        xx, xy, yy, kl, kk, ll = _by_columns(xs, ys, problem)
    return _Sides(xs, ys, scale_x, scale_y, kl, kk, ll, xx, yy, xy, _empty(xs, 0))


def _by_columns(xs: Tensor, ys: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Scalar, Scalar, Scalar]:
    """A = X^T X, C = Y^T X, B = Y^T Y (empty if no gradient of y is wanted); |C|^2, |A|^2, |B|^2."""
    xx, xy = self_product(xs.T), mm(ys.T, xs)
    yy = self_product(ys.T) if problem.y_grad else _empty(xs, 0)
    ll = inner(yy, yy) if problem.y_grad else self_product_norm(ys.T)
    return xx, xy, yy, inner(xy, xy), inner(xx, xx), ll


def _empty(like: Tensor, size: int | tuple[int, ...]) -> Tensor:
    """One each: an operator's outputs must not share memory."""
    return like.new_empty(size, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


# --------------------------------------------------------------------------------------------------- unbiased


# Of what the unbiased self-HSIC is a difference of, the share that has to be left (CPU): 1 / 0.02 roundings are let
# pass. Below, rows dominate, or there are a dozen of them: the way without cancellation.
LEFT = 0.02


def _amid(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> _Sides:
    """The unbiased estimator whatever the rows: about the mean of those that do not dominate."""
    n = at_least(4.0, count)
    if route == "gram":
        (xs, scale_x), (ys, scale_y) = (_about_bulk(a, mask, problem) for a in (x, y))
        sides = _u_products(xs, ys, n, problem, mask, look=False)
        assert sides is not None
        return sides._replace(scale_x=scale_x, scale_y=scale_y)
    wide, operand = dtypes(problem)
    x, y = to(x, wide), to(y, wide)
    norms = [squared_norms(_kept(a - location(a, mask), mask)) for a in (x, y)]
    few = largest(*norms)
    rest = without(mask, few, len(x))
    apart = torch.zeros_like(norms[0]).scatter_(0, few, 1.0)
    zs, scales = zip(*(_about_rest(a, mask, rest, count - float(len(few)), problem) for a in (x, y)), strict=True)
    bulk = [torch.where(rest[:, None], z, 0.0).to(operand) for z in zs]
    xx, xy, yy, kl, kk, ll = _by_columns(bulk[0], bulk[1], problem)
    kappa, lam = (squared_norms(to(z, wide)) for z in bulk)
    e, f = (_without_diagonal(z @ z[few].T, few) for z in zs)
    r, s = exact(e.sum(1) - kappa), exact(f.sum(1) - lam)
    twice = 2.0 - exact(apart)  # the products of two rows, of which one is apart, stand in E once
    kl, kk, ll = (
        products + scalar(exact((a * b).sum(1)) @ twice - exact(i) @ exact(j))
        for products, a, b, i, j in ((kl, e, f, kappa, lam), (kk, e, e, kappa, kappa), (ll, f, f, lam, lam))
    )
    kl, kk, ll = (
        products + scalar(2.0 * (a @ b) / -(n - 2.0) + a.sum() * b.sum() / ((n - 1.0) * (n - 2.0)))
        for products, a, b in ((kl, r, s), (kk, r, r), (ll, s, s))
    )
    eps = torch.finfo(wide).eps
    kk, ll = (alive(a, scalar(noise(squared_norms(z), eps))) for a, z in ((kk, zs[0]), (ll, zs[1])))
    rows = torch.stack([kappa, lam, apart])
    return _Sides(zs[0].to(operand), zs[1].to(operand), scales[0], scales[1], kl, kk, ll, xx, yy, xy, rows)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask[:, None], x, 0.0)


def _about_bulk(x: Tensor, mask: Tensor | None, problem: Problem) -> tuple[Tensor, Scalar]:
    """x about the mean of the rows that do not dominate, brought near 1 by a power of two; that."""
    wide, operand = dtypes(problem)
    x = to(x, wide)
    z = _kept(x - bulk_mean(x, mask), mask)
    scale = power_of_two(z)
    return (z * scale).to(operand), scale


def _about_rest(x: Tensor, mask: Tensor | None, rest: Tensor, count: Scalar, problem: Problem) -> tuple[Tensor, Scalar]:
    """x about the mean of the ``count`` rows of ``rest``, in fp32 or better, brought near 1 by a power of two; that."""
    wide = problem._replace(device=torch.device("cpu"))  # for operands that are not rounded
    _, _, (first, second) = centre(x, rest, count, wide)
    z = _kept(x - first - second, mask)
    scale = power_of_two(z)
    return z * scale, scale


def _u_products(
    xs: Tensor, ys: Tensor, n: Scalar, problem: Problem, mask: Tensor | None = None, look: bool = True
) -> _Sides | None:
    """U-centred Gram matrices and their inner products; None if a ``look`` finds rows that dominate."""
    eps = torch.finfo(dtypes(problem)[0]).eps
    grams, noises = [], []
    for side in (xs, ys):
        gram = self_product(side)
        if look and dominated(gram.diagonal()):
            return None
        noises.append(scalar(noise(gram.diagonal(), eps)))
        grams.append(u_centred_(gram, n, mask))
    kl, kk, ll = inner_products(*grams)
    kk, ll = alive(kk, noises[0]), alive(ll, noises[1])
    return _Sides(xs, ys, 1.0, 1.0, kl, kk, ll, grams[0], grams[1], _empty(xs, (0, 0)), _empty(xs, 0))


def _hollow_products(xs: Tensor, ys: Tensor, n: float, problem: Problem) -> _Sides | None:
    """Products of columns less the diagonals, of centred columns: None where too little is left (CPU)."""
    xx, xy, yy, kl, kk, ll = _by_columns(xs, ys, problem)
    rows = torch.stack([squared_norms(xs), squared_norms(ys), torch.zeros_like(xs[:, 0])])
    if dominated(rows[0]) or dominated(rows[1]):
        return None
    kappa, lam, _ = rows.double()
    found = []
    for product, a, b in ((kl, kappa, lam), (kk, kappa, kappa), (ll, lam, lam)):
        dot, total = (a @ b).item(), a.sum().item() * b.sum().item() / ((n - 1.0) * (n - 2.0))
        found.append(product - dot * n / (n - 2.0) + total)
        if a is b and not found[-1] > LEFT * (product + dot + total):
            return None
    kl, kk, ll = found
    return _Sides(xs, ys, 1.0, 1.0, kl, kk, ll, xx, yy, xy, rows)


def _unscaled(value: Scalar, scale_x: Scalar, scale_y: Scalar) -> Scalar:
    """``value`` over the squares of both scales, one after the other: their product may leave fp64's range."""
    for scale in (scale_x, scale_y, scale_x, scale_y):
        value = value / scale
    return value
