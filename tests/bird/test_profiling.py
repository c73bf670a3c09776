"""Where the time of a step goes, by a clock that the layers turn; and that the looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bird import BirdLoss, Taps, Teacher
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.profiling import StepTimes, step_times
from bird.lab.vision.steps import TransferGuide
from tests.bird.loops import images, losses, network, state

SETTINGS = Settings(steps=9, batch_size=16)


class Clock:
    now = 0.0


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bird.lab.vision.profiling.time.perf_counter", lambda: Clock.now)


class Slow(torch.autograd.Function):
    """The identity; forward and backward take the given times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        Clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        Clock.now += ctx.seconds
        return gradient, None, None


class Wait(nn.Module):
    def __init__(self, forward: float, backward: float = 0.0) -> None:
        super().__init__()
        self.times = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return Slow.apply(x, *self.times)


class SlowLoss(BirdLoss):
    def forward(self, task_loss: Tensor, teacher: Any, student: Any, mask: Tensor | None = None) -> Tensor:
        student = {name: Slow.apply(rows, 2, 1) for name, rows in student.items()}
        return super().forward(task_loss, teacher, student, mask)


def slow(forward: float, backward: float = 0.0) -> nn.Module:
    model = network()
    model.insert(2, Wait(forward, backward))
    return model


def guided(student: nn.Module, loss: nn.Module | None = None) -> TransferGuide:
    return TransferGuide(Teacher(slow(3), "2"), Taps(student, "1"), loss or SlowLoss(pairs=[("2", "1")]))


def test_each_part_has_its_time() -> None:
    student = slow(5, 4)
    times = step_times(student, images(), SETTINGS, guided(student), repeats=3)
    assert (times.teacher, times.loss) == (3, 2 + 1)
    assert times.step == 5 + 4 + 3 + 2 + 1


def test_parts_of_a_batch_add_up() -> None:
    student, settings = network(), Settings(steps=9, batch_size=16, chunk_size=4)
    hints = guided(student, losses([("2", "1")])["hints"])
    assert step_times(student, images(), settings, hints, repeats=2) == StepTimes(4 * 3, 4 * 3, 0)
    bird = step_times(student, images(), settings, guided(student), repeats=2)
    assert (bird.teacher, bird.loss) == (4 * 3, 2 + 1)  # of the whole batch, once


def test_it_is_the_median_after_the_first_two() -> None:
    seconds, student = iter([100, 100, 1, 7, 2, 0]), network()  # the last is of the parts
    guide = guided(student, BirdLoss(pairs=[("2", "1")]))
    augment = lambda x, index, epoch: setattr(Clock, "now", Clock.now + next(seconds)) or x  # noqa: E731
    assert step_times(student, images(), SETTINGS, guide, augment=augment, repeats=3).step == 3 + 2


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_changed(training: bool) -> None:
    student, loss = network().train(training), losses([("2", "1")])["hints"]
    guide = guided(student, loss)
    both = nn.ModuleList([student, loss])
    before, random = state(both), torch.get_rng_state()
    step_times(student, images(), Settings(steps=9, batch_size=16, lr=1.0), guide, repeats=1)

    assert all(torch.equal(value, before[name]) for name, value in both.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in both.parameters())
    assert {module.training for module in student.modules()} == {training}
