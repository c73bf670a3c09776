"""Chunks that draw at random: the second pass sees what the first one saw, or says that it did not; learned weights."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bird.chunks
from bird import BirdLoss, Teacher, chunked_backward
from bird.chunks import random_state, set_random_state
from bird_kernels import Statistics

PAIRS = [("0", "0"), ("0", "2")]
OWN = np.random.default_rng(0)
DRAWS = {
    "python": lambda: random.gauss(0, 1),
    "numpy": lambda: np.random.standard_normal(),  # noqa: NPY002, the global generator is the question
    "torch": lambda: torch.randn(()).item(),
    "own": lambda: OWN.standard_normal(),
}


class Augmented(Sequence[tuple[Tensor, Tensor]]):
    """Chunks that are shifted by what a generator draws, each time that they are fetched."""

    def __init__(self, draw: str, chunks: int = 4, rows: int = 12) -> None:
        torch.manual_seed(0)
        self.images = [torch.randn(rows, 10) for _ in range(chunks)]
        self.labels = [torch.randint(3, (rows,)) for _ in range(chunks)]
        self.noise = torch.randn(rows, 10)
        self.draw, self.seen = DRAWS[draw], []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.seen.append((self.images[i] + self.draw() * self.noise.roll(i), self.labels[i]))
        return self.seen[-1]


def networks(width: int) -> tuple[nn.Sequential, Teacher]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 3))
    return model, Teacher(nn.Sequential(nn.Linear(10, width + 1)), ["0"])


def forward(model: nn.Sequential, count: int = 48):
    def student(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = chunk
        first = model[0](x)
        last = model[1:](first)
        return F.cross_entropy(last, y, reduction="sum") / count, {"0": first, "2": last}

    return student


def compared(
    model: nn.Module, teacher: Teacher, chunks: Augmented, loss: nn.Module, whole: nn.Module, factor: float
) -> None:
    """Value and gradients of chunks beside those of one graph over what the first pass saw."""
    value = chunked_backward(
        forward(model), lambda chunk: teacher(chunk[0]), chunks, loss, model=model, gradient=factor
    )
    assert not value.requires_grad
    found = [parameter.grad.clone() for parameter in (*model.parameters(), *loss.parameters())]
    images, labels = (torch.cat(parts) for parts in zip(*chunks.seen[:4], strict=True))
    model.zero_grad()
    task, features = forward(model)((images, labels))
    expected = whole(task, teacher(images), features)
    (factor * expected).backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-6)
    for one, parameter in zip(found, (*model.parameters(), *whole.parameters()), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [4, 60])  # by statistics, by features
@pytest.mark.parametrize("draw", ["python", "numpy", "torch"])
@pytest.mark.parametrize("limit", [0, 1 << 28])  # whether the teacher runs again
def test_global_generators_repeat(draw: str, width: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bird.chunks.TEACHER_BYTES", limit)
    loss = BirdLoss(pairs=PAIRS)
    compared(*networks(width), Augmented(draw), loss, loss, 1.0)


@pytest.mark.parametrize(("limit", "pairs"), [(1535, 2), (1536, 1), (1727, 1), (1728, 0)])
def test_features_that_take_few_bytes_are_kept(limit: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 rows of 4 + 5 and of 3 + 5 features take 1,728 and 1,536 bytes: for how many pairs there are statistics."""
    made: list[Statistics] = []

    class Counted(Statistics):
        def __init__(self, **options: str | None) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr("bird.chunks.Statistics", Counted)
    monkeypatch.setattr("bird.chunks.FEW_BYTES", limit)
    loss = BirdLoss(pairs=PAIRS)
    compared(*networks(4), Augmented("torch"), loss, loss, 1.0)
    assert len(made) == pairs


@pytest.mark.parametrize("width", [4, 60])
def test_learned_weights_get_their_gradient(width: int) -> None:
    numbers = {"alpha": torch.tensor(0.3), "beta": torch.tensor(0.8), "weights": torch.tensor([0.5, 2.0])}
    losses = [BirdLoss(pairs=PAIRS, **{n: nn.Parameter(x.clone()) for n, x in numbers.items()}) for _ in range(2)]
    assert {name for name, _ in losses[0].named_parameters()} == {*numbers}
    compared(*networks(width), Augmented("torch"), *losses, 0.5)


def test_what_does_not_repeat_is_told() -> None:
    (model, teacher), chunks = networks(4), Augmented("own")
    with pytest.raises(RuntimeError, match=r"chunk 0, and perhaps others, gave other features in the second pass"):
        chunked_backward(forward(model), lambda chunk: teacher(chunk[0]), chunks, BirdLoss(pairs=PAIRS), model=model)


def test_a_teacher_that_does_not_repeat_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bird.chunks.TEACHER_BYTES", 0)
    (model, teacher), chunks, calls = networks(4), Augmented("torch"), []

    def moody(chunk: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        calls.append(0)
        return teacher(chunk[0] if len(calls) != 7 else chunk[0].flip(0))

    with pytest.raises(RuntimeError, match=r"chunk 2, and perhaps others"):
        chunked_backward(forward(model), moody, chunks, BirdLoss(pairs=PAIRS), model=model)


def test_rounding_is_no_other_input() -> None:
    """In bf16 a kernel with a graph may round otherwise than one without."""
    (model, teacher), chunks = networks(4), Augmented("torch")
    student = forward(model)

    def rounding(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        task, features = student(chunk)
        if torch.is_grad_enabled():
            features = {name: x * (1 + 4e-3 * torch.randn_like(x)) for name, x in features.items()}
        return task, features

    chunked_backward(rounding, lambda chunk: teacher(chunk[0]), chunks, BirdLoss(pairs=PAIRS), model=model)


def test_states_of_all_global_generators() -> None:
    state = random_state([])
    first = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(())) == first  # noqa: NPY002


def test_memory_that_a_teacher_reuses_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first pass saw is compared, not what the memory holds by then."""
    monkeypatch.setattr("bird.chunks.TEACHER_BYTES", 0)
    (model, teacher), chunks, memory = networks(4), Augmented("torch"), torch.empty(12, 5)

    def moody(chunk: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"0": memory.copy_(teacher(chunk[0])["0"]).add_(torch.tensor(OWN.standard_normal((12, 5))))}

    with pytest.raises(RuntimeError, match="gave other features in the second pass"):
        chunked_backward(forward(model), moody, chunks, BirdLoss(pairs=PAIRS[:1]), model=model)


def test_statistics_leave_no_features_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by themselves nor by what is compared; of the student, and of a teacher that runs again."""
    monkeypatch.setattr("bird.chunks.TEACHER_BYTES", 0)
    (model, teacher), chunks, freed = networks(4), Augmented("torch", rows=2000), []
    runs = forward(model)

    def watched(features: dict[str, Tensor]) -> dict[str, Tensor]:
        for x in features.values():
            storage = x.untyped_storage()
            weakref.finalize(storage, freed.append, storage.nbytes())
        return features

    def student(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        task, features = runs(chunk)
        return task, watched(features)

    between: list[int] = []
    second = bird.chunks._second_pass

    def count_and_run(*args: Any, **options: Any) -> Any:
        between.append(len(freed))
        return second(*args, **options)

    monkeypatch.setattr("bird.chunks._second_pass", count_and_run)
    chunked_backward(student, lambda chunk: watched(teacher(chunk[0])), chunks, BirdLoss(pairs=PAIRS), model=model)
    assert between == [4 * 3]


@pytest.mark.parametrize("limit", [0, 1 << 24])  # by statistics, by features
def test_kept_features_are_copies(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory that both networks reuse where no graph is recorded: value and gradients are those of new tensors."""
    monkeypatch.setattr("bird.chunks.FEW_BYTES", limit)
    (model, teacher), chunks = networks(4), Augmented("torch")
    runs, ours, theirs, found = forward(model), torch.empty(12, 4), torch.empty(12, 5), []

    def student(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        task, features = runs(chunk)
        return task, features if torch.is_grad_enabled() else {"0": ours.copy_(features["0"])}

    for run, guide in (
        (runs, lambda chunk: teacher(chunk[0])),
        (student, lambda chunk: {"0": theirs.copy_(teacher(chunk[0])["0"])}),
    ):
        torch.manual_seed(2)
        model.zero_grad()
        value = chunked_backward(run, guide, chunks, BirdLoss(pairs=PAIRS[:1]), model=model)
        found.append([value, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*found)
