r"""The published equations, written literally in fp64: the truth that every other backend is tested against.

Slow on purpose (dense centring matrices, n x n products), differentiable to any order, without imports of ours.
``backend="reference"`` runs it, a double backward differentiates it. A row *counts* unless its mask (bool) is False.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def select(x: Tensor, mask: Tensor | None) -> Tensor:
    """x in fp64 with zeros in the rows that do not count: dropping them would make shapes depend on the data."""
    x = x.double()
    return x if mask is None else torch.where(mask[:, None], x, 0.0)


def number_of_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The number of rows that count, as a 0-d fp64 tensor."""
    return torch.full((), x.shape[0], dtype=torch.float64, device=x.device) if mask is None else mask.double().sum()


def centring_matrix(x: Tensor, mask: Tensor | None) -> Tensor:
    r"""H = I - 1 1^T / n, restricted to the rows that count. Shape [n, n], fp64."""
    ones = torch.ones(x.shape[0], dtype=torch.float64, device=x.device) if mask is None else mask.double()
    return torch.diag(ones) - torch.outer(ones, ones) / number_of_rows(x, mask)


def squared_distances(x: Tensor, mask: Tensor | None) -> Tensor:
    """|x_i - x_j|^2 of the rows that count, zero for the others and up to the rounding error; [n, n], fp64."""
    lost = 1e-26 * select(x, mask).square().sum()  # the rounding error of centring, even of constant features
    x = centring_matrix(x, mask) @ select(x, mask)
    norms = x.square().sum(1)
    pairs = norms[:, None] + norms[None, :]
    distances = pairs - 2 * x @ x.T
    return torch.where(distances <= 1e-14 * pairs + lost, 0.0, distances)  # false for NaN


def bandwidth(distances: Tensor, mask: Tensor | None, kernel: Any, side: int) -> Tensor:
    """sigma^2 by the rule of an `RBF`; 0-d, fp64. The median of none is 0."""
    if kernel.sigma is not None:
        sigma = kernel.sigma[side] if isinstance(kernel.sigma, tuple) else kernel.sigma
        return torch.full((), sigma**2, dtype=torch.float64, device=distances.device)
    distances = distances if kernel.flow else distances.detach()
    ones = torch.ones_like(distances[0]) if mask is None else mask.double()
    counted = torch.outer(ones, ones) > 0
    if kernel.threshold is None:
        counted = counted & (distances != 0)
    number = counted.sum()
    ordered = torch.where(counted, distances, torch.inf).flatten().sort().values
    lower, upper = (ordered.gather(0, (rank // 2).clamp(min=0).expand(1)).squeeze() for rank in (number - 1, number))
    median = lower if kernel.median == "lower" else 0.5 * (lower + upper)
    return torch.where(number > 0, median, 0.0) * (kernel.threshold or 1.0) ** 2


def rbf_gram(x: Tensor, mask: Tensor | None, kernel: Any, side: int, center: bool) -> Tensor:
    """exp(-|x_i - x_j|^2 / (2 sigma^2)) of the rows that count, zero for the others; [n, n], fp64.

    All ones where sigma is 0. With ``center`` less 1, which H K H does not see: where sigma is large beside all
    distances, K itself has no digits left.
    """
    distances = squared_distances(x, mask)
    square = bandwidth(distances, mask, kernel, side)
    exponents = torch.where(square == 0, 0.0, -distances / (2 * torch.where(square == 0, 1.0, square)))
    gram = exponents.expm1() if center else exponents.exp()
    return gram if mask is None else gram * torch.outer(mask.double(), mask.double())


def centered_gram(
    x: Tensor, mask: Tensor | None = None, kernel: Any = None, side: int = 0, center: bool = True
) -> Tensor:
    r"""H K H (Gretton et al. 2005) with K = X X^T or the matrix of an `RBF`; K itself without ``center``. [n, n], fp64.

    For the linear kernel H is applied to X before the product: the same in exact arithmetic, and in fp64 its rounding
    error is smaller by (mean/std)^2. ``side`` is 0 for x, 1 for y, which may have different fixed sigmas.
    """
    h = centring_matrix(x, mask)
    if kernel is not None:
        gram = rbf_gram(x, mask, kernel, side, center)
        return h @ gram @ h if center else gram
    centred = h @ select(x, mask) if center else select(x, mask)
    return centred @ centred.T


def hsic_biased(k: Tensor, l: Tensor, n: Tensor) -> Tensor:
    r"""tr(K H L H) / (n-1)^2 (Gretton et al. 2005, eq. 9) of centred Gram matrices k and l; 0-d, fp64."""
    return (k * l).sum() / (n - 1) ** 2


def hsic_unbiased(k: Tensor, l: Tensor, n: Tensor) -> Tensor:
    r"""Song et al. 2012, eq. 5, with K~ and L~ the Gram matrices without their diagonals::

        [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3))

    Adding u_i + u_j to K_ij does not change the estimator, so k and l may be centred, which is more accurate.
    """
    k, l = (gram - torch.diag(gram.diagonal()) for gram in (k, l))
    trace = (k * l.T).sum()
    totals = k.sum() * l.sum() / ((n - 1) * (n - 2))
    rows = (k.sum(0) * l.sum(1)).sum() * 2 / (n - 2)
    return (trace + totals - rows) / (n * (n - 3))


HSIC = {"biased": hsic_biased, "unbiased": hsic_unbiased}


def hsic(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    estimator: str = "biased",
    kernel: Any = None,
    center: bool = True,
) -> Tensor:
    """HSIC of x [n, p] and y [n, q]; 0-d, fp64. ``kernel`` None is the linear one, else a `bird_kernels.RBF`."""
    k, l = centered_gram(x, mask, kernel, 0, center), centered_gram(y, mask, kernel, 1, center)
    return undefined(x, mask, estimator) * HSIC[estimator](k, l, number_of_rows(x, mask))


def has_no_variance(x: Tensor, gram: Tensor, self_hsic: Tensor, mask: Tensor | None, kernel: Any) -> Tensor:
    """Whether HSIC(x, x) is zero up to the rounding of fp64; 0-d, bool. ``gram`` is the centred one."""
    size = select(x, mask).square().sum() * 1e-26 if kernel is None else 0.0
    return (gram.trace() <= size) | (self_hsic <= 1e-13 * gram.square().mean())


def undefined(x: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    """NaN where there are fewer rows than the estimator needs, else 1; 0-d, fp64."""
    enough = number_of_rows(x, mask) >= {"biased": 2, "unbiased": 4}[estimator]
    return torch.where(enough, 1.0, torch.nan).double()


def cka(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    estimator: str = "biased",
    kernel: Any = None,
    center: bool = True,
) -> Tensor:
    """HSIC(x,y) / sqrt(HSIC(x,x) HSIC(y,y)) (Kornblith et al. 2019, eq. 4), 0 if a side has no variance; 0-d, fp64."""
    k, l = centered_gram(x, mask, kernel, 0, center), centered_gram(y, mask, kernel, 1, center)
    n = number_of_rows(x, mask)
    xy, xx, yy = (HSIC[estimator](a, b, n) for a, b in ((k, l), (k, k), (l, l)))
    dead = has_no_variance(x, k, xx, mask, kernel) | has_no_variance(y, l, yy, mask, kernel)
    xx, yy = (torch.where(dead, 1.0, a) for a in (xx, yy))
    return undefined(x, mask, estimator) * torch.where(dead, 0.0 * xy, xy) / (xx.sqrt() * yy.sqrt())


def cka_loss(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """1 - CKA, the representation loss of BIRD (ICLR 2026); 0-d, fp64. Options as `cka`."""
    return 1.0 - cka(x, y, *options)


def sqrt_cka_loss(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """1 - sqrt(CKA), biased: hidden-state matching (Dasgupta and Cohn 2025); 0-d, fp64. Options as `cka`."""
    value = cka(x, y, *options)
    return 1.0 - torch.where(value <= 0, 0.0, torch.where(value <= 0, 1.0, value).sqrt())


def gram_mse(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    estimator: str = "biased",
    kernel: Any = None,
    center: bool = True,
) -> Tensor:
    """Mean squared difference of the Gram matrices' n^2 entries; 0-d, fp64."""
    difference = centered_gram(x, mask, kernel, 0, center) - centered_gram(y, mask, kernel, 1, center)
    return undefined(x, mask, estimator) * difference.square().sum() / number_of_rows(x, mask) ** 2
