"""Labelled images in memory, and splits into training, validation and test sets by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Labelled images, all in memory; other dtypes and shapes raise a ValueError.

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
        """The samples at the positions ``index`` (int64 ``[m]``), in that order."""
        return Images(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """Disjoint sets: ``train`` to fit, ``validation`` to make choices, ``test`` for the final report only."""

    train: Images
    validation: Images
    test: Images


def to_float(images: Tensor) -> Tensor:
    """uint8 0-255 to float32 0-1, same shape and device."""
    return images.float() / 255


def split_by_class(
    train: Images, test: Images, classes: Sequence[int], *, validation: float, seed: int, limit_per_class: int | None
) -> Splits:
    """Set random training images of each class aside for validation; the test set does not depend on the seed.

    Images are ordered class by class, those of the test set within a class as they were.

    Args:
        train: the images that are divided into training and validation set.
        test: labels numbered as in ``train``.
        classes: the labels to keep, renumbered 0, 1, ... in the order given.
        validation: the share of each class, below 1; at least one image if it is not 0.
        seed: decides which ones.
        limit_per_class: the most images to keep of each class in each of the three sets, the first ones; None: all.

    Raises:
        ValueError: no training image of a class would be left, or the limit is below 1.
    """
    if limit_per_class is not None and limit_per_class < 1:
        raise ValueError(f"limit_per_class must be at least 1, got {limit_per_class}")
    generator = torch.Generator().manual_seed(seed)
    fit, aside, last = [], [], []
    for c in classes:
        members = _members(train, c)
        count = max(1, round(validation * len(members))) if validation else 0
        if count >= len(members):
            raise ValueError(
                f"{count} of class {c}'s {len(members)} training images validate: none is left to train on"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        aside.append(members[:count][:limit_per_class])
        fit.append(members[count:][:limit_per_class])
        last.append(_members(test, c)[:limit_per_class])
    return Splits(_gather(train, fit), _gather(train, aside), _gather(test, last))


def of_classes(data: Images, classes: Sequence[int]) -> Images:
    """The images of some classes, class by class in the order given, renumbered 0, 1, ...; each in its order."""
    return _gather(data, [_members(data, c) for c in classes])


def require_classes(classes: Sequence[int], number: int) -> None:
    """Raise a ValueError unless ``classes`` are different numbers below ``number``."""
    if not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(number)):
        raise ValueError(f"classes must be different numbers from 0 to {number - 1}, got {list(classes)}")


def _members(data: Images, c: int) -> Tensor:
    return (data.labels == c).nonzero().squeeze(1)


def _gather(data: Images, members: list[Tensor]) -> Images:
    """The images at some indices, given class by class; the position of a class in ``members`` becomes its label."""
    labels = torch.cat([torch.full((len(index),), k) for k, index in enumerate(members)])
    return Images(data.images[torch.cat(members)], labels)
