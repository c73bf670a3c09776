"""A million rows: sums of that many terms go in parts, or fp32 loses four of its seven digits."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import bird_kernels as bk
from bird_kernels import matrix
from bird_kernels.backends import rows

ROWS, MEAN, UPSTREAM = 1_000_000, 1000.0, 1e6  # the gradient of one of so many rows is brought near 1
# In one product the value was off by 2.6e-4 and the gradient by 7.2e-4; in bf16 a gradient is rounded itself.
VALUE, GRADIENT = 2e-6, {torch.float32: 5e-6, torch.bfloat16: 3e-3}


class Case(NamedTuple):
    x: Tensor
    y: Tensor
    value: float
    dx: Tensor


def squares(x: Tensor, y: Tensor, estimator: str) -> Tensor:
    """<K, L>, or what HSIC_1 (Song et al. 2012) is of it, of centred columns in fp64; by columns, as n x n is 8 TB."""
    product = (y.T @ x).square().sum()
    if estimator == "biased":
        return product
    n, kappa, lam = len(x), x.square().sum(1), y.square().sum(1)  # the row sums without the diagonals are minus these
    return product - kappa @ lam * (1 + 2 / (n - 2)) + kappa.sum() * lam.sum() / ((n - 1) * (n - 2))


def case(dtype: torch.dtype, estimator: str) -> Case:
    """Features that drift, as those of a sorted data set do, far from zero."""
    random = torch.Generator().manual_seed(0)
    common = torch.randn(ROWS, 3, generator=random)
    drift = torch.linspace(-1.0, 1.0, ROWS)[:, None] + MEAN
    sides = []
    for width in (6, 5):
        own = torch.randn(ROWS, width, generator=random) + drift
        sides.append((common @ torch.randn(3, width, generator=random) + own).to(dtype))
    x, y = sides
    wide = x.double().requires_grad_()
    xs, ys = wide - wide.mean(0), y.double() - y.double().mean(0)
    own = squares(xs, xs, estimator) * squares(ys, ys, estimator)
    value = 1.0 - squares(xs, ys, estimator) / own.sqrt()
    (dx,) = torch.autograd.grad(value, wide)
    return Case(x, y, value.item(), dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_rows(estimator: str, dtype: torch.dtype) -> None:
    """One call, mergeable sums, and a matrix of layers: the three ways to products of columns on a CPU."""
    true = case(dtype, estimator)
    x = true.x.requires_grad_()
    loss = bk.cka_loss(x, true.y, estimator=estimator)
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(UPSTREAM))
    x = x.detach()
    statistics = bk.Statistics()
    statistics.update(x, true.y)
    merged = statistics.gradient(x, true.y, estimator, upstream=UPSTREAM)
    matrix = bk.cka_matrix([x], [true.y], estimator=estimator)
    for found in (loss.item(), 1.0 - statistics.cka(estimator).item(), 1.0 - matrix.item()):
        assert abs(found - true.value) <= VALUE
    for gradient in (dx, merged):
        assert (gradient.double() / UPSTREAM - true.dx).norm() <= GRADIENT[dtype] * true.dx.norm()


def test_a_million_shifted_rows() -> None:
    """What a GPU without Triton does, in the arithmetic of a CPU."""
    true = case(torch.float32, "biased")
    xx, xy, yy = rows.products(rows.shifted(true.x, true.y, None))
    value = 1.0 - xy.norm().square() / (xx.norm() * yy.norm())
    assert abs(value.item() - true.value) <= VALUE


def test_a_matrix_of_wide_layers(estimator: str) -> None:
    """Each of its numbers is a sum over strips of 128,000 squares; as one product each was off by up to 2e-6."""
    random = torch.Generator().manual_seed(0)
    common = torch.randn(1000, 8, generator=random)
    layers = [
        0.2 * torch.randn(1000, 700, generator=random) + common @ torch.randn(8, 700, generator=random)
        for _ in range(9)
    ]
    true = [bk.hsic(x.double(), x.double(), estimator=estimator).item() for x in layers]
    found = matrix.hsic_matrix(layers, estimator=estimator).xx
    assert found.tolist() == pytest.approx(true, rel=4e-7)
