"""Every way to compute an alignment, on every kind of features that breaks naive formulas, against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.accuracy import Result, features, poison, truth
from tests.kernels.ways import BF16, F16, F32, F64, GAUSSIAN, LINEAR, NARROW, WAYS, Way
from tests.selection import short

pytestmark = pytest.mark.usefixtures("interpreter_rounds_bfloat16")

UPSTREAM = 512.0  # keeps fp16 gradients in that dtype's normal range
LEAST = {"biased": 2, "unbiased": 4}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Whoever reads memory that nobody wrote reads NaN."""
    with poison():
        yield


def sides_of(name: str, dtype: torch.dtype, device: torch.device, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    return features(*WAYS[name].shape, dtype=dtype, device=device, mean=mean)


def every_third(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % 3 != 1


def cells(ways: dict[str, Way]) -> Any:
    """A parameter of ways, and of the dtypes that they take."""
    found = [(name, dtype) for name in ways for dtype in ways[name].dtypes]
    return pytest.mark.parametrize(("way", "dtype"), found, ids=[f"{w} {str(d)[6:]}" for w, d in found])


def usual(way: str) -> bool:
    """What is left out says it again, or slowly: strips that are kept, a GPU's sums in Triton's interpreter, and of
    fused kernels the other bandwidths than the median and one at which K is nearly constant."""
    return "in parts" not in way and way not in ("sums, triton", "fused rbf threshold", "fused rbf fixed")


def assert_right(
    name: str, x: Tensor, y: Tensor, mask: Tensor | None = None, looser: float = 1.0, vanishing: bool = False,
    upstream: float = UPSTREAM, sides: str = "xy", **options: Any,
) -> None:  # fmt: skip
    """What a way allows, times ``looser``; of a ``vanishing`` gradient, of the inverse size of its features."""
    way = WAYS[name]
    found = way.run(x, y, mask, sides=sides, upstream=upstream, **options)
    true = truth(x, y, mask=mask, sides=sides, upstream=upstream, kernel=way.kernel, **options)
    value, gradient = (looser * allowed for allowed in way.allowed(x.dtype))
    assert (found.value.double() - true.value).abs() <= value * max(1.0, true.value.abs().item())
    for side, got, want in ((x, found.dx, true.dx), (y, found.dy, true.dy)):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert got.dtype == side.dtype
            own = (side if mask is None else side[mask]).double()
            scale = want.norm() + upstream / (own - own.mean(0)).norm() if vanishing else want.norm()
            off = (got.double() - want).norm()
            assert off <= gradient * scale, f"{off / scale:.2g} off"
            assert mask is None or got[~mask].eq(0).all()


@short(
    "all in fp32; in the other dtypes both gradients under a mask",
    lambda way, dtype, sides, masked: (
        (dtype == F32 and usual(way) and (sides, masked) in [("xy", False), ("xy", True), ("x", True), ("y", False)])
        or (sides == "xy" and masked and "in parts" not in way)
    ),
)
@cells(WAYS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sides", ["xy", "x", "y", ""])
def test_values_and_gradients(
    sides: str, masked: bool, way: str, dtype: torch.dtype, estimator: str, device: torch.device
) -> None:
    x, y = sides_of(way, dtype, device, mean=2.0)
    # An unbiased gradient of products of features has terms that cancel.
    looser = 10.0 if (way, estimator) == ("shifted cross", "unbiased") and dtype != F32 else 1.0
    assert_right(way, x, y, every_third(x) if masked else None, looser, sides=sides, estimator=estimator)


@short("every statistic of the linear kernel and of one bandwidth", lambda way: "rbf" not in way or "median," in way)
@pytest.mark.parametrize(("way", "statistic"), [(w, s) for w in WAYS for s in WAYS[w].statistics if s != "cka_loss"])
def test_other_statistics(way: str, statistic: str, estimator: str, device: torch.device) -> None:
    if statistic == "sqrt_cka_loss":
        estimator = "biased"
    x, y = sides_of(way, F32, device, mean=1.0)
    assert_right(way, x, y, looser=2.0, statistic=statistic, estimator=estimator)


# ---------------------------------------------------------------------------------------------- regimes


class Regime(NamedTuple):
    """``change(x, y)`` of standard normal features, and what is asked of the result."""

    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...] = (F32,)
    looser: float = 1.0
    vanishing: bool = False
    upstream: float = UPSTREAM
    gaussian: str = "all"  # the bandwidths that are as exact: all, those of a "median", without a "flow", "none"

    def suits(self, way: Way) -> bool:
        kernel = way.kernel
        if kernel is None or self.gaussian == "all":
            return True
        # A fixed sigma makes K the identity, or constant; of equal distances any one is the median that flows.
        return {"median": kernel.sigmas is None, "no flow": not kernel.flow, "none": False}[self.gaussian]


def at(mean: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x, y: ((x.float() + mean).to(x.dtype), (y.float() + mean).to(y.dtype))


def of_size(s: float, t: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x, y: (s * x, t * y)


def large_rows(factor: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x[5] *= factor
        y[5] *= factor
        return x, y

    return change


def large_columns(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x[:, 3] *= 1000
    y[:, 11] *= 1000
    return x, y


def drifting(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """CKA is all but 1, and the gradient what is left of a difference."""
    drift = torch.linspace(-30, 30, len(x), device=x.device)[:, None]
    return (x.float() + drift).to(x.dtype), (y.float() - drift).to(y.dtype)


def largest_halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squares, products and differences would leave fp16's range."""
    signs = torch.where(torch.arange(x.shape[1], device=x.device) % 2 == 0, 1.0, -1.0)
    x = ((x.float() * 500 + 60000).clamp(max=65000) * signs).half()
    return x, (y.float() * 15000).clamp(-65000, 65000).half()


def unrelated(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """C = Y^T X is exactly zero, and no side is: the biased gradient vanishes, the unbiased one has its diagonal."""
    half = len(x) // 4 * 2
    whole = torch.zeros_like(x), torch.zeros_like(y)
    for side, own, rows in ((x, whole[0], slice(0, half)), (y, whole[1], slice(half, 2 * half))):
        own[rows][::2] = side[: half // 2].round()
        own[rows][1::2] = -own[rows][::2]
    return whole


def own_means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (a + s * torch.logspace(-3, 3, a.shape[1], device=a.device) for a, s in ((x, 1), (y, -1)))  # type: ignore[return-value]


REGIMES = {
    "means of 4": Regime(at(4.1), NARROW),
    "means of 1000": Regime(at(1000), NARROW, 3.0),
    "means of -1000": Regime(at(-1000), looser=3.0),
    "own means": Regime(own_means, looser=3.0),
    "tiny": Regime(of_size(1e-12, 1e-12), upstream=1e-9, gaussian="median"),
    "huge": Regime(of_size(1e12, 1e12), upstream=1e12, gaussian="median"),
    "tiny and huge": Regime(of_size(1e-12, 1e12), gaussian="median"),
    "powers of two": Regime(of_size(2.0**40, 2.0**-40), (F32, BF16), gaussian="median"),
    "large columns": Regime(large_columns, NARROW, 2.0, upstream=2.0**14, gaussian="none"),
    "large rows": Regime(large_rows(1000), looser=6.0, vanishing=True, gaussian="none"),
    "drift": Regime(drifting, NARROW, 10.0, vanishing=True, gaussian="median"),
    "rectified": Regime(lambda x, y: ((x - 1.5).relu(), (y - 1.5).relu()), NARROW, 2.0, gaussian="no flow"),
    "largest halves": Regime(largest_halves, (F16,), 2.0, upstream=1e6, gaussian="none"),
    "smallest halves": Regime(lambda x, y: (x * 6e-5, y * 6e-5), (F16,), 8.0, upstream=6e-5, gaussian="none"),
    "nearly equal": Regime(lambda x, y: (x, x + 1e-3 * x.flip(1)), vanishing=True),
    "equal": Regime(lambda x, y: (x, x.clone()), vanishing=True),
    "nearly constant": Regime(lambda x, y: (1 + 1e-4 * x, y), looser=3.0),
    "constant but for last bits": Regime(lambda x, y: (1 + 1e-6 * x, y), looser=3.0, gaussian="median"),
    "five rows, repeated": Regime(
        lambda x, y: (x[torch.arange(len(x)) % 5], y[torch.arange(len(x)) % 5]), gaussian="no flow"
    ),
    "two rows, repeated": Regime(
        lambda x, y: (x[torch.arange(len(x)) % 2], y[torch.arange(len(x)) % 2]), vanishing=True, gaussian="none"
    ),
    "one column": Regime(lambda x, y: (x[:, :1], y[:, :1])),
    "one column, expanded": Regime(lambda x, y: (x[:, :1].expand_as(x), y), looser=2.0),
    "nothing shared": Regime(unrelated, vanishing=True, gaussian="none"),
}


def of_regimes(ways: dict[str, Way]) -> Any:
    """A parameter of regimes, the ways that they suit, and the dtypes that both take."""
    found = [
        (r, w, d)
        for r, regime in REGIMES.items()
        for w, way in ways.items()
        for d in regime.dtypes
        if d in way.dtypes and regime.suits(way)
    ]
    return pytest.mark.parametrize(
        ("regime", "way", "dtype"), found, ids=[f"{r}, {w} {str(d)[6:]}" for r, w, d in found]
    )


@short(
    "every regime in fp32, some in a half; sums of a GPU with Triton are of the rows that its other kernels read",
    lambda way, dtype, regime: (
        way != "sums, triton" and (dtype == F32 or regime == "means of 1000" or "halves" in regime)
    ),
)
@of_regimes(LINEAR)
def test_regimes(regime: str, way: str, dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    change, _, looser, vanishing, upstream, _ = REGIMES[regime]
    x, y = change(*sides_of(way, dtype, device))
    assert_right(way, x, y, None, looser, vanishing, upstream, estimator=estimator)


@short(
    "every rule for sigma where nothing is kept, and of the fused kernels the median",
    lambda way, dtype: dtype == F32 and ("streamed" in way or way == "fused rbf median"),
)
@of_regimes(GAUSSIAN)
def test_regimes_of_gaussian_kernels(
    regime: str, way: str, dtype: torch.dtype, estimator: str, device: torch.device
) -> None:
    change, _, looser, _, upstream, _ = REGIMES[regime]
    x, y = change(*sides_of(way, dtype, device))
    assert_right(way, x, y, None, 2 * looser, True, upstream, estimator=estimator)


# ---------------------------------------------------------------------------------------------- no answer

FLAT: dict[str, Callable[[Tensor], Tensor]] = {  # sides without variance, like a side
    "zero": torch.zeros_like,
    "0.1": lambda x: torch.full_like(x, 0.1),
    "1e-30": lambda x: torch.full_like(x, 1e-30),
    "1000.3": lambda x: torch.full_like(x, 1000.3),
    "-3e4": lambda x: torch.full_like(x, -3e4),
    "one row, repeated": lambda x: (100 * x[:1]).expand_as(x),
    "one feature": lambda x: torch.full_like(x[:, :1], 1 / 3),
    "all but one zero": lambda x: torch.cat([torch.zeros_like(x[:, 1:]), torch.full_like(x[:, :1], 7.7)], dim=1),
}


def assert_no_answer(found: Result) -> None:
    assert found.value.item() == 1.0
    assert found.dx is not None
    assert found.dy is not None
    assert found.dx.eq(0).all()
    assert found.dy.eq(0).all()


@short(
    "every constant in fp32 where nothing is emulated; elsewhere the one whose mean is rounded most",
    lambda way, dtype, flat: (
        (usual(way) and flat == "1000.3" and dtype == F32)
        or (flat == "-3e4" and dtype == F16 and ("shifted" in way or "plain" in way))
        or (dtype == F32 and way in ("library gram", "library cross", "sums", "rbf median, streamed"))
    ),
)
@cells(WAYS)
@pytest.mark.parametrize("flat", FLAT)
def test_a_side_without_variance(flat: str, way: str, dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    """Loss exactly 1 and gradient exactly 0, whatever rounding of means makes of a constant; the variance of rows that
    do not count is none; a side that is NaN is not hidden by one that is constant."""
    run = WAYS[way].run
    x, y = sides_of(way, dtype, device)
    mask = every_third(x)
    constant = FLAT[flat](x)
    for a, b in ((constant, y), (y, constant), (constant, constant.flip(1))):
        assert_no_answer(run(a, b, estimator=estimator))
    if constant.shape == x.shape:
        assert_no_answer(run(torch.where(mask[:, None], constant, x), y, mask, estimator=estimator))
    assert run(torch.full_like(x, torch.nan), FLAT[flat](y), estimator=estimator).value.isnan()
    if estimator == "biased" and "sqrt_cka_loss" in WAYS[way].statistics:
        assert_no_answer(run(constant, y, statistic="sqrt_cka_loss"))
    found = run(constant, y, estimator=estimator, statistic="hsic")
    assert found.value == 0
    assert found.dx.isfinite().all()


@short("one size of each way; of others the least", lambda way, n: usual(way) and (n == 24 or way == "library gram"))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [4, 5, 24, 37, 128])
def test_rows_that_are_all_equally_far(n: int, way: str, device: torch.device) -> None:
    """The hollow kernel of one-hot rows, as of rows that are orthogonal up to rounding, is constant: its unbiased HSIC
    is none. The biased estimator has the diagonal."""
    kernel = WAYS[way].kernel
    y = features(n, n, 30, device=device)[1]
    turned = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(1))).Q.float()
    for x in (3.7 * torch.eye(n, device=device), turned.to(device)):
        if kernel is None or kernel.sigmas is None:
            assert_no_answer(WAYS[way].run(x, y, estimator="unbiased"))
            assert_no_answer(WAYS[way].run(y, x, estimator="unbiased"))
        assert WAYS[way].run(x, y).value < 1


@short(
    "NaN of all ways in fp32, Inf of the library's; one is the other's difference",
    lambda way, bad, dtype: usual(way) and dtype == F32 and (bad != bad or way in ("library gram", "triton", "native")),
)
@cells(WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_not_hidden(
    bad: float, way: str, dtype: torch.dtype, estimator: str, device: torch.device
) -> None:
    """Of either side, in both gradients; but where the row does not count."""
    for side in (0, 1):
        sides = sides_of(way, dtype, device)
        sides[side][6, 3] = bad
        found = WAYS[way].run(*sides, estimator=estimator)
        assert found.value.isnan()
        if WAYS[way].kernel is None:
            assert found.dx.isnan().any()
            assert found.dy.isnan().any()
    mask = torch.arange(len(sides[0]), device=device) != 6
    found = WAYS[way].run(*sides, mask, estimator=estimator)
    assert all(part.isfinite().all() for part in found)
    assert found.dx[6].eq(0).all()


@short("strips change nothing of counting", lambda way: usual(way) and "kept" not in way)
@pytest.mark.parametrize("way", WAYS)
def test_too_few_rows_are_nan(way: str, estimator: str, device: torch.device) -> None:
    """It cannot raise: counting the rows would wait for the device."""
    x, y = sides_of(way, F32, device)
    least = LEAST[estimator]
    for count in (0, least - 1, least):
        mask = torch.arange(len(x), device=device) < count
        for statistic in ("cka_loss", "hsic"):
            value = WAYS[way].run(x, y, mask, estimator=estimator, statistic=statistic).value
            assert value.isnan() == (count < least)


@pytest.mark.parametrize("way", [name for name in WAYS if "sums" not in name and usual(name)])
@pytest.mark.parametrize(("n", "estimator"), [(2, "biased"), (3, "biased"), (4, "unbiased"), (5, "unbiased")])
def test_few_rows(n: int, way: str, estimator: str, device: torch.device) -> None:
    """Two rows are perfectly aligned with any others, and there is nothing to improve."""
    x, y = features(n, 21, 30, device=device)
    assert_right(way, x, y, None, 4.0, vanishing=True, estimator=estimator)


# ---------------------------------------------------------------------------------------------- bits


@short(
    "every way in fp32; in halves those that round rows themselves",
    lambda way, dtype: way != "sums, triton" and (dtype == F32 or (dtype == BF16 and "shifted" in way)),
)
@cells(WAYS)
def test_no_bit_depends_on_other_memory(way: str, dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    """Not on rows that do not count, whatever they hold, nor on what an earlier call left; inputs stay as they are."""
    x, y = sides_of(way, dtype, device, mean=2.0)
    mask = every_third(x)
    first = None
    for garbage in (0.0, torch.nan, torch.inf, 6e4):
        sides = [torch.where(mask[:, None], a, garbage) for a in (x, y)]
        before = [a.clone() for a in (*sides, mask)]
        found = WAYS[way].run(*sides, mask, estimator=estimator)
        first = first or found
        for one, other in zip(found, first, strict=True):
            assert other.isfinite().all()
            assert one.equal(other)
        for a, b in zip((*sides, mask), before, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda a: a.t().contiguous().t(),
    "sliced columns": lambda a: torch.cat([torch.full_like(a, torch.nan), a], dim=1)[:, a.shape[1] :],
    "every second row": lambda a: torch.stack([a, torch.full_like(a, torch.nan)], dim=1).flatten(0, 1)[::2],
    "every second column": lambda a: torch.stack([a, torch.full_like(a, torch.nan)], dim=2).flatten(1)[:, ::2],
    "offset by one element": lambda a: torch.cat([a.new_zeros(1), a.flatten()])[1:].view_as(a),
}


@short("every layout of linear kernels; of the others the two that are not read in one go", lambda way, layout: (
    usual(way) and "kept" not in way and ("rbf" not in way or layout in ("transposed", "offset by one element"))
))  # fmt: skip
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, way: str, device: torch.device) -> None:
    """Of features and of a mask: inputs are read where they lie, gradients are dense."""
    x, y = sides_of(way, F32, device)
    mask = every_third(x)
    strided = torch.stack([mask, ~mask], dim=1)[:, 0]
    found = WAYS[way].run(LAYOUTS[layout](x), LAYOUTS[layout](y), strided, estimator="unbiased")
    expected = WAYS[way].run(x, y, mask, estimator="unbiased")
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-6)
    for one, other in ((found.dx, expected.dx), (found.dy, expected.dy)):
        assert (one - other).norm() <= 2e-6 * other.norm()
        assert one.is_contiguous() or "rbf" in way
