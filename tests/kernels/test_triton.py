"""Device functions alone, and the paths of the Triton backend that the problems of the other tests do not reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import plan
from bird_kernels.moments import MIN_ROWS, Moments, combine
from bird_kernels.testing import assert_no_worse, errors, evaluate, features, operator, plain, truth
from bird_kernels.types import Problem

triton = pytest.importorskip("triton", reason="Triton does not exist for this system")
tl = pytest.importorskip("triton.language", reason="Triton does not exist for this system")
reduce = pytest.importorskip("bird_kernels.backends.triton.reduce")
launch = pytest.importorskip("bird_kernels.backends.triton.launch")
routes = pytest.importorskip("bird_kernels.backends.triton.routes")

EPS = torch.finfo(torch.float32).eps


@triton.jit
def combine_kernel(moments, out, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr):
    value, d_kl, d_kk, d_ll = reduce.combine(
        tl.load(moments + 0), tl.load(moments + 1), tl.load(moments + 2), tl.load(moments + 3), tl.load(moments + 4),
        tl.load(moments + 5), tl.load(moments + 6), tl.load(moments + 7), tl.load(moments + 8), STATISTIC, UNBIASED,
    )  # fmt: skip
    tl.store(out + 0, value)
    tl.store(out + 1, d_kl)
    tl.store(out + 2, d_kk)
    tl.store(out + 3, d_ll)


MOMENTS = {
    "any": Moments(5.0, 7.0, 9.0, 3.0, 2.0, 4.0, 1.5, -2.5),
    "negative": Moments(-5.0, 7.0, 9.0, 3.0, 2.0, 4.0, 1.5, -2.5),
    "tiny": Moments(*(1e-60 * m for m in (5.0, 7.0, 9.0, 3.0, 2.0, 4.0)), 1.5e-30, -2.5e-30),
    "no variance": Moments(1e-20, 0.0, 9.0),
    "none on either side": Moments(0.0, 0.0, 0.0),
    "cancelled to rounding": Moments(56.0, 56.0 * (1 + 1e-7), 90.0, 392.0, 392.0, 0.0, 56.0, 0.0),
    "nan": Moments(math.nan, 7.0, math.nan),
    "inf": Moments(math.inf, 7.0, math.inf),
    "nan beside no variance": Moments(math.nan, 0.0, math.nan),
}


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("statistic", ["cka_loss", "cka", "hsic", "sqrt_cka_loss"])
def test_combine_is_estimators_combine(name: str, statistic: str, estimator: str, device: torch.device) -> None:
    least = MIN_ROWS[estimator]
    for n in (0, 1, least - 1, least, 8, 1000):
        arguments = torch.tensor([*MOMENTS[name], n], dtype=torch.float64, device=device)
        found = torch.full((4,), -1.0, dtype=torch.float64, device=device)
        combine_kernel[(1,)](arguments, found, STATISTIC=statistic, UNBIASED=estimator == "unbiased")
        expected = combine(MOMENTS[name], float(n), statistic, estimator, EPS)
        wanted = torch.tensor([float(number) for number in expected], dtype=torch.float64)
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-12, atol=0, equal_nan=True)


@triton.jit
def upper_tile_kernel(indices, rows, columns, tiles):
    index = tl.load(indices + tl.program_id(0))
    row, column = reduce.upper_tile(index, tiles)
    tl.store(rows + tl.program_id(0), row)
    tl.store(columns + tl.program_id(0), column)


@pytest.mark.parametrize("tiles", [1, 2, 3, 13, 1999, 8192])
def test_upper_tiles_are_enumerated(tiles: int, device: torch.device) -> None:
    """Row by row, (i, j) with i <= j; of the large ones the ends of every 500th row, where a root is off first."""
    pairs = [(i, j) for i in range(tiles) for j in range(i, tiles)] if tiles < 100 else []
    for row in range(0, tiles, 500) if tiles >= 100 else ():
        pairs += [(row, row), (row, tiles - 1)]
    numbers = [i * tiles - i * (i - 1) // 2 + j - i for i, j in pairs]
    index = torch.tensor(numbers, dtype=torch.int32, device=device)
    rows, columns = torch.full_like(index, -1), torch.full_like(index, -1)
    upper_tile_kernel[(len(pairs),)](index, rows, columns, tiles)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == pairs


@pytest.mark.parametrize(("estimator", "masked"), [("biased", True), ("unbiased", False)])
def test_many_rows_are_split(estimator: str, masked: bool, device: torch.device) -> None:
    """Above 2048 rows several programs share the statistics of a column; the last share is not a full one."""
    x, y = features(2100, 3, 2, device=device, mean=3.0)
    mask = torch.arange(2100, device=device) % 7 != 1 if masked else None
    true = truth(x, y, estimator, mask=mask)
    found = evaluate(operator("cross", "triton", estimator, mask=mask), x, y)
    if mask is None:
        assert_no_worse([found], [evaluate(plain("cross", estimator), x, y)], [true])
    assert (found.value - true.value).abs() < 1e-6
    assert (found.dx - true.dx).norm() < 3e-6 * true.dx.norm()
    assert (found.dy - true.dy).norm() < 3e-6 * true.dy.norm()


@pytest.mark.parametrize(("n", "p", "q"), [(20, 20, 300), (200, 20, 5)])
def test_splits_with_empty_shares(n: int, p: int, q: int, estimator: str, route: str, device: torch.device) -> None:
    """As many programs as the larger side needs: the smaller one has nothing for some of them."""
    x, y = features(n, p, q, device=device)
    ours, theirs = (evaluate(f, x, y) for f in (operator(route, "triton", estimator), plain(route, estimator)))
    assert_no_worse([ours], [theirs], [truth(x, y, estimator)])


def test_counters_are_not_left_behind(estimator: str, route: str, device: torch.device) -> None:
    """The last program to arrive finishes a call: no count of an earlier or a larger call may be in the way."""
    function = operator(route, "triton", estimator)
    pairs = [features(n, 9, 70, device=device, seed=n) for n in (65, 12, 65)]
    values: list[Tensor] = [function(x, y) for x, y in pairs]
    for (x, y), value in zip(pairs, values, strict=True):
        torch.testing.assert_close(value.double(), truth(x, y, estimator).value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sides", ["x", "y", "xy", ""])
@pytest.mark.parametrize(
    ("route", "n", "p", "q"),
    [("gram", 9, 5, 40), ("gram", 520, 3, 5), ("gram", 2100, 3, 5), ("cross", 70, 3, 2), ("cross", 2050, 90, 2)],
)
def test_launches_are_as_planned(
    route: str, n: int, p: int, q: int, sides: str, masked: bool, estimator: str, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Counted, not run; and a mask is counted by PyTorch only where the plan says so."""
    count = 0

    def launched(*_: Any, **__: Any) -> Tensor:
        nonlocal count
        count += 1
        return torch.ones((), device=device)

    monkeypatch.setattr(launch.Launch, "__call__", launched)
    x, y = (a.requires_grad_(side in sides) for side, a in zip("xy", features(n, p, q, device=device), strict=True))
    mask = torch.arange(n, device=device) % 3 != 0 if masked else None
    monkeypatch.setattr(Tensor, "sum", launched)
    value = operator(route, "triton", estimator, mask=mask)(x, y)
    forward, count = count, 0
    if sides:
        value.backward()
    problem = Problem(n, p, q, x.dtype, device, "cka_loss", estimator, None, masked, "x" in sides, "y" in sides)
    assert (forward, count) == plan.launches(problem, route)


@pytest.fixture
def as_if_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small problems are planned as larger ones are."""
    monkeypatch.setattr(plan, "SMALL", 0)
    monkeypatch.setattr(plan, "PROGRAMS", request.param)
    routes.launches_of.cache_clear()
    yield
    routes.launches_of.cache_clear()


@pytest.mark.parametrize("as_if_large", [1, 5, 132], indirect=True, ids="{} programs".format)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("as_if_large")
def test_larger_problems(masked: bool, estimator: str, device: torch.device) -> None:
    """Statistics in a launch of their own; tiles whole (1 program), in few parts, in many."""
    x, y = features(37, 61, 109, device=device, mean=2.0)
    splits = plan.tiling(Problem(37, 61, 109, x.dtype, device), "gram").splits
    assert splits in ((), (1, 2), (2, 4))
    mask = torch.arange(37, device=device) % 5 != 3 if masked else None
    found = evaluate(operator("gram", "triton", estimator, mask=mask), x, y)
    assert max(errors(found, truth(x, y, estimator, mask=mask)).values()) < 3e-6


@pytest.mark.parametrize("exponents", [(-30, 0, 30), (20, -25, -20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shares_of_features_differ_in_scale(
    dtype: torch.dtype, exponents: tuple[int, ...], estimator: str, device: torch.device
) -> None:
    """Each program centres and scales its own; the sums are in one scale, whichever share has the largest entries."""
    x, y = features(37, 3 * 64, 2 * 64, device=device, mean=1.0)
    powers = [2.0 ** (e / 3 if dtype == torch.float16 else e) for e in exponents]
    x = (x * torch.tensor(powers, device=device).repeat_interleave(64)).to(dtype)
    y = (y * torch.tensor(powers[1:], device=device).repeat_interleave(64)).to(dtype)
    assert plan.tiling(Problem(37, 192, 128, dtype, device), "gram").splits >= (3, 2)
    upstream = max(powers)  # keeps the gradient in fp16's range
    found = errors(
        evaluate(operator("gram", "triton", estimator), x, y, upstream=upstream),
        truth(x, y, estimator, upstream=upstream),
    )
    allowed = 3e-6 if dtype == torch.float32 else 4e-3
    assert max(found.values()) < allowed


class Compiled(launch.CompiledKernel):
    """Stands for a compiled kernel: remembers the grid and what it is launched with."""

    module = None

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, *args))


class Jit:
    """Stands for a kernel before compilation."""

    arg_names = ("x", "stride", "n", "BLOCK", "MASKED")

    def __init__(self, result: Any) -> None:
        self.result, self.launches = result, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            self.launches.append((grid, args, named))
            return self.result

        return run


def test_the_compiled_kernel_is_kept_for_what_is_known() -> None:
    """It takes the constants, too, in the order of the signature; options are the compiler's alone."""
    compiled = Compiled()
    kernel = Jit(compiled)
    launched = launch.Launch(kernel, (3, 2), (7,), dict(MASKED=True, BLOCK=64), num_warps=4)
    for known, x in (("a", "x1"), ("a", "x2"), ("b", "x3"), (None, "x4"), (None, "x5"), ("a", "x6")):
        launched(known, x, 5)
    named = dict(MASKED=True, BLOCK=64, num_warps=4)
    assert kernel.launches == [((3, 2, 1), (x, 5, 7), named) for x in ("x1", "x3", "x4", "x5")]
    assert compiled.launches == [((3, 2, 1), x, 5, 7, 64, True) for x in ("x2", "x6")]


def test_the_interpreter_has_nothing_to_keep() -> None:
    kernel = Jit(None)
    launched = launch.Launch(kernel, (1, 1), (7,), dict(MASKED=True, BLOCK=64))
    launched("a", "x", 5)
    launched("a", "x", 5)
    assert len(kernel.launches) == 2


def test_aligned() -> None:
    numbers = torch.empty(64, dtype=torch.float32)
    assert launch.aligned(numbers, numbers[4:], numbers[:0])
    assert not launch.aligned(numbers, numbers[3:])
    assert not launch.aligned(numbers[2:], numbers[4:])
