"""Gaussian kernels: values and gradients against fp64 and the literal formulas, and what breaks them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bird_kernels import RBF, cka_loss, reference
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
    "the loss in fp32 everywhere; hsic and fp64 differ after the kernel matrices, and are tested where it is streamed",
    lambda dtype, statistic, masked, memory: (
        (dtype == torch.float32 and statistic == "cka_loss") or (masked and memory == "streamed")
    ),
)
@pytest.mark.parametrize("statistic", ["cka_loss", "hsic"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, masked: bool, statistic: str, rule: RBF, estimator: str, memory: str, device: torch.device
) -> None:
    """Against autograd through the literal formula in fp64."""
    x, y = features(N, P, Q, dtype, device, mean=1.0)
    mask = torch.arange(N, device=device) % 3 != 1 if masked else None
    options = dict(estimator=estimator, statistic=statistic, mask=mask, kernel=rule)
    found = evaluate(operator("gram", "library", **options), x, y, upstream=3.0)
    true = truth(x, y, **options, upstream=3.0)
    assert max(errors(found, true).values()) < (1e-12 if dtype == torch.float64 else 4e-6)
    if mask is not None:
        assert found.dx[~mask].eq(0).all()


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


@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_large_means(mean: float, rule: RBF, estimator: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device, mean=mean)
    found = errors(
        evaluate(operator("gram", "library", estimator, kernel=rule), x, y), truth(x, y, estimator, kernel=rule)
    )
    assert found["value"] < 1e-6
    assert max(found["dx"], found["dy"]) < 1e-5


@pytest.mark.parametrize("scales", [(1e-12, 1e-12), (1e-12, 1e12), (1e12, 1.0)])
@pytest.mark.parametrize("kernel", [RBF(), RBF(threshold=0.6), RBF(flow=True)], ids=str)
def test_scale_does_not_matter(kernel: RBF, scales: tuple[float, float], estimator: str, device: torch.device) -> None:
    x, y = (scale * a for scale, a in zip(scales, features(N, P, Q, device=device), strict=True))
    found = errors(
        evaluate(operator("gram", "library", estimator, kernel=kernel), x, y), truth(x, y, estimator, kernel=kernel)
    )
    assert max(found.values()) < 2e-6


def test_an_outlier_among_the_rows(rule: RBF, estimator: str, device: torch.device) -> None:
    """Its distance to all others is a thousand times theirs."""
    x, y = features(N, P, Q, device=device)
    x[3] *= 1000
    function, plain = operator("gram", "library", estimator, kernel=rule), plain_rbf(rule, estimator)
    if rule.flow:
        assert max(errors(evaluate(function, x, y), truth(x, y, estimator, kernel=rule)).values()) < 1e-3
        return
    assert_no_worse([evaluate(function, x, y)], [evaluate(plain, x, y)], [truth(x, y, estimator, kernel=rule)], 2e-6)


# ---------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("kernel", [RBF(), RBF(threshold=0.6)], ids=str)
def test_invariances(kernel: RBF, estimator: str, device: torch.device) -> None:
    x, y = features(N, P, Q, torch.float64, device)
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64, generator=generator)).Q.to(device)
    order = torch.randperm(N, generator=generator).to(device)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return cka_loss(a, b, kernel=kernel, estimator=estimator)

    expected = loss(x, y)
    for a, b in ((3.7 * x @ turn - 5.0, y), (x[order], y[order]), (y, x)):
        torch.testing.assert_close(loss(a, b), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(x, x), torch.zeros_like(expected), rtol=0, atol=1e-12)


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


@short(
    "every constant on one side; on the others the one whose mean is rounded",
    lambda side, value: side == "student" or value == 1000.3,
)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.3])
def test_rows_that_are_all_equal(value: float, side: str, rule: RBF, estimator: str, device: torch.device) -> None:
    """No distance, no median: CKA 0, loss 1, gradient 0."""
    flat, varied = torch.full((N, P), value, device=device), features(N, P, Q, device=device)[1]
    x, y = {"student": (flat, varied), "teacher": (varied, flat), "both": (flat, flat)}[side]
    for backend in ("library", "reference"):
        found = evaluate(
            lambda a, b, name=backend: cka_loss(a, b, kernel=rule, estimator=estimator, backend=name), x, y
        )
        assert found.value == 1.0
        assert found.dx.eq(0).all()
        assert found.dy.eq(0).all()


def test_rows_at_equal_distances(rule: RBF, device: torch.device) -> None:
    """One-hot rows: the hollow kernel is constant, its unbiased HSIC rounding; the biased one is the identity's."""
    n = 8
    x, y = torch.eye(n, device=device), features(n, P, Q, device=device)[1]
    options = dict(kernel=rule, backend="library")
    found = evaluate(lambda a, b: cka_loss(a, b, estimator="unbiased", **options), x, y)
    assert found.value == 1.0
    assert found.dx.eq(0).all()
    assert cka_loss(x, 3 * x, **options | {"kernel": "rbf"}).abs() < 1e-6


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_rows(n: int, rule: RBF, estimator: str, device: torch.device) -> None:
    if n < 4 and estimator == "unbiased":
        with pytest.raises(ValueError, match="at least 4 rows"):
            cka_loss(torch.ones(n, 2), torch.ones(n, 2), kernel=rule, estimator=estimator)
        return
    x, y = features(n, P, Q, torch.float64, device)
    found = evaluate(lambda a, b: cka_loss(a, b, kernel=rule, estimator=estimator), x, y)
    true = truth(x, y, estimator, kernel=rule)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_visible(bad: float, rule: RBF, estimator: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    x[0, 0] = bad
    assert cka_loss(x, y, kernel=rule, estimator=estimator).isnan()


@pytest.mark.parametrize("missing", [1, 2])
def test_too_few_rows_selected(missing: int, rule: RBF, estimator: str, device: torch.device) -> None:
    least = {"biased": 2, "unbiased": 4}[estimator]
    x, y = features(N, P, Q, device=device)
    for count in (least - missing, least):
        mask = torch.arange(N, device=device) < count
        value = evaluate(lambda a, b, m=mask: cka_loss(a, b, kernel=rule, estimator=estimator, mask=m), x, y).value
        assert value.isnan() == (count < least)


def test_what_is_masked_out_does_not_matter(rule: RBF, estimator: str, memory: str, device: torch.device) -> None:
    mask = torch.arange(N, device=device) % 3 != 1
    x, y = features(N, P, Q, device=device)
    function = operator("gram", "library", estimator, mask=mask, kernel=rule)
    clean, dirty = (
        evaluate(function, *(torch.where(mask[:, None], a, fill) for a in (x, y))) for fill in (0.0, float("nan"))
    )
    for one, other in zip(clean, dirty, strict=True):
        assert one.isfinite().all()
        assert one.equal(other)
