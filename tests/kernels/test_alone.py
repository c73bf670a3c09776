"""A forward alone of plain matrices on a CPU takes fewer steps (`call._alone`): with the same value, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels import cka, cka_loss, hsic
from bird_kernels.backends import library
from tests.accuracy import features, truth
from tests.selection import short

STATISTICS: dict[str, Callable[..., Tensor]] = {"cka_loss": cka_loss, "cka": cka, "hsic": hsic}
SIZES = {"gram": (40, 64, 48), "cross": (96, 24, 20)}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call that took the short way, whether it found a value there."""
    calls: list[bool] = []
    alone = library.forward_alone

    def seen(*given: object) -> Tensor | None:
        calls.append((found := alone(*given)) is not None)
        return found

    monkeypatch.setattr(library, "forward_alone", seen)
    return calls


@short("a mean of 16 spreads lies between those that are left", lambda mean: mean != 16.0)
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("mean", [0.0, 16.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_value_is_that_with_a_gradient(
    name: str, estimator: str, route: str, mean: float, scale: float, taken: list[bool]
) -> None:
    x, y = (scale * side for side in features(*SIZES[route], mean=mean))
    function, found = STATISTICS[name], STATISTICS[name](x, y, estimator=estimator)
    assert torch.equal(found, function(x.clone().requires_grad_(), y, estimator=estimator).detach())
    assert taken == ([scale == 1.0 and mean == 0.0] if estimator == "biased" else [])
    if name != "hsic":
        expected = truth(x, y, estimator).value
        expected = 1 - expected if name == "cka" else expected
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_collapsed_sides_and_what_is_no_number(estimator: str) -> None:
    x, y = features(30, 8, 7)
    assert cka_loss(torch.full_like(x, 3.1), y, estimator=estimator) == 1.0
    assert cka(x, torch.zeros_like(y), estimator=estimator) == 0.0
    for bad in (torch.nan, torch.inf):
        assert cka_loss(x.index_fill(0, torch.tensor([4]), bad), y, estimator=estimator).isnan()


def test_who_takes_it(taken: list[bool]) -> None:
    """Those of which no gradient is wanted, and nothing that the steps left out would have to look at."""
    x, y = features(40, 64, 48)
    learned = x.clone().requires_grad_()
    expected = truth(x, y, "biased").value.float()

    def close(value: Tensor, bound: float = 2e-6) -> None:
        torch.testing.assert_close(value.detach().float(), expected, rtol=0, atol=bound)

    with torch.no_grad():
        close(cka_loss(learned, y))
    with torch.inference_mode():
        close(cka_loss(x + 0.0, y))
    close(cka_loss(torch.nn.Parameter(x, requires_grad=False), y))
    assert taken == [True, True, True]
    taken.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(cka_loss(x, y))
    close(cka_loss(learned, y))
    close(cka_loss(x.double(), y.double()))
    close(cka_loss(x.view(8, 5, 64), y.view(8, 5, 48), row_dims=2))
    close(cka_loss(x.view(40, 8, 8), y))
    close(cka_loss(x, y, mask=torch.ones(40, dtype=torch.bool)))
    close(cka_loss(x, y, precision="ieee"))
    close(torch.func.vmap(cka_loss)(x[None], y[None])[0])
    close(torch.func.grad_and_value(cka_loss)(x, y)[1])
    assert taken == []


def test_wrong_arguments_are_told_in_the_same_words() -> None:
    x, y = features(40, 64, 48)
    for given, message in (
        ((x, y[:39]), "the same rows"),
        ((x[:1], y[:1]), "needs at least 2 rows"),
        ((x[:, :0], y), "x has no features"),
        ((x.to_sparse(), y), "strided tensor"),
        ((x[0], y), "feature dimension"),
        ((x, y.int()), "must be float64"),
        ((x, 3), "must be a torch.Tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bird_kernels.cka_loss(*given)
    with pytest.raises(ValueError, match="kernel must be one of"):
        bird_kernels.cka_loss(x, y, kernel=["linear"])
