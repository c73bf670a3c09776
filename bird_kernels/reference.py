r"""What is computed: the published equations, written literally, in fp64. Imports nothing of ours.

Slow on purpose (dense centring matrices, n x n everything) and differentiable to any order, this is the truth that
every other backend is tested against. It is also what ``backend="reference"`` runs and what a double backward
differentiates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of ``x`` that count, in fp64. Zeroed rather than dropped, so that shapes do not depend on the data."""
    x = x.double()
    return x if mask is None else torch.where(mask[:, None], x, 0.0)


def row_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """The number of rows that count, as a 0-d fp64 tensor."""
    return torch.full((), x.shape[0], dtype=torch.float64, device=x.device) if mask is None else mask.double().sum()


def centring_matrix(x: Tensor, mask: Tensor | None) -> Tensor:
    r"""H = I - 1 1^T / n, restricted to the rows that count. Shape [n, n], fp64."""
    ones = torch.ones(x.shape[0], dtype=torch.float64, device=x.device) if mask is None else mask.double()
    return torch.diag(ones) - torch.outer(ones, ones) / row_count(x, mask)


def centered_gram(x: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""H X X^T H (Gretton et al. 2005). Shape [n, n], fp64.

    H is applied to X before the product: in exact arithmetic the same, in fp64 better by (mean/std)^2.
    """
    centred = centring_matrix(x, mask) @ select(x, mask)
    return centred @ centred.T


def hsic_biased(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""tr(K H L H) / (n-1)^2 (Gretton et al. 2005, eq. 9)."""
    n = row_count(x, mask)
    return (centered_gram(x, mask) * centered_gram(y, mask)).sum() / (n - 1) ** 2


def hsic_unbiased(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Song et al. 2012, eq. 5, with K~ and L~ the Gram matrices without their diagonals::

        [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3))

    The estimator does not change when the features are shifted; they are centred first for accuracy.
    """
    n = row_count(x, mask)
    k, l = (gram - torch.diag(gram.diagonal()) for gram in (centered_gram(x, mask), centered_gram(y, mask)))
    trace = (k * l.T).sum()
    totals = k.sum() * l.sum() / ((n - 1) * (n - 2))
    rows = (k.sum(0) * l.sum(1)).sum() * 2 / (n - 2)
    return (trace + totals - rows) / (n * (n - 3))


HSIC = {"biased": hsic_biased, "unbiased": hsic_unbiased}


def hsic(x: Tensor, y: Tensor, mask: Tensor | None = None, estimator: str = "biased") -> Tensor:
    """HSIC of x [n, p] and y [n, q]; 0-d, fp64."""
    return undefined(x, mask, estimator) * HSIC[estimator](x, y, mask)


def has_no_variance(x: Tensor, self_hsic: Tensor, mask: Tensor | None) -> Tensor:
    """Whether HSIC(x, x) is zero up to the rounding of fp64; 0-d, bool."""
    gram = centered_gram(x, mask)
    constant = gram.trace() <= 1e-26 * select(x, mask).square().sum()
    return constant | (self_hsic <= 1e-13 * gram.square().mean())


def undefined(x: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    """NaN where there are fewer rows than the estimator needs, else 1; 0-d, fp64."""
    enough = row_count(x, mask) >= {"biased": 2, "unbiased": 4}[estimator]
    return torch.where(enough, 1.0, torch.nan).double()


def cka(x: Tensor, y: Tensor, mask: Tensor | None = None, estimator: str = "biased") -> Tensor:
    """HSIC(x,y) / sqrt(HSIC(x,x) HSIC(y,y)) (Kornblith et al. 2019, eq. 4), 0 if a side has no variance; 0-d, fp64."""
    xy, xx, yy = (hsic(a, b, mask, estimator) for a, b in ((x, y), (x, x), (y, y)))
    dead = has_no_variance(x, xx, mask) | has_no_variance(y, yy, mask)
    xx, yy = (torch.where(dead, 1.0, a) for a in (xx, yy))
    return undefined(x, mask, estimator) * torch.where(dead, 0.0 * xy, xy) / (xx.sqrt() * yy.sqrt())


def cka_loss(x: Tensor, y: Tensor, mask: Tensor | None = None, estimator: str = "biased") -> Tensor:
    """1 - CKA, the representation loss of BIRD (ICLR 2026); 0-d, fp64."""
    return 1.0 - cka(x, y, mask, estimator)
