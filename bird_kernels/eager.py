r"""Backend 1: library matrix products and closed-form gradients. Any device, any dtype, both routes.

With X, Y centred, alpha = d value/d<K,L> and gamma = d value/d<K,K> (`estimators.combine`), the gradient is::

    gram    dX = (2 alpha L + 4 gamma K) X             one product instead of autograd's four
    cross   dX = Y (2 alpha C) + X (4 gamma A)

The unbiased estimator leaves out the diagonals of K and L, kappa_i = |x_i|^2 and lambda_i = |y_i|^2. That adds
``diag(w) X`` with ``w = -n/(n-2) (2 alpha lambda + 4 gamma kappa) + (2 alpha sum(lambda) + 4 gamma sum(kappa)) /
((n-1)(n-2))`` and then a centring of the columns of dX.

On the CPU scalars are read and combined as Python floats; on a GPU nothing leaves the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .estimators import MIN_ROWS, Coefficients, Scalar, combine, linear_moments
from .types import Problem, Route, Shapes, Stash

# Symmetric products of two blocks and more are formed block by block, the upper ones alone. Two cores of a Zen 5 CPU,
# fp32: a product takes 0.9 of the time at m = 256, 0.75 at 512, 0.68 at 1024. With fewer than 256 rows it pays where
# they are long: 1.0 at 128 x 512, 0.86 at 128 x 2048. On CUDA not yet measured.
SMALLEST_BLOCK, LARGEST_BLOCK = {"cpu": 128, "cuda": 2048}, {"cpu": 512, "cuda": 4096}
LONG_ROWS, SMALLEST_BLOCK_OF_LONG_ROWS = 1024, 64
# Up to here a dot product (MKL) and a sum (PyTorch) run on one thread. To wake a second one costs 80 us.
ONE_THREAD_DOT, ONE_THREAD_SUM = 1 << 13, 1 << 15


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """The eager backend runs everywhere."""
    return None


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash."""
    n, p, q = problem.n, problem.p, problem.q
    wide, operand = _dtypes(problem)
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
    wide, _ = _dtypes(problem)
    eps = torch.finfo(wide).eps
    count = _row_count(x, mask)
    with _fp32_products(problem):
        products, scale_x, scale_y = None, 1.0, 1.0
        if mask is None and x.is_cpu:
            # A CPU can look before it pays: centring with care takes a third as long as the products at 128 x 512.
            (xs, x_sum), (ys, y_sum) = _subtract_mean(_to(x, wide)), _subtract_mean(_to(y, wide))
            if problem.estimator == "unbiased":  # takes row sums of K for zero: n eps |mean| counts
                (xs, x_sum), (ys, y_sum) = _subtract_mean(xs), _subtract_mean(ys)
            products = _products(xs, ys, problem, route)
            if not (_sound(products.kk, x_sum, count) and _sound(products.ll, y_sum, count)):
                products = None
        if products is None:
            xs, scale_x = _centre(x, mask, count, problem)
            ys, scale_y = _centre(y, mask, count, problem)
            products = _products(xs, ys, problem, route)

    kl, kk, ll, norms = products.kl, products.kk, products.ll, products.norms
    hollow = (kl, kk, ll)
    if norms is not None and route == "cross":
        hollow = kl - norms[0], kk - norms[1], ll - norms[2]
    result = combine(linear_moments(hollow, norms), count, problem.statistic, problem.estimator, eps)
    unscale = 1.0 / (scale_x * scale_y) ** 2 if problem.statistic == "hsic" else 1.0
    sum_k, sum_l = (0.0, 0.0) if norms is None else norms[3:]
    coefficients = Coefficients(
        result.d_kl * unscale, result.d_kk, result.d_ll, kl, kk, ll, sum_k, sum_l, scale_x, scale_y,
        _at_least(MIN_ROWS[problem.estimator], count),  # with fewer the derivatives are NaN already
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
    upstream = _scalar(grad)
    dx = dy = None
    with _fp32_products(problem):
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
    return x.new_empty(0) if dx is None else _to(dx, x.dtype), y.new_empty(0) if dy is None else _to(dy, y.dtype)


def _side(
    own: Tensor, other: Tensor, own_product: Tensor, cross: Tensor, rows: Tensor,
    d_cross: Scalar, d_own: Scalar, own_sum: Scalar, other_sum: Scalar, n: Scalar,
    mask: Tensor | None, problem: Problem, route: Route,
) -> Tensor:  # fmt: skip
    """Gradient of one side; ``cross`` is the other Gram matrix (gram route) or other^T own (cross route)."""
    if problem.estimator == "biased":
        if route == "gram":
            return _scaled_mm(_weighted_sum(cross, d_cross, own_product, d_own), own)
        return _add_scaled_mm(_scaled_mm(other, cross * d_cross), own, own_product * d_own)

    constant = (d_cross * other_sum + d_own * own_sum) / ((n - 1.0) * (n - 2.0))
    weights = rows[1] * d_cross + rows[0] * d_own
    if route == "gram":  # The stashed Gram matrices are hollow already: 1 - n/(n-2) = -2/(n-2) is left to add.
        m = _weighted_sum(cross, d_cross, own_product, d_own)
        m.diagonal().add_(weights * (-2.0 / (n - 2.0)) + constant)
        d = _scaled_mm(m, own)
    else:
        d = _add_scaled_mm(_scaled_mm(other, cross * d_cross), own, own_product * d_own)
        d += (weights * (-n / (n - 2.0)) + constant)[:, None] * own
    d -= d.sum(0) / n
    return d if mask is None else d.masked_fill_(~mask[:, None], 0.0)


# ---------------------------------------------------------------------------------------------- centring


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a call that has nothing to do takes 0.8 us


def _subtract_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns minus their means, and their sums. sum(0) takes half as long as mean(0) where x is small."""
    total = x.sum(0)
    return x.sub(total, alpha=1.0 / x.shape[0]), total


def _sound(kk: float, total: Tensor, n: float) -> bool:
    """Whether a plain subtraction of the mean was good enough, judged by its outcome (CPU).

    The subtraction leaves a residual of about eps |mean|, the same in every row. It enters <K,L> not at all (L is
    centred), <K,K> by its square, and the gradient to first order as a constant: eps |mean| / spread. Up to 16 eps of
    that are let pass, spread being the fourth root of <K,K> over sqrt(n). Anything else (larger means, a constant side,
    squares of squares that leave fp32's range, NaN) takes the careful way.
    """
    return 1e-25 < kk < 1e25 and 256.0 * n * math.sqrt(kk) > torch.dot(total, total).item()


def _centre(x: Tensor, mask: Tensor | None, count: Scalar, problem: Problem) -> tuple[Tensor, Scalar]:
    """Columns minus their means, times a power of two that brings the largest entry near 1.

    The mean is taken twice: the second one is the rounding of the first. It makes a constant column exactly zero, where
    one pass leaves eps * |mean| that looks like variance.
    """
    wide, operand = _dtypes(problem)
    x = x.to(wide)
    if mask is None:
        x = x - x.mean(0)
        x -= x.mean(0)
    else:
        keep = mask[:, None]
        rows = _at_least(1.0, count)
        x = torch.where(keep, x, 0.0)
        for _ in range(2):
            x = torch.where(keep, x - x.sum(0) / rows, 0.0)
    scale = _power_of_two(x)
    return (x * scale).to(operand), scale


def _power_of_two(x: Tensor) -> Scalar:
    """2^k with 0.5 <= 2^k max|x| < 1; some finite number for zeros, NaN and Inf."""
    limit = 250 if x.dtype == torch.float64 else 120
    peak = torch.maximum(*(a.abs() for a in torch.aminmax(x)))
    if x.device.type == "cpu":
        value = peak.item()
        return math.ldexp(1.0, -max(-limit, min(limit, math.frexp(value)[1]))) if math.isfinite(value) else 1.0
    exponent = torch.frexp(peak).exponent.clamp(-limit, limit)
    return torch.ldexp(torch.ones((), dtype=torch.float64, device=x.device), -exponent)


def _at_least(least: float, count: Scalar) -> Scalar:
    return count.clamp(min=least) if isinstance(count, Tensor) else max(count, least)


def _row_count(x: Tensor, mask: Tensor | None) -> Scalar:
    if mask is None:
        return float(x.shape[0])
    count = mask.sum(dtype=torch.float64)
    return count.item() if x.is_cpu else count


# ---------------------------------------------------------------------------------------------- products


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
    wide, _ = _dtypes(problem)
    empty = partial(xs.new_empty, dtype=wide)  # one each: an operator's outputs must not share memory
    rows = None
    if route == "gram":
        xx, yy, xy = _self_product(xs), _self_product(ys), empty((0, 0))
        if unbiased:
            rows = torch.stack([_take_diagonal(xx), _take_diagonal(yy)])
        kl, kk, ll = _inner_products(xx, yy)
    else:
        xx, xy = _self_product(xs.T), _mm(ys.T, xs)
        yy = _self_product(ys.T) if problem.y_grad else empty(0)
        kl, kk = _inner(xy, xy), _inner(xx, xx)
        ll = _inner(yy, yy) if problem.y_grad else _self_product_norm(ys.T)
        if unbiased:
            rows = torch.stack([torch.linalg.vecdot(a, a) for a in (xs.to(wide), ys.to(wide))])
    if rows is None:
        return _Products(kl, kk, ll, None, xx, yy, xy, empty(0))
    kappa, lam = rows.double()
    norms = tuple(_scalar(a) for a in (kappa @ lam, kappa @ kappa, lam @ lam, kappa.sum(), lam.sum()))
    return _Products(kl, kk, ll, norms, xx, yy, xy, rows)


def _dtypes(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of products and statistics, dtype of the matrix operands)."""
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    # Half-precision products with fp32 results exist on CUDA only; the CPU would round them to half.
    return wide, problem.dtype if problem.device.type == "cuda" else wide


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32 for half operands."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _scaled_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b where one side may be a wide matrix that has yet to be rounded to the other's half precision.

    It is brought near 1 first: at n = 128 the entries of L - (a/b) K over sqrt(bc) are below fp16's normal range.
    """
    if a.dtype == b.dtype:
        return a @ b
    if a.dtype == torch.float32:
        scale = _power_of_two(a)
        return _mm((a * scale).to(b.dtype), b) / scale
    scale = _power_of_two(b)
    return _mm(a, (b * scale).to(a.dtype)) / scale


def _weighted_sum(a: Tensor, s: Scalar, b: Tensor, t: Scalar) -> Tensor:
    """s a + t b"""
    return a * s + b * t if isinstance(t, Tensor) else torch.mul(a, s).add_(b, alpha=t)


def _add_scaled_mm(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """d + a @ b, in the memory of ``d`` where the product needs no scaling."""
    return torch.addmm(d, a, b, out=d) if a.dtype == b.dtype else d + _scaled_mm(a, b)


def _blocks(a: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows of ``a`` whose products are formed together; the last one takes what is left."""
    m, k = a.shape
    device = "cpu" if a.is_cpu else "cuda"
    smallest = SMALLEST_BLOCK[device]
    if a.is_cpu and k >= LONG_ROWS:
        smallest = SMALLEST_BLOCK_OF_LONG_ROWS
    if m < 2 * smallest:
        return [(0, m)]
    block = min(max(m // 4, smallest), LARGEST_BLOCK[device])
    return [(i, i + block if i + 2 * block <= m else m) for i in range(0, m - block + 1, block)]


def _self_product(a: Tensor) -> Tensor:
    """a @ a.T for a [m, k], upper blocks computed and mirrored."""
    blocks = _blocks(a)
    if len(blocks) < 2:
        return _mm(a, a.T)
    out = torch.empty(a.shape[0], a.shape[0], dtype=_wide(a), device=a.device)
    for i, j in blocks:
        out[i:j, i:] = _mm(a[i:j], a[i:].T)
        out[j:, i:j] = out[i:j, j:].T
    return out


def _self_product_norm(a: Tensor) -> Scalar:
    """|a @ a.T|^2, one row of upper blocks in memory at a time."""
    total: Scalar = 0.0
    for i, j in _blocks(a):
        strip = _mm(a[i:j], a[i:].T)
        diagonal = strip[:, : j - i]
        total = total + 2.0 * _inner(strip, strip) - _inner(diagonal, diagonal)
    return total


def _inner(a: Tensor, b: Tensor) -> Scalar:
    """sum(a * b). Long sums go by rows in the dtype of ``a`` (pairwise) and from there on in fp64: no fp64 copy."""
    if a.is_cpu and a.numel() < ONE_THREAD_SUM:
        if a.numel() <= ONE_THREAD_DOT and a.is_contiguous() and b.is_contiguous():
            return torch.dot(a.view(-1), b.view(-1)).item()
        return (a * b).sum().item()
    return _scalar(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


def _inner_products(a: Tensor, b: Tensor) -> tuple[Scalar, Scalar, Scalar]:
    """<a,b>, <a,a> and <b,b>"""
    if a.is_cpu and a.numel() <= ONE_THREAD_DOT:
        a, b = a.view(-1), b.view(-1)
        return torch.dot(a, b).item(), torch.dot(a, a).item(), torch.dot(b, b).item()
    return _inner(a, b), _inner(a, a), _inner(b, b)


def _take_diagonal(a: Tensor) -> Tensor:
    """The diagonal of ``a``, which is set to zero: off-diagonal sums then need no subtraction."""
    diagonal = a.diagonal().clone()
    a.diagonal().zero_()
    return diagonal


def _wide(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


_UNCHANGED = contextlib.nullcontext()


def _fp32_products(problem: Problem) -> contextlib.AbstractContextManager[None]:
    """Run with the requested fp32 precision; None leaves PyTorch's own switch alone. tf32x3 is honoured by ieee."""
    if problem.precision is None or problem.dtype != torch.float32:
        return _UNCHANGED
    switch: Any = torch.backends.cuda.matmul if problem.device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return _switched(switch, "tf32" if problem.precision == "tf32" else "ieee")


@contextlib.contextmanager
def _switched(switch: Any, precision: str) -> Iterator[None]:
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


# ---------------------------------------------------------------------------------------------- scalars


def _scalar(value: Tensor) -> Scalar:
    return value.item() if value.is_cpu else value.double()


def _read(values: Tensor) -> tuple[Scalar, ...]:
    return tuple(values.tolist()) if values.is_cpu else values.unbind()


def _write(value: Scalar, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else torch.scalar_tensor(value, dtype=dtype)


def _pack(coefficients: Coefficients, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.from_numpy(np.array(coefficients))  # a third of torch.tensor's time
    # full() and not tensor(): a copy from the host would break CUDA graph capture.
    full = partial(torch.full, (), dtype=torch.float64, device=device)
    return torch.stack([c.double() if isinstance(c, Tensor) else full(c) for c in coefficients])
