"""Every public call that takes features, by name: what the tests of a property of all of them go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bird_kernels
from bird_kernels import RBF, CKALoss, HSICLoss, Statistics, cka_loss, token_cka_loss
from bird_kernels.matrix import hsic_matrix

Call = Callable[..., Any]  # of x [n, p], y [n, q] and mask [n] or None; ``backend`` where `COMMON` has it


def of(function: Callable[..., Any], **options: Any) -> Call:
    return lambda x, y, mask, **more: function(x, y, mask=mask, **options, **more)


def listed(**options: Any) -> Call:
    return lambda x, y, mask, **more: cka_loss([x, x[:, :1]], [y, y], mask=mask, **options, **more)


def sequences(x: Tensor, y: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Of six tokens each."""
    x, y, mask = (None if a is None else a.unflatten(0, (-1, 6)) for a in (x, y, mask))  # type: ignore[assignment]
    return token_cka_loss(x, y, mask=mask, **options)


def packed(x: Tensor, y: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Sequences of six tokens, which all count."""
    starts = torch.arange(0, len(x) + 1, 6, device=x.device)
    return token_cka_loss(x, y, cu_seqlens=starts, max_seqlen=6, **options)


def added(x: Tensor, y: Tensor, mask: Tensor | None) -> Statistics:
    """Statistics that were updated and merged."""
    total, other = Statistics(), Statistics()
    for each in (total, total, other):
        each.update(x, y, mask)
    total.merge(other)
    return total


# With a backward, whatever the device. Values are 0-d.
LOSSES: dict[str, Call] = {
    "cka_loss": of(cka_loss),
    "unbiased": of(cka_loss, estimator="unbiased"),
    "cka": of(bird_kernels.cka),
    "hsic": of(bird_kernels.hsic),
    "hsic, unbiased": of(bird_kernels.hsic, estimator="unbiased"),
    "sqrt": of(cka_loss, sqrt=True),
    "uncentred": of(cka_loss, center=False),
    "uncentred cka": of(bird_kernels.cka, center=False),
    "gram_mse": of(bird_kernels.gram_mse),
    "uncentred gram_mse": of(bird_kernels.gram_mse, center=False),
    "lists": listed(),
    "lists with weights": listed(weights=[0.5, 2.0], estimator="unbiased"),
    "uncentred lists": listed(weights=[0.5, 2.0], center=False),
    "lists of one": lambda x, y, mask, **more: cka_loss([x], [y], mask=mask, **more),
    "modules": lambda x, y, mask: CKALoss()(x, y, mask) + HSICLoss(estimator="unbiased")(x, y, mask),
    "tokens": sequences,
    "last tokens": partial(sequences, tokens="last"),
    "mean tokens": partial(sequences, tokens="mean"),
    "packed tokens": partial(packed, estimator="unbiased"),
    "packed last tokens": partial(packed, tokens="last"),
    "packed mean tokens": partial(packed, tokens="mean"),
}
# These may refuse a device that lacks something.
OTHERS: dict[str, Call] = {
    "rbf": of(cka_loss, kernel="rbf"),
    "rbf, unbiased": of(cka_loss, kernel="rbf", estimator="unbiased"),
    "rbf, fixed": of(cka_loss, kernel=RBF(sigma=4.0)),
    "rbf, threshold": of(bird_kernels.hsic, kernel=RBF(threshold=0.5)),
    "rbf, flow": of(bird_kernels.cka, kernel=RBF(flow=True)),
    "rbf, uncentred": of(cka_loss, kernel="rbf", center=False),
    "rbf gram_mse": of(bird_kernels.gram_mse, kernel="rbf"),
    "sequences": partial(sequences, tokens="sequence"),
    "sequences, unbiased": partial(sequences, tokens="sequence", estimator="unbiased"),
    "packed sequences": partial(packed, tokens="sequence"),
    "centered_gram": lambda x, y, mask: bird_kernels.centered_gram(x).square().sum(),
    "centered_gram, rbf": lambda x, y, mask: bird_kernels.centered_gram(x, kernel="rbf").square().sum(),
    "cka_matrix": lambda x, y, mask: bird_kernels.cka_matrix([x, y], [y, x], mask=mask, estimator="unbiased"),
    "cka_matrix, by features": lambda x, y, mask: bird_kernels.cka_matrix([x[:, :1]], [y[:, :2], y[:, :1]], mask=mask),
    "cka_matrix, itself": lambda x, y, mask: bird_kernels.cka_matrix([x, x, y], mask=mask),
    "hsic_matrix": lambda x, y, mask: hsic_matrix([x, y], mask=mask).xy,
    "statistics": lambda x, y, mask: added(x, y, mask).cka(),
    "statistics, unbiased": lambda x, y, mask: added(x, y, mask).hsic("unbiased"),
    "statistics, gradient": lambda x, y, mask: added(x, y, mask).gradient(x, y, "unbiased").sum(),
}
CALLS = LOSSES | OTHERS
# What every backend computes, and what some compute.
COMMON = ("cka_loss", "unbiased", "cka", "hsic", "hsic, unbiased", "lists", "lists with weights", "lists of one")
