"""The losses and the comparison of networks write to no feature, input or parameter that they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bird import BirdLoss, Hints, LwF, Taps, Teacher, chunked_backward, chunks, compare
from tests.selection import short
from tests.untouched import untouched

N, P, Q = 12, 5, 5
PAIRS = [("t", "s"), ("t", "s2")]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameters": nn.Parameter,
    "transposed": lambda x: x.T.contiguous().T.requires_grad_(),
    "equal rows": lambda x: x[:1].expand_as(x).requires_grad_(),
    "equal columns": lambda x: x[:, :1].expand_as(x).requires_grad_(),
    "frozen": lambda x: x,
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "bird": lambda: BirdLoss(0.3, 0.7, PAIRS, weights=[0.5, 2.0]),
    "bird, one pair": lambda: BirdLoss(0.3, 0.7, PAIRS[:1]),
    "bird, unbiased": lambda: BirdLoss(0.3, 0.7, PAIRS, estimator="unbiased"),
    "bird, rbf": lambda: BirdLoss(0.3, 0.7, PAIRS, kernel="rbf"),
    "hints": lambda: Hints(0.3, 0.7, PAIRS, teacher_widths={"t": Q}, student_widths={"s": P, "s2": P}),
    "lwf": lambda: LwF(0.3, 0.7, PAIRS),
}


def features(layout: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of a teacher and of a student, with means and sizes that whoever normalises in place would change."""
    generator = torch.Generator().manual_seed(0)
    t, s, s2 = (5.0 * (1.0 + torch.randn(N, width, generator=generator)).to(dtype) for width in (Q, P, P))
    return {"t": t}, {"s": LAYOUTS[layout](s), "s2": LAYOUTS[layout](s2)}


@short(
    "every layout in fp32, of the other dtypes one",
    lambda dtype, layout: dtype == torch.float32 or layout == "transposed",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, layout: str, dtype: torch.dtype) -> None:
    loss, (theirs, ours) = LOSSES[name](), features(layout, dtype)
    task, mask = torch.tensor(2.0, requires_grad=True), torch.arange(N) % 5 != 2
    for rows in (None, mask) if name.startswith("bird") else (None,):
        given: list[Any] = [task, mask, *theirs.values(), *ours.values(), *loss.parameters()]
        with untouched(*given):
            value = loss(task, theirs, ours, **({} if rows is None else {"mask": rows}))
            torch.autograd.grad(value, [tensor for tensor in given if tensor.requires_grad], allow_unused=True)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("way", ["statistics", "statistics, teacher again", "features"])
def test_chunks(way: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two functions return, and what the chunks hold."""
    if way.endswith("again"):
        monkeypatch.setattr(chunks, "TEACHER_BYTES", 0)
    wide = 40 if way == "features" else 2
    generator = torch.Generator().manual_seed(0)
    model, images = nn.Linear(4, wide), torch.randn(24, 4, generator=generator)
    theirs = 5.0 * (1.0 + torch.randn(24, 3, generator=generator))
    parts = list(zip(images.split(9), theirs.split(9), strict=True))
    returned: list[tuple[Tensor, Tensor]] = []

    def student(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = model(chunk[0])
        returned.append((rows, rows.detach().clone()))
        return rows.square().sum() / 24, {"s": rows}

    loss = BirdLoss(0.3, 0.7, PAIRS[:1], estimator=estimator)
    with untouched(images, theirs, *model.parameters()):
        chunked_backward(student, lambda chunk: {"t": chunk[1]}, parts, loss, model=model)
    assert len(returned) == 6
    assert all(rows.equal(before) and rows._version == 0 for rows, before in returned)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_networks_that_are_compared(estimator: str) -> None:
    a, b = (nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).eval() for width in (6, 20))
    batches = [torch.randn(9, 4) for _ in range(3)]
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in (*a, *b):
        layer.register_forward_hook(lambda _layer, _args, output: seen.append((output, output.clone())))
    with untouched(*batches, *a.parameters(), *b.parameters()):
        compare(a, b, batches, estimator=estimator, progress=False)
    assert seen
    assert all(output.equal(before) for output, before in seen)


def test_a_teacher_and_taps() -> None:
    teacher = Teacher(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), ["0", "1"])
    model, images = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), torch.randn(9, 4)
    taps = Taps(model, ["0", "1"])
    with untouched(images, *model.parameters(), *teacher.parameters()):
        theirs, out = teacher(images), model(images)
        ours = taps.pop()
        with untouched(out, *theirs.values(), *ours.values()):
            BirdLoss(0.3, 0.7, [("0", "0"), ("1", "1")])(out.sum(), theirs, ours)
