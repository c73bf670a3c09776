"""Device functions alone, and the paths of the Triton backend that the problems of the other tests do not reach."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import plan
from bird_kernels.moments import MIN_ROWS, Moments, combine
from bird_kernels.types import RBF, Problem
from tests.accuracy import features, operator, truth

triton = pytest.importorskip("triton", reason="Triton does not exist for this system")
tl = pytest.importorskip("triton.language", reason="Triton does not exist for this system")
reduce = pytest.importorskip("bird_kernels.backends.triton.reduce")
launch = pytest.importorskip("bird_kernels.backends.triton.launch")
centre = pytest.importorskip("bird_kernels.backends.triton.centre")
small = pytest.importorskip("bird_kernels.backends.triton.small")

EPS = torch.finfo(torch.float32).eps


@triton.jit
def combine_kernel(moments, out, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr):
    value, d_kl, d_kk, d_ll = reduce.combine_centred(
        tl.load(moments + 0), tl.load(moments + 1), tl.load(moments + 2), tl.load(moments + 3), STATISTIC, UNBIASED
    )
    tl.store(out + 0, value)
    tl.store(out + 1, d_kl)
    tl.store(out + 2, d_kk)
    tl.store(out + 3, d_ll)


MOMENTS = {
    "any": Moments(5.0, 7.0, 9.0),
    "negative": Moments(-5.0, 7.0, 9.0),
    "tiny": Moments(5e-60, 7e-60, 9e-60),
    "no variance": Moments(1e-20, 0.0, 9.0),
    "none on either side": Moments(0.0, 0.0, 0.0),
    "nan": Moments(math.nan, 7.0, math.nan),
    "inf": Moments(math.inf, 7.0, math.inf),
    "nan beside no variance": Moments(math.nan, 0.0, math.nan),
}


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("statistic", ["cka_loss", "cka", "hsic", "sqrt_cka_loss"])
def test_combine_is_moments_combine(name: str, statistic: str, estimator: str, device: torch.device) -> None:
    least = MIN_ROWS[estimator]
    for n in (0, 1, least - 1, least, 8, 1000):
        arguments = torch.tensor([*MOMENTS[name][:3], n], dtype=torch.float64, device=device)
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


def test_counters_are_not_left_behind(estimator: str, device: torch.device) -> None:
    """The last program to arrive finishes a call: no count of an earlier or a larger call may be in the way."""
    function = operator("gram", "triton", estimator)
    pairs = [features(n, 9, 70, device=device, seed=n) for n in (65, 12, 65)]
    values: list[Tensor] = [function(x, y) for x, y in pairs]
    for (x, y), value in zip(pairs, values, strict=True):
        torch.testing.assert_close(value.double(), truth(x, y, estimator).value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sides", ["x", "y", "xy", ""])
def test_launches_are_as_planned(
    sides: str, masked: bool, estimator: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not run; a mask is counted by the kernels themselves."""
    count = 0

    def launched(*_: Any, **__: Any) -> Tensor:
        nonlocal count
        count += 1
        return torch.ones((), device=device)

    monkeypatch.setattr(launch.Launch, "__call__", launched)
    x, y = (a.requires_grad_(side in sides) for side, a in zip("xy", features(9, 5, 40, device=device), strict=True))
    mask = torch.arange(9, device=device) % 3 != 0 if masked else None
    monkeypatch.setattr(Tensor, "sum", launched)
    value = operator("gram", "triton", estimator, mask=mask)(x, y)
    forward, count = count, 0
    if sides:
        value.backward()
    problem = Problem(9, 5, 40, x.dtype, device, "cka_loss", estimator, None, masked, "x" in sides, "y" in sides)
    assert (forward, count) == plan.launches(problem)


# ------------------------------------------------------------------------------------------- rows that dominate


@triton.jit
def locate_kernel(x, mask, location, spread, n, d, ROBUST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(spread, centre.store_location(x, mask, location, tl.arange(0, BLOCK), n, d, ROBUST, MASKED, BLOCK))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 40, 100])
def test_location_is_the_median_of_the_means_of_groups(n: int, masked: bool, device: torch.device) -> None:
    """Of eight groups, to which the rows that count are dealt in turn; of the two in the middle where they are even."""
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).mul(3).add(50).to(device)
    mask = torch.arange(n, device=device) % 8 != 3 if masked else torch.ones(n, dtype=torch.bool, device=device)
    location, spread = torch.full((2, 5), torch.nan, device=device), torch.full((1,), torch.nan, device=device)
    locate_kernel[(1,)](x, mask.view(torch.uint8), location, spread, n, 5, ROBUST=True, MASKED=masked, BLOCK=32)
    of_group = [x[mask][g::8].double() for g in range(8)]
    means = torch.stack([rows.mean(0) for rows in of_group if len(rows)]).sort(0).values
    wanted = means[[(len(means) - 1) // 2, len(means) // 2]].mean(0)
    torch.testing.assert_close(location.double().sum(0), wanted, rtol=1e-12, atol=0)
    furthest = (x[mask].double() - wanted).abs().max()
    assert spread.item() == pytest.approx(furthest.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------- launches


def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Name and grid of every kernel launched from now on; nothing runs."""
    launched: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        launch.Launch, "__call__", lambda self, *_: launched.append((self._kernel.fn.__name__, self._grid))
    )
    return launched


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("widths", [[5_000_000], [1_000_000] * 64, [1] * 64], ids=["one side", "64 wide", "64 narrow"])
def test_no_grid_passes_its_limit(widths: list[int], estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^31 - 1 blocks in x, 65,535 in y and z; every place of a kernel's own below 2^31. Without a device."""
    launched, meta = grids(monkeypatch), torch.device("meta")
    problems = tuple(
        Problem(128, d, d, torch.bfloat16, meta, "cka_loss", estimator, None, True, True, True) for d in widths
    )
    made = small.Small(problems, "ieee")
    for each in (made.partials, made.reduce, made.moments, made.gradients):
        each(None)
    gaussian = importlib.import_module("bird_kernels.backends.triton.gaussian")
    made = gaussian.Gaussian((problems[0]._replace(n=8192, kernel=RBF()),), "ieee")
    for each in (made.shifted.locate, made.shifted.shift, *made.launches, made.gradients):
        each(None)
    assert len(launched) == 14
    for name, (x, y, z) in launched:
        assert 0 < x < 2**31, name
        assert 0 < max(y, z) <= 65_535, name
    assert 2 * sum(2 * d for d in widths) < 2**31
    wanted = next(grid for name, grid in launched if name == "backward_kernel")[0]
    share = plan.gradient_tiling(problems).share
    columns = plan.gradient_tiling(problems).wide * share
    assert wanted == sum(2 * -(-d // columns) for d in widths)


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
    """It takes the sizes and constants, too, in the order of the signature; options are the compiler's alone."""
    compiled = Compiled()
    kernel = Jit(compiled)
    launched = launch.Launch(kernel, (3, 2), dict(MASKED=True, BLOCK=64, n=7, others=0), num_warps=4)
    for known, x in (("a", "x1"), ("a", "x2"), ("b", "x3"), (None, "x4"), (None, "x5"), ("a", "x6")):
        launched(known, dict(stride=5, x=x, y="not its"))
    assert kernel.launches == [((3, 2, 1), (x, 5, 7, 64, True), dict(num_warps=4)) for x in ("x1", "x3", "x4", "x5")]
    assert compiled.launches == [((3, 2, 1), x, 5, 7, 64, True) for x in ("x2", "x6")]


def test_the_interpreter_has_nothing_to_keep() -> None:
    kernel = Jit(None)
    launched = launch.Launch(kernel, (1, 1), dict(n=7, MASKED=True, BLOCK=64))
    launched("a", dict(x="x", stride=5))
    launched("a", dict(x="x", stride=5))
    assert len(kernel.launches) == 2


def test_what_a_problem_decides_stands_last() -> None:
    with pytest.raises(ValueError, match="decides others than the last ones"):
        launch.Launch(Jit(None), (1, 1), dict(x=1, n=7, MASKED=True, BLOCK=64))
    launched = launch.Launch(Jit(None), (1, 1), dict(n=7, MASKED=True, BLOCK=64))
    with pytest.raises(KeyError, match="stride"):
        launched("a", dict(x="x"))


def test_aligned() -> None:
    numbers = torch.empty(64, dtype=torch.float32)
    assert launch.aligned(numbers, numbers[4:], numbers[:0])
    assert not launch.aligned(numbers, numbers[3:])
    assert not launch.aligned(numbers[2:], numbers[4:])
