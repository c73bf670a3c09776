"""Losses that hold a process group, or weights that are learned, are copied, pickled and averaged like any module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bird import BirdLoss, CKALoss, Hints, HSICLoss, LwF

PAIRS = [("t", "s"), ("u", "s")]


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def options_of(loss: Any) -> dict[str, Any]:
    return (loss.distance if isinstance(loss, BirdLoss) else loss).options


@pytest.mark.parametrize("kind", [lambda **own: BirdLoss(pairs=PAIRS, **own), CKALoss, HSICLoss])
def test_a_process_group_is_kept_in_copies(kind: Any, group: Any) -> None:
    loss = kind(group=dist.new_group([0]), estimator="unbiased")
    alone = kind(estimator="unbiased")
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), AveragedModel(loss).module):
        assert options_of(copied)["group"] is options_of(loss)["group"]
        assert copied is not loss
    assert options_of(copy.deepcopy(alone)) == options_of(alone) == options_of(loss) | {"group": None}


def test_a_pickle_in_a_process_without_that_group_says_so(group: Any) -> None:
    data = pickle.dumps(CKALoss(group=group))
    dist.destroy_process_group()
    with pytest.raises(
        RuntimeError, match=r"process group .* which this process does not have: call init_process_group"
    ):
        pickle.loads(data)


# ------------------------------------------------------------------------------------ learned weights


def features() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    return {"t": torch.randn(16, 6), "u": torch.randn(16, 5)}, {"s": torch.randn(16, 6, requires_grad=True)}


@pytest.mark.parametrize("learned", ["alpha", "beta", "weights"])
def test_weights_are_parameters_and_get_their_gradient(learned: str) -> None:
    teacher, student = features()
    numbers = {"alpha": torch.tensor(0.3), "beta": torch.tensor(0.6), "weights": torch.tensor([0.5, 2.0])}
    fixed = {name: number.tolist() for name, number in numbers.items()}
    loss = BirdLoss(pairs=PAIRS, **fixed | {learned: nn.Parameter(numbers[learned])})
    assert [name for name, _ in loss.named_parameters()] == [learned]
    task = torch.tensor(1.7, requires_grad=True)
    for _ in range(2):  # nothing of the first step's graph is left
        loss.zero_grad()
        loss(task, teacher, student).backward()
    distances = [1 - loss.last[f"cka/{t}/{s}"] for t, s in PAIRS]
    alpha, beta, weights = fixed["alpha"], fixed["beta"], fixed["weights"]
    expected = {
        "alpha": torch.tensor(1.7),
        "beta": weights[0] * distances[0] + weights[1] * distances[1],
        "weights": beta * torch.stack(distances),
    }
    torch.testing.assert_close(loss.get_parameter(learned).grad, expected[learned])
    assert task.grad == pytest.approx(2 * alpha)


@pytest.mark.parametrize("kind", [Hints, LwF])
def test_the_other_losses_learn_alpha_too(kind: Any) -> None:
    teacher, student = features()
    widths = dict(teacher_widths={"t": 6}, student_widths={"s": 6}) if kind is Hints else {}
    loss = kind(nn.Parameter(torch.tensor(0.3)), pairs=PAIRS[:1], **widths)
    loss(torch.tensor(1.7), teacher, student).backward()
    assert loss.alpha.grad == pytest.approx(1.7)


def test_a_list_of_learned_weights_is_refused() -> None:
    weights: Any = [torch.tensor(0.5, requires_grad=True), 1.0]
    with pytest.raises(TypeError, match=r"learned come as one tensor \[pairs\]"):
        BirdLoss(pairs=PAIRS, weights=weights)


@pytest.mark.parametrize("kind", [BirdLoss, Hints, LwF])
def test_a_teacher_in_inference_mode(kind: Any) -> None:
    teacher, student = features()
    widths = dict(teacher_widths={"t": 6}, student_widths={"s": 6}) if kind is Hints else {}
    loss = kind(pairs=PAIRS[:1], **widths)
    with torch.inference_mode():
        there = {name: rows.clone() for name, rows in teacher.items()}
    gradients = [
        torch.autograd.grad(loss(torch.tensor(1.0), rows, student), student["s"])[0] for rows in (there, teacher)
    ]
    assert gradients[0].equal(gradients[1])
