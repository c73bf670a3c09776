"""Both sides of a linear problem, centred, with their products: what a forward keeps and a backward is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..moments import Scalar
from ..types import Problem
from .linalg import inner, mm, self_product, self_product_norm


class Sides(NamedTuple):
    """Both sides, centred and scaled, and what the backward needs of their products; fields as in `Stash`.

    ``kl``, ``kk`` and ``ll`` are <K,L>, <K,K> and <L,L> of centred matrices; unbiased: of U-centred ones. ``rows``
    [3, n] (unbiased) holds kappa, lambda, and 1 for the rows that are apart; ``sum_k`` and ``sum_l`` are the sums of
    kappa and lambda if that is all that the gradient needs beside the products (`unbiased.plain`), else 0.
    """

    xs: Tensor
    ys: Tensor
    scale_x: Scalar
    scale_y: Scalar
    kl: Scalar
    kk: Scalar
    ll: Scalar
    xx: Tensor
    yy: Tensor
    xy: Tensor
    rows: Tensor
    sum_k: Scalar = 0.0
    sum_l: Scalar = 0.0


class Shifted(NamedTuple):
    """The rows of `Side` as they are multiplied: columns ``own`` and ``other`` of z (`rows.Rows`), but the rows ``few``
    [k], which are ``beside`` it (`rows.beside_z`)."""

    z: Tensor
    beside: Tensor
    few: Tensor
    own: slice
    other: slice


class Side(NamedTuple):
    """What the gradient of one side is made of; ``cross`` is the other Gram matrix, or other^T own; ``rows``
    (unbiased) are kappa and lambda, or the reverse, and the rows apart; ``sums`` `Sides`' of its own and the other."""

    own: Tensor
    other: Tensor
    cross: Tensor
    product: Tensor
    rows: tuple[Tensor, ...]
    scale: Scalar
    n: Scalar
    sums: tuple[Scalar, Scalar]
    shifted: Shifted | None = None


def by_columns(xs: Tensor, ys: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Scalar, Scalar, Scalar]:
    """A = X^T X, C = Y^T X, B = Y^T Y (empty if no gradient of y is wanted); |C|^2, |A|^2, |B|^2."""
    xx, xy = self_product(xs.T), mm(ys.T, xs)
    yy = self_product(ys.T) if problem.y_grad else xx.new_empty(0)
    ll = inner(yy, yy) if problem.y_grad else self_product_norm(ys.T)
    return xx, xy, yy, inner(xy, xy), inner(xx, xx), ll
