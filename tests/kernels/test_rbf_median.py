"""`RBF(median=...)`: of an even number of distances the lower one of the two in the middle, or their average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bird_kernels import RBF, cka, cka_loss, explain
from bird_kernels.backends.library_rbf import median
from tests.accuracy import evaluate, features, truth

RULES = [RBF(median="average"), RBF(threshold=0.5, median="average")]


def literal(x: Tensor, y: Tensor, kernel: RBF) -> float:
    """CKA by the formulas as they are written, with `numpy.median`."""
    n = len(x)
    h = np.eye(n) - 1 / n
    both = []
    for side in (x, y):
        d = ((side.double().numpy()[:, None] - side.double().numpy()[None]) ** 2).sum(-1)
        counted = d[d != 0] if kernel.threshold is None else d
        square = np.median(counted) * (kernel.threshold or 1.0) ** 2
        both.append(h @ np.exp(-d / (2 * square)) @ h)
    k, l = both
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


@pytest.fixture(params=["selected", "histograms"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "histograms":
        monkeypatch.setattr(median, "FEW", 0)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", RULES, ids=["median", "threshold"])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 37])  # numbers of distances that are even and odd, by both rules
def test_the_average_is_numpy_s(n: int, rule: RBF) -> None:
    x, y = features(n, 3, 4, torch.float64, mean=2.0)
    expected = pytest.approx(literal(x, y, rule), rel=1e-9)
    for backend in ("reference", "library", "auto"):
        assert cka(x, y, kernel=rule, backend=backend).item() == expected
    apart = abs(cka(x, y, kernel=RBF(threshold=rule.threshold)).item() - literal(x, y, rule))
    if n in (4, 8):  # an even number of distances, by both rules
        assert apart > 1e-5


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", RULES, ids=["median", "threshold"])
def test_equal_distances_masks_and_gradients(rule: RBF) -> None:
    """A grid has many equal distances, the middle ones among them; the gradient takes sigma for a constant."""
    grid = torch.tensor([[i // 4, i % 4] for i in range(16)], dtype=torch.float64)
    other = features(16, 3, 4, torch.float64)[1]
    assert cka(grid, other, kernel=rule).item() == pytest.approx(literal(grid, other, rule), rel=1e-9)
    mask = torch.arange(20) % 5 != 2
    x, y = (torch.full((20, a.shape[1]), 1e3).double().index_put((mask.nonzero()[:, 0],), a) for a in (grid, other))
    assert cka(x, y, kernel=rule, mask=mask).item() == pytest.approx(literal(grid, other, rule), rel=1e-9)
    for estimator in ("biased", "unbiased"):
        x, y = features(12, 3, 4, torch.float32)
        found = evaluate(lambda a, b, e=estimator: cka_loss(a, b, kernel=rule, estimator=e), x, y)
        true = truth(x, y, estimator, kernel=rule)
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_the_notebook_s_published_digits() -> None:
    """The example of Kornblith et al.'s colab: 100 x 10 normal numbers of seed 1337, threshold 0.5."""
    numbers = np.random.RandomState(1337)
    x = numbers.randn(100, 10)
    y = numbers.randn(100, 10) + x
    found = cka(*(torch.from_numpy(a) for a in (x, y)), kernel=RBF(threshold=0.5, median="average"))
    assert round(found.item(), 5) == 0.65483


@pytest.mark.parametrize(
    ("size", "dtype", "value", "gradient"),
    [(1e4, torch.float32, 1e-6, 2e-3), (1e5, torch.float32, 1e-4, 0.2), (1e6, torch.float64, 1e-8, 1e-5)],
)
def test_one_large_row_costs_what_the_guide_says(
    size: float, dtype: torch.dtype, value: float, gradient: float
) -> None:
    """docs/guide/bandwidths.md; beside distances that are made of differences."""
    torch.manual_seed(0)
    x = torch.randn(64, 576)
    y = x + torch.randn(64, 576)
    x[0, :2] = y[0, :2] = size
    found = evaluate(lambda a, b: cka_loss(a, b, kernel="rbf"), x.to(dtype), y.to(dtype))

    def by_differences(a: Tensor, b: Tensor) -> Tensor:
        h = torch.eye(64, dtype=torch.float64) - 1 / 64
        both = []
        for side in (a, b):
            d = (side[:, None] - side[None]).square().sum(-1)
            both.append(h @ torch.exp(-d / (2 * d[d != 0].median().detach())) @ h)
        k, l = both
        return 1 - (k * l).sum() / (k.norm() * l.norm())

    true = evaluate(by_differences, x.double(), y.double())
    assert abs(found.value - true.value) < value
    assert (found.dx - true.dx).norm() < gradient * true.dx.norm()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", RULES, ids=["median", "threshold"])
def test_no_distance_is_no_median(rule: RBF) -> None:
    x = torch.ones(6, 3, requires_grad=True)
    loss = cka_loss(x, features(6, 3, 4)[1], kernel=rule)
    loss.backward()
    assert loss == 1
    assert x.grad.eq(0).all()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"sigma": (1.0, 2.0, 3.0)}, ValueError, "one number, or one for x and one for y, got"),
        ({"sigma": (1.0,)}, ValueError, "one number, or one for x and one for y, got"),
        ({"sigma": [1.0, 2.0]}, TypeError, "sigma and threshold are numbers, or a tuple of two sigmas"),
        ({"sigma": "a"}, TypeError, "sigma and threshold are numbers"),
        ({"threshold": True}, TypeError, "sigma and threshold are numbers"),
    ],
)
def test_bandwidths_are_numbers(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RBF(**given)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match='median must be "lower" or "average", got \'upper\''):
        RBF(median="upper")
    with pytest.raises(ValueError, match='a gradient flows to the rows whose distance is the median: median="lower"'):
        RBF(flow=True, median="average")


def test_fused_kernels_leave_it_to_the_library() -> None:
    x, y = features(64, 8, 8)
    assert explain(x, y, kernel=RBF(median="average")).backend == "library"
    with pytest.raises(ValueError, match='RBF\\(median="average"\\)'):
        cka(x, y, kernel=RBF(median="average"), backend="triton")
