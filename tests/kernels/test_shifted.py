"""`backends.shifted`: values and gradients against fp64, on the batches that shifting could break."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import backends, reference
from bird_kernels.backends import library
from bird_kernels.types import Problem
from tests.accuracy import Result, assert_no_worse, errors, evaluate, features, operator, plain, poison, truth
from tests.kernels import test_dominating_rows as dominating
from tests.selection import short

shifted = pytest.importorskip("bird_kernels.backends.shifted", reason="Triton does not exist for this system")
shift = pytest.importorskip("bird_kernels.backends.triton.shift")
symmetric = pytest.importorskip("bird_kernels.backends.triton.symmetric")

pytestmark = pytest.mark.usefixtures("interpreter_rounds_bfloat16")

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {"cross": (70, 13, 21), "gram": (37, 70, 41)}  # nothing is a multiple of 8; more than one block of rows
# Allowed error of the value, relative error of a gradient. In halves a gradient is a product of rounded matrices that
# is rounded itself: sqrt(2) times the spread of a rounding, 0.0017 and 0.0002.
ALLOWED = {FLOAT32: (1e-6, 3e-6), BFLOAT16: (3e-6, 4e-3), FLOAT16: (3e-6, 5e-4)}
UPSTREAM = 512.0  # keeps fp16 gradients in that dtype's normal range


def problem_of(x: Tensor, y: Tensor, mask: Tensor | None = None, sides: str = "xy", **options: Any) -> Problem:
    wanted = dict(masked=mask is not None, x_grad="x" in sides, y_grad="y" in sides)
    return Problem(*x.shape, y.shape[1], x.dtype, x.device, **wanted, **options)


def run(
    route: str, x: Tensor, y: Tensor, mask: Tensor | None = None, sides: str = "xy", upstream: float = 1.0,
    **options: Any,
) -> Result:  # fmt: skip
    symmetric = options.pop("symmetric", None)
    problem = problem_of(x, y, mask, sides, **options)
    value, stash = shifted.forward(x, y, mask, problem, route, symmetric)
    shapes = shifted.stash_shapes(problem, route)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stash._asdict().items()} == shapes
    dx, dy = shifted.backward(torch.full_like(value, upstream), x, y, mask, stash, problem, route=route)
    assert all(tensor.is_contiguous() for tensor in (*stash, dx, dy))  # as the fake operators say
    return Result(value, dx if "x" in sides else None, dy if "y" in sides else None)


def assert_right(
    route: str, x: Tensor, y: Tensor, mask: Tensor | None = None, sides: str = "xy", upstream: float = UPSTREAM,
    looser: float = 1.0, **options: Any,
) -> Result:  # fmt: skip
    """Within ALLOWED of the truth, times ``looser``."""
    found = run(route, x, y, mask, sides, upstream, **options)
    named = {name: options[name] for name in ("estimator", "statistic") if name in options}
    off = errors(found, truth(x, y, mask=mask, sides=sides, upstream=upstream, **named))
    value, gradient = ALLOWED[x.dtype]
    assert off.pop("value") <= looser * value
    assert all(error <= looser * gradient for error in off.values()), off
    return found


def sides_of(route: str, dtype: torch.dtype, device: torch.device, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    return features(*SHAPES[route], dtype=dtype, device=device, mean=mean)


def rows_kept(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) % 5 != 2


@pytest.fixture(params=[FLOAT32, BFLOAT16, FLOAT16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@short(
    "every launch in fp32; in halves both gradients under a mask",
    lambda dtype, sides, masked: dtype == FLOAT32 or (sides == "xy" and masked),
)
@pytest.mark.parametrize(("sides", "masked"), [("xy", False), ("xy", True), ("x", True), ("y", False), ("", True)])
def test_values_and_gradients(
    route: str, dtype: torch.dtype, estimator: str, sides: str, masked: bool, device: torch.device
) -> None:
    """Every kernel's constants in all pairs that change what it does: a side's gradient has a launch of its own, a
    mask reaches all of them."""
    x, y = sides_of(route, dtype, device, mean=2.0)
    assert_right(route, x, y, rows_kept(x) if masked else None, sides, estimator=estimator)


@pytest.mark.parametrize("statistic", ["cka", "hsic", "sqrt_cka_loss"])
def test_statistics(route: str, statistic: str, estimator: str, device: torch.device) -> None:
    x, y = sides_of(route, FLOAT32, device, mean=1.0)
    if statistic == "sqrt_cka_loss":
        estimator = "biased"  # it has no other
    true = truth(x, y, estimator, statistic)
    found = run(route, x, y, statistic=statistic, estimator=estimator)
    off = errors(found, true)
    assert off["value"] < 1e-6 * true.value.abs()
    assert max(off["dx"], off["dy"]) < 3e-6


@short(
    "every mean in fp32; in halves the first that is shifted, and the largest",
    lambda dtype, mean: dtype == FLOAT32 or mean in (4.1, 1000),
)
@pytest.mark.parametrize("mean", [0, 3.9, 4.1, 16, 64, 1000])
def test_means(route: str, dtype: torch.dtype, mean: float, device: torch.device) -> None:
    """No digit is lost to the mean, whether a column is shifted or not."""
    n, p, q = (600, 48, 40) if route == "cross" else (96, 128, 72)
    assert_right(route, *features(n, p, q, dtype=dtype, device=device, mean=mean))


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
    found = run("gram", x, y, mask, "x", estimator="unbiased", statistic="cka")
    dominating.assert_right(found.value.item(), true.value)
    assert found.dx is not None
    dominating.assert_gradient(found.dx[mask].cpu(), true)


def test_arbitrary_strides(route: str, device: torch.device) -> None:
    n, p, q = SHAPES[route]
    x, y = features(n, p, q, device=device)
    wide = torch.full((n, 3 * q + 1), torch.nan, device=device)
    wide[:, 1::3] = y
    expected = run(route, x, y)
    found = run(route, x.T.contiguous().T, wide[:, 1::3])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_right(route, torch.arange(n, device=device).float()[:, None].expand(n, p), y)  # rows of one number


def test_a_massive_column(route: str, dtype: torch.dtype, device: torch.device) -> None:
    x, y = sides_of(route, dtype, device)
    x[:, 3] *= 1000
    assert_right(route, x, y, looser=2.0)


def test_fp16_near_its_largest(route: str, device: torch.device) -> None:
    """60,000: the squares, the products and x - s itself would leave fp16's range."""
    x, y = sides_of(route, FLOAT16, device)
    signs = torch.where(torch.arange(x.shape[1], device=device) % 2 == 0, 1.0, -1.0)
    x = ((x.float() * 500 + 60000).clamp(max=65000) * signs).half()
    assert_right(route, x, (y.float() * 15000).clamp(-65000, 65000).half(), upstream=1e6)


def test_rectified_features(route: str, dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    """Most entries are zero, some columns all of them."""
    n, p, q = (96, 30, 20) if route == "cross" else (48, 60, 40)
    x, y = features(n, p, q, dtype=dtype, device=device, mean=-1.5)
    x, y = x.relu(), y.relu()
    x[:, :4] = 0
    assert_right(route, x, y, estimator=estimator)


@short(
    "every constant in fp32; in halves the one that is furthest from 0",
    lambda dtype, constant: dtype == FLOAT32 or constant == -3e4,
)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3e4])
def test_a_side_without_variance(
    route: str, dtype: torch.dtype, estimator: str, constant: float, device: torch.device
) -> None:
    """Loss 1 and no gradient, masked rows as different as they may be."""
    x, y = sides_of(route, dtype, device)
    mask = rows_kept(x)
    x = torch.where(mask[:, None], torch.full_like(x, constant), x)
    for a, b in ((x, y), (y, x), (x, x)):
        found = run(route, a, b, mask, estimator=estimator)
        assert found.value == 1
        assert found.dx is not None
        assert found.dy is not None
        assert found.dx.abs().max() == found.dy.abs().max() == 0


def test_orthogonal_rows_have_no_unbiased_variance(dtype: torch.dtype, device: torch.device) -> None:
    """Nor do rows that are orthogonal up to fp32's rounding."""
    x = 3 * torch.eye(24, dtype=dtype, device=device)
    _, y = features(24, 24, 30, dtype=dtype, device=device)
    assert run("gram", x, y, estimator="unbiased").value == 1
    turned = torch.linalg.qr(y[:, :24].double()).Q.float()
    assert run("gram", turned, y.float(), estimator="unbiased").value == 1


@short(
    "NaN in every dtype; Inf becomes NaN in the first difference",
    lambda dtype, wrong: dtype == FLOAT32 or math.isnan(wrong),
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_out(route: str, dtype: torch.dtype, estimator: str, wrong: float, device: torch.device) -> None:
    x, y = sides_of(route, dtype, device)
    x[7, 2] = wrong
    found = run(route, x, y, estimator=estimator)
    assert found.value.isnan()
    assert found.dx is not None
    assert found.dx.isnan().any()
    x[~rows_kept(x)] = wrong
    x[7, 2], y[2] = 0.0, wrong  # row 7 is left out, as row 2 is
    assert_right(route, x, y, rows_kept(x), estimator=estimator)


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_too_few_rows(route: str, kept: int, estimator: str, device: torch.device) -> None:
    x, y = sides_of(route, FLOAT32, device)
    mask = torch.arange(x.shape[0], device=device) < kept
    fewest = 4 if estimator == "unbiased" else 2
    assert run(route, x, y, mask, estimator=estimator).value.isnan() == (kept < fewest)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_a_row_that_dominates_biased(route: str, size: float, device: torch.device) -> None:
    """CKA is all but 1 then, and what is left of the gradient no better than plain PyTorch could make it."""
    x, y = sides_of(route, FLOAT32, device, mean=1.0)
    x[5] *= size
    y[5] *= size
    assert_no_worse([run(route, x, y)], [evaluate(plain(route), x, y)], [truth(x, y)], floor=1e-5)


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


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("power", [-12, 12])
def test_scales(route: str, dtype: torch.dtype, power: int, estimator: str, device: torch.device) -> None:
    x, y = sides_of(route, dtype, device, mean=1.0)
    x, y = x * 2.0 ** (4 * power), y * 2.0 ** (-3 * power)
    assert_right(route, x, y, upstream=1.0, estimator=estimator)


@pytest.mark.parametrize("period", [0, 2, 4, 64])
def test_sorted_and_periodic_batches(period: int, device: torch.device) -> None:
    """bf16, 3,600 rows, of which one in four is sampled: sorted (0), or every so many rows massive, as first tokens."""
    x, y = features(3600, 6, 5, dtype=BFLOAT16, device=device, mean=100.0)
    if period == 0:
        x = x.sort(0).values
    elif period == 2:
        x[::2] += 40
    else:
        x[::period] = -2500
    assert_right("cross", x, y)


def test_an_outlier_that_the_sample_misses(estimator: str, device: torch.device) -> None:
    """fp16: a row that is 250,000 times as large as the sample let expect does not overflow."""
    x, y = features(3000, 6, 5, dtype=FLOAT16, device=device)
    index = torch.arange(1000)
    sampled = 3 * index + ((index * 2654435761) % 2**32 // 2**16) % 3
    row = min(set(range(3000)) - set(sampled.tolist()))
    x = (x.float() * 0.001).half()
    x[row] *= 250000
    assert 512 < x[row].abs().max() < 1000
    assert_right("cross", x, y, estimator=estimator)


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


@short(
    "the unbiased estimator writes all that the biased one does, and more",
    lambda dtype, estimator: dtype == FLOAT32 or estimator == "unbiased",
)
def test_bitwise_repeatable_from_poisoned_memory(
    route: str, dtype: torch.dtype, estimator: str, device: torch.device
) -> None:
    x, y = sides_of(route, dtype, device, mean=2.0)
    mask = rows_kept(x)
    before = x.clone(), y.clone(), mask.clone()
    first = run(route, x, y, mask, estimator=estimator)
    with poison():
        second = run(route, x, y, mask, estimator=estimator)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, mask), strict=True))


@pytest.mark.parametrize("change", [dict(dtype=torch.float64), dict(statistic="gram_mse"), dict(center=False)], ids=str)
def test_other_problems_are_the_librarys(change: dict[str, Any], route: str, device: torch.device) -> None:
    x, y = sides_of(route, FLOAT32, device)
    problem = problem_of(x, y)._replace(**change)
    assert not shifted.takes(problem)
    assert shifted.stash_shapes(problem, route) == library.stash_shapes(problem, route)


def test_the_library_backend_is_shifted_where_triton_compiles(
    route: str, estimator: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, and the operators that a second backward goes through."""
    monkeypatch.setattr(backends, "_shifts", lambda dtype, device: True)
    x, y = sides_of(route, FLOAT32, device)
    problem = problem_of(x, y)
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
    for configuration in (symmetric.Configuration(16, 32, 64, 4, 3), symmetric.Configuration(32, 32, 128, 4, 3)):
        assert_right(route, x, y, sides="x", symmetric=configuration)
    shifted._launches_of.cache_clear()


def test_symmetric_products_are_symmetric(device: torch.device) -> None:
    z = torch.randn(64, 40, device=device)
    found = symmetric.multiply(z, True, 2, symmetric.Configuration(16, 32, 64, 4, 3), False)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found[1], z[32:].T @ z[32:], rtol=1e-5, atol=1e-5)


def test_configurations_fit_shared_memory() -> None:
    """All of them on an H100, tiles of up to 128 x 128 elsewhere, and three stages of those in 99 KB."""
    assert symmetric.fitting((9, 0)) == symmetric.CONFIGURATIONS
    assert len(symmetric.fitting((8, 0))) == len(symmetric.fitting((10, 0))) == 4
    assert len(symmetric.fitting((8, 6))) == len(symmetric.fitting((12, 0))) == 3
