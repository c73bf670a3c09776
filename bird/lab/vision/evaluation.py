"""Accuracy on clean and on corrupted images, and the alignment (CKA) of features with a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Accuracies, in 0-1.

    Args:
        clean: on clean images.
        corrupted: for each corruption a list with one accuracy per severity.
    """

    clean: float
    corrupted: dict[str, list[float]]

    @property
    def robust(self) -> float:
        """Robust accuracy: the mean over corruptions and severities, without clean images."""
        return fmean(fmean(accuracies) for accuracies in self.corrupted.values())

    @property
    def pooled(self) -> float:
        """The paper's measure: the mean over severities with 0, so that with five the clean accuracy has weight 1/6."""
        severities = len(next(iter(self.corrupted.values())))
        return (self.clean + severities * self.robust) / (1 + severities)


def image_accuracy(model: nn.Module, data: Images, *, batch_size: int = 500) -> float:
    """The share of images that are classified correctly, in eval mode without gradients, on the model's device.

    Args:
        model: images ``[n, c, h, w]`` in 0-1 to logits ``[n, classes]``.
        data: on any device; batches are moved to the model's.
        batch_size: images at a time.

    Raises:
        ValueError: no images.
    """
    if len(data) == 0:
        raise ValueError("there are no images to evaluate on")
    with evaluating(model) as device:
        right = torch.zeros((), dtype=torch.int64, device=device)
        for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
            found = model(_channels_last(to_float(images.to(device)))).argmax(dim=1)
            right += (found == labels.to(device)).sum()
        return right.item() / len(data)


def robustness(
    model: nn.Module, data: Images, names: Sequence[str], severities: Sequence[int] = SEVERITIES
) -> Robustness:
    """Score a model on clean images and on corrupted ones, which are rounded to 8 bits like published ones.

    Args:
        model: as for `image_accuracy`.
        data: clean images, corrupted on their device.
        names: keys of `bird.lab.vision.corruptions.CORRUPTIONS`; each is applied at every severity.
        severities: 1 to `bird.lab.vision.corruptions.STRONGEST`.

    Raises:
        ValueError: no images, or an unknown corruption.
    """
    accuracies = {
        name: [image_accuracy(model, corrupted(data, name, severity)) for severity in severities] for name in names
    }
    return Robustness(image_accuracy(model, data), accuracies)


def first(data: Images, count: int | None) -> Images:
    """A fixed random choice of ``count`` images; all if ``count`` is None or larger."""
    if count is None or count >= len(data):
        return data
    return data.select(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count])


def corrupted(data: Images, name: str, severity: int) -> Images:
    """The same images under a corruption, in 8 bits."""
    parts = []
    for index in torch.arange(len(data), device=data.images.device).split(500):
        view = corrupt(to_float(data.images[index]), name, severity, index=index)
        parts.append(view.mul_(255).round_().to(torch.uint8))
    return Images(torch.cat(parts), data.labels)


def layer_alignment(
    teacher: Teacher,
    student: nn.Module,
    teacher_layer: str,
    student_layer: str,
    data: Images,
    *,
    batch_size: int = 500,
) -> float:
    """CKA between two layers over all images at once, in eval mode.

    The unbiased estimator is used, because the biased one depends on the number of images.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    with evaluating(student) as device, Taps(student, [student_layer]) as taps:
        for images in data.images.split(batch_size):
            x = _channels_last(to_float(images.to(device)))
            student(x)
            rows.append((taps.pop()[student_layer], teacher(x)[teacher_layer]))
        ours, theirs = (torch.cat(side) for side in zip(*rows, strict=True))
        return cka(ours, theirs, estimator="unbiased").item()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
