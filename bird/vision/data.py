"""Images in memory: the Fashion-MNIST subset that ships with the package, and its splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor

CLASS_NAMES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class Images:
    """Labelled images, held whole in memory.

    Args:
        images: uint8 ``[n, channels, height, width]``, 0-255.
        labels: int64 ``[n]``, 0 to classes - 1.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [n, channels, height, width], got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor) -> Images:
        """The samples at the positions `index` (int64 ``[m]``), in that order."""
        return Images(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Images:
        """The same on another device."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """Disjoint sets: ``train`` to fit, ``validation`` to choose with, ``test`` to report on, at the end."""

    train: Images
    validation: Images
    test: Images


def to_float(images: Tensor) -> Tensor:
    """uint8 0-255 to float32 0-1, same shape and device."""
    return images.float() / 255


def load_fashion(
    classes: Sequence[int],
    *,
    validation_per_class: int = 100,
    seed: int = 0,
    limit_per_class: int | None = None,
) -> Splits:
    """Load the shipped Fashion-MNIST images of some classes: 1200 for training and 250 for testing per class,
    28x28.

    Args:
        classes: classes to keep, 0-9; labels are renumbered 0, 1, ... in the order given.
        validation_per_class: how many training images of each class are set aside for validation.
        seed: decides which ones; the test set is the same for every seed.
        limit_per_class: keep at most so many images of each class in each of the three sets.

    Raises:
        ValueError: classes out of range or repeated; no training image left.
    """
    if not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(len(CLASS_NAMES))):
        raise ValueError(f"classes must be different numbers from 0 to 9, got {list(classes)}")
    path = resources.files("bird.vision") / "fashion" / "fashion_mnist.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images = {split: torch.from_numpy(arrays[f"{split}_images"]).unsqueeze(1) for split in ("train", "test")}
        labels = {split: torch.from_numpy(arrays[f"{split}_labels"]) for split in ("train", "test")}
    available = int((labels["train"] == classes[0]).sum())
    if not 0 < validation_per_class < available:
        raise ValueError(f"validation_per_class must be between 1 and {available - 1}, got {validation_per_class}")

    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for c in classes:
        members = (labels["train"] == c).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        parts["validation"].append(members[:validation_per_class][:limit_per_class])
        parts["train"].append(members[validation_per_class:][:limit_per_class])
        parts["test"].append((labels["test"] == c).nonzero().squeeze(1)[:limit_per_class])

    def gather(part: str, source: str) -> Images:
        new = torch.cat([torch.full((len(index),), k) for k, index in enumerate(parts[part])])
        return Images(images[source][torch.cat(parts[part])], new)

    return Splits(gather("train", "train"), gather("validation", "train"), gather("test", "test"))
