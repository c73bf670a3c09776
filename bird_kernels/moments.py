r"""HSIC and CKA, and the derivatives that a backward needs, from eight numbers of two Gram matrices.

HSIC and CKA, biased or unbiased, are functions of the same eight moments of two kernel matrices K and L::

    kl, kk, ll       <K,L>, <K,K>, <L,L>                  (elementwise inner products)
    r_kl, r_kk, r_ll inner products of the row sums of K and L
    t_k, t_l         the totals of K and L

    HSIC(K, L) = (kl + alpha * r_kl + beta * t_k * t_l) / norm

    biased    alpha = -2/n,      beta = 1/n**2,            norm = (n-1)**2      (Gretton et al. 2005)
    unbiased  alpha = -2/(n-2),  beta = 1/((n-1)(n-2)),    norm = n(n-3)        (Song et al. 2012, HSIC_1)

    CKA(K, L)  = HSIC(K,L) / sqrt(HSIC(K,K) * HSIC(L,L))                        (Kornblith et al. 2019)
    sqrt_cka_loss = 1 - sqrt(CKA), biased                                       (Dasgupta and Cohn 2025)
    gram_mse   = |K - L|^2 / n**2 = (kk - 2 kl + ll) / n**2 of centred K and L  (Tung and Mori 2019, not normalised)

For the unbiased estimator the diagonals of K and L count as zero. If the columns of the features are centred, the row
sums of a linear Gram matrix are zero, and without its diagonal they are minus the squared row norms; so the biased
estimator needs the first three moments alone. If the Gram matrices are centred themselves (biased H K H, unbiased
`backends.dominating.u_centred_`), the other five moments are zero for both estimators.

Everything here works on floats and on 0-d fp64 tensors alike: a CPU reads the eight numbers once, since a dozen 0-d
tensor operations cost more than the Gram matrices at n = 128; on a GPU they stay tensors, and nothing synchronises.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch

from .types import Estimator, Statistic

Scalar: TypeAlias = Any  # a float or a 0-d fp64 tensor

# HSIC(K, K) up to ROUNDING * eps times the sum of its terms counts as zero. That of one-hot rows, zero if unbiased, was
# below 25 eps times it (n = 4..512, three scales, two means, fp32, fp64, both routes). Features that vary have n/d.
ROUNDING = 64.0

MIN_ROWS = {"biased": 2, "unbiased": 4}


class Moments(NamedTuple):
    """The eight numbers of the module's docstring; floats or 0-d fp64 tensors."""

    kl: Scalar
    kk: Scalar
    ll: Scalar
    r_kl: Scalar = 0.0
    r_kk: Scalar = 0.0
    r_ll: Scalar = 0.0
    t_k: Scalar = 0.0
    t_l: Scalar = 0.0


class Combined(NamedTuple):
    """A statistic and its derivatives with respect to ``kl``, ``kk`` and ``ll``."""

    value: Scalar
    d_kl: Scalar
    d_kk: Scalar
    d_ll: Scalar


class Coefficients(NamedTuple):
    """What the backward of a linear kernel needs besides the features; saved as one fp64 vector.

    The derivatives are with respect to the moments ``kl``, ``kk``, ``ll`` of the *scaled* features, which were
    multiplied by the powers of two ``scale_x`` and ``scale_y``; from the moments the backward also chooses scales for
    half-precision operands. ``n`` is the number of rows that count. ``sum_k`` and ``sum_l`` are what the backend needs
    to centre: for the library's unbiased estimator the sums of the squared row norms (`sides.Sides`), for kernels that
    centre K and L in the backward the totals of K and L, else 0.
    """

    d_kl: Scalar
    d_kk: Scalar
    d_ll: Scalar
    kl: Scalar
    kk: Scalar
    ll: Scalar
    sum_k: Scalar
    sum_l: Scalar
    scale_x: Scalar
    scale_y: Scalar
    n: Scalar


def combine(m: Moments, n: Scalar, statistic: Statistic, estimator: Estimator, eps: float) -> Combined:
    """The value of ``statistic`` by the module's formulas, and its derivatives, for ``n`` rows that count.

    A side without variance has CKA 0 and zero derivatives. The unbiased self-HSIC is a difference of ``kk``, ``r_kk``
    and ``t_k``, so "without" means: not above ROUNDING * ``eps`` times their sum, with ``eps`` the rounding unit of the
    products. NaN and Inf propagate. Too few rows give NaN: a masked call could not raise without a synchronisation.
    """
    enough, valid = n >= MIN_ROWS[estimator], 1.0
    if enough is not True:  # too few rows, or a tensor, whose value is not read
        n, valid = _where(enough, n, 4.0), _where(enough, 1.0, float("nan"))
    alpha = beta = 0.0
    if isinstance(m.r_kk, torch.Tensor) or m.r_kk or m.r_ll:  # else they are centred already
        left, pairs = (n, n * n) if estimator == "biased" else (n - 2.0, (n - 1.0) * (n - 2.0))
        alpha, beta = -2.0 / left, 1.0 / pairs
    if statistic == "gram_mse":  # its Gram matrices are centred already, so the other moments are zero
        each = valid / (n * n)
        return Combined(each * (m.kk - 2.0 * m.kl + m.ll), -2.0 * each, each, each)
    kl = m.kl + alpha * m.r_kl + beta * m.t_k * m.t_l
    if statistic == "hsic":
        norm = norm_of(n, estimator)
        return Combined(valid * kl / norm, valid / norm, 0.0 * kl, 0.0 * kl)

    kk, k_dead = _self_hsic(m.kk, m.r_kk, m.t_k, alpha, beta, eps)
    ll, l_dead = _self_hsic(m.ll, m.r_ll, m.t_l, alpha, beta, eps)
    dead = k_dead | l_dead
    alive = valid if dead is False else valid * _where(dead, 0.0, 1.0)
    d_kl = alive / (kk**0.5 * ll**0.5)
    cka = kl * d_kl
    d_kk, d_ll = -0.5 * cka / kk, -0.5 * cka / ll
    if statistic == "cka":
        return Combined(cka, d_kl, d_kk, d_ll)
    if statistic == "sqrt_cka_loss":
        # The square root has no derivative at 0. CKA 0 is the minimum of kl, whose gradient is zero, and so is this.
        none = cka <= 0.0  # False for NaN
        root = _where(none, 1.0, cka) ** 0.5
        slope = _where(none, 0.0, -0.5) / root
        return Combined(1.0 - _where(none, 0.0, root), slope * d_kl, slope * d_kk, slope * d_ll)
    return Combined(1.0 - cka, -d_kl, -d_kk, -d_ll)


def norm_of(n: Scalar, estimator: Estimator) -> Scalar:
    """By what HSIC is divided for ``n`` rows."""
    return n * (n - 3.0) if estimator == "unbiased" else (n - 1.0) * (n - 1.0)


def combine_all(
    inner: torch.Tensor, sums: torch.Tensor | None, n: Scalar, estimator: Estimator, eps: float
) -> tuple[torch.Tensor, torch.Tensor, Scalar]:
    """`combine` for all pairs of k Gram matrices: HSIC times its norm [k, k]; one over the root of that of each with
    itself [k], 0 without variance; and the norm's number of rows, NaN for too few.

    ``inner`` [k, k] are inner products, ``sums`` [k, n] row sums, None if they are zero; fp64. Pairs of which
    ``inner`` holds no product have no meaning; of each matrix with itself it must.
    """
    least = MIN_ROWS[estimator]
    n = n.masked_fill(n < least, torch.nan) if isinstance(n, torch.Tensor) else n if n >= least else math.nan
    if sums is None:
        value = terms = inner + 0.0 * n
    else:
        left, totals, products = n - 2.0, sums.sum(1), sums @ sums.T
        both = torch.outer(totals, totals) / ((n - 1.0) * left)
        value, terms = inner - products * (2.0 / left) + both, inner + products + both
    own = value.diagonal()
    dead = own <= ROUNDING * eps * terms.diagonal()  # False for NaN
    return value, own.masked_fill(dead, torch.inf).rsqrt(), n


def _self_hsic(kk: Scalar, r_kk: Scalar, t_k: Scalar, alpha: Scalar, beta: Scalar, eps: float) -> tuple[Scalar, Scalar]:
    """HSIC(K,K) * norm, replaced by 1 where it is zero up to rounding, and whether it is."""
    total = beta * t_k * t_k
    value = kk + alpha * r_kk + total
    dead = value <= ROUNDING * eps * (kk + r_kk + total)  # False for NaN
    return value if dead is False else _where(dead, 1.0, value), dead


def _where(condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    if isinstance(b, torch.Tensor) and not isinstance(a, torch.Tensor):
        return b.masked_fill(condition, a)  # torch.where would launch a kernel for the number
    return torch.where(condition, a, b)
