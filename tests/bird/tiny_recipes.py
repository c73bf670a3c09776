"""Recipes of images that take seconds, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bird.lab import cli
from bird.lab.vision import recipe as recipes
from bird.lab.vision.experiment import VisionExperiment

TINY = """
title = "Tiny"
methods = ["none"]
seeds = 1
corruptions = ["contrast"]
held_out = ["brightness"]
teacher = { data = "fashion-mnist-subset", limit_per_class = 4, augment = "none" }
student = { data = "fashion-mnist-subset", limit_per_class = 4, augment = "none" }
pretraining = { steps = 1, batch_size = 8 }
transfer = { steps = 1, batch_size = 8 }
scoring = { corruptions = ["brightness", "contrast"], images = 8 }
networks.one = { teacher = "plain", student = "plain" }
"""
# Of digits, whose methods and variants matter; what follows says its networks and variants.
DIGITS = """
title = "A try"
methods = ["none", "bird", "ceiling"]
corruptions = ["brightness"]
held_out = ["contrast", "speckle_noise"]
seeds = 1
teacher = { data = "digits", classes = [0, 1, 2], augment = "none" }
student = { data = "digits", classes = [5, 6, 7, 8], augment = "none", limit_per_class = 100 }
pretraining = { steps = 12, batch_size = 16, lr = 0.05 }
transfer = { steps = 8, batch_size = 16, lr = 0.05 }
scoring = { corruptions = ["contrast", "speckle_noise", "brightness"], images = 60 }
"""
CPU = ("--device", "cpu", "--jobs", "1")


def written(folder: Path, text: str, *changes: tuple[str, str]) -> Path:
    """A recipe as try.toml, in which each first of a pair is said as the second."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "try.toml"
    path.write_text(text)
    return path


def command(name: str, path: Path, *more: str, out: Path | None = None) -> int:
    """`bird run`, `select` or `report` of it, into the folder runs beside it."""
    given = () if name == "report" else CPU
    return cli.main([name, str(path), "--out", str(out or path.parent / "runs"), *given, *more])


def experiment_of(path: Path, root: Path | None = None, **options: Any) -> VisionExperiment:
    return VisionExperiment(
        recipes.read_vision(str(path)), root or path.parent / "runs", torch.device("cpu"), **options
    )


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err
