"""The images that ship with the package, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bird.lab.vision.data import Splits
from bird.lab.vision.datasets import load


def fashion(classes: Sequence[int], **options: Any) -> Splits:
    """Some classes of the shipped part of Fashion-MNIST, 32 x 32; options as of `bird.lab.vision.datasets.load`."""
    return load("fashion-mnist-subset", classes=classes, **options)
