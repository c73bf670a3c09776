"""The truth is true: `reference` against sums over tuples of rows, closed small cases and known properties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from bird_kernels import reference
from tests.accuracy import features


def grams(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return tuple(a.numpy() @ a.numpy().T for a in (x, y))


def hsic_over_tuples(x: Tensor, y: Tensor, estimator: str) -> float:
    """The definition: an average over pairs, triples and quadruples of rows (of distinct rows when unbiased)."""
    k, l = grams(x, y)
    n = len(k)
    tuples = itertools.permutations if estimator == "unbiased" else lambda rows, r: itertools.product(rows, repeat=r)

    def mean(r: int, term) -> float:
        return np.mean([term(*rows) for rows in tuples(range(n), r)])

    pairs = mean(2, lambda i, j: k[i, j] * l[i, j])
    triples = mean(3, lambda i, j, a: k[i, j] * l[i, a])
    quadruples = mean(4, lambda i, j, a, b: k[i, j] * l[a, b])
    total = pairs - 2 * triples + quadruples
    return total if estimator == "unbiased" else total * n**2 / (n - 1) ** 2


@pytest.mark.parametrize("n", [4, 6])
def test_hsic_is_its_definition(n: int, estimator: str) -> None:
    x, y = features(n, 3, 5, torch.float64, mean=0.3)
    expected = hsic_over_tuples(x, y, estimator)
    torch.testing.assert_close(reference.hsic(x, y, None, estimator).item(), expected, rtol=1e-11, atol=1e-13)


def test_biased_hsic_is_the_published_trace() -> None:
    x, y = features(37, 7, 29, torch.float64, mean=2.0)
    k, l = grams(x, y)
    h = np.eye(37) - 1 / 37
    expected = np.trace(k @ h @ l @ h) / 36**2
    torch.testing.assert_close(reference.hsic(x, y).item(), expected, rtol=1e-11, atol=0)
    np.testing.assert_allclose(reference.centered_gram(x).numpy(), h @ k @ h, rtol=0, atol=1e-12)


def test_unbiased_hsic_is_the_published_trace() -> None:
    """Song et al. 2012, eq. 5, on Gram matrices that nobody centred."""
    n = 37
    x, y = features(n, 7, 29, torch.float64, mean=2.0)
    k, l = grams(x, y)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    total = one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
    expected = (np.trace(k @ l) + total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))
    torch.testing.assert_close(reference.hsic(x, y, None, "unbiased").item(), expected, rtol=1e-11, atol=0)


def test_unbiased_cka_is_made_of_unbiased_hsic() -> None:
    x, y = features(6, 3, 5, torch.float64)
    xy, xx, yy = (hsic_over_tuples(a, b, "unbiased") for a, b in ((x, y), (x, x), (y, y)))
    expected = xy / (xx * yy) ** 0.5
    torch.testing.assert_close(reference.cka(x, y, None, "unbiased").item(), expected, rtol=1e-11, atol=0)


def test_small_cases_by_hand() -> None:
    """One feature a side: CKA is Pearson's r squared. Three points on a line against a step: r^2 = 3/4."""
    line, step = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    assert reference.cka(line, step).item() == pytest.approx(0.75, abs=1e-15)
    # Centred: K = [[1, 0, -1], [0, 0, 0], [-1, 0, 1]], 9 L = [[1, 1, -2], [1, 1, -2], [-2, -2, 4]], so <K, L> = 1.
    assert reference.hsic(line, step).item() == pytest.approx(1.0 / 4, abs=1e-15)
    assert reference.cka_loss(line, -5 * line + 3).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("n", "expected"), [(32, 0.957), (64, 0.920), (128, 0.854)])
def test_biased_cka_of_unrelated_features_is_high(n: int, expected: float) -> None:
    """sqrt(pq / ((n + p)(n + q))) for 512 and 1280 features, and the unbiased estimator does not have it."""
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, width, generator=generator) for width in (512, 1280))
    assert reference.cka(x, y).item() == pytest.approx(expected, abs=0.01)
    assert reference.cka(x, y, None, "unbiased").item() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("statistic", ["hsic", "cka", "cka_loss"])
def test_masked_is_the_call_on_selected_rows(statistic: str, estimator: str) -> None:
    x, y = features(23, 5, 8, torch.float64, mean=3.0)
    mask = torch.arange(23) % 3 != 0
    function = getattr(reference, statistic)
    garbage = torch.where(mask[:, None], x, float("nan"))
    expected = function(x[mask], y[mask], None, estimator)
    torch.testing.assert_close(function(garbage, y, mask, estimator), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("statistic", ["hsic", "cka"])
def test_differentiable_twice(statistic: str, estimator: str) -> None:
    x, y = (a.requires_grad_() for a in features(6, 3, 4, torch.float64))

    def function(x: Tensor, y: Tensor) -> Tensor:
        return getattr(reference, statistic)(x, y, None, estimator)

    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


@pytest.mark.parametrize(
    "flat",
    [torch.full((37, 5), 0.1), torch.full((37, 5), 0.1, dtype=torch.float64), torch.rand(1, 5).expand(37, 5)],
    ids=["fp32", "fp64", "one row, repeated"],
)
def test_no_variance_is_cka_zero(flat: Tensor, estimator: str) -> None:
    x = flat.double().clone().requires_grad_()
    y = features(37, 5, 4, torch.float64)[1]
    for loss in (reference.cka_loss(x, y, None, estimator), reference.cka_loss(y, x, None, estimator)):
        assert loss.item() == 1.0
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.eq(0).all()
