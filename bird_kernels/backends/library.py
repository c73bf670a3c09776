r"""Library matrix products and closed-form gradients. Any device, any dtype, both routes.

With X, Y centred, alpha = d value/d<K,L> and gamma = d value/d<K,K> (`moments.combine`), the gradient is::

    gram    dX = (2 alpha L + 4 gamma K) X             one product instead of autograd's four
    cross   dX = Y (2 alpha C) + X (4 gamma A)

The unbiased estimator leaves out the diagonals of K and L, kappa_i = |x_i|^2 and lambda_i = |y_i|^2. The derivative of
its value with respect to K is 2 alpha L' + 4 gamma K' with K' and L' U-centred (`dominating.u_centred_`). From L and K
without their diagonals, with their row sums r, rho = 2 alpha r_L + 4 gamma r_K, tau = sum(rho) / ((n-1)(n-2)) and
u = rho/(n-2) - tau, w = u + rho/(n-2), T = sum(x), V = sum(rho x)/(n-2)::

    gram    dX = (2 alpha L + 4 gamma K) X + diag(w) X - 1 V
    cross   dX = Y (2 alpha C) + X (4 gamma A) + E X_S + diag(w - 2 alpha lambda - 4 gamma kappa) X - u T - 1 V

where the few rows S that dominate (`dominating`) are in no product but E = 2 alpha L_S + 4 gamma K_S, their columns of
the Gram matrices without a diagonal, and kappa and lambda are zero for them.

Scalars are read and combined as Python floats; on CUDA they are tensors, and nothing leaves the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..moments import MIN_ROWS, Coefficients, Moments, Scalar, combine
from ..types import Problem, Route, Shapes, Stash
from .dominating import h_centred_, how_many, marked
from .linalg import (
    add_scaled_mm,
    at_least,
    centre,
    dtypes,
    fp32_products,
    halves,
    inner,
    inner_products,
    lesser,
    pack,
    padded,
    power_of_two,
    read,
    row_count,
    scalar,
    scaled_mm,
    self_product,
    subtract_mean,
    to,
    unscaled,
    weighted_sum,
    write,
)
from .rows import Shift, Term, places, products, shifted, wanted, weighed, whole
from .sides import Shifted, Side, Sides, by_columns, empty, kept
from .unbiased import add_rows, amid, plain, with_rows


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """The library backend runs everywhere."""
    return None


def stash_shapes(problem: Problem, route: Route, rows: int | None = None) -> Shapes:
    """Shape and dtype of every tensor of the stash; z has so many ``rows``, n if None."""
    n, p, q = problem.n, problem.p, problem.q
    wide, operand = dtypes(problem)
    gram, shifts = route == "gram", wanted(problem)
    keep_y = problem.y_grad or not gram
    few = how_many(n, problem.device) if problem.estimator == "unbiased" and not gram else 0
    return dict(
        coefficients=((len(Coefficients._fields),), torch.float64),
        xs=((rows or n, padded(q) + padded(p) + 8), problem.dtype) if shifts else ((n, p), operand),
        ys=((few + 1, padded(q) + p), wide) if shifts else ((n, q) if keep_y else (0,), operand),
        xx=((n, n) if gram else (p, p), wide),
        yy=((n, n) if gram else ((q, q) if problem.y_grad else (0,)), wide),
        xy=((0, 0) if gram else (q, p), wide),
        rows=((3, n) if problem.estimator == "unbiased" else (0,), wide),
    )


def forward(
    x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route, shift: Shift = shifted
) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32 or fp64) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None; ``shift`` makes the
    rows of the unbiased cross route."""
    wide, _ = dtypes(problem)
    count = row_count(x, mask)
    looks = x.is_cpu and not wanted(problem)
    with fp32_products(problem):
        sides = _looked(x, y, mask, count, problem, route) if looks else None
        if shift is not shifted:
            sides = amid(x, y, mask, count, problem, route, shift)
        elif sides is None:
            (near_x, x_unit), (near_y, y_unit) = _near_one(x, y, mask, problem)
            if looks and (x_unit, y_unit) != (1.0, 1.0):
                sides = _looked(near_x, near_y, mask, count, problem, route)
            if sides is None:
                careful = _careful if problem.estimator == "biased" else amid
                sides = careful(near_x, near_y, mask, count, problem, route)
            sides = sides._replace(scale_x=sides.scale_x * x_unit, scale_y=sides.scale_y * y_unit)
    products = Moments(sides.kl, sides.kk, sides.ll)
    result = combine(products, count, problem.statistic, problem.estimator, torch.finfo(wide).eps)
    value, d_kl, d_kk, d_ll = result
    if problem.statistic in ("hsic", "gram_mse"):  # have units
        value, d_kl, d_kk, d_ll = (unscaled(a, sides.scale_x, sides.scale_y) for a in result)
    coefficients = Coefficients(
        d_kl, d_kk, d_ll, sides.kl, sides.kk, sides.ll, sides.sum_k, sides.sum_l, sides.scale_x, sides.scale_y,
        at_least(MIN_ROWS[problem.estimator], count),  # with fewer the derivatives are NaN already
    )  # fmt: skip
    ys = sides.ys if problem.y_grad or route == "cross" or wanted(problem) else sides.ys.new_empty(0)
    stash = Stash(pack(coefficients, x.device), sides.xs, ys, sides.xx, sides.yy, sides.xy, sides.rows)
    return write(value, wide, x.device), stash


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    c = Coefficients(*read(stash.coefficients))
    upstream = scalar(grad)
    dx = dy = of_x = of_y = None
    gram, xs, ys = route == "gram", stash.xs, stash.ys
    with fp32_products(problem):
        if wanted(problem):
            z, beside, place_x, place_y = stash.xs[: problem.n], stash.ys, *places(problem.p, problem.q)
            few = marked(stash.rows[2]) if len(beside) > 1 else None
            of_x, of_y = Shifted(z, beside, few, place_x, place_y), Shifted(z, beside, few, place_y, place_x)
            if few is not None:
                xs, ys = (whole(z, place, beside[:, place], few) for place in (place_x, place_y))
            elif gram:  # each as it is multiplied: with the ones, for the sums of the rounded matrix
                xs, ys = (z[:, place.start :] for place in (place_x, place_y))
        if problem.x_grad:
            products = (stash.yy, stash.xx) if gram else (stash.xy, stash.xx)
            own = Side(xs, ys, *products, stash.rows, c.scale_x, c.n, (c.sum_k, c.sum_l), of_x)
            dx = _gradient(own, 2.0 * c.d_kl, 4.0 * c.d_kk, upstream, mask, route)
        if problem.y_grad:
            products = (stash.xx, stash.yy) if gram else (stash.xy.T, stash.yy)
            rows = torch.stack([stash.rows[i] for i in (1, 0, 2)]) if len(stash.rows) else stash.rows
            own = Side(ys, xs, *products, rows, c.scale_y, c.n, (c.sum_l, c.sum_k), of_y)
            dy = _gradient(own, 2.0 * c.d_kl, 4.0 * c.d_ll, upstream, mask, route)
    return x.new_empty(0) if dx is None else to(dx, x.dtype), y.new_empty(0) if dy is None else to(dy, y.dtype)


def _gradient(
    side: Side, d_cross: Scalar, d_own: Scalar, upstream: Scalar, mask: Tensor | None, route: Route
) -> Tensor:
    """Gradient of one side, by the formulas of the module."""
    d_cross, d_own, factors = _folded(d_cross, d_own, upstream, side.scale)
    if route == "gram":
        d = scaled_mm(weighted_sum(side.cross, d_cross, side.product, d_own), side.own)
        if side.shifted is not None:
            mean = side.shifted.beside[-1, side.shifted.own]
            d = d[:, : len(mean)].addr(d[:, -8], mean, alpha=-1)
    elif side.shifted is not None:
        d = _weighed(side, side.shifted, d_cross, d_own)
    else:
        d = add_scaled_mm(scaled_mm(side.other, side.cross * d_cross), side.own, side.product * d_own)
    if len(side.rows):
        d = add_rows(d, side, d_cross, d_own, route)
    for factor in factors:
        d = d * factor
    return d if mask is None else d.masked_fill_(~mask[:, None], 0.0)


def _weighed(side: Side, by: Shifted, d_cross: Scalar, d_own: Scalar) -> Tensor:
    """other cross d_cross + own product d_own of the cross route, in fp32: of all rows of z."""
    z, beside, few, own, other = by
    terms = ((own, side.product, d_own), (other, side.cross, d_cross))
    d = weighed(z, len(z), tuple(Term(place, beside[-1, place], *by) for place, *by in terms))
    return d if few is None else d.index_copy_(0, few, sum(beside[:-1, place] @ (a * b) for place, a, b in terms))


def _folded(d_cross: Scalar, d_own: Scalar, upstream: Scalar, scale: Scalar) -> tuple[Scalar, Scalar, list[Scalar]]:
    """The products' factors, and those that are left for the gradient: what would leave fp32's range is not folded in.

    A scale is up to 2^240 (fp64: 2^1000), a loss scale anything, and derivatives in units are fourth powers of scales.
    """
    unit: Scalar = 1.0
    if isinstance(d_own, float):
        peak, factor = max(abs(d_cross), abs(d_own)), upstream * scale
        if 1e-18 < abs(peak * factor) < 1e18:
            return d_cross * factor, d_own * factor, []
        unit = math.ldexp(1.0, math.frexp(peak)[1]) if 0.0 < peak < math.inf else 1.0
        d_cross, d_own = d_cross / unit, d_own / unit
    parts = halves(unit), halves(upstream), halves(scale)
    return d_cross, d_own, [part[i] for i in (0, 1) for part in parts]


def _looked(x: Tensor, y: Tensor, mask: Tensor | None, n: float, problem: Problem, route: Route) -> Sides | None:
    """The plain way, if its outcome says that this was good enough; a CPU can look.

    Without a mask a subtraction of the means: to centre with care takes a third as long as the products at 128 x 512.
    """
    unbiased = problem.estimator == "unbiased"
    if mask is not None:
        if n < MIN_ROWS[problem.estimator]:
            return None
        if not unbiased:
            sides = _careful(x, y, mask, n, problem, route)
            near = _is_normal(sides.scale_x) and _is_normal(sides.scale_y)
            return sides if near and 0.0 < sides.kk < math.inf and 0.0 < sides.ll < math.inf else None
        (xs, scale_x, _), (ys, scale_y, _) = (centre(a, mask, n, problem) for a in (x, y))
        found = plain(xs, ys, n, problem, route) if _is_normal(scale_x) and _is_normal(scale_y) else None
        return None if found is None else found._replace(scale_x=scale_x, scale_y=scale_y)
    (xs, x_sum), (ys, y_sum) = subtract_mean(x, problem.center), subtract_mean(y, problem.center)
    if unbiased:  # takes row sums of K for zero: n eps |mean| counts
        (xs, x_sum), (ys, y_sum) = subtract_mean(xs), subtract_mean(ys)
        found = plain(xs, ys, n, problem, route)
        if found is None:
            return None
        sides = found
    else:
        sides = _products(xs, ys, problem, route)
    return sides if _sound(sides.kk, x_sum, n) and _sound(sides.ll, y_sum, n) else None


def _sound(kk: float, total: Tensor, n: float) -> bool:
    """Whether a plain subtraction of the mean was good enough, judged by its outcome (CPU).

    The subtraction leaves a residual of about eps |mean|, the same in every row. It enters <K,L> not at all (L is
    centred), <K,K> by its square, and the gradient to first order as a constant: eps |mean| / spread. Up to 16 eps of
    that are let pass, spread being the fourth root of <K,K> over sqrt(n). Anything else (larger means, a constant side,
    squares of squares that leave fp32's range, NaN) takes the careful way.
    """
    return 1e-25 < kk < 1e25 and 256.0 * n * math.sqrt(kk) > torch.dot(total, total).item()


def _near_one(
    x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem
) -> tuple[tuple[Tensor, Scalar], tuple[Tensor, Scalar]]:
    """Both sides times powers of two, and these: the sums and squares of what is far from 1 leave the range of fp32."""
    narrow = wide = dtypes(problem)[0]
    if wanted(problem):  # as they are multiplied; fp16 has a range whose sums and squares fit
        narrow = problem.dtype
        if narrow == torch.float16:
            return (x, 1.0), (y, 1.0)
    x, y = (kept(to(a, wide), mask) for a in (x, y))
    units = power_of_two(x), power_of_two(y)
    if problem.statistic == "gram_mse":  # K - L needs one for both
        units = (lesser(*units),) * 2
    if all(isinstance(u, float) and 1e-5 < u < 1e5 for u in units):  # fourth powers fit
        units = 1.0, 1.0
    else:
        x, y = x * units[0], y * units[1]
    return (to(x, narrow), units[0]), (to(y, narrow), units[1])


def _is_normal(unit: float) -> bool:
    """Whether features that this power of two brings to 1 can be summed as they are: not where numbers are denormal."""
    return 1e-12 < unit < 1e12


def _careful(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> Sides:
    """Columns minus their means, with care, brought near 1; biased."""
    if wanted(problem):
        return _by_shifted(x, y, mask, count, problem, route)
    xs, scale_x, _ = centre(x, mask, count, problem)
    ys, scale_y, _ = centre(y, mask, count, problem)
    if problem.statistic == "gram_mse":  # K - L needs one scale for both
        scale = lesser(scale_x, scale_y)
        xs, ys, scale_x, scale_y = xs * (scale / scale_x), ys * (scale / scale_y), scale, scale
    return _products(xs, ys, problem, route)._replace(scale_x=scale_x, scale_y=scale_y)


def _by_shifted(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> Sides:
    """`_careful` with shifted rows, centred in their products."""
    rows = shifted(x, y, mask, problem.center, problem.statistic == "gram_mse")
    if route == "gram":
        sides = _products(*(rows.z[:, side.place] for side in (rows.x, rows.y)), problem, route, count, mask)
    else:
        xx, xy, yy = products(rows)
        kl, kk, ll = (inner(a, a) for a in (xy, xx, yy))
        sides = Sides(x, y, 1.0, 1.0, kl, kk, ll, xx, yy if problem.y_grad else empty(xx, 0), xy, empty(xx, 0))
    return with_rows(sides, rows)


def _products(
    xs: Tensor, ys: Tensor, problem: Problem, route: Route, count: Scalar | None = None, mask: Tensor | None = None
) -> Sides:
    """The products of one route and their inner products; biased. ``count``: the products are what is centred."""
    if route == "gram":
        xx, yy, xy = self_product(xs), self_product(ys), empty(xs, (0, 0))
        if count is not None and problem.center:
            xx, yy = (h_centred_(gram, count, mask) for gram in (xx, yy))
        if problem.statistic == "gram_mse":  # the difference itself is exact where the matrices agree
            difference = xx - yy
            kk = inner(difference, difference)
            kl = ll = 0.0 * kk
        else:
            kl, kk, ll = inner_products(xx, yy)
    else:
        xx, xy, yy, kl, kk, ll = by_columns(xs, ys, problem)
    return Sides(xs, ys, 1.0, 1.0, kl, kk, ll, xx, yy, xy, empty(xs, 0))
