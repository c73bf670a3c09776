"""The Triton backend's bandwidths: the median of given distances against torch.median and the library's, to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bird_kernels import RBF, plan
from bird_kernels.backends import library_rbf
from bird_kernels.backends.library_rbf.strips import Strips
from bird_kernels.types import Problem
from tests.accuracy import features, poison
from tests.kernels.gaussian import bandwidth, distances
from tests.selection import short

gaussian = pytest.importorskip("bird_kernels.backends.triton.gaussian", reason="Triton does not exist for this system")

MEDIANS = [RBF(), RBF(threshold=1.0), RBF(threshold=0.3)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison():
        yield


def found(
    both: Tensor, mask: Tensor | None, kernel: RBF, scales: tuple[float, float] = (1.0, 4.0)
) -> tuple[Tensor, Tensor]:
    """What the launches between distances and kernels write for ``both`` [2, n, n], [2, 4], and what they read.

    All that they need not read is NaN: the lower halves, the diagonals, and, in the beginning, digits and counts.
    """
    n, device = both.shape[1], both.device
    problem = Problem(n, 8, 8, torch.float32, device, masked=mask is not None, kernel=kernel)
    made = gaussian.Gaussian((problem,), "ieee")
    memory: dict[str, Any] = {
        name: torch.empty(size, dtype=of, device=device) for name, (size, of) in made.sizes.items()
    }
    upper = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
    counted = n if mask is None else int(mask.sum())
    sums = torch.full((made.shifted.shares, 24), torch.nan, device=device)
    sums[:, 16] = 0.0
    sums[-1, 16] = counted
    memory |= dict(
        grams=torch.where(upper, both, torch.nan).contiguous(), sums=sums, norms=torch.empty(2, n, device=device),
        scales=torch.tensor(scales, device=device), counters=torch.zeros(2, dtype=torch.int32, device=device),
        mask=sums if mask is None else mask.view(torch.uint8),
        bandwidths=torch.empty(8, dtype=torch.float64, device=device),
    )  # fmt: skip
    for launch in made.launches[1:-2]:
        launch(None, memory)
    assert memory["counters"].tolist() == [0, 0]
    return memory["bandwidths"].view(2, 4), memory["grams"]


def expected(median: float, threshold: float | None, scale: float) -> list[float]:
    """f, t, c and the scale of a side: f = 1 / (2 sigma^2), t in fp32."""
    square = median * (threshold or 1.0) ** 2
    factor = 0.5 / square if square else 0.0
    typical = float(np.float32(factor * median))
    return [factor, typical, float(np.exp(-typical)), scale]


def symmetric(upper: Tensor) -> Tensor:
    """The whole matrix of what is above the diagonal, with diagonal 0."""
    above = torch.ones_like(upper, dtype=torch.bool).triu(1)
    return torch.where(above, upper, torch.where(above.T, upper.T, 0.0))


@short("every size with the first rule, one with the others", lambda kernel, n: kernel == RBF() or n == 5)
@pytest.mark.parametrize("kernel", MEDIANS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 17, 130])
def test_the_median_is_torch_s(n: int, masked: bool, kernel: RBF, device: torch.device) -> None:
    """Even and odd numbers, a tile and several, many equal distances and none, some of them zero."""
    generator = torch.Generator().manual_seed(n)
    mask = torch.rand(n, generator=generator) < 0.7 if masked else None
    ties = torch.randint(0, 4, (n, n), generator=generator).float()
    apart = torch.randn(n, n, generator=generator).square() * torch.logspace(-20, 20, n)
    both = torch.stack([symmetric(ties), symmetric(apart)])
    rows = [side if mask is None else side[mask][:, mask] for side in both]
    counted = [side if kernel.threshold else side[side != 0] for side in rows]
    medians = [side.median().item() if side.numel() else 0.0 for side in counted]
    wanted = [expected(m, kernel.threshold, s) for m, s in zip(medians, (1.0, 4.0), strict=True)]
    ours, _ = found(both.to(device), None if mask is None else mask.to(device), kernel)
    torch.testing.assert_close(ours[:, :2].tolist(), [row[:2] for row in wanted], rtol=0, atol=0)
    torch.testing.assert_close(ours[:, 2:].tolist(), [row[2:] for row in wanted], rtol=1e-15, atol=0)


INF, NAN = float("inf"), float("nan")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kernel", MEDIANS[:2], ids=str)
@pytest.mark.parametrize(
    "values",
    [[0.0], [NAN], [INF], [1.0, 1.0, NAN], [-NAN, -NAN, 3.0], [0.0, 0.0, 2.0], [1.0, INF, INF], [1e-45], [3e38]],
    ids=str,
)
def test_what_is_no_distance_is_taken_as_the_library_takes_it(
    values: list[float], kernel: RBF, device: torch.device
) -> None:
    """Zeros, NaN of either sign, infinities, the smallest and the largest numbers."""
    n = 9
    upper = torch.tensor(values)[torch.arange(n * n) % len(values)].view(n, n)
    both = torch.stack([symmetric(upper), symmetric(upper.flip(0))])
    problem = Problem(n, 8, 8, torch.float32, torch.device("cpu"), kernel=kernel)
    ours, _ = found(both.to(device), None, kernel)
    for side, given in enumerate(both):
        strips = Strips(torch.zeros(n, 8), None, problem, torch.empty(n * n))
        strips.kept[0][:] = given
        theirs = library_rbf._bandwidth_of(strips, (1.0, 4.0)[side], float(n), side)
        torch.testing.assert_close(ours[side].tolist(), list(theirs[:4]), rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("sigma", [(3, 0.1), (1e10, 1e-10), (1e200, 1e-20), (1e-320, 5e-324)], ids=str)
def test_a_given_sigma_is_exact(sigma: tuple[float, float], device: torch.device) -> None:
    """To fp64, though Triton takes no such argument, and beyond fp32's range; t is near the mean distance's."""
    n = 70
    x, y = features(n, 70, 5, device=device)
    kernel = RBF(sigma=sigma)
    problem = Problem(n, 70, 5, x.dtype, device, kernel=kernel)
    _, stash = gaussian.Gaussian((problem,), "ieee").forward((x, y), None)
    for side, (features_, given) in enumerate(zip((x, y), sigma, strict=True)):
        factor, typical, level, scale = stash.xy.view(2, 4)[side].tolist()
        square = (scale * given) * (scale * given)
        assert factor == (min(0.5 / square, torch.finfo(torch.float32).max / 16) if square else 0.0)
        mean = distances(features_.cpu()).mean().item() * scale**2
        assert typical == pytest.approx(min(factor * mean, 44.0), rel=0.05)
        assert level == pytest.approx(np.exp(-typical), rel=1e-15)


@pytest.mark.parametrize(
    ("dtype", "mean", "kernel", "bound"),
    [
        (torch.float32, 0.0, RBF(), 2e-6),
        (torch.float32, 1000.0, RBF(threshold=0.3), 2e-6),
        (torch.bfloat16, 0.0, RBF(threshold=0.3), 2e-2),
        (torch.float16, 1000.0, RBF(), 2e-3),
    ],
    ids=str,
)
def test_sigmas_of_features(dtype: torch.dtype, mean: float, kernel: RBF, bound: float, device: torch.device) -> None:
    """Against the literal rule in fp64, of the shifted rows, of which these distances are, and of the features.

    Two blocks of columns of x, whose norms are added, and one of y.
    """
    n = 67
    x, y = features(n, 70, 30, dtype, device, mean=mean)
    mask = torch.arange(n, device=device) % 5 != 3
    problem = Problem(n, 70, 30, dtype, device, masked=True, kernel=kernel)
    x[~mask], y[~mask] = torch.nan, 1e4
    _, stash = gaussian.Gaussian((problem,), "ieee").forward((x, y), mask)
    for side, (rows, z) in enumerate(((x, stash.xs), (y, stash.ys))):
        factor, _, _, scale = stash.xy.view(2, 4)[side].tolist()
        assert 0.5 / factor == pytest.approx(bandwidth(z[mask].cpu(), kernel), rel=2e-6)
        assert 0.5 / factor / scale**2 == pytest.approx(bandwidth(rows[mask].cpu(), kernel), rel=bound)


def test_more_tiles_than_programs_and_bits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Each program takes several tiles; however many there are, and whatever is in memory, all bits are the same."""
    x, y = features(150, 20, 30, device=device)
    problem = Problem(150, 20, 30, x.dtype, device, kernel=RBF())
    results = []
    for programs in (1, 4, 4, 132):
        monkeypatch.setattr(plan, "PROGRAMS", programs)
        monkeypatch.setattr(plan, "CROWD", 2)
        value, stash = gaussian.Gaussian((problem,), "ieee").forward((x, y), None)
        results.append(torch.cat([value.double().view(1), *(part.double().flatten() for part in (stash.xx, stash.xy))]))
    assert all(torch.equal(result, results[0]) for result in results)
    factor, _, _, scale = stash.xy.view(2, 4)[0].tolist()
    assert 0.5 / factor / scale**2 == pytest.approx(bandwidth(x.cpu(), RBF()), rel=2e-6)


@pytest.mark.parametrize("n", [2, 130])
def test_distances_are_read_four_times_at_most(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both matrices, what is above the diagonals; counted in the interpreter, number by number."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU does not say what it reads")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    read: list[Tensor] = []

    def load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        read.append(torch.from_numpy(pointers.data[mask.data].astype(np.int64)))
        return original(builder, pointers, mask, *rest)

    original = interpreter.InterpreterBuilder.create_masked_load
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    grams = found(torch.rand(2, n, n), None, RBF())[1]
    places = torch.cat(read) - grams.data_ptr()
    places, times = places[(places >= 0) & (places < grams.nbytes)].unique(return_counts=True)
    above = torch.ones(n, n, dtype=torch.bool).triu(1).repeat(2, 1).flatten().nonzero()[:, 0]
    assert places.equal(4 * above)
    assert times.eq(4).all()
