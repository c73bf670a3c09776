r"""Backend of PyTorch's matrix products and closed-form gradients. Any device, any dtype, both routes.

With X, Y centred, alpha = d value/d<K,L> and gamma = d value/d<K,K> (`moments.combine`), the gradient is::

    gram    dX = (2 alpha L + 4 gamma K) X             one product instead of autograd's four
    cross   dX = Y (2 alpha C) + X (4 gamma A)

The unbiased estimator leaves out the diagonals of K and L, kappa_i = |x_i|^2 and lambda_i = |y_i|^2. The derivative of
its value with respect to K is 2 alpha L' + 4 gamma K' with K' and L' U-centred (`dominating.u_centred_`). From L and K
without their diagonals, with their row sums r, rho = 2 alpha r_L + 4 gamma r_K, tau = sum(rho) / ((n-1)(n-2)) and
u = rho/(n-2) - tau, w = u + rho/(n-2), T = sum(x), V = sum(rho x)/(n-2)::

    gram    dX = (2 alpha L + 4 gamma K) X + diag(w) X - 1 V
    cross   dX = Y (2 alpha C) + X (4 gamma A) + E X_S + diag(w - 2 alpha lambda - 4 gamma kappa) X - u T - 1 V

where the few dominating rows S (`dominating`) are left out of A, C, kappa and lambda, and enter only by their columns
of the Gram matrices without diagonals, E = 2 alpha L_S + 4 gamma K_S.

Scalars are read and combined as Python floats; on CUDA they stay 0-d tensors, so that nothing synchronises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..moments import MIN_ROWS, Coefficients, Moments, Scalar, combine
from ..types import Problem, Route, Shapes, Stash, Statistic
from .dominating import how_many, marked
from .linalg import (
    add_scaled_mm,
    at_least,
    centre,
    dtypes,
    fp32_products,
    inner,
    inner_products,
    is_harmless,
    kept,
    lesser,
    mm,
    pack,
    padded,
    power_of_two,
    read,
    row_count,
    scalar,
    scaled_mm,
    self_product,
    self_product_norm,
    subtract_mean,
    to,
    two_factors,
    unscaled,
    weighted_sum_mm,
    write,
)
from .rows import Term, places, wanted, weighed, whole
from .sides import Shifted, Side, Sides, by_columns
from .unbiased import add_rows, amid, plain, plain_gradient


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None: the library backend runs everywhere."""
    return None


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash. If rows are shifted (`rows`), ``xs`` is z, and ``ys`` holds the
    dominating rows and the means."""
    n, p, q = problem.n, problem.p, problem.q
    wide, operand = dtypes(problem)
    gram = route == "gram"
    of_x, of_y = ((n, p), operand), ((n, q) if problem.y_grad or not gram else (0,), operand)
    if _shifts(problem, route):
        of_x = (n, padded(q) + padded(p) + 8), problem.dtype
        of_y = (how_many(n, problem.device) + 1, padded(q) + p), wide
    return dict(
        coefficients=((len(Coefficients._fields),), torch.float64),
        xs=of_x,
        ys=of_y,
        xx=((n, n) if gram else (p, p), wide),
        yy=((n, n) if gram else ((q, q) if problem.y_grad else (0,)), wide),
        xy=((0, 0) if gram else (q, p), wide),
        rows=((3, n) if problem.estimator == "unbiased" else (0,), wide),
    )


def _shifts(problem: Problem, route: Route) -> bool:
    return route == "cross" and problem.estimator == "unbiased" and wanted(problem)


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32 or fp64) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    wide, _ = dtypes(problem)
    count = row_count(x, mask)
    shifts = _shifts(problem, route)
    looks = x.is_cpu and not shifts
    with fp32_products(problem):
        sides = amid(x, y, mask, count, problem, route) if shifts else None
        if looks:
            sides = _looked(x, y, mask, count, problem, route)
        if sides is None:
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
    if problem.statistic in ("hsic", "gram_mse"):  # they are not invariant to the scales
        value, d_kl, d_kk, d_ll = (unscaled(a, sides.scale_x, sides.scale_y) for a in result)
    coefficients = Coefficients(
        d_kl, d_kk, d_ll, sides.kl, sides.kk, sides.ll, sides.sum_k, sides.sum_l, sides.scale_x, sides.scale_y,
        at_least(MIN_ROWS[problem.estimator], count),  # with fewer the derivatives are NaN already
    )  # fmt: skip
    ys = sides.ys if problem.y_grad or route == "cross" else sides.ys.new_empty(0)
    stash = Stash(pack(coefficients, x.device), sides.xs, ys, sides.xx, sides.yy, sides.xy, sides.rows)
    return write(value, wide, x.device), stash


def forward_alone(x: Tensor, y: Tensor, statistic: Statistic, route: Route) -> Tensor | None:
    """The value (0-d, fp32) of fp32 matrices on a CPU without mask or gradients, biased and centred, as `_looked` finds
    it, but in fewer steps; None where that is too inaccurate."""
    n = float(x.shape[0])
    x, x_sum = subtract_mean(x, n, None)
    y, y_sum = subtract_mean(y, n, None)
    if route == "gram":
        kl, kk, ll = inner_products(self_product(x), self_product(y))
    else:
        columns = y.T
        product = mm(columns, x)
        kl, kk, ll = inner(product, product), self_product_norm(x.T, x), self_product_norm(columns, y)
    if not (_sound(kk, x_sum, n) and _sound(ll, y_sum, n)):
        return None
    value = combine(Moments(kl, kk, ll), n, statistic, "biased", torch.finfo(x.dtype).eps)[0]
    return torch.scalar_tensor(value, dtype=x.dtype, device=x.device)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    c = Coefficients(*read(stash.coefficients))
    upstream = scalar(grad)
    dx = dy = of_x = of_y = None
    gram, xs, ys = route == "gram", stash.xs, stash.ys
    numbers = *c[:6], upstream
    if mask is not None and gram and x.is_cpu and problem.estimator == "biased" and all(map(math.isfinite, numbers)):
        mask = None  # masked rows are zero, and so are their gradients
    rows = stash.rows.unbind() if problem.estimator == "unbiased" else ()
    with fp32_products(problem):
        if _shifts(problem, route):
            z, beside, few, at = xs[: problem.n], ys, marked(stash.rows[2]), places(problem.p, problem.q)
            of_x, of_y = Shifted(z, beside, few, *at), Shifted(z, beside, few, *at[::-1])
            xs, ys = (whole(z, place, beside[:, place], few) for place in at)
        if problem.x_grad:
            cross = stash.yy if gram else stash.xy
            own = Side(xs, ys, cross, stash.xx, rows, c.scale_x, c.n, (c.sum_k, c.sum_l), of_x)
            dx = _gradient(own, 2.0 * c.d_kl, 4.0 * c.d_kk, upstream, mask, route)
        if problem.y_grad:
            cross = stash.xx if gram else stash.xy.T
            rows = (rows[1], rows[0], rows[2]) if rows else ()
            own = Side(ys, xs, cross, stash.yy, rows, c.scale_y, c.n, (c.sum_l, c.sum_k), of_y)
            dy = _gradient(own, 2.0 * c.d_kl, 4.0 * c.d_ll, upstream, mask, route)
    return x.new_empty(0) if dx is None else to(dx, x.dtype), y.new_empty(0) if dy is None else to(dy, y.dtype)


def _gradient(
    side: Side, d_cross: Scalar, d_own: Scalar, upstream: Scalar, mask: Tensor | None, route: Route
) -> Tensor:
    """Gradient of one side, by the formulas of the module's docstring."""
    d_cross, d_own, factors = _folded(d_cross, d_own, upstream, side.scale)
    if side.shifted is not None:
        z, beside, few, own, other = side.shifted
        terms = (own, side.product * d_own), (other, side.cross * d_cross)
        d = weighed(z, len(z), tuple(Term(place, beside[-1, place], matrix) for place, matrix in terms))
        d.index_copy_(0, few, sum(beside[:-1, place] @ matrix for place, matrix in terms))
    elif route == "cross":
        d = add_scaled_mm(scaled_mm(side.other, side.cross * d_cross), side.own, side.product * d_own)
    elif side.rows and isinstance(side.sums[0], float) and side.sums[0] > 0.0:
        d = plain_gradient(side, d_cross, d_own)
    else:  # biased, or U-centred
        d = weighted_sum_mm(side.cross, d_cross, side.product, d_own, side.own)
    if route == "cross" and side.rows:
        d = add_rows(d, side, d_cross, d_own)
    for factor in factors:
        d = d * factor
    return d if mask is None else d.masked_fill_(~mask[:, None], 0.0)


def _folded(d_cross: Scalar, d_own: Scalar, upstream: Scalar, scale: Scalar) -> tuple[Scalar, Scalar, list[Scalar]]:
    """The products' factors, and further factors of the gradient, which would leave fp32's range if multiplied in.

    Scales are up to 2^240 (fp64: 2^1000), a loss scale is arbitrary, and derivatives of HSIC hold scales' 4th powers.
    """
    unit: Scalar = 1.0
    if isinstance(d_own, float):
        peak, factor = max(abs(d_cross), abs(d_own)), upstream * scale
        if 1e-18 < abs(peak * factor) < 1e18:
            return d_cross * factor, d_own * factor, []
        unit = math.ldexp(1.0, math.frexp(peak)[1]) if 0.0 < peak < math.inf else 1.0
        d_cross, d_own = d_cross / unit, d_own / unit
    firsts, seconds = zip(two_factors(unit), two_factors(upstream), two_factors(scale), strict=True)
    return d_cross, d_own, [a * b * c for a, b, c in (firsts, seconds)]


def _looked(x: Tensor, y: Tensor, mask: Tensor | None, n: float, problem: Problem, route: Route) -> Sides | None:
    """Centres by one subtraction of the means; None if the result shows that this was too inaccurate (CPU only).

    It saves the careful centring, which takes a third of the time of the products at 128 x 512.
    """
    if n < MIN_ROWS[problem.estimator] or (problem.statistic == "gram_mse" and route == "gram"):
        return None
    if x.dtype.itemsize == 2:
        x, y = x.float(), y.float()
    keep = x_sum = y_sum = None
    if mask is not None:
        x, y, keep = kept(x, mask), kept(y, mask), mask.to(x.dtype)
    if problem.center:
        x, x_sum = subtract_mean(x, n, keep, keep is not None)
        y, y_sum = subtract_mean(y, n, keep, keep is not None)
    if problem.estimator == "unbiased":  # `plain` assumes that row sums of K are zero, so residual means matter
        (x, x_sum), (y, y_sum) = subtract_mean(x, n, keep, True), subtract_mean(y, n, keep, True)
        sides = plain(x, y, n, problem, route)
    else:
        sides = _products(x, y, 1.0, 1.0, problem, route)
    return sides if sides and _sound(sides.kk, x_sum, n) and _sound(sides.ll, y_sum, n) else None


def _sound(kk: float, total: Tensor | None, n: float) -> bool:
    """Whether one subtraction of the mean was accurate enough, judged by its result (CPU).

    The subtraction leaves a residual of about eps |mean|, the same in every row. It does not enter <K,L> (L is
    centred), enters <K,K> by its square, and the gradient to first order as a constant: eps |mean| / spread. Up to
    16 eps of that are accepted, where spread is the fourth root of <K,K> over sqrt(n). All else (larger means, a
    constant side, fourth powers outside fp32's range, NaN) is centred carefully. No ``total``: nothing was subtracted.
    """
    return 1e-25 < kk < 1e25 and (total is None or 256.0 * n * math.sqrt(kk) > torch.dot(total, total).item())


def _near_one(
    x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem
) -> tuple[tuple[Tensor, Scalar], tuple[Tensor, Scalar]]:
    """(side, power of two) of both sides, scaled by the latter: sums and squares far from 1 leave the range of fp32."""
    wide, _ = dtypes(problem)
    x, y = (kept(to(a, wide), mask) for a in (x, y))
    units = power_of_two(x), power_of_two(y)
    if problem.statistic == "gram_mse":  # K - L needs a common scale
        units = (lesser(*units),) * 2
    if all(map(is_harmless, units)):
        return (x, 1.0), (y, 1.0)
    return (x * units[0], units[0]), (y * units[1], units[1])


def _careful(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> Sides:
    """Centres the columns in two passes and scales them near 1 (`centre`); biased estimator."""
    xs, scale_x, _ = centre(x, mask, count, problem)
    ys, scale_y, _ = centre(y, mask, count, problem)
    if problem.statistic == "gram_mse":  # K - L needs one scale for both
        scale = lesser(scale_x, scale_y)
        xs, ys, scale_x, scale_y = xs * (scale / scale_x), ys * (scale / scale_y), scale, scale
    return _products(xs, ys, scale_x, scale_y, problem, route)


def _products(xs: Tensor, ys: Tensor, scale_x: Scalar, scale_y: Scalar, problem: Problem, route: Route) -> Sides:
    """The products of one route and their inner products; biased estimator."""
    if route == "gram":
        xx, yy = self_product(xs), self_product(ys)
        xy = xx.new_empty(0, 0)
        if problem.statistic == "gram_mse":  # the difference itself is exact where the matrices agree
            difference = xx - yy
            kk = inner(difference, difference)
            kl = ll = 0.0 * kk
        else:
            kl, kk, ll = inner_products(xx, yy)
    else:
        xx, xy, yy, kl, kk, ll = by_columns(xs, ys, problem)
    return Sides(xs, ys, scale_x, scale_y, kl, kk, ll, xx, yy, xy, xx.new_empty(0))
