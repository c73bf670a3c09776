r"""From eight numbers of two Gram matrices to a value and the derivatives that a backward needs.

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

For the unbiased estimator the diagonals of K and L count as zero. With centred columns the row sums of a linear Gram
matrix vanish, so the biased moments are the first three alone, and without the diagonals they are minus the squared row
norms. Of matrices that are centred already (biased H K H, unbiased `backends.dominating.u_centred_`) the other five are
zero for both estimators.

Everything here works on Python floats and on 0-d fp64 tensors alike: the CPU reads its eight numbers once and goes on
in floats (a dozen 0-d tensor operations cost more than the Gram matrices at n = 128), a GPU stays on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch

from .types import Estimator, Statistic

Scalar: TypeAlias = Any  # a float or a 0-d fp64 tensor

# One-hot rows have an unbiased self-HSIC of zero. Over n = 4..512, three scales and two means its computed value stayed
# below 25 eps times the sum of its terms, fp32 and fp64, both routes; features that vary stand at n/d of that sum.
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

    The derivatives are those of the *scaled* features' moments: features were multiplied by the powers of two
    ``scale_x`` and ``scale_y``. ``kl``, ``kk``, ``ll`` are the products they belong to (they size the half-precision
    operands), ``sum_k`` and ``sum_l`` the sums of the squared row norms (unbiased only), ``n`` the rows that count.
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
    """The closed form of the module's docstring and its gradient.

    A side without variance has CKA 0 and zero derivatives. The unbiased self-HSIC is a difference of ``kk``, ``r_kk``
    and ``t_k``, so "without" means: not above ROUNDING * ``eps`` times their sum, with ``eps`` the rounding unit of the
    products. NaN and Inf stay visible. Fewer rows than the estimator needs give NaN (a masked call cannot raise without
    a host sync).
    """
    enough, valid = n >= MIN_ROWS[estimator], 1.0
    if enough is not True:  # too few, or a tensor that may say so
        n, valid = _where(enough, n, 4.0), _where(enough, 1.0, float("nan"))
    alpha = beta = 0.0
    if isinstance(m.r_kk, torch.Tensor) or m.r_kk or m.r_ll:  # else centred already
        left, pairs = (n, n * n) if estimator == "biased" else (n - 2.0, (n - 1.0) * (n - 2.0))
        alpha, beta = -2.0 / left, 1.0 / pairs
    if statistic == "gram_mse":  # of matrices that are centred already: they have no other moments
        each = valid / (n * n)
        return Combined(each * (m.kk - 2.0 * m.kl + m.ll), -2.0 * each, each, each)
    kl = m.kl + alpha * m.r_kl + beta * m.t_k * m.t_l
    if statistic == "hsic":
        norm = n * (n - 3.0) if estimator == "unbiased" else (n - 1.0) * (n - 1.0)
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
        # At CKA 0 the root has no slope: what is not above is the minimum of kl, whose own gradient is zero.
        none = cka <= 0.0  # False for NaN
        root = _where(none, 1.0, cka) ** 0.5
        slope = _where(none, 0.0, -0.5) / root
        return Combined(1.0 - _where(none, 0.0, root), slope * d_kl, slope * d_kk, slope * d_ll)
    return Combined(1.0 - cka, -d_kl, -d_kk, -d_ll)


def _self_hsic(kk: Scalar, r_kk: Scalar, t_k: Scalar, alpha: Scalar, beta: Scalar, eps: float) -> tuple[Scalar, Scalar]:
    """HSIC(K,K) * norm, made safe to divide by, and whether it vanishes."""
    total = beta * t_k * t_k
    value = kk + alpha * r_kk + total
    dead = value <= ROUNDING * eps * (kk + r_kk + total)  # False for NaN
    return value if dead is False else _where(dead, 1.0, value), dead


def _where(condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    if isinstance(b, torch.Tensor) and not isinstance(a, torch.Tensor):
        return b.masked_fill(condition, a)  # a number of a torch.where is a launch
    return torch.where(condition, a, b)
