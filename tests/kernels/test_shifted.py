"""`backends.shifted`: values and gradients against fp64, on the batches that shifting could break."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import backends, reference
from bird_kernels.backends import library
from bird_kernels.types import Problem
from tests.accuracy import errors, evaluate, features, operator, truth
from tests.kernels import test_dominating_rows as dominating
from tests.kernels.ways import ALLOWED, WAYS
from tests.kernels.ways import by_shifting as run
from tests.selection import short

shifted = pytest.importorskip("bird_kernels.backends.shifted", reason="Triton does not exist for this system")
shift = pytest.importorskip("bird_kernels.backends.triton.shift")
symmetric = pytest.importorskip("bird_kernels.backends.triton.symmetric")

pytestmark = pytest.mark.usefixtures("interpreter_rounds_bfloat16")

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {route: WAYS[f"shifted {route}"].shape for route in ("cross", "gram")}
PROBLEM = Problem(70, 13, 21, FLOAT32, torch.device("cpu"), x_grad=True, y_grad=True)
UPSTREAM = 512.0  # keeps fp16 gradients in that dtype's normal range


def assert_right(
    route: str, x: Tensor, y: Tensor, mask: Tensor | None = None, sides: str = "xy", looser: float = 1.0, **options: Any
) -> None:
    """Within ALLOWED of the truth, times ``looser``."""
    found = run(route, x, y, mask, sides=sides, upstream=UPSTREAM, **options)
    named = {name: options[name] for name in ("estimator", "statistic") if name in options}
    off = errors(found, truth(x, y, mask=mask, sides=sides, upstream=UPSTREAM, **named))
    value, gradient = ALLOWED[x.dtype]
    assert off.pop("value") <= looser * value
    assert all(error <= looser * gradient for error in off.values()), off


def sides_of(route: str, dtype: torch.dtype, device: torch.device, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    return features(*SHAPES[route], dtype=dtype, device=device, mean=mean)


def rows_kept(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) % 5 != 2


@pytest.fixture(params=[FLOAT32, BFLOAT16, FLOAT16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@short(
    "periods below the number of groups, without a factor of it, it, and twice it",
    lambda stride: stride in (2, 5, 8, 16),
)
@pytest.mark.parametrize("stride", [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16])
def test_masks_with_a_period(stride: int, device: torch.device) -> None:
    """The location is a median over groups of rows: no period of the mask puts all that count into one group."""
    true = dominating.case(16, 1, 3e4)
    mask = torch.arange(16 * stride, device=device) % stride == stride - 1
    x, y = (torch.full((len(mask), a.shape[1]), torch.nan, device=device) for a in (true.x, true.y))
    x[mask], y[mask] = true.x.to(device), true.y.to(device)
    found = run("gram", x, y, mask, sides="x", estimator="unbiased", statistic="cka")
    dominating.assert_right(found.value.item(), true.value)
    assert found.dx is not None
    dominating.assert_gradient(found.dx[mask].cpu(), true)


def test_a_massive_first_token_unbiased(dtype: torch.dtype, device: torch.device) -> None:
    """Two features of one row at 3,000: no side is without variance for it."""
    x, y = features(64, 160, 160, dtype=dtype, device=device)
    x[0, :2] = y[0, :2] = 3000
    assert_right("gram", x, y, estimator="unbiased", looser=2.0)


def test_squares_that_leave_the_range_of_fp32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 10^11 that the sample misses: entries of K and L of 10^24 are fp32 numbers, their squares are not."""
    monkeypatch.setattr(shift, "SAMPLE", 8)
    shifted._launches_of.cache_clear()
    x, y = sides_of("gram", FLOAT32, device, mean=1.0)
    every = -(-len(x) // 8)
    index = torch.arange(8)
    row = min(set(range(len(x))) - set((every * index + ((index * 2654435761) % 2**32 // 2**16) % every).tolist()))
    x[row] *= 1e11
    y[row] *= 1e11
    found, true = run("gram", x, y), truth(x, y)
    shifted._launches_of.cache_clear()
    assert (found.value - true.value).abs() < 1e-6
    assert found.dx.isfinite().all()
    assert found.dy.isfinite().all()


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hundred rows are looked at, of so few that the interpreter is soon through with all."""
    monkeypatch.setattr(shift, "SAMPLE", 100)
    shifted._launches_of.cache_clear()
    yield
    shifted._launches_of.cache_clear()


@pytest.mark.parametrize("period", [0, 2, 4, 64])
@pytest.mark.usefixtures("few_samples")
def test_sorted_and_periodic_batches(period: int, device: torch.device) -> None:
    """bf16, 360 rows, of which one in four is sampled: sorted (0), or every so many rows massive, as first tokens."""
    x, y = features(360, 6, 5, dtype=BFLOAT16, device=device, mean=100.0)
    if period == 0:
        x = x.sort(0).values
    elif period == 2:
        x[::2] += 40
    else:
        x[::period] = -2500
    assert_right("cross", x, y)


@pytest.mark.usefixtures("few_samples")
def test_an_outlier_that_the_sample_misses(estimator: str, device: torch.device) -> None:
    """fp16: a row of 500, where the sample lets expect 0.004, does not overflow."""
    x, y = features(300, 6, 5, dtype=FLOAT16, device=device)
    index = torch.arange(100)
    sampled = 3 * index + ((index * 2654435761) % 2**32 // 2**16) % 3
    row = min(set(range(300)) - set(sampled.tolist()))
    x = (x.float() * 0.001).half()
    x[row] = (x[row].float() * 500 / x[row].abs().max()).half()
    assert_right("cross", x, y, estimator=estimator)


@short("the unbiased estimator, which sums all that the biased one does", lambda estimator: estimator == "unbiased")
def test_long_sums_go_in_parts(
    dtype: torch.dtype, estimator: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shifted, "PART", 128)
    shifted._launches_of.cache_clear()
    x, y = features(300, 12, 20, dtype=dtype, device=device, mean=2.0)
    assert_right("cross", x, y, estimator=estimator)
    assert_right("cross", x, y, rows_kept(x), estimator=estimator)
    shifted._launches_of.cache_clear()


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_precisions(route: str, precision: str, estimator: str, device: torch.device) -> None:
    """tf32 rounds operands to ten bits where they are made, tf32x3 is exact."""
    x, y = sides_of(route, FLOAT32, device, mean=30.0)
    assert_right(route, x, y, precision=precision, estimator=estimator, looser=1.0 if precision == "tf32x3" else 500.0)


@pytest.mark.parametrize("change", [dict(dtype=torch.float64), dict(statistic="gram_mse"), dict(center=False)], ids=str)
def test_other_problems_are_the_librarys(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_shifts", lambda dtype, device: True)
    assert backends.of(PROBLEM, "library") is shifted
    assert backends.of(PROBLEM._replace(**change), "library") is library


def test_the_library_backend_is_shifted_where_triton_compiles(
    route: str, estimator: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, and the operators that a second backward goes through."""
    monkeypatch.setattr(backends, "_shifts", lambda dtype, device: True)
    x, y = sides_of(route, FLOAT32, device)
    problem = PROBLEM
    assert backends.of(problem, "library") is shifted
    assert backends.of(problem._replace(dtype=torch.float64), "library") is library
    function = operator(route, "library", estimator)
    assert max(errors(evaluate(function, x, y), truth(x, y, estimator)).values()) < 3e-6
    x, y = x.requires_grad_(), y.requires_grad_()
    twice = []
    for loss in (function(x, y), reference.cka_loss(x, y, None, estimator)):
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), y)[0])
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-7)


@short(
    "how a tile is read and what it holds do not know each other: either with one of the other",
    lambda described, dtype: described == (dtype == BFLOAT16),
)
@pytest.mark.parametrize("described", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_symmetric_products(
    route: str, described: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile that crosses the diagonal, several, the last ones not full; long sums in parts, of 128 rows and more."""
    monkeypatch.setattr(symmetric, "capability", lambda device: (9, 0) if described else (8, 0))
    monkeypatch.setattr(shifted, "PART", 128)
    shifted._launches_of.cache_clear()
    n, p, q = (100, 72, 41) if route == "gram" else (200, 60, 21)
    x, y = features(n, p, q, dtype=dtype, device=device)
    for configuration in (symmetric.Configuration(16, 32, 64, 4, 3), symmetric.Configuration(32, 32, 128, 4, 3, 1)):
        assert_right(route, x, y, sides="x", symmetric=configuration)
    shifted._launches_of.cache_clear()


def test_symmetric_products_are_symmetric(device: torch.device) -> None:
    z = torch.randn(64, 40, device=device)
    found = symmetric.multiply(z, True, 2, symmetric.Configuration(16, 32, 64, 4, 3), False)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found[1], z[32:].T @ z[32:], rtol=1e-5, atol=1e-5)


def test_configurations_fit_shared_memory() -> None:
    """All on an H100 but the one with specialised warps, tiles of up to 128 x 128 elsewhere, three stages in 99 KB."""
    assert symmetric.fitting((9, 0)) == symmetric.CONFIGURATIONS[:-1]
    assert symmetric.fitting((10, 0)) == (*symmetric.CONFIGURATIONS[:4], symmetric.CONFIGURATIONS[-1])
    assert symmetric.fitting((8, 0)) == symmetric.CONFIGURATIONS[:4]
    assert len(symmetric.fitting((8, 6))) == len(symmetric.fitting((12, 0))) == 3
