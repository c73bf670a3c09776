"""The library backend's unbiased estimator: its products and its part of the gradient; formulas in `library`.

A CPU first centres the columns by their means (`plain`) and checks the result. If that is inaccurate, and on CUDA
always, the origin is a robust centre of the rows, and dominating rows are treated separately (`amid`, `dominating`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..moments import ROUNDING, Scalar
from ..types import Problem, Route
from .dominating import alive, columns, largest, marked, noise, squared_norms, u_centred_, uneven
from .linalg import at_least, dtypes, exact, inner, inner_products, pack, read, self_product, to, weighted_sum
from .rows import apart, beside_z, products, shifted, wanted, whole
from .sides import Side, Sides, by_columns

# The least ratio of the unbiased self-HSIC to the sum of its terms that `plain` accepts (CPU): cancellation then
# amplifies rounding by at most 1 / 0.02. It is less if rows dominate or there are only a dozen: `amid` is used.
LEFT = 0.02


def amid(x: Tensor, y: Tensor, mask: Tensor | None, count: Scalar, problem: Problem, route: Route) -> Sides:
    """The unbiased estimator for any rows: the origin is the mean of those that do not dominate."""
    n = at_least(4.0, count)
    if route == "gram":
        rows, (_, operand) = shifted(x, y, mask), dtypes(problem)
        xs, ys = (to(rows.z[:, side.place], operand).contiguous() for side in (rows.x, rows.y))
        return _by_rows(xs, ys, n, mask)._replace(scale_x=rows.x.scale, scale_y=rows.y.scale)
    rows, few, *heavy = apart(shifted(x, y, mask), x, y, mask)
    xx, xy, yy = products(rows)
    eps = torch.finfo(xx.dtype).eps
    beside = beside_z(rows, *heavy)
    xs, ys = (whole(rows.z[: len(x)], side.place, beside[:, side.place], few) for side in (rows.x, rows.y))
    norms = torch.stack([squared_norms(a) for a in (xs, ys)])
    diagonals = norms.index_fill(1, few, 0.0)  # kappa and lambda, zero for the dominating rows
    taken = torch.zeros_like(norms[0]).index_fill_(0, few, 1.0)
    # K_S and L_S [2, n, k]. From here on in fp64: what orthogonal rows leave is a difference, and must not be rounding.
    e = exact(torch.stack([columns(a, few) for a in (xs, ys)]))
    kappas = exact(diagonals)
    sums = e.sum(2) - kappas  # r_K, r_L [2, n]
    # <K,K>, <K,L>, <L,K> and <L,L> [2, 2]; E holds the product of a dominating and an ordinary row only once.
    whole_products = pack(tuple(inner(a, a) for a in (xx, xy, xy, yy)), x.device).view(2, 2)
    dots, totals = kappas @ kappas.T, sums.sum(1)
    found = whole_products + (e[:, None] * e).sum(3) @ (2.0 - exact(taken)) - dots
    found += torch.outer(totals, totals) / ((n - 1.0) * (n - 2.0)) - 2.0 / (n - 2.0) * (sums @ sums.T)
    # The other rows' part is a difference, whose rounding error is that of its terms.
    bound = noise((xs, ys), norms, few, eps) + ROUNDING * eps * (whole_products + dots).diagonal()
    kk, kl, _, ll = read(found.flatten())
    kk, ll = (alive(a, b) for a, b in zip((kk, ll), read(bound), strict=True))
    yy = yy if problem.y_grad else yy.new_empty(0)
    diagonals = torch.cat([diagonals, taken[None]])
    sides = Sides(xs, ys, rows.x.scale, rows.y.scale, kl, kk, ll, xx, yy, xy, diagonals)
    return sides._replace(xs=rows.z, ys=beside) if wanted(problem) else sides


def plain(xs: Tensor, ys: Tensor, n: float, problem: Problem, route: Route) -> Sides | None:
    """The products of centred sides, whose row sums without diagonals are minus the diagonals (CPU); None if rows
    dominate or cancellation is too large."""
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
    share = 2.0 / (n - 2.0) if route == "gram" else n / (n - 2.0)  # products of columns still include the diagonals
    kl, kk, ll = (a - share * b + c for a, b, c in zip((kl, kk, ll), dots, totals, strict=True))
    if not (kk > LEFT * terms[0] and ll > LEFT * terms[1]):
        return None
    return Sides(xs, ys, 1.0, 1.0, kl, kk, ll, xx, yy, xy, rows, sum_k, sum_l)


def _by_rows(xs: Tensor, ys: Tensor, n: Scalar, mask: Tensor | None) -> Sides:
    """The Gram route: U-centred Gram matrices. `add_rows` is not needed for them, so ``rows`` is zero."""
    eps = torch.finfo(torch.float64 if xs.dtype == torch.float64 else torch.float32).eps
    xx, yy = self_product(xs), self_product(ys)
    norms = torch.stack([xx.diagonal(), yy.diagonal()])
    bound = read(noise((xs, ys), norms, None if xs.is_cpu else largest(*norms), eps))
    xx, yy = (u_centred_(gram, n, mask) for gram in (xx, yy))
    kl, kk, ll = inner_products(xx, yy)
    kk, ll = alive(kk, bound[0]), alive(ll, bound[1])
    return Sides(xs, ys, 1.0, 1.0, kl, kk, ll, xx, yy, xx.new_empty(0, 0), torch.zeros_like(xx[:3]))


def plain_gradient(side: Side, d_cross: float, d_own: float) -> Tensor:
    """dX of the Gram route after `plain`: rho is minus the diagonal, so the whole formula in `library` is one matrix
    times X; the matrix is divided by ``d_cross``, which is not zero."""
    n, ratio = side.n, d_own / d_cross
    kappa, lam, _ = side.rows
    sum_own, sum_other = side.sums
    matrix, diagonal = torch.add(side.cross, side.product, alpha=ratio), torch.add(lam, kappa, alpha=ratio)
    constant = (sum_other + ratio * sum_own) / ((n - 1.0) * (n - 2.0))
    matrix.add_(diagonal, alpha=1.0 / (n - 2.0)).diagonal().add_(diagonal, alpha=-2.0 / (n - 2.0)).add_(constant)
    return torch.addmm(side.own, matrix, side.own, beta=0.0, alpha=d_cross)


def add_rows(d: Tensor, side: Side, d_cross: Scalar, d_own: Scalar) -> Tensor:
    """Add the unbiased estimator's terms to ``d`` on the cross route: those after the products in `library`."""
    kappa, lam, apart = side.rows
    sum_own, sum_other = side.sums
    own, n = to(side.own, d.dtype), at_least(4.0, side.n)
    diagonal = weighted_sum(lam, d_cross, kappa, d_own)
    if isinstance(sum_own, float) and sum_own > 0.0:  # from `plain`: rho = -diagonal, no dominating rows, T = 0
        constant = (d_cross * sum_other + d_own * sum_own) / ((n - 1.0) * (n - 2.0))
        d.addcmul_((diagonal * (-n / (n - 2.0)) + constant)[:, None], own)
        return d.add_(diagonal @ own, alpha=1.0 / (n - 2.0))
    few = marked(apart) if side.shifted is None else side.shifted.few
    e = weighted_sum(columns(to(side.other, d.dtype), few), d_cross, columns(own, few), d_own)
    rho, heavy = e.sum(1) - diagonal, own[few]
    share = rho / (n - 2.0)
    u = share - exact(rho).sum().to(d.dtype) / ((n - 1.0) * (n - 2.0))
    d.addcmul_((u + share - diagonal)[:, None], own)
    left = torch.cat([e, u[:, None], torch.ones_like(u)[:, None]], 1)
    return d.addmm_(left, torch.cat([heavy, -heavy.sum(0)[None], -(share @ own)[None]]))
