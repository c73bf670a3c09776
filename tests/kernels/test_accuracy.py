"""Values and gradients against fp64, on a grid of shapes and dtypes and on data that break naive formulas."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels.backends import linalg, sides
from tests.accuracy import (
    Result,
    assert_no_worse,
    errors,
    evaluate,
    features,
    operator,
    plain,
    poison,
    truth,
)
from tests.selection import short

UPSTREAM = 1024.0  # a loss scale: fp16 gradients of a mean over n p elements are below its normal range without one

COMPILED = pytest.mark.compiled
# Rows, student width, teacher width. Kernels work on blocks of 64: below, at and across their borders.
SMALL = [(3, 5, 2), (4, 7, 5), (37, 61, 29), (61, 3, 1), (64, 16, 48), (130, 5, 9), (9, 130, 3)]
MORE = [
    (3, 1, 1), (4, 1, 3), (5, 3, 3), (5, 2, 64), (5, 700, 300), (37, 1, 1), (37, 64, 1), (37, 700, 130), (61, 64, 64),
    (61, 3, 257), (128, 512, 512), (128, 33, 1), (128, 130, 700), (130, 129, 131), (512, 7, 13), (512, 64, 300),
    (512, 700, 1), (700, 40, 24),
]  # fmt: skip
SHAPES = [*SMALL, *(pytest.param(shape, marks=COMPILED) for shape in MORE)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Whoever reads memory that nobody wrote reads NaN."""
    with poison():
        yield


FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6}


def floor(dtype: torch.dtype) -> float:
    """Half precision: where rounding happens to cancel in one value, it is lucky by more than twice."""
    return FLOOR.get(dtype, torch.finfo(dtype).eps / 32)


@lru_cache(maxsize=4)  # the cases of one shape follow each other
def draws(
    shape: tuple[int, int, int], dtype: torch.dtype, estimator: str, device: torch.device
) -> list[tuple[Tensor, Tensor, Result]]:
    """Features and the truth about them; several draws of few rows, where a single one may be lucky."""
    n, p, q = shape
    if estimator == "unbiased":
        # With 4 rows features rounded to half have row sums that the closed form takes for zero: 3 x plain's error.
        n = max(n, 8 if dtype.itemsize == 2 else 4)
    inputs = [features(n, p, q, dtype, device, seed=seed) for seed in range(12 if n < 5 else 5 if n < 10 else 1)]
    return [(x, y, truth(x, y, estimator, upstream=UPSTREAM)) for x, y in inputs]


def compare(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    sides: str,
    estimator: str,
    route: str,
    backend: str,
    device: torch.device,
) -> Result:
    """Asserts that the operator is no worse than plain PyTorch, and gives one of its results."""
    drawn = draws(shape, dtype, estimator, device)
    ours, theirs = (
        [evaluate(function, x, y, sides, UPSTREAM) for x, y, _ in drawn]
        for function in (operator(route, backend, estimator), plain(route, estimator))
    )
    assert_no_worse(ours, theirs, [true for _, _, true in drawn], floor(dtype))
    return ours[0]


@short(
    "every shape in fp32; in the other dtypes, whose rounding alone differs, few rows, one block and several",
    lambda shape, dtype: dtype == torch.float32 or shape in [(4, 7, 5), (37, 61, 29), (130, 5, 9)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    estimator: str,
    route: str,
    backend: str,
    device: torch.device,
) -> None:
    found = compare(shape, dtype, "xy", estimator, route, backend, device)
    assert found.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.dx.dtype == found.dy.dtype == dtype


MIXED = [
    (torch.float64, torch.float32, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float64, torch.float64),
]


@pytest.mark.parametrize(("x_dtype", "y_dtype", "common"), MIXED, ids=str)
def test_mixed_dtypes_are_promoted(
    x_dtype: torch.dtype, y_dtype: torch.dtype, common: torch.dtype, estimator: str, device: torch.device
) -> None:
    x, y = (a.to(t) for a, t in zip(features(37, 21, 30, device=device), (x_dtype, y_dtype), strict=True))
    found = evaluate(lambda a, b: bird_kernels.cka_loss(a, b, estimator=estimator), x, y, upstream=UPSTREAM)
    assert (found.value.dtype, found.dx.dtype, found.dy.dtype) == (common, x_dtype, y_dtype)
    found_errors = errors(found, truth(x, y, estimator, upstream=UPSTREAM))
    rounding = {name: torch.finfo(t).eps for name, t in (("value", common), ("dx", x_dtype), ("dy", y_dtype))}
    for name, error in found_errors.items():
        assert error <= max(rounding[name], 10 * torch.finfo(common).eps)


@pytest.mark.parametrize("sides", ["x", "xy"])
@pytest.mark.parametrize("shape", [(130, 30, 20), (75, 64, 130)], ids=str)
def test_symmetric_products_in_blocks(
    shape: tuple[int, int, int],
    sides: str,
    estimator: str,
    route: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks as large products have them, of 16 to 31 rows here."""
    for limits in (linalg.SMALLEST_BLOCK, linalg.LARGEST_BLOCK):
        monkeypatch.setitem(limits, device.type, 16)
    compare(shape, torch.float32, sides, estimator, route, "library", device)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize("statistic", ["cka_loss", pytest.param("hsic", marks=COMPILED)])
def test_precisions(
    precision: str, statistic: str, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """ieee and tf32x3 are fp32; tf32 rounds the operands to 11 bits. PyTorch's own switches stay as they were."""
    x, y = features(37, 61, 29, torch.float32, device, mean=1.0)
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    found = evaluate(operator(route, backend, estimator, statistic, precision), x, y)
    assert before == (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )
    true = truth(x, y, estimator, statistic)
    found_errors = errors(found, true)
    found_errors["value"] /= max(1.0, true.value.item())
    assert max(found_errors.values()) < (3e-3 if precision == "tf32" else 2e-6)


@pytest.mark.parametrize(
    ("asked", "given"), [(None, "switch"), ("ieee", "ieee"), ("tf32", "tf32"), ("tf32x3", "ieee")], ids=str
)
def test_library_products_run_under_the_precision_asked_for(
    asked: str | None, given: str, route: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tf32x3 is not something a library offers: it gets what is no worse."""
    switch = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before, seen = switch.fp32_precision, set()

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.add(switch.fp32_precision)
        return a @ b

    for module in (sides, linalg):
        monkeypatch.setattr(module, "mm", product)
    x, y = features(5, 3, 4, device=device)
    operator(route, "library", precision=asked)(x, y)
    assert seen == {before if given == "switch" else given}
