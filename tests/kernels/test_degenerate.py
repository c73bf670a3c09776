"""Where the statistic has no answer, or an obvious one: no variance, NaN, Inf, two rows, negative unbiased CKA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bird_kernels import reference
from tests.accuracy import Result, assert_no_worse, evaluate, features, operator, plain, truth
from tests.selection import short

COMPILED = pytest.mark.compiled
N, P, Q = 37, 21, 30  # 37 is odd, so that the mean of 37 equal fp32 numbers may differ from them

GENERATOR = torch.Generator().manual_seed(3)
# Features without variance, [n, width], and a name.
FLAT = {
    "zero": torch.zeros(N, P),
    "0.1": torch.full((N, P), 0.1),
    "1e-30": torch.full((N, P), 1e-30),
    "1000.3": torch.full((N, P), 1000.3),
    "one row, repeated": torch.randn(P, generator=GENERATOR).mul(100).expand(N, P),
    "one feature": torch.full((N, 1), 1 / 3),
    "all but one zero": torch.cat([torch.zeros(N, P - 1), torch.full((N, 1), 7.7)], dim=1),
}


def assert_no_answer(found: Result) -> None:
    assert found.value.item() == 1.0
    for gradient in (found.dx, found.dy):
        assert gradient.eq(0).all()


@short(
    "every constant on one side; on the others the two whose means are rounded",
    lambda name, side: side == "student" or name in ("1000.3", "one row, repeated"),
)
@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("side", ["student", "teacher", pytest.param("both", marks=COMPILED)])
def test_constant_features_have_cka_zero(
    name: str, side: str, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Loss exactly 1 and gradient exactly 0, whatever the rounding of means makes of a constant."""
    flat, varied = FLAT[name].to(device), features(N, P, Q, device=device)[1]
    x, y = {"student": (flat, varied), "teacher": (varied, flat), "both": (flat, flat.flip(1))}[side]
    assert_no_answer(evaluate(operator(route, backend, estimator), x, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [4, 61, pytest.param(7, marks=COMPILED)])
def test_constant_in_any_dtype(
    n: int, dtype: torch.dtype, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    flat = torch.full((n, P), 0.1, dtype=dtype, device=device)
    varied = features(n, P, Q, dtype, device)[1]
    assert_no_answer(evaluate(operator(route, backend, estimator), flat, varied))


def test_hsic_of_a_constant_is_zero(estimator: str, route: str, backend: str, device: torch.device) -> None:
    x, y = torch.full((N, P), 0.1, device=device), features(N, P, Q, device=device)[1]
    found = evaluate(operator(route, backend, estimator, "hsic"), x, y)
    assert found.value == 0
    assert found.dx.isfinite().all()


@pytest.mark.parametrize("spread", [1e-6, 1e-4, *(pytest.param(s, marks=COMPILED) for s in (1e-2, 1e-5))])
def test_almost_constant_features_count(
    spread: float, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """A small variance on a large mean is variance, down to a few units in the last place of the features."""
    x, y = features(N, P, Q, device=device)
    x = 1 + spread * x
    true = truth(x, y, estimator)
    ours, theirs = (evaluate(f, x, y) for f in (operator(route, backend, estimator), plain(route, estimator)))
    assert_no_worse([ours], [theirs], [true])
    assert (ours.value - true.value).abs() < 1e-6


@pytest.mark.parametrize("shift", [0.0, 0.1])
@pytest.mark.parametrize("scale", [3.7, pytest.param(1.0, marks=COMPILED)])
@pytest.mark.parametrize("n", [4, 37, *(pytest.param(n, marks=COMPILED) for n in (5, 128))])
def test_one_hot_rows_under_unbiased(
    n: int, scale: float, shift: float, route: str, backend: str, device: torch.device
) -> None:
    """Every pair of rows is equally alike: the hollow Gram matrix is constant, and its unbiased self-HSIC zero."""
    one_hot = scale * torch.eye(n, device=device) + shift
    y = features(n, n, Q, device=device)[1]
    assert truth(one_hot, y, "unbiased").value == 1.0
    assert_no_answer(evaluate(operator(route, backend, "unbiased"), one_hot, y))
    assert_no_answer(evaluate(operator(route, backend, "unbiased"), y, one_hot))


def test_one_hot_rows_under_biased_count(route: str, backend: str, device: torch.device) -> None:
    one_hot, y = torch.eye(N, device=device), features(N, N, Q, device=device)[1]
    found, true = evaluate(operator(route, backend), one_hot, y), truth(one_hot, y)
    torch.testing.assert_close(found.value.double(), true.value, rtol=0, atol=1e-6)
    assert true.value < 0.9


@pytest.mark.parametrize("distinct", [2, 5])
def test_duplicated_rows(distinct: int, estimator: str, route: str, backend: str, device: torch.device) -> None:
    x, y = (a[torch.arange(N) % distinct] for a in features(distinct, P, Q, device=device))
    found, true = evaluate(operator(route, backend, estimator), x, y), truth(x, y, estimator)
    torch.testing.assert_close(found.value.double(), true.value, rtol=0, atol=1e-6)
    scale = true.dx.norm() + 1 / x.norm()  # two distinct rows are perfectly aligned with any others: no gradient
    assert (found.dx - true.dx).norm() < 2e-6 * scale


def test_a_single_feature_a_side_is_squared_correlation(route: str, backend: str, device: torch.device) -> None:
    x, y = features(N, 1, 1, device=device)
    r = torch.corrcoef(torch.stack([x.squeeze(), y.squeeze()]).double())[0, 1]
    found = evaluate(operator(route, backend, statistic="cka"), x, y)
    torch.testing.assert_close(found.value.double(), r**2, rtol=0, atol=1e-6)


def test_two_rows_are_aligned(route: str, backend: str, device: torch.device) -> None:
    """Two points have one shape: CKA is 1 for any features, and there is nothing to improve."""
    x, y = features(2, P, Q, device=device)
    found = evaluate(operator(route, backend), x, y)
    assert found.value.abs() < 1e-6
    assert found.dx.norm() < 2e-6 / x.norm()
    assert found.dy.norm() < 2e-6 / y.norm()


@short(
    "every number in the loss; hsic is a part of it",
    lambda bad, statistic: statistic == "cka_loss" or bad == float("inf"),
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), pytest.param(float("-inf"), marks=COMPILED)])
@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("statistic", ["cka_loss", pytest.param("hsic", marks=COMPILED)])
def test_nan_and_inf_are_not_hidden(
    bad: float, side: str, statistic: str, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    x, y = features(N, P, Q, device=device)
    {"x": x, "y": y}[side][5, 7] = bad
    found = evaluate(operator(route, backend, estimator, statistic), x, y)
    assert found.value.isnan()
    assert found.dx.isnan().any()
    assert found.dy.isnan().any()


@pytest.mark.parametrize("other", ["constant", "NaN"])
def test_nan_beats_no_variance(other: str, estimator: str, route: str, backend: str, device: torch.device) -> None:
    """A collapsed side must not make a diverged one look like a loss of 1."""
    x = torch.full((N, P), float("nan"), device=device)
    y = torch.full((N, Q), 0.1 if other == "constant" else float("nan"), device=device)
    assert evaluate(operator(route, backend, estimator), x, y).value.isnan()
    assert evaluate(operator(route, backend, estimator), y, x).value.isnan()


def test_unbiased_cka_is_never_clamped(route: str, backend: str, device: torch.device) -> None:
    """Of independent draws about half are negative: a loss above 1, with a gradient that leads back."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(16):
        x, y = (torch.randn(16, width, generator=generator).to(device) for width in (9, 5))
        found = evaluate(operator(route, backend, "unbiased"), x, y, sides="x")
        true = reference.cka_loss(x, y, None, "unbiased")
        torch.testing.assert_close(found.value.double(), true, rtol=0, atol=1e-6)
        assert found.dx.norm() > 1e-3
        losses.append(found.value.item())
    above = sum(loss > 1 for loss in losses)
    assert 4 <= above <= 12


def orthogonal(x: Tensor) -> Tensor:
    """Features in directions over the rows that ``x`` does not have."""
    q, _ = torch.linalg.qr(torch.cat([torch.ones(len(x), 1), x], dim=1), mode="complete")
    return q[:, x.shape[1] + 1 :]


def test_orthogonal_features_have_biased_cka_zero(route: str, backend: str, device: torch.device) -> None:
    """Another zero, of <K, L> and not of a side: the gradient vanishes with C = Y^T X, without 0/0."""
    x = features(N, 9, 9)[0]
    x, y = x.to(device), orthogonal(x).to(device)
    found = evaluate(operator(route, backend), x, y)
    assert found.value == pytest.approx(1.0, abs=1e-6)
    assert found.dx.norm() < 1e-5 / x.norm()


def test_nothing_in_common(estimator: str, route: str, backend: str, device: torch.device) -> None:
    """C = Y^T X exactly zero: the biased gradient vanishes with it, the unbiased one has its diagonal left."""
    x = torch.tensor([[1.0, -1, 0, 0, 0, 0, 2, -2], [3, -3, 0, 0, 0, 0, -1, 1]], device=device).T
    y = torch.tensor([[0.0, 0, 1, -1, 3, -3, 0, 0]], device=device).T
    found, true = evaluate(operator(route, backend, estimator), x, y), truth(x, y, estimator)
    torch.testing.assert_close(found.value.double(), true.value, rtol=0, atol=1e-6)
    for gradient, wanted in ((found.dx, true.dx), (found.dy, true.dy)):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)
    assert true.dx.any() == (estimator == "unbiased")


def test_identical_features_have_loss_zero(estimator: str, route: str, backend: str, device: torch.device) -> None:
    x = features(N, P, P, device=device)[0]
    found = evaluate(operator(route, backend, estimator), x, x)
    assert found.value.abs() < 1e-6
    assert found.dx.norm() < 2e-6 / x.norm() * N**0.5
