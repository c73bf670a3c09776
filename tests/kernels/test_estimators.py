"""The closed form from eight moments to a value and its derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bird_kernels import reference
from bird_kernels.moments import MIN_ROWS, Combined, Moments, combine
from tests.accuracy import features

STATISTICS = ["hsic", "cka", "cka_loss"]
EPS = torch.finfo(torch.float64).eps
N = 9


def gaussian_gram(x: Tensor) -> Tensor:
    """A Gram matrix that nobody centred and no linear kernel has made."""
    return torch.exp(-torch.cdist(x, x).square() / x.shape[1])


def moments(k: Tensor, l: Tensor, estimator: str) -> Moments:
    if estimator == "unbiased":
        k, l = (a - a.diagonal().diag() for a in (k, l))
    row_k, row_l = k.sum(0), l.sum(0)
    sums = (k * l).sum(), (k * k).sum(), (l * l).sum()
    return Moments(*sums, row_k @ row_l, row_k @ row_k, row_l @ row_l, row_k.sum(), row_l.sum())


def literal_hsic(k: Tensor, l: Tensor, estimator: str) -> Tensor:
    """The published traces (Gretton et al. 2005, eq. 9; Song et al. 2012, eq. 5)."""
    n = k.shape[0]
    one = torch.ones(n, 1, dtype=k.dtype)
    if estimator == "biased":
        h = torch.eye(n, dtype=k.dtype) - one @ one.T / n
        return torch.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l = (a - a.diagonal().diag() for a in (k, l))
    total = (one.T @ k @ one * (one.T @ l @ one)).squeeze() / ((n - 1) * (n - 2))
    rows = (one.T @ k @ l @ one).squeeze() * 2 / (n - 2)
    return (torch.trace(k @ l) + total - rows) / (n * (n - 3))


def literal(k: Tensor, l: Tensor, statistic: str, estimator: str) -> Tensor:
    kl, kk, ll = (literal_hsic(a, b, estimator) for a, b in ((k, l), (k, k), (l, l)))
    cka = kl / (kk * ll).sqrt()
    return {"hsic": kl, "cka": cka, "cka_loss": 1 - cka}[statistic]


@pytest.fixture
def matrices() -> tuple[Tensor, Tensor]:
    return tuple(gaussian_gram(a) for a in features(N, 3, 5, torch.float64))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_any_two_matrices(matrices: tuple[Tensor, Tensor], statistic: str, estimator: str) -> None:
    found = combine(moments(*matrices, estimator), float(N), statistic, estimator, EPS).value
    torch.testing.assert_close(found, literal(*matrices, statistic, estimator), rtol=1e-12, atol=0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_floats_and_tensors_agree(matrices: tuple[Tensor, Tensor], statistic: str, estimator: str) -> None:
    on_tensors = moments(*matrices, estimator)
    on_floats = Moments(*(m.item() for m in on_tensors))
    n = torch.tensor(float(N), dtype=torch.float64)
    found = combine(on_floats, float(N), statistic, estimator, EPS)
    assert all(isinstance(number, float) for number in found)
    expected = combine(on_tensors, n, statistic, estimator, EPS)
    assert all(isinstance(number, Tensor) and number.dtype == torch.float64 for number in expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other.item(), rel=1e-14, abs=0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_derivatives_are_autograd_s(matrices: tuple[Tensor, Tensor], statistic: str, estimator: str) -> None:
    leaves = Moments(*(m.detach().requires_grad_() for m in moments(*matrices, estimator)))
    combined = combine(leaves, float(N), statistic, estimator, EPS)
    wanted = torch.autograd.grad(combined.value, leaves[:3], allow_unused=True)
    for found, expected in zip(combined[1:], wanted, strict=True):
        assert float(found) == pytest.approx(0.0 if expected is None else expected.item(), rel=1e-13, abs=0)


def test_linear_moments_of_centred_features(estimator: str) -> None:
    """Row sums of centred columns vanish; without the diagonals they are minus these, the squared row norms."""
    x, y = (a - a.mean(0) for a in features(N, 3, 5, torch.float64))
    expected = moments(x @ x.T, y @ y.T, estimator)
    found = Moments(*expected[:3])
    if estimator == "unbiased":
        kappa, lam = x.square().sum(1), y.square().sum(1)
        found = Moments(*expected[:3], kappa @ lam, kappa @ kappa, lam @ lam, -kappa.sum(), -lam.sum())
    for one, other in zip(found, expected, strict=True):
        assert float(one) == pytest.approx(other.item(), rel=1e-12, abs=1e-12)
    value = combine(found, float(N), "cka", estimator, EPS).value
    torch.testing.assert_close(value, reference.cka(x, y, None, estimator), rtol=1e-12, atol=0)


@pytest.fixture(params=["floats", "tensors"])
def scalar(request: pytest.FixtureRequest):
    """Makes a number what the CPU or what a GPU passes around."""
    if request.param == "floats":
        return float
    return lambda number: torch.tensor(number, dtype=torch.float64)


def numbers(combined: Combined) -> list[float]:
    return [float(number) for number in combined]


@pytest.mark.parametrize("dead", ["kk", "ll", "both"])
def test_no_variance(scalar, dead: str, estimator: str) -> None:
    """CKA 0 and nothing to climb, though kl is not exactly zero."""
    kk, ll = (0.0 if dead in (side, "both") else 3.0 for side in ("kk", "ll"))
    m = Moments(*map(scalar, (1e-20, kk, ll)))
    assert numbers(combine(m, scalar(float(N)), "cka", estimator, EPS)) == [0, 0, 0, 0]
    assert numbers(combine(m, scalar(float(N)), "cka_loss", estimator, EPS)) == [1, 0, 0, 0]


def test_cancelled_to_rounding_is_no_variance(scalar) -> None:
    """The unbiased self-HSIC is a difference: what is left of large terms, up to their rounding, is zero."""
    n, total = 8.0, 56.0  # the Gram matrix of ones, hollow: kk = n(n-1), rows n-1, and all terms cancel
    m = Moments(*map(scalar, (56.0, 56.0 * (1 + 1e-7), 90.0, 392.0, 392.0, 0.0, total, 0.0)))
    assert numbers(combine(m, scalar(n), "cka", "unbiased", 1.2e-7)) == [0, 0, 0, 0]
    assert all(number != 0 for number in numbers(combine(m, scalar(n), "cka", "unbiased", 1e-11)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["kl", "kk", "ll"])
def test_nan_and_inf_stay_visible(scalar, bad: float, where: str, estimator: str) -> None:
    """As data give them: a NaN or Inf on one side is in <K, L> and in that side's own product."""
    spoilt = {"kl": ("kl", "kk", "ll"), "kk": ("kl", "kk"), "ll": ("kl", "ll")}[where]
    m = Moments(*(scalar(bad if name in spoilt else 2.0) for name in ("kl", "kk", "ll")))
    assert math.isnan(float(combine(m, scalar(float(N)), "cka_loss", estimator, EPS).value))
    assert not math.isfinite(float(combine(m, scalar(float(N)), "hsic", estimator, EPS).value))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("missing", [1, 2, 4])
@pytest.mark.parametrize("products", [(1.0, 2.0, 3.0), (0.0, 0.0, 0.0)], ids=["varied", "constant"])
def test_too_few_rows_are_nan(
    scalar, products: tuple[float, ...], missing: int, statistic: str, estimator: str
) -> None:
    """A single row has no variance either; that there are too few weighs more."""
    least = MIN_ROWS[estimator]
    found, enough = (
        combine(Moments(*map(scalar, products)), scalar(float(n)), statistic, estimator, EPS)
        for n in (max(least - missing, 0), least)
    )
    assert math.isnan(float(found.value))
    assert math.isnan(float(found.d_kl))
    assert math.isfinite(float(enough.value))
