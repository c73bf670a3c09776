"""The library backend's unbiased estimator: its products and its share of the gradient; formulas in `library`.

A CPU tries the plain way first, with columns about their means, and looks at what came out. Else, and on CUDA always,
the origin is put amid the rows that do not dominate (`dominating`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..moments import ROUNDING, Scalar
from ..types import Problem, Route
from .dominating import (
    alive,
    bulk_mean,
    columns,
    largest,
    location,
    marked,
    noise,
    squared_norms,
    u_centred_,
    uneven,
    without,
)
from .linalg import (
    at_least,
    centre,
    dtypes,
    exact,
    inner_products,
    kept,
    power_of_two,
    row_count,
    scalar,
    self_product,
    to,
    weighted_sum,
)
from .sides import Side, Sides, by_columns

# Of what the unbiased self-HSIC is a difference of, the share that has to be left (CPU): 1 / 0.02 roundings are let
# pass. Below, rows dominate, or there are a dozen of them: the way without cancellation.
LEFT = 0.02


def amid(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> Sides:
    """The unbiased estimator whatever the rows: about the mean of those that do not dominate."""
    n = at_least(4.0, count)
    if route == "gram":
        return _by_rows(_about_bulk(x, mask, problem), _about_bulk(y, mask, problem), n, mask)
    wide, operand = dtypes(problem)
    # About a location first: there may be no rows but those that are apart.
    x, y = (kept(to(a, wide) - location(to(a, wide), mask), mask) for a in (x, y))
    norms = [squared_norms(a) for a in (x, y)]
    few = largest(*norms)
    rest = without(mask, few, len(x))
    apart = torch.zeros_like(norms[0]).scatter_(0, few, 1.0)
    left = row_count(x, rest)  # of those that are apart some may not count
    zs, scales = zip(*(_about_rest(a, mask, rest, left, problem) for a in (x, y)), strict=True)
    bulk = [torch.where(rest[:, None], z, 0.0).to(operand) for z in zs]
    xx, xy, yy, kl, kk, ll = by_columns(bulk[0], bulk[1], problem)
    kappa, lam = (squared_norms(to(z, wide)) for z in bulk)
    eps = torch.finfo(wide).eps
    # Of the bulk a difference is taken: what is left of it has the rounding of its terms.
    lost = [ROUNDING * eps * (a + scalar(exact(b) @ exact(b))) for a, b in ((kk, kappa), (ll, lam))]
    e, f = (columns(z, few) for z in zs)
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
    kk, ll = (
        alive(a, scalar(noise(z, squared_norms(z), few, eps)) + b)
        for a, z, b in ((kk, zs[0], lost[0]), (ll, zs[1], lost[1]))
    )
    rows = torch.stack([kappa, lam, apart])
    return Sides(zs[0].to(operand), zs[1].to(operand), scales[0], scales[1], kl, kk, ll, xx, yy, xy, rows)


def plain(xs: Tensor, ys: Tensor, n: float, problem: Problem, route: Route) -> Sides | None:
    """Of sides about their means: the row sums without the diagonals are minus the diagonals. A CPU's way, which looks:
    None where rows dominate or too little is left."""
    if route == "gram":
        xx, yy, xy = self_product(xs), self_product(ys), xs.new_empty(0, 0)
        rows = torch.stack([xx.diagonal(), yy.diagonal(), xx.new_ones(len(xx))])
        xx.fill_diagonal_(0.0), yy.fill_diagonal_(0.0)
        kl, kk, ll = inner_products(xx, yy)
    else:
        xx, xy, yy, kl, kk, ll = by_columns(xs, ys, problem)
        rows = torch.stack([squared_norms(xs), squared_norms(ys), xs.new_ones(len(xs))])
    powers = rows.double()
    (squares_k, product, sum_k), (_, squares_l, sum_l), _ = torch.mm(powers, powers.T).tolist()
    if uneven(squares_k, sum_k, n) or uneven(squares_l, sum_l, n):
        return None
    rows[2].zero_()
    dots = product, squares_k, squares_l
    totals = [a * b / ((n - 1.0) * (n - 2.0)) for a, b in ((sum_k, sum_l), (sum_k, sum_k), (sum_l, sum_l))]
    terms = kk + squares_k + totals[1], ll + squares_l + totals[2]
    share = 2.0 / (n - 2.0) if route == "gram" else n / (n - 2.0)  # the diagonals are still in products of columns
    kl, kk, ll = (a - share * b + c for a, b, c in zip((kl, kk, ll), dots, totals, strict=True))
    if not (kk > LEFT * terms[0] and ll > LEFT * terms[1]):
        return None
    return Sides(xs, ys, 1.0, 1.0, kl, kk, ll, xx, yy, xy, rows, sum_k, sum_l)


def _by_rows(x: tuple[Tensor, Scalar], y: tuple[Tensor, Scalar], n: Scalar, mask: Tensor | None) -> Sides:
    """U-centred Gram matrices of sides and their scales, which need nothing of `add_rows`: its rows are zero."""
    (xs, scale_x), (ys, scale_y) = x, y
    eps = torch.finfo(torch.float64 if xs.dtype == torch.float64 else torch.float32).eps
    xx, yy = self_product(xs), self_product(ys)
    few = [None if xs.is_cpu else largest(gram.diagonal()) for gram in (xx, yy)]
    noises = [
        scalar(noise(z, gram.diagonal(), some, eps)) for z, gram, some in zip((xs, ys), (xx, yy), few, strict=True)
    ]
    xx, yy = (u_centred_(gram, n, mask) for gram in (xx, yy))
    kl, kk, ll = inner_products(xx, yy)
    kk, ll = alive(kk, noises[0]), alive(ll, noises[1])
    return Sides(xs, ys, scale_x, scale_y, kl, kk, ll, xx, yy, xx.new_empty(0, 0), xx.new_zeros(3, len(xx)))


def _about_bulk(x: Tensor, mask: Tensor | None, problem: Problem) -> tuple[Tensor, Scalar]:
    """x about the mean of the rows that do not dominate, brought near 1 by a power of two; that."""
    wide, operand = dtypes(problem)
    x = to(x, wide)
    z = kept(x - bulk_mean(x, mask), mask)
    scale = power_of_two(z)
    return (z * scale).to(operand), scale


def _about_rest(x: Tensor, mask: Tensor | None, rest: Tensor, count: Scalar, problem: Problem) -> tuple[Tensor, Scalar]:
    """x about the mean of the ``count`` rows of ``rest``, in fp32 or better, brought near 1 by a power of two; that."""
    wide = problem._replace(device=torch.device("cpu"))  # for operands that are not rounded
    _, _, (first, second) = centre(x, rest, count, wide)
    z = kept(x - first - second, mask)
    scale = power_of_two(z)
    return z * scale, scale


def plain_gradient(side: Side, d_cross: float, d_own: float) -> Tensor:
    """dX by rows of what `plain` found: rho is minus the diagonal, so all of the formula in `library` fits into the
    matrix that multiplies X, here over ``d_cross``, which is not zero."""
    n, ratio = side.n, d_own / d_cross
    kappa, lam, _ = side.rows
    sum_own, sum_other = side.sums
    matrix, diagonal = torch.add(side.cross, side.product, alpha=ratio), torch.add(lam, kappa, alpha=ratio)
    constant = (sum_other + ratio * sum_own) / ((n - 1.0) * (n - 2.0))
    matrix.add_(diagonal, alpha=1.0 / (n - 2.0)).diagonal().add_(diagonal, alpha=-2.0 / (n - 2.0)).add_(constant)
    return torch.addmm(side.own, matrix, side.own, beta=0.0, alpha=d_cross)


def add_rows(d: Tensor, side: Side, d_cross: Scalar, d_own: Scalar) -> Tensor:
    """The unbiased estimator's share of dX by columns: what stands behind the products in the formula of `library`."""
    own, n = to(side.own, d.dtype), at_least(4.0, side.n)
    kappa, lam, apart = side.rows
    sum_own, sum_other = side.sums
    diagonal = weighted_sum(lam, d_cross, kappa, d_own)
    if isinstance(sum_own, float) and sum_own > 0.0:  # `plain`: rho = -diagonal, no rows stand apart, T = 0
        constant = (d_cross * sum_other + d_own * sum_own) / ((n - 1.0) * (n - 2.0))
        d.addcmul_((diagonal * (-n / (n - 2.0)) + constant)[:, None], own)
        return d.add_(diagonal @ own, alpha=1.0 / (n - 2.0))
    few = marked(apart)
    e = columns(own, few) * d_own
    e += columns(to(side.other, d.dtype), few) * d_cross
    diagonal = diagonal * (1.0 - apart)
    rho = e.sum(1) - diagonal
    share = rho / (n - 2.0)
    u = share - exact(rho).sum().to(d.dtype) / ((n - 1.0) * (n - 2.0))
    d = torch.addmm(d, e, own[few])
    d += (u + share - diagonal)[:, None] * own
    d -= torch.outer(u, own.sum(0))
    return d.sub_(share @ own)
