"""Device functions alone, and the paths of the Triton backend that the problems of the other tests do not reach."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import backends, plan
from bird_kernels.moments import MIN_ROWS, Moments, combine
from bird_kernels.types import RBF, Problem
from tests.accuracy import errors, evaluate, features, operator, poison, truth

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


@pytest.fixture
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many as there are sides: each reads all of its side, in many steps. New memory is NaN."""
    monkeypatch.setattr(plan, "PROGRAMS", 0)
    backends.module_of("triton")._launches_of.cache_clear()
    with poison():
        yield
    backends.module_of("triton")._launches_of.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("few_programs")
def test_wide_features(masked: bool, estimator: str, device: torch.device) -> None:
    x, y = features(37, 61, 109, device=device, mean=2.0)
    assert plan.small_tiling([Problem(37, 61, 109, x.dtype, device)]).splits == (1, 2)
    mask = torch.arange(37, device=device) % 5 != 3 if masked else None
    found = evaluate(operator("gram", "triton", estimator, mask=mask), x, y)
    assert max(errors(found, truth(x, y, estimator, mask=mask)).values()) < 3e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@pytest.mark.usefixtures("few_programs")
def test_features_that_are_read_once(precision: str, masked: bool, estimator: str, device: torch.device) -> None:
    """In many steps, by programs that hold all rows; M stays on the chip for several tiles of a gradient."""
    dtype = {"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    x, y = features(71, 130, 200, dtype, device, mean=3.0)
    asked: Any = precision if precision == "tf32" else None
    problem = Problem(71, 130, 200, dtype, device, precision=asked)
    assert plan.small_tiling([problem]).whole
    assert plan.gradient_tiling([problem._replace(y_grad=True)])[2:] == (128, 12 if precision == "tf32" else 7)
    mask = torch.arange(71, device=device) % 5 != 3 if masked else None
    call = operator("gram", "triton", estimator, mask=mask, precision=asked)
    found = evaluate(call, x, y)
    # The rounding of centred features and of M; in the interpreter tf32 is not rounded.
    allowed = {"tf32": 3e-6 if device.type == "cpu" else 2e-3, "bf16": 7e-3, "fp16": 8e-4}[precision]
    assert max(errors(found, truth(x, y, estimator, mask=mask)).values()) < allowed
    if masked:
        for again, first in zip(evaluate(call, x, y), found, strict=True):
            assert torch.equal(again, first)


@pytest.mark.parametrize("n", [37, 71])
@pytest.mark.usefixtures("few_programs")
def test_columns_of_equal_rows_have_no_variance(n: int, estimator: str, device: torch.device) -> None:
    """Exactly, whatever the number: the loss is 1, without a gradient."""
    x = torch.tensor([0.1, -3e4, 7.3, 1e-5] * 24, device=device).expand(n, -1)
    _, y = features(n, 3, 70, device=device)
    for dtype, precision in ((torch.float32, "tf32"), (torch.bfloat16, None), (torch.float16, None)):
        found = evaluate(operator("gram", "triton", estimator, precision=precision), x.to(dtype), y.to(dtype))
        assert [float(part.double().abs().max()) for part in found] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("n", [37, 71])
@pytest.mark.parametrize("exponents", [(-30, 0, 30), (20, -25, -20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shares_of_features_differ_in_scale(
    dtype: torch.dtype, exponents: tuple[int, ...], n: int, estimator: str, device: torch.device
) -> None:
    """Each program centres and scales its own; the sums are in one scale, whichever share has the largest entries."""
    x, y = features(n, 3 * 64, 2 * 64, device=device, mean=1.0)
    powers = [2.0 ** (e / 3 if dtype == torch.float16 else e) for e in exponents]
    x = (x * torch.tensor(powers, device=device).repeat_interleave(64)).to(dtype)
    y = (y * torch.tensor(powers[1:], device=device).repeat_interleave(64)).to(dtype)
    assert plan.small_tiling([Problem(n, 192, 128, dtype, device)]).splits >= (3, 2)
    upstream = max(powers)  # keeps the gradient in fp16's range
    found = errors(
        evaluate(operator("gram", "triton", estimator), x, y, upstream=upstream),
        truth(x, y, estimator, upstream=upstream),
    )
    allowed = 3e-6 if dtype == torch.float32 else 4e-3
    assert max(found.values()) < allowed


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.usefixtures("few_programs")
def test_steps_of_a_program_differ_in_scale(growing: bool, estimator: str, device: torch.device) -> None:
    """What was added up is scaled again when larger entries come."""
    powers = [2.0 ** (8 * k) for k in range(5)][:: 1 if growing else -1]
    scales = torch.tensor(powers, device=device).repeat_interleave(64)
    x, y = (side * scales[: side.shape[1]] for side in features(71, 320, 256, device=device, mean=1.0))
    call = operator("gram", "triton", estimator, precision="tf32")
    if device.type == "cpu":
        assert max(errors(evaluate(call, x, y), truth(x, y, estimator)).values()) < 3e-6
    else:
        assert abs(evaluate(call, x, y).value - truth(x, y, estimator).value) < 2e-3


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
    assert wanted == sum(2 * -(-d // (64 * share)) for d in widths) or max(widths) == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(
    ("d", "dtype", "precision", "most"),
    [
        (802_816, torch.bfloat16, None, 1.06),
        (802_816, torch.float32, "tf32", 1.03),
        (200_704, torch.float16, None, 1.12),
        (100_352, torch.bfloat16, None, 1.21),  # a tenth of it are the programs' parts of K and L, which L2 holds
    ],
)
def test_bytes_of_wide_features(
    d: int,
    dtype: torch.dtype,
    precision: Any,
    most: float,
    estimator: Any,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most so many times the least, x twice, y once, and dx: each tensor of a launch counts once. Without a device.

    `whole_kernel` loads each feature in one place of one loop, over columns that no other program has.
    """
    names, moved, meta = [], 0, torch.device("meta")

    def launched(self: Any, _: Any, memory: Any) -> None:
        nonlocal moved
        names.append(self._kernel.fn.__name__)
        for argument in self.arguments(memory):
            if argument is memory["mask"] and not masked:
                continue  # features stand for it
            tensors = [argument] if isinstance(argument, Tensor) else argument if isinstance(argument, tuple) else []
            moved += sum(tensor.nbytes for tensor in tensors)

    monkeypatch.setattr(launch.Launch, "__call__", launched)
    problem = Problem(128, d, d, dtype, meta, "cka_loss", estimator, precision, masked, True, False)
    made = small.Small((problem,), precision or "ieee")
    x, y = (torch.empty(128, d, dtype=dtype, device=meta) for _ in range(2))
    mask = torch.ones(128, dtype=torch.bool, device=meta) if masked else None
    value, stash = made.forward((x, y), mask)
    made.backward(value, (x, y), mask, stash)
    unbiased = ["moments_kernel"] if estimator == "unbiased" else []
    assert names == ["whole_kernel", "reduce_kernel", *unbiased, "backward_kernel"]
    assert moved <= most * plan.minimum_bytes(problem, "gram")


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
