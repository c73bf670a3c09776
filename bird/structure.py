"""Losses of the structure of two sets of rows, by name: what ``BirdLoss(loss=)`` and ``Guidance(loss=)`` take.

x [n, p] are the student's rows, y [n, q] the teacher's. A side without variance, up to rounding, has similarity 0: the
loss is 1 (but of gram_mse) and its gradient zero.

================== ====================================================================================================
name               loss
================== ====================================================================================================
``cka``            1 - CKA, BIRD's published loss: `bird_kernels.cka_loss`
``sqrt_cka``       1 - sqrt(CKA) (Dasgupta and Cohn 2025), biased
``cosine_cka``     1 - CKA of rows scaled to length 1, so that angles alone count, as in similarity-preserving
                   distillation (Tung and Mori 2019), which scales the rows of Gram matrices; a zero row stays zero
``gram_mse``       mean squared difference of the centred Gram matrices, in the fourth power of the features' units:
                   `bird_kernels.gram_mse`
``rsa``            1 - r, Pearson's correlation of the n (n - 1) / 2 Euclidean distances between rows: representational
                   similarity analysis (Kriegeskorte, Mur and Bandettini 2008). McClure and Kriegeskorte 2016 trained on
                   such distances. "Distance correlation" means this correlation of distances here, and not the
                   statistic of Szekely, Rizzo and Bakirov 2007, which centres both matrices first, as CKA does. (Ranks,
                   which the first paper correlates, have no gradient.) [n, n] distances are in memory
``procrustes``     1 - the nuclear norm of Xc^T Yc over the Frobenius norms of the centred features Xc and Yc: what is
                   left after the best rotation (Schönemann 1966; Williams et al. 2021), by the singular values of a
                   matrix of at most [min(n, p), min(n, q)]. First derivatives only; the host waits for the device
``cka_difference`` 1 - CKA of the differences of pairs of rows, the first half of them minus the second: chosen minus
                   rejected responses, so that what both have in common cancels
================== ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bird_kernels import CKALoss, distributed, functional, gram_mse, inputs
from bird_kernels.pairs import stack

# The options that each loss takes; others must have their defaults.
LOSSES: dict[str, set[str]] = {
    "cka": (everything := {"kernel", "estimator", "row_dims", "group", "backend", "precision"}),
    "sqrt_cka": everything - {"estimator"},
    "cosine_cka": everything,
    "gram_mse": everything - {"estimator", "group"},
    "rsa": {"row_dims"},
    "procrustes": {"row_dims"},
    "cka_difference": everything - {"row_dims"},
}
ERRORS = ("gram_mse",)  # of all others 1 - loss is a similarity, which logs show
ROUNDING = 16  # times its rounding error, squared: a side of less variance has none
_DEFAULTS = CKALoss().options


def named_loss(loss: str, **options: Any) -> CKALoss:
    """The module of a loss by its name; ``options`` as of `CKALoss`.

    Raises:
        ValueError: no such loss (those known are listed), or an option that it does not take.
    """
    inputs.require_choice({"loss": tuple(LOSSES)}, loss=loss)
    if refused := {name for name, value in options.items() if value != _DEFAULTS[name]} - LOSSES[loss]:
        given = ", ".join(f"{name}={options[name]!r}" for name in sorted(refused))
        raise ValueError(
            f'loss="{loss}" takes no {given}; {", ".join(name for name in LOSSES if refused <= LOSSES[name])} can'
        )
    if loss in ("cka", "sqrt_cka"):
        return CKALoss(**options | ({"sqrt": True} if loss == "sqrt_cka" else {}))
    return StructureLoss(loss, **options)


class StructureLoss(CKALoss):
    """A loss that `bird_kernels.cka_loss` does not have, as a module."""

    def __init__(self, loss: str, **options: Any) -> None:
        super().__init__(**options)
        self.loss = loss

    def forward(self, x: Any, y: Any, mask: Tensor | None = None) -> Tensor:
        """The loss of x [n, ...] and y [n, ...], 0-d; fp32, or fp64 if either side has it."""
        return self.each([x], [y], mask)[0]

    def each(self, xs: Sequence[Tensor], ys: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The loss of each pair of two lists, [pairs]."""
        options, pairs = {name: value for name, value in self.options.items() if name != "row_dims"}, []
        taken, each = {name: options[name] for name in LOSSES["gram_mse"] - {"row_dims"}}, zip(xs, ys, strict=True)
        of_one = {"rsa": _rsa, "procrustes": _procrustes, "gram_mse": lambda x, y, m: gram_mse(x, y, mask=m, **taken)}
        with distributed.Reported(options["group"]), torch.autocast(xs[0].device.type, enabled=False):
            for x, y, rows in (inputs.as_rows(*pair, mask, self.options["row_dims"]) for pair in each):
                if self.loss == "cosine_cka":
                    x, y = _unit(x, rows), _unit(y, rows)
                elif self.loss == "cka_difference":
                    x, y, rows = differences(x), differences(y), rows if rows is None else rows.reshape(2, -1).all(0)
                pairs.append((x, y, rows))
            if self.loss in of_one:
                return stack([of_one[self.loss](*pair) for pair in pairs])
        return functional.cka_losses(*zip(*(pair[:2] for pair in pairs), strict=True), mask=pairs[0][2], **options)

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows."""
        return f"{self.loss!r}, {super().extra_repr()}"


def differences(rows: Tensor) -> Tensor:
    """The first half of the rows minus the second, [n / 2, ...], in fp32 or wider.

    Raises:
        ValueError: an odd number of rows.
    """
    if len(rows) % 2:
        raise ValueError(f"differences of pairs need as many chosen rows as rejected ones, got {len(rows)} in all")
    first, second = rows.to(torch.promote_types(rows.dtype, torch.float32)).chunk(2)
    return first - second


def _unit(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of length 1. They are divided by their largest value first, whose square may be beyond fp32."""
    rows = _counted(x, mask)
    size = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / size.masked_fill(size == 0, 1.0)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.masked_fill(length == 0, torch.inf)  # a zero row has no direction, and no gradient


def _rsa(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    pairs = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    pairs = pairs if mask is None else pairs & mask[:, None] & mask
    spreads, dead = [], []
    for side in (x, y):
        rows, constant, count = _centred("rsa", side, mask)
        # Not by products of rows, which would cancel.
        distances = torch.where(pairs, torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist"), 0.0)
        spread = torch.where(pairs, distances - distances.sum() / (count * (count - 1)), 0.0)
        spreads.append(spread)
        dead.append(constant | _is_noise(spread, distances))
    a, b = spreads
    return _one_less((a * b).sum(), a, b, dead[0] | dead[1], count)


def _procrustes(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The nuclear norm is <U V^T, Xc^T Yc> with the singular vectors U and V, which are held constant: its gradient is
    right so, too. Those of singular values that are rounding are left out, so features of any rank have a stable one.
    """
    (x, dead_x, count), (y, dead_y, _) = _centred("procrustes", x, mask), _centred("procrustes", y, mask)
    with torch.no_grad():
        (a, left), (b, right) = _narrowed(x), _narrowed(y)
        product = a.mT @ b
        product = torch.where(product.isfinite().all(), product, 0.0)  # the decomposition raises for others
        u, values, vt = torch.linalg.svd(product, full_matrices=False)
        kept = values > torch.finfo(x.dtype).eps * ROUNDING * values[0]  # times the width it also took real directions
        left, right = left @ (u * kept), right @ vt.mT
    for side in (x, y):
        if side.requires_grad and not torch.compiler.is_compiling():  # compiled code has no second derivative anyway
            side.register_hook(_only_once)
    return _one_less(((x @ left) * (y @ right)).sum(), x, y, dead_x | dead_y, count)


def _only_once(gradient: Tensor | None) -> None:
    """A hook of a gradient, of which a derivative raises: the singular vectors would be constant in it, too."""

    def refuse(_: Tensor) -> None:
        raise RuntimeError('loss="procrustes" has first derivatives only; all other losses have second ones, too')

    if gradient is not None and gradient.requires_grad:
        gradient.register_hook(refuse)


def _narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, p] as a q^T with a [n, min(n, p)] and orthonormal columns q [p, min(n, p)]."""
    if x.shape[1] <= len(x):
        return x, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    q, r = torch.linalg.qr(x.mT)
    return r.mT, q


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """x in fp32 or wider, with zeros in the rows that do not count, which may hold NaN."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if mask is None else torch.where(mask[:, None], x, 0.0)


def _centred(loss: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The rows centred and of size one, whether they have no variance, and how many count; 0-d."""
    if len(x) < 2:
        raise ValueError(f'loss="{loss}" needs at least 2 rows, got {len(x)}')
    ones = torch.ones(len(x), 1, dtype=torch.bool, device=x.device) if mask is None else mask[:, None]
    count, x = ones.sum(), _counted(x, mask)
    # By a power of two, which rounds nothing: divided by their largest value, rows with a mean lose its digits.
    x = centred = x / torch.ldexp(x.new_ones(()), torch.frexp(x.detach().abs().amax()).exponent - 1)
    for _ in range(2):  # the second time takes what rounding left of a mean that is large beside the spread
        centred = torch.where(ones, centred - centred.sum(0) / count, 0.0)
    return centred, _is_noise(centred, x), count


def _one_less(product: Tensor, x: Tensor, y: Tensor, dead: Tensor, count: Tensor) -> Tensor:
    """1 - product / (|x| |y|), 1 if a side is ``dead``; NaN where fewer than two rows count or a side has NaN."""
    dead = dead & (x.detach().sum() + y.detach().sum()).isfinite()
    xx, yy = (torch.where(dead, 1.0, side.square().sum()) for side in (x, y))
    similarity = torch.where(dead, 0.0, product) / (xx.sqrt() * yy.sqrt())
    return torch.where(count < 2, torch.nan, 1 - similarity)


def _is_noise(spread: Tensor, x: Tensor) -> Tensor:
    """Whether what is left of x is its rounding error, 0-d; false for NaN."""
    bound = (ROUNDING * torch.finfo(x.dtype).eps) ** 2
    return spread.detach().square().sum() <= bound * x.detach().square().sum()
