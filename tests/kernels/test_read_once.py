"""Triton's kernels of few rows where features are wide, or programs few: each reads its columns once, in many steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels import backends, plan
from bird_kernels.types import Estimator, Problem
from tests.accuracy import errors, evaluate, features, operator, poison, truth

pytest.importorskip("triton", reason="Triton does not exist for this system")
launch = pytest.importorskip("bird_kernels.backends.triton.launch")
small = pytest.importorskip("bird_kernels.backends.triton.small")


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
    assert plan.small_tiling([problem]).rows == plan.ROWS_AT_ONCE
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


@pytest.mark.parametrize(("n", "dtype"), [(20, torch.float32), (66, torch.bfloat16), (66, torch.float32)], ids=str)
@pytest.mark.usefixtures("few_programs")
def test_sums_of_large_features_stay_in_range(n: int, dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    """The sum of a column is beyond fp32; so it is where columns are constant, which are no variance."""
    x, y = features(n, 40, 70, device=device)
    x = ((x + 3) * 2e37).to(dtype)
    call = operator("gram", "triton", estimator, precision="tf32" if dtype == torch.float32 else None)
    found, true = evaluate(call, x, y.to(dtype)), truth(x, y.to(dtype), estimator)
    assert abs(found.value - true.value) < (1e-5 if dtype == torch.float32 else 1e-3)
    assert errors(found, true)["dy"] < (1e-5 if dtype == torch.float32 else 1e-2)
    constant = torch.full((n, 3), 6.7e37, dtype=dtype, device=device)
    assert evaluate(call, constant, y.to(dtype)).value == 1


@pytest.mark.parametrize("n", [40, 66])
def test_programs_share_a_side(n: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for each side, of several tiles each; the last ones have less to do, and overshoot."""
    monkeypatch.setattr(plan, "PROGRAMS", 3)
    backends.module_of("triton")._launches_of.cache_clear()
    x, y = features(n, 520, 300, torch.float16, device)
    problem = Problem(n, 520, 300, x.dtype, device, x_grad=True, y_grad=True)
    t = plan.gradient_tiling([problem])
    assert t.share > 1
    assert -(-520 // (t.wide * t.share)) > 1
    with poison():
        found = evaluate(operator("gram", "triton"), x, y)
    assert max(errors(found, truth(x, y)).values()) < 2e-3
    backends.module_of("triton")._launches_of.cache_clear()


@pytest.mark.parametrize("n", [40, 100])
@pytest.mark.usefixtures("few_programs")
def test_dominating_rows_under_a_periodic_mask(n: int, device: torch.device) -> None:
    """Every fourth row counts: groups of rows by their numbers would be two, of which a large row moves the median."""
    x, y = features(n, 70, 50, device=device, mean=2.0)
    x[4] *= 1e5
    mask = torch.arange(n, device=device) % 4 == 0
    found = evaluate(operator("gram", "triton", "unbiased", mask=mask, precision="tf32"), x, y)
    true = truth(x, y, "unbiased", mask=mask)
    tolerance = 1e-5 if device.type == "cpu" else 1e-2
    assert abs(found.value - true.value) < tolerance
    assert errors(found, true)["dy"] < 10 * tolerance


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


@pytest.mark.parametrize("n", [97, 128])
@pytest.mark.usefixtures("few_programs")
def test_pairs_that_are_read_once(n: int, estimator: Estimator, device: torch.device) -> None:
    """Sides of different widths in one launch, each in shares of its own; the gradients of all of them."""
    pairs = [features(n, p, q, device=device, mean=2.0) for p, q in ((40, 130), (70, 1))]
    xs, ys = ([side.clone().requires_grad_() for side in sides] for sides in zip(*pairs, strict=True))
    assert plan.small_tiling([Problem(n, 40, 130, torch.float32, device, precision="tf32")] * 2).rows == 128
    value = bird_kernels.cka_loss(xs, ys, estimator=estimator, precision="tf32", backend="triton")
    found = torch.autograd.grad(value, [*xs, *ys])
    true = [truth(x, y, estimator) for x, y in pairs]
    allowed = 3e-6 if device.type == "cpu" else 2e-3
    assert abs(value.item() - sum(float(of.value) for of in true)) < 2 * allowed
    for gradient, exact in zip(found, [*(of.dx for of in true), *(of.dy for of in true)], strict=True):
        assert (gradient.double() - exact).norm() <= allowed * exact.norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(
    ("d", "dtype", "precision", "most"),
    [
        (802_816, torch.bfloat16, None, 1.05),
        (802_816, torch.float32, "tf32", 1.03),
        (200_704, torch.float16, None, 1.09),
        (100_352, torch.bfloat16, None, 1.15),
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
