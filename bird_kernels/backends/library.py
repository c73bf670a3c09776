r"""Backend 1: library matrix products and closed-form gradients. Any device, any dtype, both routes.

With X, Y centred, alpha = d value/d<K,L> and gamma = d value/d<K,K> (`moments.combine`), the gradient is::

    gram    dX = (2 alpha L + 4 gamma K) X             one product instead of autograd's four
    cross   dX = Y (2 alpha C) + X (4 gamma A)

The unbiased estimator leaves out the diagonals of K and L, kappa_i = |x_i|^2 and lambda_i = |y_i|^2. That adds
``diag(w) X`` with ``w = -n/(n-2) (2 alpha lambda + 4 gamma kappa) + (2 alpha sum(lambda) + 4 gamma sum(kappa)) /
((n-1)(n-2))`` and then a centring of the columns of dX.

On the CPU scalars are read and combined as Python floats; on a GPU nothing leaves the device.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..moments import MIN_ROWS, Coefficients, Scalar, combine, linear_moments
from ..types import Problem, Route, Shapes, Stash
from .linalg import (
    add_scaled_mm,
    at_least,
    centre,
    dtypes,
    fp32_products,
    inner,
    inner_products,
    lesser,
    mm,
    row_count,
    scalar,
    scaled_mm,
    self_product,
    self_product_norm,
    subtract_mean,
    take_diagonal,
    to,
    weighted_sum,
)


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """The library backend runs everywhere."""
    return None


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash."""
    n, p, q = problem.n, problem.p, problem.q
    wide, operand = dtypes(problem)
    unbiased = problem.estimator == "unbiased"
    gram = route == "gram"
    keep_y = problem.y_grad or not gram
    return dict(
        coefficients=((len(Coefficients._fields),), torch.float64),
        xs=((n, p), operand),
        ys=((n, q) if keep_y else (0,), operand),
        xx=((n, n) if gram else (p, p), wide),
        yy=((n, n) if gram else ((q, q) if problem.y_grad else (0,)), wide),
        xy=((0, 0) if gram else (q, p), wide),
        rows=((2, n) if unbiased else (0,), wide),
    )


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32 or fp64) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    wide, _ = dtypes(problem)
    eps = torch.finfo(wide).eps
    count = row_count(x, mask)
    with fp32_products(problem):
        products, scale_x, scale_y = None, 1.0, 1.0
        if mask is None and x.is_cpu:
            # A CPU can look before it pays: centring with care takes a third as long as the products at 128 x 512.
            (xs, x_sum), (ys, y_sum) = (subtract_mean(to(a, wide), problem.center) for a in (x, y))
            if problem.estimator == "unbiased":  # takes row sums of K for zero: n eps |mean| counts
                (xs, x_sum), (ys, y_sum) = subtract_mean(xs), subtract_mean(ys)
            products = _products(xs, ys, problem, route)
            if not (_sound(products.kk, x_sum, count) and _sound(products.ll, y_sum, count)):
                products = None
        if products is None:
            xs, scale_x, _ = centre(x, mask, count, problem)
            ys, scale_y, _ = centre(y, mask, count, problem)
            if problem.statistic == "gram_mse":  # K - L needs one scale for both
                scale = lesser(scale_x, scale_y)
                xs, ys, scale_x, scale_y = xs * (scale / scale_x), ys * (scale / scale_y), scale, scale
            products = _products(xs, ys, problem, route)

    kl, kk, ll, norms = products.kl, products.kk, products.ll, products.norms
    if problem.statistic == "gram_mse" and route == "gram":  # the difference itself is exact where the matrices agree
        difference = products.xx - products.yy
        kl, kk, ll = 0.0 * kl, inner(difference, difference), 0.0 * ll
    hollow = (kl, kk, ll)
    if norms is not None and route == "cross":
        hollow = kl - norms[0], kk - norms[1], ll - norms[2]
    result = combine(linear_moments(hollow, norms), count, problem.statistic, problem.estimator, eps)
    unscale = 1.0 / (scale_x * scale_y) ** 2 if problem.statistic in ("hsic", "gram_mse") else 1.0
    sum_k, sum_l = (0.0, 0.0) if norms is None else norms[3:]
    coefficients = Coefficients(
        result.d_kl * unscale, result.d_kk * unscale, result.d_ll * unscale, kl, kk, ll, sum_k, sum_l, scale_x, scale_y,
        at_least(MIN_ROWS[problem.estimator], count),  # with fewer the derivatives are NaN already
    )  # fmt: skip
    if route == "gram" and not problem.y_grad:
        ys = ys.new_empty(0)
    stash = Stash(
        _pack(coefficients, x.device), xs, ys, products.xx, products.yy, products.xy, products.rows
    )  # fmt: skip
    return _write(result.value * unscale, wide), stash


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    c = Coefficients(*_read(stash.coefficients))
    upstream = scalar(grad)
    dx = dy = None
    with fp32_products(problem):
        if problem.x_grad:
            g = upstream * c.scale_x
            dx = _side(
                stash.xs, stash.ys, stash.xx, stash.yy if route == "gram" else stash.xy, stash.rows,
                2.0 * c.d_kl * g, 4.0 * c.d_kk * g, c.sum_k, c.sum_l, c.n, mask, problem, route,
            )  # fmt: skip
        if problem.y_grad:
            g = upstream * c.scale_y
            dy = _side(
                stash.ys, stash.xs, stash.yy, stash.xx if route == "gram" else stash.xy.T, stash.rows.flip(0),
                2.0 * c.d_kl * g, 4.0 * c.d_ll * g, c.sum_l, c.sum_k, c.n, mask, problem, route,
            )  # fmt: skip
    return x.new_empty(0) if dx is None else to(dx, x.dtype), y.new_empty(0) if dy is None else to(dy, y.dtype)


def _side(
    own: Tensor, other: Tensor, own_product: Tensor, cross: Tensor, rows: Tensor,
    d_cross: Scalar, d_own: Scalar, own_sum: Scalar, other_sum: Scalar, n: Scalar,
    mask: Tensor | None, problem: Problem, route: Route,
) -> Tensor:  # fmt: skip
    """Gradient of one side; ``cross`` is the other Gram matrix (gram route) or other^T own (cross route)."""
    if problem.estimator == "biased":
        if route == "gram":
            return scaled_mm(weighted_sum(cross, d_cross, own_product, d_own), own)
        return add_scaled_mm(scaled_mm(other, cross * d_cross), own, own_product * d_own)

    constant = (d_cross * other_sum + d_own * own_sum) / ((n - 1.0) * (n - 2.0))
    weights = rows[1] * d_cross + rows[0] * d_own
    if route == "gram":  # The stashed Gram matrices are hollow already: 1 - n/(n-2) = -2/(n-2) is left to add.
        m = weighted_sum(cross, d_cross, own_product, d_own)
        m.diagonal().add_(weights * (-2.0 / (n - 2.0)) + constant)
        d = scaled_mm(m, own)
    else:
        d = add_scaled_mm(scaled_mm(other, cross * d_cross), own, own_product * d_own)
        d += (weights * (-n / (n - 2.0)) + constant)[:, None] * own
    d -= d.sum(0) / n
    return d if mask is None else d.masked_fill_(~mask[:, None], 0.0)


def _sound(kk: float, total: Tensor, n: float) -> bool:
    """Whether a plain subtraction of the mean was good enough, judged by its outcome (CPU).

    The subtraction leaves a residual of about eps |mean|, the same in every row. It enters <K,L> not at all (L is
    centred), <K,K> by its square, and the gradient to first order as a constant: eps |mean| / spread. Up to 16 eps of
    that are let pass, spread being the fourth root of <K,K> over sqrt(n). Anything else (larger means, a constant side,
    squares of squares that leave fp32's range, NaN) takes the careful way.
    """
    return 1e-25 < kk < 1e25 and 256.0 * n * math.sqrt(kk) > torch.dot(total, total).item()


class _Products(NamedTuple):
    """The products of one route and their moments; fields as in `Stash`, ``norms`` as in `linear_moments`."""

    kl: Scalar
    kk: Scalar
    ll: Scalar
    norms: tuple[Scalar, ...] | None
    xx: Tensor
    yy: Tensor
    xy: Tensor
    rows: Tensor


def _products(xs: Tensor, ys: Tensor, problem: Problem, route: Route) -> _Products:
    unbiased = problem.estimator == "unbiased"
    wide, _ = dtypes(problem)
    empty = partial(xs.new_empty, dtype=wide)  # one each: an operator's outputs must not share memory
    rows = None
    if route == "gram":
        xx, yy, xy = self_product(xs), self_product(ys), empty((0, 0))
        if unbiased:
            rows = torch.stack([take_diagonal(xx), take_diagonal(yy)])
        kl, kk, ll = inner_products(xx, yy)
    else:
        xx, xy = self_product(xs.T), mm(ys.T, xs)
        yy = self_product(ys.T) if problem.y_grad else empty(0)
        kl, kk = inner(xy, xy), inner(xx, xx)
        ll = inner(yy, yy) if problem.y_grad else self_product_norm(ys.T)
        if unbiased:
            rows = torch.stack([torch.linalg.vecdot(a, a) for a in (xs.to(wide), ys.to(wide))])
    if rows is None:
        return _Products(kl, kk, ll, None, xx, yy, xy, empty(0))
    kappa, lam = rows.double()
    norms = tuple(scalar(a) for a in (kappa @ lam, kappa @ kappa, lam @ lam, kappa.sum(), lam.sum()))
    return _Products(kl, kk, ll, norms, xx, yy, xy, rows)


def _read(values: Tensor) -> tuple[Scalar, ...]:
    return tuple(values.tolist()) if values.is_cpu else values.unbind()


def _write(value: Scalar, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=dtype)


def _pack(coefficients: tuple[Scalar, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.from_numpy(np.array(coefficients))  # a third of torch.tensor's time
    # full() and not tensor(): a copy from the host would break CUDA graph capture.
    full = partial(torch.full, (), dtype=torch.float64, device=device)
    return torch.stack([c.double() if isinstance(c, Tensor) else full(c) for c in coefficients])
