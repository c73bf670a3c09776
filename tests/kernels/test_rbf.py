"""Gaussian kernels: values and gradients against fp64 and the literal formulas, and what breaks them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bird_kernels import RBF, centered_gram, cka_loss, reference
from tests.accuracy import assert_no_worse, errors, evaluate, features, operator, plain_rbf, poison, truth
from tests.kernels.gaussian import N, P, Q, bandwidth, centred, distances
from tests.selection import short

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison():
        yield


# ---------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 37])
def test_the_reference_is_the_literal_formula(n: int, rule: RBF) -> None:
    x, y = features(n, 3, 4, torch.float64, mean=2.0)
    if n == 2 and rule.threshold is not None:
        assert reference.cka(x, y, None, "biased", rule) == 0  # the lower median of 0, 0, d, d
        return
    k, l = centred(x, rule), centred(y, rule, 1)
    expected = (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
    torch.testing.assert_close(reference.cka(x, y, None, "biased", rule), expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(reference.hsic(x, y, None, "biased", rule), (k * l).sum() / (n - 1) ** 2)
    torch.testing.assert_close(reference.gram_mse(x, y, None, "biased", rule), (k - l).square().mean())


def test_the_reference_s_unbiased_estimator_is_of_the_hollow_kernels(rule: RBF) -> None:
    """Song et al. 2012, eq. 5, on kernel matrices that nobody centred."""
    n = 9
    x, y = features(n, 3, 4, torch.float64)
    k, l = (torch.exp(-distances(a) / (2 * bandwidth(a, rule, side))) for side, a in enumerate((x, y)))
    k, l = (a.fill_diagonal_(0) for a in (k, l))
    total = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    expected = ((k * l).sum() + total) / (n * (n - 3))
    torch.testing.assert_close(reference.hsic(x, y, None, "unbiased", rule), expected, rtol=1e-10, atol=1e-15)


# ---------------------------------------------------------------------------------------------- accuracy


@short(
    "every shape in fp32, one in the other dtypes",
    lambda dtype, shape: dtype == torch.float32 or shape == (37, 61, 29),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 4), (37, 61, 29), (130, 16, 40)], ids=str)
@pytest.mark.parametrize(
    "kernel", [RBF(), RBF(threshold=0.4), RBF(threshold=3.0), RBF(sigma=1.0), RBF(sigma=100.0), RBF(sigma=1e4)], ids=str
)
def test_no_worse_than_plain(
    kernel: RBF, shape: tuple[int, int, int], dtype: torch.dtype, estimator: str, device: torch.device
) -> None:
    """Also where K is nearly constant: plain PyTorch is lost there, in fp32 from sigma = 1e4 on."""
    ours, theirs, truths = [], [], []
    for seed in range(5 if shape[0] < 10 else 1):
        x, y = features(*shape, dtype, device, mean=1.0, seed=seed)
        true = truth(x, y, estimator, upstream=1024.0, kernel=kernel)
        if min(true.dx.abs().max(), true.dy.abs().max()) < 1e-9:
            return  # the identity: no gradient
        ours.append(evaluate(operator("gram", "library", estimator, kernel=kernel), x, y, upstream=1024.0))
        theirs.append(evaluate(plain_rbf(kernel, estimator), x, y, upstream=1024.0))
        truths.append(true)
    floor = {torch.float64: 1e-10, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps / 4)
    lost = [max(errors(*pair).values()) for pair in zip(theirs, truths, strict=True)]
    if max(lost) < 0.1:
        assert_no_worse(ours, theirs, truths, floor)
    else:
        assert max(max(errors(*pair).values()) for pair in zip(ours, truths, strict=True)) < max(2 * floor, 1e-5)


def test_an_outlier_among_the_rows(rule: RBF, estimator: str, device: torch.device) -> None:
    """Its distance to all others is a thousand times theirs."""
    x, y = features(N, P, Q, device=device)
    x[3] *= 1000
    function, plain = operator("gram", "library", estimator, kernel=rule), plain_rbf(rule, estimator)
    if rule.flow:
        assert max(errors(evaluate(function, x, y), truth(x, y, estimator, kernel=rule)).values()) < 1e-3
        return
    assert_no_worse([evaluate(function, x, y)], [evaluate(plain, x, y)], [truth(x, y, estimator, kernel=rule)], 2e-6)


@pytest.mark.parametrize("backend", ["library", "triton"])
def test_a_bandwidth_beyond_all_distances_is_the_linear_kernel(estimator: str, backend: str) -> None:
    """Without its constant, exp(-d / (2 s^2)) tends to (x_i - m)'(x_j - m) / s^2; K itself is 1 to the last digit."""
    if backend == "triton":
        pytest.importorskip("triton")
    dtypes = (torch.float32,) if backend == "triton" else (torch.float32, torch.float64)
    for dtype, bound in zip(dtypes, (3e-6, 1e-9), strict=False):
        for sigma in (1e6, 1e8):
            x, y = features(N, P, Q, dtype)
            found = evaluate(operator("gram", backend, estimator, kernel=RBF(sigma=sigma)), x, y)
            assert max(errors(found, truth(x, y, estimator)).values()) < bound
    gram = centered_gram(x, kernel=RBF(sigma=1e8)) * 1e16
    torch.testing.assert_close(gram.double(), reference.centered_gram(x), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------- invariance


def test_a_flowing_gradient_is_orthogonal_to_the_features(estimator: str, device: torch.device) -> None:
    """Scale does not matter, so no gradient points along it; that of a constant sigma does."""
    x, y = features(N, P, Q, torch.float64, device)
    x = x - x.mean(0)
    along = [
        (x * evaluate(lambda a, b, k=k: cka_loss(a, b, kernel=k, estimator=estimator), x, y).dx).sum().abs()
        for k in (RBF(flow=True), RBF())
    ]
    assert along[0] < 1e-13
    assert along[1] > 1e-3


# ---------------------------------------------------------------------------------------------- no answer


def test_equal_rows_are_no_distance(estimator: str, memory: str, device: torch.device) -> None:
    """Every row stands twice: the rounding of |a|^2 + |b|^2 - 2ab must not count as a distance."""
    x, y = features(40, 300, Q, device=device, mean=5.0)
    x[20:] = x[:20]
    kernel = RBF()
    found = evaluate(operator("gram", "library", estimator, kernel=kernel), x, y)
    k, l = ((-distances(a) / (2 * bandwidth(a, kernel))).exp() for a in (x, y))
    literal = reference.HSIC[estimator]
    n = torch.tensor(40.0, dtype=torch.float64)
    h = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, l = h @ k @ h, h @ l @ h
    expected = 1 - literal(k, l, n) / (literal(k, k, n) * literal(l, l, n)).sqrt()
    torch.testing.assert_close(found.value.double(), expected, rtol=0, atol=1e-6)
    assert max(errors(found, truth(x, y, estimator, kernel=kernel)).values()) < 4e-6
