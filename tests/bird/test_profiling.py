"""Where the time of a step goes, by a clock that the layers turn; and that the looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bird import BirdLoss, Hints, Taps, Teacher
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.profiling import StepTimes, step_times
from bird.lab.vision.steps import TransferGuide


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


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *layers, *head)


def images() -> Images:
    pixels = torch.randint(0, 256, (48, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Images(pixels, torch.arange(48) % 3)


def guided(student: nn.Module, loss: nn.Module | None = None) -> TransferGuide:
    teacher = Teacher(network(Wait(3)), "2")
    return TransferGuide(teacher, Taps(student, "1"), loss or SlowLoss(pairs=[("2", "1")]))


def test_each_part_has_its_time() -> None:
    student = network(Wait(5, 4))
    times = step_times(student, images(), Settings(steps=9, batch_size=16), guided(student), repeats=3)
    assert (times.teacher, times.loss) == (3, 2 + 1)
    assert times.step == 5 + 4 + 3 + 2 + 1


def test_parts_of_a_batch_add_up() -> None:
    student = network()
    loss = Hints(pairs=[("2", "1")], teacher_widths={"2": 4}, student_widths={"1": 4})
    settings = Settings(steps=9, batch_size=16, chunk_size=4)
    times = step_times(student, images(), settings, guided(student, loss), repeats=2)
    assert times == StepTimes(4 * 3, 4 * 3, 0)
    bird = step_times(student, images(), settings, guided(student), repeats=2)
    assert (bird.teacher, bird.loss) == (4 * 3, 2 + 1)  # of the whole batch, once


def test_it_is_the_median_after_the_first_two() -> None:
    seconds = iter([100, 100, 1, 7, 2, 0])  # the last is of the parts
    student = network()
    augment = lambda x, index, epoch: setattr(Clock, "now", Clock.now + next(seconds)) or x  # noqa: E731
    guide = guided(student, BirdLoss(pairs=[("2", "1")]))
    assert step_times(student, images(), Settings(steps=9), guide, augment=augment, repeats=3).step == 3 + 2


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_changed(training: bool) -> None:
    student = network().train(training)
    loss = Hints(pairs=[("2", "1")], teacher_widths={"2": 4}, student_widths={"1": 4})
    guide = guided(student, loss)
    before = [value.clone() for module in (student, loss) for value in module.state_dict().values()]
    random = torch.get_rng_state()
    step_times(student, images(), Settings(steps=9, batch_size=16, lr=1.0), guide, repeats=1)
    after = [value for module in (student, loss) for value in module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in [*student.parameters(), *loss.parameters()])
    assert {module.training for module in student.modules()} == {training}
