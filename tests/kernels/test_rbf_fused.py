"""The Triton backend's Gaussian kernels: values and gradients against fp64, what breaks them, what the library does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bird_kernels import RBF, backends, cka_loss, explain, hsic, plan
from bird_kernels.types import Problem
from tests.accuracy import described, errors, evaluate, features, operator, poison, truth
from tests.kernels.gaussian import N, P, Q

triton = pytest.importorskip("triton", reason="Triton does not exist for this system")
tl = pytest.importorskip("triton.language", reason="Triton does not exist for this system")
kernels = pytest.importorskip("bird_kernels.backends.triton.finish")
gradient = pytest.importorskip("bird_kernels.backends.triton.gradient")
launch = pytest.importorskip("bird_kernels.backends.triton.launch")

# Large sigma: K is constant but for 1e-7 of it.


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison():
        yield


@triton.jit
def expm1_kernel(x, out, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, kernels.expm1(tl.load(x + place, mask=place < n)), mask=place < n)


def test_expm1(device: torch.device) -> None:
    """Relative to itself from 1e-30 on; large arguments carry their own rounding into the power."""
    small = torch.logspace(-30, -0.1, 200)
    x = torch.cat([small, -small, torch.linspace(-60, 44, 400), torch.tensor([0.5, -0.5, 0.4999999, -0.4999999])])
    x = x.float().to(device)
    found = torch.full_like(x, -7.0)
    expm1_kernel[(triton.cdiv(len(x), 256),)](x, found, len(x), BLOCK=256)
    expected = torch.expm1(x.double())
    assert ((found.double() - expected).abs() <= 3e-7 * (1 + x.clamp(min=0)) * expected.abs()).all()


@pytest.mark.parametrize("masked", [False, True])
def test_many_tiles(masked: bool, estimator: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of tiles, rows read in several steps that begin before and at the diagonal, several feature tiles."""
    monkeypatch.setattr(gradient.double, "LENGTH", 16)
    backends.module_of("triton")._launches_of.cache_clear()
    x, y = features(70, 5, 67, device=device)
    mask = torch.arange(70, device=device) % 5 != 3 if masked else None
    options = dict(estimator=estimator, mask=mask, kernel=RBF())
    found = errors(evaluate(operator("gram", "triton", **options), x, y), truth(x, y, **options))
    backends.module_of("triton")._launches_of.cache_clear()
    assert max(found.values()) < 2e-6


def test_gradients_of_a_tiny_kernel_in_fp16(device: torch.device) -> None:
    """All distances are much alike and K is 1e-6, less than fp16 holds: it is brought near 1 before it is rounded."""
    x, y = features(20, 300, 300, torch.float16, device)
    options = dict(statistic="hsic", estimator="unbiased", kernel=RBF(sigma=4.6))
    upstream = 2e13  # the largest gradient is near 1
    true = truth(x, y, **options, upstream=upstream)
    found = errors(evaluate(operator("gram", "triton", **options), x, y, upstream=upstream), true)
    assert max(found["dx"], found["dy"]) < 2e-3  # 0.01 without


def test_equal_rows_are_no_distance(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row stands twice; the median is that of distances which are not zero."""
    seen = []

    def looked_at(self: Any, known: Any, memory: dict[str, Any]) -> None:
        if self._kernel.fn.__name__ == "select_kernel":
            seen.append(memory["grams"][0].clone())
        original(self, known, memory)

    original = launch.Launch.__call__
    monkeypatch.setattr(launch.Launch, "__call__", looked_at)
    x, y = features(40, 70, Q, device=device, mean=5.0)
    x[20:] = x[:20]
    operator("gram", "triton", kernel=RBF())(x, y)
    assert seen[0].diagonal(20).eq(0).all()
    assert seen[0].diagonal(19).gt(1).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sides", "n"), [("x", 9), ("xy", 9), ("", 40)])
def test_launches_are_as_planned(
    n: int, sides: str, masked: bool, estimator: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not run."""
    count = 0

    def launched(*_: Any, **__: Any) -> None:
        nonlocal count
        count += 1

    monkeypatch.setattr(launch.Launch, "__call__", launched)
    x, y = (a.requires_grad_(side in sides) for side, a in zip("xy", features(n, 3, 5, device=device), strict=True))
    mask = torch.arange(n, device=device) % 3 != 0 if masked else None
    kernel = RBF(sigma=1.0)
    value = operator("gram", "triton", estimator, mask=mask, kernel=kernel)(x, y)
    forward, count = count, 0
    if sides:
        value.backward()
    problem = Problem(n, 3, 5, x.dtype, device, "cka_loss", estimator, None, masked, "x" in sides, "y" in sides, kernel)
    assert (forward, count) == plan.launches(problem)
    assert forward == 6


@pytest.mark.parametrize("sides", ["x", "y"])
def test_operator_is_registered_right(sides: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    call = described("gram", "triton", wanted=(sides == "x", sides == "y"), kernel=RBF(threshold=0.5))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bird.alignment.default, (x, y, None, *call), test_utils=tests)


def test_workspace_is_what_is_kept() -> None:
    problem = Problem(700, 300, 200, torch.float32, torch.device("cpu"), kernel=RBF())
    shapes = backends.module_of("triton", "rbf").stash_shapes(problem, "gram")
    kept = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())
    assert plan.workspace(problem, "gram", "triton") == pytest.approx(kept, rel=1e-3)


def test_the_public_call_takes_it(device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    for function in (cka_loss, hsic):
        ours, theirs = (function(x, y, kernel="rbf", backend=name) for name in ("triton", "library"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    found = explain(x, y, kernel="rbf", backend="triton")
    assert found.backend == "triton"
    assert found.tile == "2 tiles of 64 x 64, inner step 32, 9 launches"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kernel=RBF(flow=True)), r"RBF\(flow=True\)"),
        (dict(kernel="rbf", center=False), "center=False"),
        (dict(kernel="rbf", n=8193), "RBF kernels too large to be kept"),
    ],
)
def test_what_is_left_to_eager(options: dict[str, Any], words: str) -> None:
    """With its reason; 8,192 rows are kept, one more is not."""
    x = torch.zeros(1, 1).expand(options.pop("n", 8), 4)
    with pytest.raises(ValueError, match=f'backend="triton" cannot run here: has no kernels for {words}'):
        explain(x, x, backend="triton", **options)
    assert explain(x, x, **options).backend == "library"
    kept = torch.zeros(1, 1).expand(8192, 4)
    assert explain(kept, kept, kernel="rbf", backend="triton").backend == "triton"


def test_a_gpu_s_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu = torch.device("cuda:62")  # answers are remembered
    assert backends.choose(torch.float32, gpu, False, "auto", 'kernel="rbf"')[0] == "triton"
    assert backends.choose(torch.float32, gpu, False, "auto", "RBF(flow=True)")[0] == "library"
    assert backends.choose(torch.float64, gpu, False, "auto", 'kernel="rbf"')[0] == "library"
