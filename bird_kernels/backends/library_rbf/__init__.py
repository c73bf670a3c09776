r"""The library backend's Gaussian kernels: K_ij = exp(-f D_ij), D_ij = |x_i - x_j|^2, f = 1 / (2 sigma^2), by strips.

Distances are computed from centred features, ``D = |x_i|^2 + |x_j|^2 - 2 <x_i, x_j>``, so a large mean costs no digits.
Centring K cancels most of it when sigma is large (K near 1) or distances are nearly equal. So a strip holds ``K - c =
c expm1(t - f D)``, with c = exp(-t) a typical entry, t = f median(D) or f mean(D), from which K can be restored to its
own accuracy. The strip's diagonal is 0: that of K is 1, which may exceed all other entries, and is added separately.
Before any product a strip is centred::

    biased    Kc = H K H                                                          (Gretton et al. 2005)
    unbiased  Kc = K_ij - (r_i + r_j)/(n-2) + sum(r)/((n-1)(n-2)), diagonal 0     (Szekely and Rizzo 2014)

with row sums r (unbiased: of K without its diagonal). HSIC(K, L) is <Kc, Lc> over the estimator's norm, and the other
five moments are zero. V = d value/dK = d_kl Lc + 2 d_kk Kc is symmetric, so with the elementwise product W = V o K and
a constant sigma::

    dX = -(2 / sigma^2) (diag(W 1) - W) X                                         one product for each side

If the gradient flows through the median D_ab, then, K being a function of D/sigma^2, the derivative of the value with
respect to sigma^2 is -<X, dX> / (2 sigma^2): ``<X, dX>/D_ab (x_a - x_b)`` is taken from row a of dX and added to row b.

An upper strip is a block of rows from its diagonal block on. Strips are kept in memory or, above `plan.KEPT`, computed
again by each pass, without any n x n memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import plan
from ...moments import MIN_ROWS, ROUNDING, Moments, Scalar, combine
from ...types import Problem, Route, Shapes, Stash
from .. import linalg
from .median import median_of, pair_at
from .strips import Bandwidth, Strips

__all__ = ["backward", "forward", "stash_shapes"]

# The largest t: with larger ones, squares of K underflow in the products' dtype. The largest f.
LIMIT = {torch.float32: 44.0, torch.float64: 350.0}
STEEPEST = {dtype: torch.finfo(dtype).max / 16 for dtype in LIMIT}


# What the backward needs besides tensors: derivatives by <K,L>, <K,K> and <L,L>, and the `Bandwidth` of each side.
COEFFICIENTS = 3 + 2 * len(Bandwidth._fields)


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash: centred features, the kept strips of both sides, row shifts.

    ``rows`` [2, n] are the shifts of x and y with Kc = K - c - shift_i - shift_j; fp64, since they cancel in V.
    """
    n, p, q = problem.n, problem.p, problem.q
    wide, operand = linalg.dtypes(problem)
    kept = plan.keeps_kernels(problem)
    size = plan.strips_size(n, plan.strip_rows(problem)) if kept else 0
    return dict(
        coefficients=((COEFFICIENTS,), torch.float64),
        xs=((n, p), operand),
        ys=((n, q) if problem.y_grad or not kept else (0,), operand),
        xx=((size,), wide),
        yy=((size,), wide),
        xy=((0,), wide),
        rows=((2, n), torch.float64),
    )


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32 or fp64) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    linalg.require_fp64("a Gaussian kernel", x.device)
    wide, _ = linalg.dtypes(problem)
    shapes = stash_shapes(problem, route)
    count = linalg.row_count(x, mask)
    with linalg.fp32_products(problem):
        xs, scale_x = _near_zero(x, mask, count, problem)
        ys, scale_y = _near_zero(y, mask, count, problem)
        xx, yy = (x.new_empty(shapes[name][0], dtype=wide) for name in ("xx", "yy"))
        k, l = (Strips(a, mask, problem, flat) for a, flat in ((xs, xx), (ys, yy)))
        ours, x_shift = _prepare(k, scale_x, count, 0)
        theirs, y_shift = _prepare(l, scale_y, count, 1)
        kl, kk, ll = _products(k, l, (ours, theirs), (x_shift, y_shift))
    if problem.center:
        kk, ll = _without_noise(kk, ours, count, wide), _without_noise(ll, theirs, count, wide)
    result = combine(Moments(kl, kk, ll), count, problem.statistic, problem.estimator, torch.finfo(wide).eps)
    coefficients = result.d_kl, result.d_kk, result.d_ll, *ours, *theirs
    stash = Stash(
        linalg.pack(coefficients, x.device), xs, ys if shapes["ys"][0] != (0,) else ys.new_empty(0), xx, yy,
        x.new_empty(0, dtype=wide), torch.stack([x_shift, y_shift]),
    )  # fmt: skip
    return linalg.write(result.value, wide, x.device), stash


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    d_kl, d_kk, d_ll, *numbers = linalg.read(stash.coefficients)
    half = len(Bandwidth._fields)
    bandwidths = Bandwidth(*numbers[:half]), Bandwidth(*numbers[half:])
    upstream = linalg.scalar(grad)
    with linalg.fp32_products(problem):
        k, l = (
            Strips(features, mask, problem, flat, filled=True)
            for features, flat in ((stash.xs, stash.xx), (stash.ys, stash.yy))
        )
        if not k.kept:
            k.become_kernel(bandwidths[0])
            l.become_kernel(bandwidths[1])
        dx = _Gradient(k, bandwidths[0]) if problem.x_grad else None
        dy = _Gradient(l, bandwidths[1]) if problem.y_grad else None
        shifts = [
            (stash.rows[1 - side] * d_kl + stash.rows[side] * (2.0 * d)).to(k.wide)
            for side, d in enumerate((d_kk, d_ll))
        ]
        for (i, j, own), (_, _, other) in zip(k, l, strict=True):
            if dx is not None:
                dx.add(i, j, own, linalg.weighted_sum(other, d_kl, own, 2.0 * d_kk), shifts[0])
            if dy is not None:
                dy.add(i, j, other, linalg.weighted_sum(own, d_kl, other, 2.0 * d_ll), shifts[1])
        return (
            x.new_empty(0) if dx is None else linalg.to(dx.finish(upstream), x.dtype),
            y.new_empty(0) if dy is None else linalg.to(dy.finish(upstream), y.dtype),
        )


def _near_zero(x: Tensor, mask: Tensor | None, count: Scalar, problem: Problem) -> tuple[Tensor, Scalar]:
    """Features minus their means, times a power of two, and that. Rounding of a mean moves all rows alike, and changes
    no distance, so one subtraction is enough; but where sigma is given, the norms stand for the mean distance."""
    if problem.kernel is not None and problem.kernel.sigmas is not None:
        x, scale, _ = linalg.centre(x, mask, count, problem._replace(center=True))
        return x, scale
    wide, operand = linalg.dtypes(problem)
    keep = None if mask is None else mask.to(wide)
    x, _ = linalg.subtract_mean(linalg.kept(linalg.to(x, wide), mask), linalg.at_least(1.0, count), keep)
    scale = linalg.power_of_two(x)
    if linalg.is_harmless(scale):
        return x, 1.0
    return linalg.to(x.mul_(scale), operand), scale


def _bandwidth_of(strips: Strips, scale: Scalar, count: Scalar, side: int) -> Bandwidth:
    """The `Bandwidth` by the rule of the problem's `RBF`, from strips of squared distances; no synchronisation on CUDA.

    ``scale`` is that of the features, ``count`` the number of rows that count, ``side`` 0 for x and 1 for y.
    """
    kernel = strips.problem.kernel
    assert kernel is not None
    first = second = 0.0
    if kernel.sigmas is not None:
        total = linalg.scalar(strips.norms.sum(dtype=torch.float64))
        typical = 2.0 * total / linalg.at_least(1.0, count)  # the mean of all distances
        sigma = scale * kernel.sigmas[side]
        square = sigma * sigma
    else:
        median = median_of(strips, linalg.as_tensor(count, strips.norms.device), kernel)
        if kernel.flow:
            first, second = map(linalg.scalar, pair_at(strips, median))
        typical = linalg.scalar(median)
        square = typical * (kernel.threshold or 1.0) ** 2
    largest, limit = STEEPEST[strips.wide], LIMIT[strips.wide]
    if isinstance(square, Tensor):
        factor: Scalar = torch.where(square == 0, 0.0, 0.5 / square).clamp(max=largest)
        typical = (factor * typical).clamp(max=limit).to(strips.wide).double()  # rounded as in the strips
        level: Scalar = (-typical).exp()
    else:
        factor = min(0.5 / square, largest) if square else 0.0
        typical = torch.full((), min(factor * typical, limit), dtype=strips.wide, device="cpu").item()
        level = math.exp(-typical)
    return Bandwidth(factor, typical, level if strips.problem.center else 0.0 * typical, scale, first, second)


def _prepare(strips: Strips, scale: Scalar, count: Scalar, side: int) -> tuple[Bandwidth, Tensor]:
    """Turn strips of distances into strips of the kernel; return its bandwidth and its row shifts [n], fp64."""
    bandwidth = _bandwidth_of(strips, scale, count, side)
    strips.become_kernel(bandwidth)
    size = strips.problem.n
    sums = strips.norms.new_zeros(size)
    if not strips.problem.center:
        return bandwidth, sums.double()
    for i, j, strip in strips:
        sums[i:j].add_(strip.sum(1))
        if j < size:
            sums[j:].add_(strip[:, j - i :].sum(0))
    sums = sums.double()
    if strips.problem.estimator == "biased":
        sums, n = sums + _diagonal(strips, bandwidth), linalg.at_least(1.0, count)
        share, pairs = 1.0 / n, n * n
    else:
        n = linalg.at_least(MIN_ROWS["unbiased"], count)
        share, pairs = 1.0 / (n - 2.0), (n - 1.0) * (n - 2.0)
    return bandwidth, sums.mul(share).sub_(0.5 * linalg.scalar(sums.sum()) / pairs)


def _diagonal(strips: Strips, bandwidth: Bandwidth) -> Tensor:
    """The diagonal of K - c, which strips leave out: 1 - c (1 if not centred) for the rows that count, else 0."""
    ones = torch.ones(strips.problem.n, dtype=torch.float64, device=strips.features.device)
    ones = ones if strips.keep is None else strips.keep.to(ones, copy=True)
    if not strips.problem.center:
        return ones
    t = bandwidth.typical  # 1 - c itself cancels if t is small
    return ones.mul_(-(-t).expm1() if isinstance(t, Tensor) else -math.expm1(-t))


def _products(
    k: Strips, l: Strips, bandwidths: tuple[Bandwidth, Bandwidth], shifts: tuple[Tensor, Tensor]
) -> tuple[Scalar, Scalar, Scalar]:
    """<Kc,Lc>, <Kc,Kc>, <Lc,Lc>; for gram_mse 0, <Kc-Lc,Kc-Lc>, 0, which is exactly zero for equal matrices."""
    problem = k.problem
    kl: Scalar = 0.0
    kk: Scalar = 0.0
    ll: Scalar = 0.0
    if problem.estimator == "biased":
        ours, theirs = (
            _diagonal(strips, bandwidth).sub_(shift if strips.keep is None else shift * strips.keep, alpha=2.0)
            for strips, bandwidth, shift in zip((k, l), bandwidths, shifts, strict=True)
        )
        if problem.statistic == "gram_mse":
            kk = linalg.scalar((ours - theirs).square().sum())
        else:
            kl, kk, ll = (linalg.scalar(a @ b) for a, b in ((ours, theirs), (ours, ours), (theirs, theirs)))
    ours, theirs = (shift.to(k.wide) for shift in shifts)
    for (i, j, own), (_, _, other) in zip(k, l, strict=True):
        own, other = k.centred(own, i, j, ours), l.centred(other, i, j, theirs)
        if problem.statistic == "gram_mse":
            difference = own - other
            kk = kk + _twice(difference, difference, j - i)
        else:
            kl, kk, ll = kl + _twice(own, other, j - i), kk + _twice(own, own, j - i), ll + _twice(other, other, j - i)
    return kl, kk, ll


def _twice(a: Tensor, b: Tensor, rows: int) -> Scalar:
    """The share of an upper strip in <A, B>: entries right of its diagonal block count twice, for the lower half."""
    whole = linalg.inner(a, b)
    return whole if rows == a.shape[1] else 2.0 * whole - linalg.inner(a[:, :rows], b[:, :rows])


def _without_noise(kk: Scalar, bandwidth: Bandwidth, count: Scalar, wide: torch.dtype) -> Scalar:
    """<Kc,Kc>, or 0 if K's entries differ by no more than rounding (unbiased, e.g. rows at equal distances)."""
    noise = (ROUNDING * torch.finfo(wide).eps * bandwidth.level * bandwidth.typical * count) ** 2
    if isinstance(noise, Tensor):  # kk may be a float all the same: the zero of gram_mse
        return torch.where(noise >= kk, 0.0, kk)
    return 0.0 if kk <= noise else kk


class _Gradient:
    """The gradient of one side, from W X and W 1, which are summed over strips."""

    def __init__(self, strips: Strips, bandwidth: Bandwidth) -> None:
        self.strips, self.features, self.bandwidth = strips, strips.features, bandwidth
        self.kernel = strips.problem.kernel
        self.product = torch.zeros_like(self.features, dtype=strips.wide)
        self.sums = self.product.new_zeros(len(self.features))

    def add(self, i: int, j: int, own: Tensor, v: Tensor, shift: Tensor) -> None:
        """Add the strip of rows i:j: ``own`` is K - c, ``v`` V before the ``shift`` is subtracted; overwritten."""
        if self.strips.problem.center:
            v.sub_(shift[i:j, None]).sub_(shift[i:])
        w = self.strips.cleared(v.mul_(own + self.bandwidth.level), i, j)
        below = w[:, j - i :]
        self.sums[i:j] += w.sum(1)
        self.sums[j:] += below.sum(0)
        linalg.add_scaled_mm(self.product[i:j], w, self.features[i:])
        linalg.add_scaled_mm(self.product[j:], below.T, self.features[i:j])

    def finish(self, upstream: Scalar) -> Tensor:
        """dX [n, p] in the products' dtype, times ``upstream``."""
        b, kernel = self.bandwidth, self.kernel
        features = self.features.to(self.product.dtype)
        d = self.product.sub_(self.sums[:, None] * features).mul_(4.0 * b.factor * b.scale * upstream)
        if kernel is not None and kernel.flow:
            first, second = (torch.as_tensor(row, device=d.device).long().view(1) for row in (b.first, b.second))
            apart = features.index_select(0, first) - features.index_select(0, second)
            square = apart.square().sum(dtype=torch.float64)
            change = torch.linalg.vecdot(features, d).sum(dtype=torch.float64)
            slope = torch.where(square == 0, 0.0, change / square)
            d.index_add_(0, torch.cat([first, second]), torch.cat([-slope * apart, slope * apart]).to(d.dtype))
        return d
