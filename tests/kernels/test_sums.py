"""Sums of parts of a batch: merged they give the statistic and the gradients of the whole."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bird_kernels import from_sums, reference, sums
from bird_kernels.types import Problem

CUTS = [0, 1, 12, 12, 40, 61]  # a part of one row, one of none
SIZES = [(1.0, 1.0, 0.0), (1.0, 1.0, 100.0), (1e12, 1e-12, 3.0), (1e-12, 1e12, 3.0)]


def sides(dtype: torch.dtype, scale_x: float, scale_y: float, mean: float, device: torch.device) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(61, 4, dtype=torch.float64, generator=g)
    x, y = (
        (shared @ torch.randn(4, d, dtype=torch.float64, generator=g) + mean) * scale
        + torch.randn(61, d, dtype=torch.float64, generator=g) * scale
        for d, scale in ((7, scale_x), (5, scale_y))
    )
    return x.to(device, dtype), y.to(device, dtype)


def compute(
    x: Tensor, y: Tensor, mask: Tensor | None, statistic: str, estimator: str, cuts: list[int]
) -> tuple[float, Tensor, Tensor]:
    """Value, dX and dY from the sums of the parts between ``cuts``."""
    problem = Problem(
        len(x), x.shape[1], y.shape[1], x.dtype, x.device, statistic, estimator, None, mask is not None, True, True
    )
    parts = [(x[a:b], y[a:b], None if mask is None else mask[a:b]) for a, b in pairwise(cuts)]
    value, c, s = from_sums.value_of(reduce(sums.include, [sums.sums_of(*part, problem) for part in parts]), problem)
    exchanged = from_sums.exchanged(s, c)
    dx = torch.cat([from_sums.gradient(a, b, m, s, c, 1.0, problem=problem) for a, b, m in parts])
    dy = torch.cat([from_sums.gradient(b, a, m, *exchanged, 1.0, problem=problem) for a, b, m in parts])
    return float(value), dx, dy


def truth(x: Tensor, y: Tensor, mask: Tensor | None, statistic: str, estimator: str) -> tuple[float, Tensor, Tensor]:
    x, y = (a.detach().double().clone().requires_grad_() for a in (x, y))
    value = getattr(reference, statistic)(x, y, mask, estimator)
    return value.item(), *torch.autograd.grad(value, (x, y))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("statistic", ["cka_loss", "cka", "hsic"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_any_split_gives_the_whole(
    dtype: torch.dtype, bound: float, statistic: str, estimator: str, size: tuple[float, ...], device: torch.device
) -> None:
    x, y = sides(dtype, *size, device)
    for mask in (None, torch.arange(61, device=device) % 5 != 2):
        got = compute(x, y, mask, statistic, estimator, CUTS)
        value, *gradients = truth(x, y, mask, statistic, estimator)
        assert abs(got[0] - value) <= bound * abs(value)
        for mine, theirs in zip(got[1:], gradients, strict=True):
            assert mine.dtype == dtype
            assert (mine.double() - theirs).norm() <= bound * theirs.norm()


def test_half_precision_is_no_worse_than_its_inputs(estimator: str, device: torch.device) -> None:
    """fp16 up to 60,000: products and their squares stay finite, and the gradient is rounded once."""
    x, y = sides(torch.float16, 6000.0, 1.0, 0.0, device)
    value, dx, dy = compute(x, y, None, "cka_loss", estimator, CUTS)
    truth_value, *gradients = truth(x, y, None, "cka_loss", estimator)
    # d loss / dx is some 1e-6 here: fp16 below its normal range, steps of 6e-8
    assert abs(value - truth_value) < (2e-3 if device.type == "cuda" else 1e-6)
    assert (dx.double() - gradients[0]).abs().max() <= 6e-8
    assert (dy.double() - gradients[1]).norm() <= 2e-3 * gradients[1].norm()


def test_a_constant_side_has_no_geometry(estimator: str, device: torch.device) -> None:
    x = sides(torch.float32, 1.0, 1.0, 0.0, device)[0]
    y = torch.full((61, 5), 1000.1, device=device)
    value, dx, dy = compute(x, y, None, "cka_loss", estimator, CUTS)
    assert value == 1.0
    assert not dx.any()
    assert not dy.any()


def test_nan_stays_visible(estimator: str, device: torch.device) -> None:
    x, y = sides(torch.float32, 1.0, 1.0, 0.0, device)
    x[50, 3] = torch.nan
    value, dx, _ = compute(x, y, None, "cka_loss", estimator, CUTS)
    assert value != value
    assert dx.isnan().all()
