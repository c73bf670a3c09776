"""Small training runs of images: data, a network, guides, and `fit` on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bird import BirdLoss, Hints, LwF, Taps, Teacher
from bird.lab.vision.checkpoints import History, Settings
from bird.lab.vision.data import Images
from bird.lab.vision.steps import TransferGuide
from bird.lab.vision.training import fit

PAIRS = [("0", "0")]
OTHERS = ("augment", "validate", "resume", "trained", "about", "device")  # arguments of `fit` that are no settings


class Cut(Exception):
    """The power goes off."""


class Run(NamedTuple):
    model: nn.Module
    history: History
    guide: TransferGuide | None


def images(n: int = 48, classes: int = 3) -> Images:
    generator = torch.Generator().manual_seed(1)
    return Images(
        torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(n) % classes
    )


def network(width: int = 6, dropout: float = 0.3, seed: int = 0) -> nn.Sequential:
    """Batch normalisation and dropout: both carry state from step to step."""
    torch.manual_seed(seed)
    body = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(width * 36, 3))


def losses(pairs: Any = PAIRS, teacher: int = 6, student: int = 6) -> dict[str, nn.Module]:
    """One of each for one pair of layers of these widths."""
    ((t, s),) = pairs
    return {
        "bird": BirdLoss(pairs=pairs),
        "unbiased": BirdLoss(pairs=pairs, estimator="unbiased"),
        "hints": Hints(pairs=pairs, teacher_widths={t: teacher}, student_widths={s: student}),
        "lwf": LwF(pairs=pairs),
    }


def guided(method: str, student: nn.Module, teacher: nn.Module | None = None) -> TransferGuide | None:
    """By the first layer of a teacher; ``none``: by nobody."""
    torch.manual_seed(5)
    teacher = network(6, seed=5) if teacher is None else teacher
    return TransferGuide(Teacher(teacher, "0"), Taps(student, "0"), losses()[method]) if method != "none" else None


def train(method: str = "none", folder: Path | None = None, data: Images | None = None, **options: Any) -> Run:
    """20 steps of 16 images; ``options``: of `fit` and of its settings, a ``model`` and a ``guide``."""
    model = options.pop("model", None)
    model = network() if model is None else model
    guide = options.pop("guide", None) or guided(method, model)
    torch.manual_seed(0)
    rest = {name: options.pop(name) for name in OTHERS if name in options}
    settings = Settings(**{"steps": 20, "batch_size": 16, "lr": 0.05, "log_every": 3, "save_every": 6} | options)
    data = images() if data is None else data
    return Run(model, fit(model, data, settings, guide=guide, folder=folder, progress=False, **rest), guide)


def cut_after(calls: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """An augmentation that ends the run once it was called so often."""
    left = iter(range(calls))

    def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        if next(left, None) is None:
            raise Cut
        return x

    return augment


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changes(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of weights and buffers that are others than before."""
    now = module.state_dict()
    assert now.keys() == before.keys()
    return {name for name in now if not torch.equal(now[name], before[name])}


def same(a: nn.Module, b: nn.Module) -> bool:
    return not changes(a, b.state_dict())


def margin(model: nn.Module) -> float:
    """A score that depends on every weight."""
    return model(images(9).images.float() / 255).std().item()
