r"""Weak-to-strong generalization (Burns et al., 2023) with a weak teacher's geometry: the parts of the protocol.

Training rows are cut in two (`bird.lab.language.data.halves`). A weak model learns the first half from true labels
(`train_classifier`, on `certain` targets); the second half gets its probabilities (`predict`). A strong student learns
those, by itself or with BIRD, where the weak model guides as well as it labels, and, for the ceiling, the true ones.
`recovered` says how much of the gap between the weak model and the ceiling a student has closed.

The published runs have batches of 32, Adam, a cosine to zero, two epochs and a learning rate of 5e-5 (1e-5 for large
models). Gradients are not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..statistics import pgr
from .classifier_training import train_classifier
from .classifiers import Classifier, accuracy, agreement, predict

__all__ = [
    "Classifier",
    "Recovered",
    "accuracy",
    "agreement",
    "certain",
    "predict",
    "recovered",
    "train_classifier",
]


def certain(labels: Sequence[int] | Tensor) -> Tensor:
    """True labels, 0 or 1, as targets ``[N, 2]``.

    Raises:
        ValueError: another label.
    """
    labels = torch.as_tensor(labels)
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1")
    return F.one_hot(labels.long(), 2).float()


@dataclass(frozen=True)
class Recovered:
    """Performance gap recovered, a share of 1.

    Args:
        raw: as it is; negative where the student is worse than the weak model, NaN where there is no gap.
        clipped: no less than 0, as published; NaN stays.
    """

    raw: float
    clipped: float


def recovered(strong: float, *, weak: float, ceiling: float) -> Recovered:
    """``(strong - weak) / (ceiling - weak)`` of accuracies; NaN unless the ceiling is above the weak model.

    Args:
        strong: of the strong student that learned from the weak model.
        weak: of the weak model.
        ceiling: of the strong model that learned from true labels.
    """
    raw = pgr(strong, weak, ceiling) if ceiling > weak else math.nan
    return Recovered(raw, raw if math.isnan(raw) else max(raw, 0.0))
