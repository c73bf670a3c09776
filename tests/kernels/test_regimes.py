"""Every way to compute an alignment, on every kind of features that breaks naive formulas, against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.accuracy import Result, features, poison, truth
from tests.kernels.regimes import FLAT, LAYOUTS, REGIMES, UPSTREAM
from tests.kernels.ways import BF16, F16, F32, F64, GAUSSIAN, LINEAR, WAYS, Way
from tests.selection import short

pytestmark = pytest.mark.usefixtures("interpreter_rounds_bfloat16")

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


FAST = ("library gram", "library cross", "sums", "sums, plain", "native")
BOTH = ("means of 1000", "tiny and huge", "large columns", "nothing shared")


SAID = ("sums, triton", "fused rbf threshold", "fused rbf fixed")  # by "shifted cross" and "fused rbf median"


def usual(way: str) -> bool:
    """What is left out says it again, or slowly: strips that are kept, a GPU's sums in Triton's interpreter, and of
    fused kernels the other bandwidths than the median."""
    return "in parts" not in way and way not in (*SAID, "fused rbf large")


def whole(way: str, estimator: str) -> bool:
    """Where Triton is interpreted the unbiased estimator is enough: it computes all that the biased one does."""
    return estimator == "unbiased" or not ("triton" in way or "shifted" in way or "fused" in way)


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
    "all in fp32, of the fused kernels' other bandwidths, and in other dtypes, both gradients under a mask",
    lambda way, dtype, sides, masked, estimator: (
        (
            dtype == F32
            and usual(way)
            and whole(way, estimator)
            and (sides, masked) in [("xy", False), ("xy", True), ("x", True), ("y", False)]
        )
        or (sides == "xy" and masked and "in parts" not in way and (dtype == F32 or whole(way, estimator)))
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
    "every regime in fp32, some in a half; where Triton is interpreted, most of the unbiased estimator, which computes"
    " all that the biased one does; sums of a GPU with Triton are of the rows that its other kernels read",
    lambda way, dtype, regime, estimator: (
        way != "sums, triton"
        and (dtype == F32 or regime == "means of 1000" or "halves" in regime)
        and (way in FAST or estimator == "unbiased" or regime in BOTH)
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


def assert_no_answer(found: Result) -> None:
    assert found.value.item() == 1.0
    assert found.dx is not None
    assert found.dy is not None
    assert found.dx.eq(0).all()
    assert found.dy.eq(0).all()


@short(
    "every constant in fp32 where nothing is emulated; elsewhere the one whose mean is rounded most",
    lambda way, dtype, flat, estimator: (
        (usual(way) and flat == "1000.3" and dtype == F32 and ("fused" not in way or whole(way, estimator)))
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
        for statistic in ("cka_loss", "hsic") if way in FAST else ("cka_loss",):
            value = WAYS[way].run(x, y, mask, estimator=estimator, statistic=statistic).value
            assert value.isnan() == (count < least)


@pytest.mark.parametrize("way", [w for w in WAYS if "sums" not in w and "in parts" not in w and w not in SAID])
@pytest.mark.parametrize(("n", "estimator"), [(2, "biased"), (3, "biased"), (4, "unbiased"), (5, "unbiased")])
def test_few_rows(n: int, way: str, estimator: str, device: torch.device) -> None:
    """Two rows are perfectly aligned with any others, and there is nothing to improve."""
    x, y = features(n, 21, 30, device=device)
    assert_right(way, x, y, None, 4.0, vanishing=True, estimator=estimator)


# ---------------------------------------------------------------------------------------------- bits


@short(
    "every way in fp32; in halves the plain form of those that round rows themselves",
    lambda way, dtype: usual(way) and (dtype == F32 or (dtype == BF16 and way == "sums, plain")),
)
@cells(WAYS)
def test_no_bit_depends_on_other_memory(way: str, dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    """Not on rows that do not count, whatever they hold, nor on what an earlier call left; inputs stay as they are."""
    x, y = sides_of(way, dtype, device, mean=2.0)
    mask = every_third(x)
    first = None
    for garbage in (0.0, torch.nan, *((torch.inf, 6e4) if way in FAST else ())):
        sides = [torch.where(mask[:, None], a, garbage) for a in (x, y)]
        before = [a.clone() for a in (*sides, mask)]
        found = WAYS[way].run(*sides, mask, estimator=estimator)
        first = first or found
        for one, other in zip(found, first, strict=True):
            assert other.isfinite().all()
            assert one.equal(other)
        for a, b in zip((*sides, mask), before, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@short(
    "every layout where nothing is interpreted; elsewhere the two that are not read in one go",
    lambda way, layout: (
        usual(way) and "kept" not in way and (way in FAST or layout in ("transposed", "offset by one element"))
    ),
)
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
