"""The images that ship with the package, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bird.lab.vision.data import Splits
from bird.lab.vision.datasets import load_splits


def fashion(classes: Sequence[int], **options: Any) -> Splits:
    """Some classes of the shipped part of Fashion-MNIST; options as of `bird.lab.vision.datasets.load_splits`."""
    return load_splits("fashion-mnist-subset", classes=classes, **options)
