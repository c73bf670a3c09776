"""Lists of pairs against the literal formula of each pair in fp64, summed; and what autograd and torch.compile see."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels import functional, pairs, plan, reference
from bird_kernels.types import Problem
from tests.accuracy import features

# Widths of (x, y): a wide one, two narrow ones (cross route where they stand alone), one beyond a block.
WIDTHS = [(40, 9), (3, 5), (7, 70), (1, 2)]
WEIGHTS = [0.5, 2.0, -1.0, 0.0]


def lists(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    both = [features(n, p, q, dtype, device, mean=2.0, seed=i) for i, (p, q) in enumerate(WIDTHS)]
    return [x.requires_grad_() for x, _ in both], [y for _, y in both]


def literal(xs: Sequence[Tensor], ys: Sequence[Tensor], estimator: str, mask: Tensor | None = None) -> list[Tensor]:
    """The pairs' losses in fp64, differentiable."""
    return [reference.cka_loss(x, y, mask, estimator) for x, y in zip(xs, ys, strict=True)]


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(value, inputs)]


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Relative in norm; a gradient that should vanish may be as large as the others' rounding."""
    largest = max(w.norm() for w in wanted)
    for index, (f, w) in enumerate(zip(found, wanted, strict=True)):
        assert (f - w).norm() <= tolerance * max(w.norm(), 1e-3 * largest), f"tensor {index}"


@pytest.mark.parametrize(("weights", "masked"), [(None, False), (WEIGHTS, True)])
def test_is_the_weighted_sum(
    weights: list[float] | None, masked: bool, estimator: str, backend: str, device: torch.device
) -> None:
    xs, ys = lists(37, device)
    mask = torch.arange(37, device=device) % 4 != 1 if masked else None
    value = bird_kernels.cka_loss(xs, ys, weights=weights, estimator=estimator, mask=mask, backend=backend)
    truth = sum(w * v for w, v in zip(weights or [1.0] * len(xs), literal(xs, ys, estimator, mask), strict=True))
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert abs(value.double() - truth) < 3e-6
    assert_close(gradients(value * 3.0, xs), gradients(truth * 3.0, xs), 2e-5)


def test_weights_that_change_every_step(device: torch.device) -> None:
    """More of them than any cache would hold, each with its own value and gradient, the first ones again at the end."""
    losses = torch.tensor([0.25, 1.5, 3.0], device=device, requires_grad=True)
    for step in [*range(100), 0, 1]:
        weights = (0.5 + step, -2.0 * step, 1.0 / (1 + step))
        value = pairs.weighted_loss(losses, weights)
        assert value.item() == pytest.approx(0.25 * weights[0] + 1.5 * weights[1] + 3.0 * weights[2], rel=1e-6)
        (gradient,) = torch.autograd.grad(value, losses)
        assert gradient.tolist() == pytest.approx(list(weights), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_become_a_vector_without_a_copy(dtype: torch.dtype, device: torch.device) -> None:
    """As on a GPU; and nobody keeps it, where a captured graph might still read what is evicted."""
    values = tuple(1.0 / (3 + i) for i in range(200))
    vector = pairs._filled(values, dtype, device)
    assert vector.equal(torch.tensor(values, dtype=dtype, device=device))
    alive = weakref.ref(vector)
    del vector
    assert alive() is None


def test_each_pair_by_itself(estimator: str, backend: str, device: torch.device) -> None:
    """As `bird.BirdLoss` asks; upstream gradients differ, and layers of both sides need one, or neither does."""
    xs, ys = lists(37, device)
    ys[1].requires_grad_()
    xs[1].requires_grad_(False)
    ys[2].requires_grad_()
    xs[3].requires_grad_(False)
    wanted = [t for t in (*xs, *ys) if t.requires_grad]
    found = functional.cka_losses(xs, ys, estimator=estimator, backend=backend)
    truth = torch.stack(literal(xs, ys, estimator))
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6)
    upstream = torch.tensor([1.0, -2.0, 3.0, 5.0], device=device)
    assert_close(gradients(found @ upstream, wanted), gradients(truth @ upstream.double(), wanted), 2e-5)


def test_a_layer_may_stand_in_several_pairs(backend: str, device: torch.device) -> None:
    xs, ys = lists(37, device)
    several = [xs[0], xs[0], xs[2]], [ys[0], ys[2], ys[2]]
    wanted = xs[0], xs[2]
    value = bird_kernels.cka_loss(*several, backend=backend)
    assert_close(gradients(value, wanted), gradients(sum(literal(*several, "biased")), wanted), 2e-5)


def test_half_precision(backend: str, device: torch.device) -> None:
    xs, ys = lists(37, device, torch.bfloat16)
    value = bird_kernels.cka_loss(xs, ys, backend=backend)
    truth = sum(literal(xs, ys, "biased"))
    found = torch.autograd.grad(value, xs)
    assert value.dtype == torch.float32
    assert {g.dtype for g in found} == {torch.bfloat16}
    assert abs(value.double() - truth) < 0.02
    assert_close([g.double() for g in found], gradients(truth, xs), 0.02)


def test_sides_without_variance(estimator: str, backend: str, device: torch.device) -> None:
    """Loss 1 and no gradient for that pair, the others are as they were; NaN stays in its pair."""
    xs, ys = lists(37, device)
    xs[1] = torch.full_like(xs[1], 7.0).detach().requires_grad_()
    ys[3] = ys[3].clone()
    ys[3][0, 0] = torch.nan
    found = functional.cka_losses(xs, ys, estimator=estimator, backend=backend)
    truth = torch.stack(literal(xs[:3], ys[:3], estimator))
    torch.testing.assert_close(found[:3].double(), truth, rtol=0, atol=2e-6)
    assert found[1] == 1.0
    assert found[3].isnan()
    assert torch.autograd.grad(found[:3].sum(), xs[1])[0].count_nonzero() == 0


def test_any_scale(backend: str, device: torch.device) -> None:
    xs, ys = lists(37, device)
    value = bird_kernels.cka_loss(xs, ys, backend=backend)
    scales = [1e-12, 1e12, 1e6, 1.0]
    scaled = bird_kernels.cka_loss(
        [s * x for s, x in zip(scales, xs, strict=True)], [y / s for s, y in zip(scales, ys, strict=True)],
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(scaled, value, rtol=0, atol=5e-6)


def test_pairs_of_other_rows(backend: str, device: torch.device) -> None:
    """As stages of a network with fewer and fewer tokens."""
    xs, ys = ([side[0][:20], side[1]] for side in lists(37, device))
    value = bird_kernels.cka_loss(xs, ys, backend=backend)
    truth = sum(literal(xs, ys, "biased"))
    assert abs(value.double() - truth) < 3e-6
    assert_close(gradients(value, xs), gradients(truth, xs), 2e-5)


def test_mixed_dtypes_and_rows_of_tokens(device: torch.device) -> None:
    xs, ys = lists(36, device, torch.float64)
    xs[1] = xs[1].detach().float().requires_grad_()
    ys[1] = ys[1].half()
    xs, ys = ([t.unflatten(0, (4, 9)) for t in side] for side in (xs, ys))
    value = bird_kernels.cka_loss(xs, ys, row_dims=2)
    flat = [[t.flatten(0, 1) for t in side] for side in (xs, ys)]
    assert value.dtype == torch.float64
    assert abs(value - sum(literal(*flat, "biased"))) < 1e-6  # of the fp32 pair
    (gradient,) = torch.autograd.grad(value, xs[0])
    (wanted,) = torch.autograd.grad(literal(*flat, "biased")[0], xs[0])
    assert (gradient - wanted).norm() < 1e-12 * wanted.norm()


def nodes(value: Tensor) -> list[str]:
    """The names of all nodes of a graph."""
    found, queue = {value.grad_fn}, [value.grad_fn]
    while queue:
        for node, _ in queue.pop().next_functions:
            if node is not None and node not in found:
                found.add(node)
                queue.append(node)
    return [node.name() for node in found]


def test_is_one_node(backend: str, device: torch.device) -> None:
    """Beside the sum and the leaves."""
    xs, ys = lists(37, device)
    value = bird_kernels.cka_loss(xs, ys, backend=backend)
    inner = [name for name in nodes(value) if not name.startswith("torch::autograd::Accumulate")]
    assert len(inner) == 2, inner
    assert bird_kernels.cka_loss([x.detach() for x in xs], ys, backend=backend).grad_fn is None


def test_can_be_differentiated_twice(backend: str, device: torch.device) -> None:
    xs, ys = lists(9, device)
    found, wanted = [], []
    for value, into in (
        (bird_kernels.cka_loss(xs, ys, backend=backend), found),
        (sum(literal(xs, ys, "biased")), wanted),
    ):
        first = torch.autograd.grad(value, xs, create_graph=True)
        into += gradients(sum(g.double().square().sum() for g in first), xs)
    assert_close(found, wanted, 1e-4)


def test_weights_are_not_rounded_under_autocast(device: torch.device) -> None:
    xs, ys = lists(12, device)
    plain = bird_kernels.cka_loss(xs, ys, weights=WEIGHTS)
    with torch.autocast(device.type, torch.bfloat16):
        assert bird_kernels.cka_loss(xs, ys, weights=WEIGHTS).item() == plain.item()


def test_compiles_without_a_break(device: torch.device) -> None:
    xs, ys = lists(12, device)
    compiled = torch.compile(lambda a, b: bird_kernels.cka_loss(a, b, weights=WEIGHTS), fullgraph=True)
    value, wanted = compiled(xs, ys), bird_kernels.cka_loss(xs, ys, weights=WEIGHTS)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    assert_close(gradients(value, xs), gradients(wanted, xs), 1e-5)
    torch.compiler.reset()


def test_under_functorch(device: torch.device) -> None:
    xs, ys = lists(12, device)
    xs = [x.detach() for x in xs]

    def loss(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        return bird_kernels.cka_loss(xs, ys, weights=WEIGHTS)

    found = torch.func.grad(loss)(xs, ys)
    leaves = [x.clone().requires_grad_() for x in xs]
    assert_close([g.double() for g in found], gradients(loss(leaves, ys), leaves), 1e-5)
    batched = [torch.stack([x, 2 * x + 1, x.flip(0)]) for x in xs]
    values = torch.vmap(loss, in_dims=(0, None))(batched, ys)
    singles = [loss([b[i] for b in batched], ys) for i in range(3)]
    torch.testing.assert_close(values, torch.stack(singles), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------- common launches


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the Triton kernels that were launched, which run all the same."""
    launch = pytest.importorskip("bird_kernels.backends.triton.launch", reason="Triton does not exist for this system")
    names: list[str] = []
    original = launch.Launch.__call__

    def call(self: Any, *args: Any) -> None:
        names.append(self._kernel.fn.__name__)
        original(self, *args)

    monkeypatch.setattr(launch.Launch, "__call__", call)
    return names


COMMON = ["whole_kernel", "reduce_kernel", "backward_kernel"]


@pytest.mark.parametrize("dense", [True, False])
def test_three_launches_for_all_pairs(dense: bool, launched: list[str], device: torch.device) -> None:
    xs, ys = lists(37, device)
    if not dense:
        ys[1] = ys[1].repeat(1, 2)[:, ::2]
    value = bird_kernels.cka_loss(xs, ys, backend="triton")
    assert launched == COMMON[:2]
    torch.autograd.grad(value, xs)
    assert launched == COMMON


@pytest.mark.parametrize("case", ["one pair", "other dtypes", "other rows", "too many pairs", "library"])
def test_pairs_that_do_not_share_launches(
    case: str, launched: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody launches for more than one; and they come out right all the same."""
    xs, ys = (side[1:3] for side in lists(9, device))
    if case == "one pair":
        xs, ys = xs[:1], ys[:1]
    elif case == "other dtypes":
        xs[1] = xs[1].detach().half()
        ys[1] = ys[1].half()
    elif case == "other rows":
        xs[1], ys[1] = xs[1][:8], ys[1][:8]
    elif case == "too many pairs":
        monkeypatch.setitem(plan.MOST_PAIRS, "triton", 1)
    value = bird_kernels.cka_loss(xs, ys, backend="library" if case == "library" else "triton")
    assert abs(value.double() - sum(literal(xs, ys, "biased"))) < 1e-3
    assert launched == ([] if case == "library" else COMMON[:2] * len(xs))


def test_the_plan_of_pairs() -> None:
    """Programs for four waves; each side its own parts."""

    def problems(n: int, *widths: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Problem]:
        return [Problem(n, p, q, dtype, torch.device("cpu")) for p, q in widths]

    few = plan.small_tiling(problems(128, (64, 512), (128, 1280)))
    assert (few.splits, few.chunk) == ((2, 16, 4, 40), 32)
    many = plan.small_tiling(problems(128, *[(2048, 2048)] * 18))
    assert many.splits == (-(-64 // (many.chunk // many.step)),) * 36
    assert sum(many.splits) * 3 <= plan.CROWD * plan.PROGRAMS * 2
    for backend, most in (("native", 32), ("triton", 64)):
        assert plan.together(problems(512, (64, 64), (64, 1 << 20)), backend)
        assert not plan.together(problems(128, (64, 64)), backend)
        assert not plan.together(problems(513, (64, 64), (64, 64)), backend)
        assert not plan.together([*problems(128, (64, 64)), *problems(128, (64, 64), dtype=torch.float16)], backend)
        assert plan.together(problems(128, *[(64, 64)] * most), backend)
        assert not plan.together(problems(128, *[(64, 64)] * (most + 1)), backend)
