"""The unbiased estimator of `backends.shifted` where few rows dominate, few count, or all but one are alike.

On the cross route such rows are taken out of z (`triton.apart`).
"""

from __future__ import annotations

import pytest
import torch

from tests.accuracy import features
from tests.kernels import test_dominating_rows as dominating
from tests.kernels.test_shifted import ALLOWED, BFLOAT16, FLOAT16, FLOAT32, assert_right, run, sides_of
from tests.selection import short

pytestmark = pytest.mark.usefixtures("interpreter_rounds_bfloat16")


@pytest.fixture(params=[FLOAT32, BFLOAT16, FLOAT16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("n", [4, 5, 8, 9, 12])
def test_few_rows_unbiased(n: int, dtype: torch.dtype, device: torch.device) -> None:
    """Up to eight of them are all taken out, and nothing is left in z."""
    assert_right("cross", *features(n, 3, 2, dtype=dtype, device=device, mean=1.0), estimator="unbiased")


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_a_row_that_dominates_unbiased(route: str, size: float, device: torch.device) -> None:
    """It weighs no more than its products with the others do."""
    x, y = sides_of(route, FLOAT32, device, mean=1.0)
    x[5] *= size
    y[5] *= size
    assert_right(route, x, y, estimator="unbiased", looser=3.0)


@short(
    "rows are taken out on the cross route alone; of the other one fp32 says that it needs nothing of the kind",
    lambda route, dtype: route == "cross" or dtype == FLOAT32,
)
def test_a_massive_first_token_unbiased(route: str, dtype: torch.dtype, device: torch.device) -> None:
    """Two features of one row at 3,000: no side is without variance for it."""
    x, y = features(64, 160, 160, dtype=dtype, device=device)
    x[0, :2] = y[0, :2] = 3000
    assert_right(route, x, y, estimator="unbiased", looser=2.0)


@short(
    "all in fp32; in halves what is largest, and takes rows of both sides",
    lambda size, where, dtype: dtype == FLOAT32 or (size == 1e4 and where == "apart"),
)
@pytest.mark.parametrize("where", ["x", "y", "apart"])
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_rows_that_dominate_one_side(size: float, where: str, dtype: torch.dtype, device: torch.device) -> None:
    """Of rows that dominate in x and others that do in y, all are taken out."""
    true = dominating.case(64, 5, size, dtype, where)
    found = run("cross", true.x, true.y, upstream=(upstream := dominating.loss_scale(true)), estimator="unbiased")
    assert (1.0 - found.value - true.value).abs() <= ALLOWED[dtype][0]
    assert found.dx is not None
    assert (found.dx.double() / -upstream - true.dx).norm() <= ALLOWED[dtype][1] * true.dx.norm()


def test_rows_that_are_alike_but_for_one_unbiased(dtype: torch.dtype, device: torch.device) -> None:
    """Between any two of the others nothing differs: HSIC_1 is zero."""
    x, y = sides_of("cross", dtype, device)
    x = torch.full_like(x, 0.1)
    x[3, :2] += 3e4
    for a, b in ((x, y), (y, x)):
        found = run("cross", a, b, estimator="unbiased")
        assert found.value == 1
        assert not found.dx.any()
        assert not found.dy.any()
