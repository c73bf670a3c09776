"""How good a model is on clean and on corrupted images, and how much of a gap it has closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from bird_kernels import cka

from ...features import evaluating
from ...taps import Taps
from ...teachers import Teacher
from .corruptions import SEVERITIES, corrupt
from .data import Images, to_float


@dataclass(frozen=True)
class Robustness:
    """Accuracies, as shares of 1.

    Args:
        clean: on the images as they are.
        corrupted: for each corruption, one for each severity.
    """

    clean: float
    corrupted: dict[str, list[float]]

    @property
    def robust(self) -> float:
        """Robust accuracy: the mean over corruptions and severities; clean images do not count."""
        return fmean(fmean(accuracies) for accuracies in self.corrupted.values())

    @property
    def pooled(self) -> float:
        """The paper's figure: severity 0 pooled with the rest, so that with five the clean one is a sixth."""
        severities = len(next(iter(self.corrupted.values())))
        return (self.clean + severities * self.robust) / (1 + severities)


def accuracy(model: nn.Module, data: Images, *, batch_size: int = 500) -> float:
    """Share of the images that the model gets right, computed on the model's device."""
    return robustness(model, data, (), batch_size=batch_size).clean


def robustness(
    model: nn.Module,
    data: Images,
    names: Sequence[str],
    *,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 500,
) -> Robustness:
    """Score a model, in eval mode and without gradients, on clean images and on corrupted ones.

    Args:
        model: images ``[n, c, h, w]`` in 0-1 to logits ``[n, classes]``.
        data: any device; batches move to the model's.
        names: keys of `bird.lab.vision.corruptions.CORRUPTIONS`.
        severities: 1 to 5.
        seed: of the corruptions: the same seed gives the same corrupted images to every model.
        batch_size: changes speed and memory, not the corrupted images.

    Raises:
        ValueError: no images, or an unknown corruption.
    """
    if len(data) == 0:
        raise ValueError("there are no images to evaluate on")
    with evaluating(model) as device:
        correct = torch.zeros(1 + len(names) * len(severities), dtype=torch.int64, device=device)
        for index in torch.arange(len(data)).split(batch_size):
            batch = data.select(index).to(device)
            views = _views(to_float(batch.images), names, severities, index, seed)
            right = [model(_channels_last(view)).argmax(dim=1) == batch.labels for view in views]
            correct += torch.stack(right).sum(dim=1)
        clean, *rest = (hits / len(data) for hits in correct.tolist())
    each = len(severities)
    return Robustness(clean, {name: rest[i * each : (i + 1) * each] for i, name in enumerate(names)})


def alignment(
    teacher: Teacher,
    student: nn.Module,
    teacher_layer: str,
    student_layer: str,
    data: Images,
    *,
    estimator: str = "unbiased",
    batch_size: int = 500,
) -> float:
    """CKA between two layers over all the images at once, in eval mode.

    It is unbiased unless asked otherwise: the biased one would depend on how many images there are.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    with evaluating(student) as device, Taps(student, [student_layer]) as taps:
        for images in data.images.split(batch_size):
            x = _channels_last(to_float(images.to(device)))
            student(x)
            rows.append((taps.pop()[student_layer], teacher(x)[teacher_layer]))
        ours, theirs = (torch.cat(side) for side in zip(*rows, strict=True))
        return cka(ours, theirs, estimator=estimator).item()


def _views(x: Tensor, names: Sequence[str], severities: Sequence[int], index: Tensor, seed: int) -> Iterator[Tensor]:
    """The images as they are, then corrupted, one after the other."""
    yield x
    for name in names:
        for severity in severities:
            yield corrupt(x, name, severity, index=index, seed=seed)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
