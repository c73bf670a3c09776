"""CKA of two Gram matrices that are given as they are, by PyTorch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.linalg import has_fp64
from .inputs import DTYPES, require_choice
from .moments import MIN_ROWS
from .types import Estimator

NOISE = 4.0  # in rounding units of the given entries: a centred matrix whose entries are no larger is rounding


def cka_from_grams(k: Tensor, l: Tensor, *, estimator: str = "biased") -> Tensor:
    r"""CKA of two symmetric Gram matrices K and L of the same n samples, of any kernel.

    .. math::  \frac{\langle K_c, L_c \rangle}{\lVert K_c \rVert \, \lVert L_c \rVert}

    Biased: K_c = H K H with H = I - 1/n (Kornblith et al. 2019). Unbiased: K_c is the U-centred matrix (Song et al.
    2012, Székely and Rizzo 2014), for which the inner product is n (n - 3) HSIC_1. If K and L are matrices of features,
    `cka` is faster and, where features have a mean, more exact: digits that the entries of K lack do not come back.
    Symmetry is not checked.

    Args:
        k: K, [n, n], fp64, fp32, bf16 or fp16. Not changed.
        l: L, the same; dtypes may differ.
        estimator: "biased" (at least 2 samples) or "unbiased" (at least 4).

    Returns:
        0-d, differentiable, fp64 if K or L is, else fp32. It is computed in fp64 where the device has it. 0, with zero
        gradients, if the entries of K_c or L_c are no larger than the rounding of those of K or L.

    Raises:
        TypeError: K or L is not a tensor of a dtype above.
        ValueError: they are not two square matrices of one size, that size is too small, their devices differ, or
            ``estimator`` has another name.
    """
    require_choice(estimator=estimator)
    for name, gram in (("k", k), ("l", l)):
        if not isinstance(gram, Tensor) or gram.dtype not in DTYPES or gram.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor of fp64, fp32, bf16 or fp16, got {_about(gram)}")
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
            raise ValueError(f"{name} must be a Gram matrix [n, n], got {list(gram.shape)}; of features take bird.cka")
    if k.shape != l.shape or k.device != l.device:
        raise ValueError(f"k and l must have the same size and device, got {_about(k)} and {_about(l)}")
    if len(k) < MIN_ROWS[estimator]:
        raise ValueError(f'estimator="{estimator}" needs at least {MIN_ROWS[estimator]} rows, got {len(k)}')
    (kc, k_noise), (lc, l_noise) = (_centred(gram, estimator) for gram in (k, l))
    kk, ll = kc.square().sum(), lc.square().sum()
    dead = (kk <= k_noise) | (ll <= l_noise)  # False for NaN
    kk, ll = (torch.where(dead, 1.0, own) for own in (kk, ll))
    value = torch.where(dead, 0.0, (kc * lc).sum()) / (kk.sqrt() * ll.sqrt())
    return value.to(torch.float64 if torch.float64 in (k.dtype, l.dtype) else torch.float32)


def _about(gram: object) -> str:
    if not isinstance(gram, Tensor):
        return type(gram).__name__
    dense = "" if gram.layout == torch.strided else f" in {gram.layout}"
    return f"{gram.dtype} {list(gram.shape)}{dense} on {gram.device}"


def _centred(gram: Tensor, estimator: Estimator | str) -> tuple[Tensor, Tensor]:
    """The centred matrix [n, n] divided by the largest entry, and what the sum of its squares may be by rounding."""
    n, eps, hollow = len(gram), torch.finfo(gram.dtype).eps, estimator == "unbiased"
    gram = gram.to(torch.float64 if has_fp64(gram.device) else torch.float32)
    if hollow:  # HSIC_1 does not depend on the diagonal
        gram = gram - torch.diag(gram.diagonal())
    largest = gram.detach().abs().amax()
    gram = gram / torch.where(largest == 0, 1.0, largest)  # squares of any scale neither overflow nor vanish
    noise = (NOISE * eps) ** 2 * gram.detach().square().sum()
    left = n - 2 if hollow else n
    rows, columns = gram.sum(1, keepdim=True) / left, gram.sum(0, keepdim=True) / left
    gram = gram - rows - columns + rows.sum() / (n - 1 if hollow else n)
    return (gram - torch.diag(gram.diagonal()) if hollow else gram), noise
