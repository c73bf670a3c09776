"""Times of a training step and of its guidance, measured outside the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ...taps import Measured
from .checkpoints import Settings, TrainingRun
from .data import Images
from .steps import Augment, Batches, TransferGuide, placed, take_step


@dataclass(frozen=True)
class StepTimes:
    """Seconds, medians over several steps.

    Args:
        step: a whole step: batch, forward, guidance, backward, optimiser.
        teacher: the teacher's forward, a part of it.
        loss: the guide's loss (CKA), forward and backward to the student's features, a part of it.
    """

    step: float
    teacher: float
    loss: float


def step_times(
    model: nn.Module,
    train: Images,
    settings: Settings,
    guide: TransferGuide,
    *,
    augment: Augment | None = None,
    device: torch.device | str = "cpu",
    repeats: int = 10,
) -> StepTimes:
    """Time the step of the first batch several times, synchronising with the device each time.

    Arguments as of `bird.lab.vision.training.fit`. As there, all modules are moved to the device; their weights,
    buffers and PyTorch's generators are restored afterwards, and gradients are cleared.

    Args:
        repeats: how often each part is timed, after two warm-up runs.

    Raises:
        ValueError: as `bird.lab.vision.training.fit`.
    """
    device = torch.device(device)
    batches = Batches(train, settings, augment, device, guide.views)
    modules = placed(model, guide, device)
    run = TrainingRun(modules, settings, len(train), device, None)

    def timed(action: Callable[[], object]) -> float:
        seconds = []
        for _ in range(2 + repeats):
            torch.get_device_module(device).synchronize()
            start = time.perf_counter()
            action()
            torch.get_device_module(device).synchronize()
            seconds.append(time.perf_counter() - start)
        return median(seconds[2:])

    with _unchanged(modules, device):
        model.train()
        step = timed(lambda: take_step(run, guide, batches.at(0), settings.lr))
        images = [x for *_, x in batches.at(0)]
        teacher, taps, loss = guide.teacher, guide.taps, guide.loss
        with run.autocast:
            seconds = timed(lambda: [teacher(x) for x in images])
            with torch.no_grad():
                theirs, ours = (_joined([f(x) for x in images]) for f in (teacher, lambda x: (model(x), taps.pop())[1]))

            def guidance() -> None:
                task = torch.zeros((), device=device)
                loss(task, theirs, Measured({name: x.requires_grad_() for name, x in ours.items()})).backward()

            return StepTimes(step, seconds, timed(guidance))


def _joined(parts: list[dict[str, Tensor]]) -> Measured:
    return Measured({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@contextmanager
def _unchanged(modules: nn.ModuleDict, device: torch.device) -> Iterator[None]:
    state = {name: value.clone() for name, value in modules.state_dict().items()}
    modes = {module: module.training for module in modules.modules()}
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            modules.load_state_dict(state)
            modules.zero_grad()
            for module, mode in modes.items():
                module.training = mode
