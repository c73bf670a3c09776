"""A mask leaves rows out: the call on the selected rows, with shapes that do not depend on the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bird_kernels
from tests.accuracy import evaluate, features, operator, truth

COMPILED = pytest.mark.compiled
N, P, Q = 37, 21, 30


def every_third(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) % 3 != 1


@pytest.fixture(params=["some", "last", *(pytest.param(rows, marks=COMPILED) for rows in ("all", "first"))])
def mask(request: pytest.FixtureRequest, device: torch.device) -> Tensor:
    rows = torch.arange(N, device=device)
    return {"some": rows % 3 != 1, "all": rows >= 0, "first": rows < 7, "last": rows > 29}[request.param]


@pytest.mark.parametrize("statistic", ["cka_loss", "hsic"])
def test_equals_the_call_on_selected_rows(
    mask: Tensor, statistic: str, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    x, y = features(N, P, Q, device=device, mean=10.0)
    found = evaluate(operator(route, backend, estimator, statistic, mask=mask), x, y, upstream=3.0)
    true = truth(x[mask], y[mask], estimator, statistic, upstream=3.0)
    torch.testing.assert_close(found.value.double(), true.value, rtol=1e-5, atol=1e-6)
    for gradient, wanted in ((found.dx, true.dx), (found.dy, true.dy)):
        assert (gradient[mask] - wanted).norm() < 1e-5 * wanted.norm()
        assert gradient[~mask].eq(0).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=COMPILED)], ids=str
)
@pytest.mark.parametrize("garbage", [float("nan"), *(pytest.param(g, marks=COMPILED) for g in (float("inf"), 6e4))])
def test_what_is_masked_out_does_not_matter(
    garbage: float, dtype: torch.dtype, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Not a bit of it: a padded row may hold anything, in a product with zero too."""
    mask = every_third(N, device)
    function = operator(route, backend, estimator, mask=mask)
    clean = [torch.where(mask[:, None], a, 0.0) for a in features(N, P, Q, dtype, device)]
    dirty = [torch.where(mask[:, None], a, garbage) for a in clean]
    for found, expected in zip(evaluate(function, *dirty), evaluate(function, *clean), strict=True):
        assert expected.isfinite().all()
        assert found.equal(expected)


def test_nan_in_a_row_that_counts_is_not_hidden(estimator: str, route: str, backend: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    x[0, 0] = float("nan")
    assert evaluate(operator(route, backend, estimator, mask=every_third(N, device)), x, y).value.isnan()


@pytest.mark.parametrize("statistic", ["cka_loss", "cka", "hsic"])
@pytest.mark.parametrize("missing", [1, 2])
def test_too_few_rows_give_nan(
    statistic: str, missing: int, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """It cannot raise: counting the rows would wait for the device. Nor does the backward."""
    least = {"biased": 2, "unbiased": 4}[estimator]
    x, y = features(N, P, Q, device=device)

    def value(count: int) -> Tensor:
        mask = torch.arange(N, device=device) < count
        return evaluate(operator(route, backend, estimator, statistic, mask=mask), x, y).value

    assert value(least - missing).isnan()
    assert value(least).isfinite()


def test_no_row_at_all(estimator: str, route: str, backend: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    nothing = torch.zeros(N, dtype=torch.bool, device=device)
    assert evaluate(operator(route, backend, estimator, mask=nothing), x, y).value.isnan()


def test_a_constant_among_selected_rows(estimator: str, route: str, backend: str, device: torch.device) -> None:
    """The variance is in the rows that do not count."""
    mask = every_third(N, device)
    x, y = features(N, P, Q, device=device)
    x = torch.where(mask[:, None], 0.1, x)
    found = evaluate(operator(route, backend, estimator, mask=mask), x, y)
    assert found.value == 1.0
    assert found.dx.eq(0).all()


@pytest.mark.parametrize("row_dims", [1, 2, 3])
def test_tokens(row_dims: int, estimator: str, backend: str, device: torch.device) -> None:
    """Leading dimensions index rows, the rest is features; a mask has the shape of the leading ones."""
    x, y = (a.reshape(3, 5, 2, -1) for a in features(30, 6, 4, device=device))
    rows = x.shape[:row_dims]
    mask = torch.arange(rows.numel(), device=device).reshape(rows) != 1
    options = dict(estimator=estimator, row_dims=row_dims, backend=backend)
    if rows.numel() < 5 and estimator == "unbiased":
        with pytest.raises(ValueError, match="at least 4 rows"):
            bird_kernels.cka_loss(x, y, mask=mask, **options)
        return
    found = evaluate(lambda a, b: bird_kernels.cka_loss(a, b, mask=mask, **options), x, y)
    flat_x, flat_y, flat_mask = x.reshape(rows.numel(), -1), y.reshape(rows.numel(), -1), mask.flatten()
    true = truth(flat_x[flat_mask], flat_y[flat_mask], estimator)
    assert found.dx.shape == x.shape
    torch.testing.assert_close(found.value.double(), true.value, rtol=0, atol=1e-6)
    gradient = found.dx.reshape(flat_x.shape)
    assert (gradient[flat_mask] - true.dx).norm() < 1e-5 * true.dx.norm() + 1e-7
    assert gradient[~flat_mask].eq(0).all()


def test_strided_mask(estimator: str, route: str, backend: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    mask = every_third(N, device)
    strided = torch.stack([mask, ~mask], dim=1)[:, 0]
    assert not strided.is_contiguous()
    found, expected = (evaluate(operator(route, backend, estimator, mask=m), x, y) for m in (strided, mask))
    assert found.value == expected.value
    assert found.dx.equal(expected.dx)


@pytest.mark.parametrize("scale", [1e-45, 1e-43, 1e-42])
def test_denormal_features_under_a_mask(scale: float, estimator: str, route: str) -> None:
    """A mask that keeps every row changes nothing, not where the means of the columns are denormal either."""
    x, y = features(16, 8, 8)
    mask = torch.ones(16, dtype=torch.bool)
    found = [operator(route, "library", estimator, mask=m)(scale * x, y).item() for m in (mask, None)]
    assert abs(found[0] - found[1]) <= 1e-6
