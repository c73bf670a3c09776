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
    dominated,
    largest,
    location,
    marked,
    noise,
    squared_norms,
    u_centred_,
    without,
)
from .linalg import at_least, centre, dtypes, exact, inner_products, power_of_two, row_count, scalar, self_product, to
from .sides import Side, Sides, by_columns, empty, kept, without_diagonal

# Of what the unbiased self-HSIC is a difference of, the share that has to be left (CPU): 1 / 0.02 roundings are let
# pass. Below, rows dominate, or there are a dozen of them: the way without cancellation.
LEFT = 0.02


def amid(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> Sides:
    """The unbiased estimator whatever the rows: about the mean of those that do not dominate."""
    n = at_least(4.0, count)
    if route == "gram":
        (xs, scale_x), (ys, scale_y) = (_about_bulk(a, mask, problem) for a in (x, y))
        sides = u_products(xs, ys, n, problem, mask, look=False)
        assert sides is not None
        return sides._replace(scale_x=scale_x, scale_y=scale_y)
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
    e, f = (without_diagonal(z @ z[few].T, few) for z in zs)
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
        alive(a, scalar(noise(squared_norms(z), eps)) + b) for a, z, b in ((kk, zs[0], lost[0]), (ll, zs[1], lost[1]))
    )
    rows = torch.stack([kappa, lam, apart])
    return Sides(zs[0].to(operand), zs[1].to(operand), scales[0], scales[1], kl, kk, ll, xx, yy, xy, rows)


def u_products(
    xs: Tensor, ys: Tensor, n: Scalar, problem: Problem, mask: Tensor | None = None, look: bool = True
) -> Sides | None:
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
    return Sides(xs, ys, 1.0, 1.0, kl, kk, ll, grams[0], grams[1], empty(xs, (0, 0)), empty(xs, 0))


def hollow_products(xs: Tensor, ys: Tensor, n: float, problem: Problem) -> Sides | None:
    """Products of columns less the diagonals, of centred columns: None where too little is left (CPU)."""
    xx, xy, yy, kl, kk, ll = by_columns(xs, ys, problem)
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
    return Sides(xs, ys, 1.0, 1.0, kl, kk, ll, xx, yy, xy, rows)


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


def add_rows(d: Tensor, side: Side, d_cross: Scalar, d_own: Scalar) -> Tensor:
    """The unbiased estimator's share of dX by products of columns: what stands behind the first two terms."""
    own, n = to(side.own, d.dtype), at_least(4.0, side.n)
    kappa, lam, apart = side.rows
    diagonal = lam * d_cross + kappa * d_own
    if apart.is_cpu and not apart.any():
        rho = -diagonal
    else:
        few = marked(apart)
        heavy = own[few]
        e = without_diagonal(own @ heavy.T, few) * d_own
        other = to(side.other, d.dtype)
        e += without_diagonal(other @ other[few].T, few) * d_cross
        d = torch.addmm(d, e, heavy)
        diagonal = diagonal * (1.0 - apart)
        rho = e.sum(1) - diagonal
    share = rho / (n - 2.0)
    u = share - exact(rho).sum().to(d.dtype) / ((n - 1.0) * (n - 2.0))
    d += (u + share - diagonal)[:, None] * own
    d -= torch.outer(u, own.sum(0))
    d -= share @ own
    return d
