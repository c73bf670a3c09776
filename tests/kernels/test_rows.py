"""Sums and gradients from shifted rows, as on a GPU: by Triton, in the interpreter here, and in plain PyTorch."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import backends, from_sums, reference, sums
from bird_kernels.backends import library, linalg, rows, unbiased
from bird_kernels.types import Problem
from tests.accuracy import Result, errors, features, poison, truth
from tests.kernels import test_dominating_rows as dominating
from tests.selection import short

pytestmark = pytest.mark.usefixtures("interpreter_rounds_bfloat16")

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Allowed error of the value, relative error of a gradient; of halves that of a product of rounded matrices.
ALLOWED = {FLOAT32: (1e-6, 3e-6), BFLOAT16: (3e-6, 4e-3), FLOAT16: (3e-6, 5e-4)}
UPSTREAM = 512.0  # keeps fp16 gradients in that dtype's normal range
CUTS = [0, 1, 30, 30, 70]  # a part of one row, one of none


@pytest.fixture(params=["triton", "plain"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As if the tests' device were a GPU, with Triton or without."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton does not exist for this system")
    monkeypatch.setattr(rows, "wanted", lambda problem: problem.dtype != torch.float64)
    monkeypatch.setattr(backends, "_shifts", lambda dtype, device: request.param == "triton")
    return request.param


@pytest.fixture(params=[FLOAT32, BFLOAT16, FLOAT16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def compute(
    x: Tensor, y: Tensor, mask: Tensor | None = None, cuts: list[int] | None = None, upstream: float = UPSTREAM,
    **options: Any,
) -> Result:  # fmt: skip
    """The loss and its gradients from the sums of the parts between ``cuts``."""
    named = dict(statistic="cka_loss") | options
    problem = Problem(*x.shape, y.shape[1], x.dtype, x.device, masked=mask is not None, **named)
    ends = pairwise(cuts or [0, len(x)])
    parts = [(x[a:b], y[a:b], None if mask is None else mask[a:b]) for a, b in ends]
    value, c, s = from_sums.value_of(reduce(sums.include, [sums.sums_of(*part, problem) for part in parts]), problem)
    exchanged = from_sums.exchanged(s, c)
    dx = torch.cat([from_sums.gradient(a, b, m, s, c, upstream, problem=problem) for a, b, m in parts])
    dy = torch.cat([from_sums.gradient(b, a, m, *exchanged, upstream, problem=problem) for a, b, m in parts])
    assert dx.dtype == dy.dtype == x.dtype
    return Result(torch.as_tensor(value), dx, dy)


def assert_right(x: Tensor, y: Tensor, mask: Tensor | None = None, looser: float = 1.0, **options: Any) -> None:
    upstream = options.pop("upstream", UPSTREAM)
    found = compute(x, y, mask, upstream=upstream, **options)
    named = {name: options[name] for name in ("estimator", "statistic") if name in options}
    off = errors(found, truth(x, y, mask=mask, upstream=upstream, **named))
    value, gradient = ALLOWED[x.dtype]
    assert off.pop("value") <= looser * value
    assert max(off.values()) <= looser * gradient, off


@short(
    "all in fp32; halves with most of what changes",
    lambda dtype, cuts, masked: dtype == FLOAT32 or (cuts is not None and masked),
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", [None, CUTS], ids=["whole", "parts"])
def test_values_and_gradients(
    dtype: torch.dtype, estimator: str, cuts: list[int] | None, masked: bool, device: torch.device
) -> None:
    x, y = features(70, 13, 21, dtype=dtype, device=device, mean=2.0)
    assert_right(x, y, torch.arange(70, device=device) % 5 != 2 if masked else None, cuts=cuts, estimator=estimator)


@short(
    "every mean in fp32, the largest in halves",
    lambda dtype, mean: dtype == FLOAT32 or mean == 1000,
)
@pytest.mark.parametrize("mean", [0, 4.1, 1000])
def test_means(dtype: torch.dtype, estimator: str, mean: float, device: torch.device) -> None:
    """No digit is lost to the mean, whether a column is shifted or not."""
    x, y = features(200, 12, 10, dtype=dtype, device=device, mean=mean)
    assert_right(x, y, cuts=[0, 80, 200], estimator=estimator)


def test_a_sorted_set_in_parts(dtype: torch.dtype, device: torch.device) -> None:
    """Each part has means of its own, some of them 20 spreads from those of all rows.

    All columns drift alike, so that CKA is all but 1 and the gradient is what rounded weights leave of a difference:
    centred rows, and `shifted` of the whole, lose as much of it (0.03 in bf16).
    """
    x, y = features(300, 12, 10, dtype=dtype, device=device)
    drift = torch.linspace(-30, 30, 300, device=device, dtype=torch.float64)[:, None]
    assert_right((x + drift).to(dtype), (y - drift).to(dtype), cuts=[0, 100, 200, 300], looser=10.0)


@short(
    "every constant in fp32; in halves the one that is furthest from 0",
    lambda dtype, constant: dtype == FLOAT32 or constant == -3e4,
)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3e4])
def test_a_side_without_variance(dtype: torch.dtype, estimator: str, constant: float, device: torch.device) -> None:
    x = torch.full((61, 5), constant, device=device, dtype=dtype)
    _, y = features(61, 5, 7, dtype=dtype, device=device)
    for a, b in ((x, y), (y, x)):
        found = compute(a, b, cuts=[0, 1, 20, 61], estimator=estimator)
        assert found.value == 1
        assert not found.dx.any()
        assert not found.dy.any()


@short(
    "the estimators share it in halves",
    lambda dtype, estimator: dtype == FLOAT32 or estimator == "unbiased",
)
def test_rows_that_do_not_count(dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    """NaN among them; a part has no others."""
    x, y = features(60, 5, 7, dtype=dtype, device=device)
    mask = torch.arange(60, device=device) % 3 == 0
    mask[20:40] = False
    x[~mask], y[~mask] = torch.nan, torch.inf
    found = compute(x, y, mask, cuts=[0, 20, 40, 60], estimator=estimator)
    true = truth(x[mask], y[mask], estimator=estimator, upstream=UPSTREAM)
    assert abs(found.value - true.value) <= ALLOWED[dtype][0]
    off = errors(Result(found.value, found.dx[mask], found.dy[mask]), true)
    assert max(off["dx"], off["dy"]) <= ALLOWED[dtype][1]
    assert not found.dx[~mask].any()


def test_nan_stays_visible(dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    x, y = features(61, 5, 7, dtype=dtype, device=device)
    x[50, 3] = torch.nan
    found = compute(x, y, cuts=[0, 40, 61], estimator=estimator)
    assert found.value.isnan()
    assert found.dx.isnan().all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_sizes(dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    x, y = features(70, 13, 21, dtype=dtype, device=device, mean=1.0)
    assert_right(x * 2.0**40, y * 2.0**-40, cuts=CUTS, estimator=estimator, upstream=2.0**40)


def test_fp16_near_its_largest(device: torch.device) -> None:
    x, y = features(70, 13, 21, dtype=FLOAT16, device=device)
    x = (x.float() * 500 + 60000).clamp(max=65000).half()
    assert_right(x, (y.float() * 15000).clamp(-65000, 65000).half(), upstream=1e6)


def test_a_row_that_dominates(device: torch.device) -> None:
    """It weighs no more in the unbiased estimator than its products with the others do."""
    x, y = features(80, 13, 21, device=device, mean=1.0)
    x[5] *= 1e3
    y[5] *= 1e3
    assert_right(x, y, cuts=[0, 40, 80], estimator="unbiased", looser=6.0)


@pytest.mark.parametrize("where", ["both", "apart"])
@pytest.mark.parametrize(("count", "size"), [(1, 3e3), (1, 1e4), (5, 1e4)])
def test_rows_that_dominate_are_no_less_exact(
    dtype: torch.dtype, count: int, size: float, where: str, way: str
) -> None:
    """In halves too, and in a part without such a row."""
    true = dominating.case(64 if way == "triton" else 600, count, size, dtype, where)
    upstream = dominating.loss_scale(true)
    for cuts in (None, [0, 31, len(true.x)]):
        found = compute(true.x, true.y, cuts=cuts, estimator="unbiased", upstream=upstream)
        assert abs(1.0 - found.value - true.value) <= ALLOWED[FLOAT32][0]
        assert found.dx is not None
        error, eps = (found.dx.double() / -upstream - true.dx).norm(), torch.finfo(FLOAT32).eps
        bar = 1e-5 if dtype == FLOAT32 else 2.0 * ALLOWED[dtype][1]
        assert error <= bar * true.dx.norm() + dominating.COPIES * eps * true.terms


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_one_batch_of_the_unbiased_cross_route(
    dtype: torch.dtype, size: float, masked: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library backend's, as on a GPU: value and both gradients."""
    for module in (library, unbiased):
        monkeypatch.setattr(module, "wanted", rows.wanted)
    x, y, _, dx, terms = dominating.case(64, 1, size, dtype)
    mask, upstream = None, dominating.loss_scale(dominating.case(64, 1, size, dtype))
    if masked:  # more rows, which do not count
        mask = torch.arange(80) % 5 != 3
        x, y = (
            torch.full((80, a.shape[1]), torch.nan, dtype=dtype).index_copy(0, mask.nonzero()[:, 0], a) for a in (x, y)
        )
    module = pytest.importorskip("bird_kernels.backends.shifted") if way == "triton" else library
    problem = Problem(*x.shape, y.shape[1], dtype, x.device, "cka_loss", "unbiased", None, masked, True, True)
    value, stash = module.forward(x, y, mask, problem, "cross")
    shapes = module.stash_shapes(problem, "cross")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stash._asdict().items()} == shapes
    grads = module.backward(torch.full_like(value, upstream), x, y, mask, stash, problem, route="cross")
    true = truth(x, y, "unbiased", mask=mask, upstream=upstream)
    off = errors(Result(value, *grads), true)
    assert off["value"] <= ALLOWED[FLOAT32][0]
    bar = (1e-5 if dtype == FLOAT32 else 2.0 * ALLOWED[dtype][1]) + 2e-6 * terms / dx.norm().item()
    assert max(off["dx"], off["dy"]) <= bar, off


def test_long_sums_go_in_parts(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PART", 128)
    x, y = features(300, 12, 20, dtype=dtype, device=device, mean=2.0)
    assert_right(x, y, torch.arange(300, device=device) % 5 != 2)


def test_products_are_of_the_features_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of a biased forward, one of a gradient."""
    seen = []
    x, y = features(40, 6, 5, dtype=dtype)
    problem = Problem(40, 6, 5, dtype, x.device)
    s = sums.sums_of(x, y, None, problem)
    _, c, s = from_sums.value_of(s, problem)
    original = linalg.mm

    def mm(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.dtype, b.dtype))
        return original(a, b)

    for module in (linalg, rows):
        monkeypatch.setattr(module, "mm", mm)
    sums.sums_of(x, y, None, problem)
    assert seen == [(dtype, dtype)] * 3
    from_sums.gradient(x, y, None, s, c, 1.0, problem=problem)
    assert seen[3:] == [(dtype, dtype)]


@short(
    "the unbiased estimator needs all sums of the biased one, and more",
    lambda dtype, estimator: dtype == FLOAT32 or estimator == "unbiased",
)
def test_bitwise_repeatable_from_poisoned_memory(dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    x, y = features(70, 13, 21, dtype=dtype, device=device, mean=2.0)
    mask = torch.arange(70, device=device) % 5 != 2
    first = compute(x, y, mask, estimator=estimator)
    with poison():
        second = compute(x, y, mask, estimator=estimator)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_statistics(device: torch.device) -> None:
    x, y = features(70, 13, 21, device=device, mean=1.0)
    hsic = reference.hsic(x.double(), y.double())
    assert_right(x, y, statistic="cka")
    found = compute(x, y, statistic="hsic").value
    assert abs(found - hsic) <= 1e-6 * hsic
