"""Sums and gradients from shifted rows, as on a GPU: by Triton, in the interpreter here, and in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bird_kernels import backends, from_sums, sums
from bird_kernels.backends import library, linalg, rows, unbiased
from bird_kernels.types import Problem
from tests.accuracy import Result, errors, features, truth
from tests.kernels import test_dominating_rows as dominating
from tests.kernels.ways import ALLOWED, by_sums
from tests.selection import short

pytestmark = pytest.mark.usefixtures("interpreter_rounds_bfloat16")

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
compute = partial(by_sums, "")


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


@short(
    "all in plain PyTorch and in fp32; where Triton is interpreted, in halves what dominates most",
    lambda way, dtype, count, where: way == "plain" or dtype == FLOAT32 or (count == 5 and where == "apart"),
)
@pytest.mark.parametrize("where", ["both", "apart"])
@pytest.mark.parametrize(("count", "size"), [(1, 3e3), (1, 1e4), (5, 1e4)])
def test_rows_that_dominate_are_no_less_exact(
    dtype: torch.dtype, count: int, size: float, where: str, way: str
) -> None:
    """In halves too, and in a part without such a row."""
    true = dominating.case(64 if way == "triton" else 600, count, size, dtype, where)
    upstream = dominating.loss_scale(true)
    for cuts in ([0, len(true.x)], [0, 31, len(true.x)]):
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
    monkeypatch.setattr(rows, "PART", 64)
    x, y = features(150, 12, 20, dtype=dtype, device=device, mean=2.0)
    mask = torch.arange(150, device=device) % 5 != 2
    off = errors(compute(x, y, mask, upstream=512.0, cuts=[0, 150]), truth(x, y, mask=mask, upstream=512.0))
    assert off.pop("value") <= ALLOWED[dtype][0]
    assert max(off.values()) <= ALLOWED[dtype][1]


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
