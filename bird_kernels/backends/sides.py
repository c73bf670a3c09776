"""What the library backend's forward computes of a linear problem and its backward needs: centred sides, products."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..moments import Scalar
from ..types import Problem
from .linalg import inner, mm, self_product, self_product_norm


class Sides(NamedTuple):
    """Both sides, centred and scaled, and their products; fields of a `Stash` as there.

    ``kl``, ``kk`` and ``ll`` are <K,L>, <K,K> and <L,L> of centred Gram matrices, unbiased of U-centred ones. ``rows``
    [3, n] (unbiased only) holds the squared row norms kappa of x and lambda of y, and 1 for rows that are kept apart
    (`dominating`). ``sum_k``, ``sum_l``: the sums of kappa and lambda, by `unbiased.plain` alone, else 0.
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
    """A `Side`'s rows as operands of products: columns ``own`` and ``other`` of z (`rows.ShiftedRows`), except for the
    rows ``few`` [k] (indices), which are in ``beside`` (`rows.beside_z`)."""

    z: Tensor
    beside: Tensor
    few: Tensor
    own: slice
    other: slice


class Side(NamedTuple):
    """What the gradient of one side needs: on the gram route ``cross`` is the other side's Gram matrix, ``product`` its
    own; on the cross route other^T own, own^T own. ``rows`` (unbiased) are kappa and lambda of (own, other), and the
    rows that are kept apart; ``sums`` are `Sides`' of (own, other)."""

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
    columns_y = ys.T
    xx, xy = self_product(xs.T), mm(columns_y, xs)
    if not problem.y_grad:
        return xx, xy, xx.new_empty(0), inner(xy, xy), inner(xx, xx), self_product_norm(columns_y, ys)
    yy = self_product(columns_y)
    return xx, xy, yy, inner(xy, xy), inner(xx, xx), inner(yy, yy)
