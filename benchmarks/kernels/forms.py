"""The loss as users of the package could write or find it instead.

Each form is a function of ``x [n, p]`` and ``y [n, q]`` that returns ``1 - CKA`` as a scalar with autograd behind it,
linear or of Gaussian kernels. They are written here from the published formulas; pytorch-cka is the package of that
name. Half precision is given its due: means and sums in fp32, products of halves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def naive(x: Tensor, y: Tensor, kernel: str = "linear", estimator: str = "biased") -> Tensor:
    """The formula as it is usually written: three HSICs, each of two Grams that are centred as ``H K H``; biased."""

    def gaussian(features: Tensor) -> Tensor:
        products = features @ features.T
        distances = products.diagonal() - products + (products.diagonal() - products).T
        square = torch.median(distances[distances != 0]).item()
        return torch.exp(-0.5 / square * distances)

    def centred_gram(features: Tensor) -> Tensor:
        n = features.shape[0]
        identity = torch.eye(n, dtype=features.dtype, device=features.device)
        centring = identity - torch.ones_like(identity) / n
        return centring @ (gaussian(features) if kernel == "rbf" else features @ features.T) @ centring

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        return (centred_gram(one) * centred_gram(other)).sum()

    return 1 - hsic(x, y) / (hsic(x, x).sqrt() * hsic(y, y).sqrt())


def by_grams(x: Tensor, y: Tensor, estimator: str = "biased", kernel: str = "linear") -> Tensor:
    """Centre the columns, two Grams, three sums: ``n^2 (p + q)`` products, the best plain form at small n."""
    x, y = _centred(x), _centred(y)
    if kernel == "rbf":
        k, l = _gaussian(x), _gaussian(y)
        if estimator == "biased":
            k, l = (a - a.mean(0) - a.mean(1, keepdim=True) + a.mean() for a in (k, l))
    else:
        k, l = _wide(x @ x.T), _wide(y @ y.T)
    if estimator == "biased":
        return 1 - (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
    n = k.shape[0]
    k, l = k - k.diagonal().diag(), l - l.diagonal().diag()  # Song et al. 2012, up to the factor that cancels
    rows_k, rows_l = k.sum(0), l.sum(0)

    def hsic(a: Tensor, b: Tensor, rows_a: Tensor, rows_b: Tensor) -> Tensor:
        totals = rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2))
        return (a * b).sum() + totals - 2 / (n - 2) * (rows_a @ rows_b)

    own, other = hsic(k, k, rows_k, rows_k), hsic(l, l, rows_l, rows_l)
    return 1 - hsic(k, l, rows_k, rows_l) / (own * other).sqrt()


def by_features(x: Tensor, y: Tensor, estimator: str = "biased") -> Tensor:
    """Centre the columns, three cross-products: ``n (p^2 + q^2 + p q)``, the best plain form at large n."""
    x, y = _centred(x), _centred(y)
    # Sums of squares and not norms: as fast, and torch's norm of 4096^2 numbers in fp32 is off by 4e-4.
    cross, own, other = (_wide(a.T @ b).square().sum() for a, b in ((y, x), (x, x), (y, y)))
    if estimator == "unbiased":  # as in `by_grams`, from the squared row norms alone: the rows of K sum to zero
        n = x.shape[0]
        kappa, lam = _wide(x).square().sum(1), _wide(y).square().sum(1)

        def correction(a: Tensor, b: Tensor) -> Tensor:
            return a.sum() * b.sum() / ((n - 1) * (n - 2)) - n / (n - 2) * (a @ b)

        cross, own, other = (
            cross + correction(kappa, lam), own + correction(kappa, kappa), other + correction(lam, lam),
        )  # fmt: skip
    return 1 - cross / (own * other).sqrt()


def anatome(x: Tensor, y: Tensor, estimator: str = "biased") -> Tensor:
    """The five lines of anatome (on PyPI ultimate-anatome): the feature form with norms; biased."""
    x, y = x - x.mean(0), y - y.mean(0)
    return 1 - (y.T @ x).norm().square() / ((x.T @ x).norm() * (y.T @ y).norm())


def fp64(x: Tensor, y: Tensor, estimator: str = "biased") -> Tensor:
    """The feature form on a float64 copy: what losses in public code do for accuracy."""
    return by_features(x.double(), y.double(), estimator).to(torch.float32)


def _gaussian(x: Tensor) -> Tensor:
    """The published bandwidth, sigma^2 = the median of distances that are not zero, and a constant."""
    products = _wide(x @ x.T)
    norms = products.diagonal()
    distances = (norms + norms[:, None] - 2 * products).clamp(min=0)
    constant = distances.detach()
    return torch.exp(distances * (-0.5 / constant[constant > 0].median()))


def _centred(x: Tensor) -> Tensor:
    wide = _wide(x)
    return (wide - wide.mean(0)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x


def pytorch_cka(x: Tensor, y: Tensor, estimator: str = "unbiased") -> Tensor:
    """1 - CKA of the package of that name; unbiased."""
    from cka import cka_from_features  # loads matplotlib: late

    return 1 - cka_from_features(x, y)[0, 0]


def flops(form: Callable[..., Tensor], n: int, p: int, q: int, backward: bool) -> int:
    """Operations of the products of one call, as library calls that know of no symmetry do them."""
    once, again = {
        "naive": (24 * n**3 + 6 * n * n * (p + q), 12 * n**3 + 12 * n * n * p),
        "by_grams": (2 * n * n * (p + q), 4 * n * n * p),
        "by_features": (2 * n * (p * p + q * q + p * q), 2 * n * (p * q + 2 * p * p)),
    }[{"fp64": "by_features", "anatome": "by_features", "pytorch_cka": "by_grams"}.get(form.__name__, form.__name__)]
    return once + again * backward


def better_form(n: int, p: int, q: int, kernel: str = "linear") -> Callable[..., Tensor]:
    """The plain form with fewer products."""
    return by_grams if kernel == "rbf" or n * n * (p + q) <= n * (p * p + q * q + p * q) else by_features
