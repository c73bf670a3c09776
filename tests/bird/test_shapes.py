"""What a training run notes of its alignments, for `bird tune --from-run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bird import BirdLoss, Hints, Taps, Teacher
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.training import TransferGuide, fit
from bird.losses import LwF


def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    return Images(torch.randint(0, 256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(50) % 3)


def network(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 36, 3))


def test_a_run_notes_the_shapes_of_its_loss(tmp_path: Path) -> None:
    """Batches of 32 and 18; pooled features of 6 and 5 channels."""
    student = network(6)
    guide = TransferGuide(Teacher(network(5), ["0"]), Taps(student, ["0"]), BirdLoss(pairs=[("0", "0")]))
    fit(student, images(), Settings(steps=4, batch_size=32), guide=guide, folder=tmp_path, progress=False)
    assert json.loads((tmp_path / "shapes.json").read_text()) == [[18, 6, 5, "float32"], [32, 6, 5, "float32"]]


@pytest.mark.parametrize("kind", ["none", "hints", "lwf", "chunks"])
def test_other_runs_note_nothing(kind: str, tmp_path: Path) -> None:
    student, pairs = network(6), [("0", "0")]
    losses = {"hints": Hints(pairs=pairs, teacher_widths={"0": 6}, student_widths={"0": 6}), "lwf": LwF(pairs=pairs)}
    losses["chunks"] = BirdLoss(pairs=pairs)
    guide = TransferGuide(Teacher(network(6), ["0"]), Taps(student, ["0"]), losses[kind]) if kind in losses else None
    fit(
        student,
        images(),
        Settings(steps=2, batch_size=32, chunk_size=7 if kind == "chunks" else None),
        guide=guide,
        folder=tmp_path,
        progress=False,
    )
    assert not (tmp_path / "shapes.json").exists()


def test_rows_and_features_of_any_number_of_dimensions() -> None:
    loss = BirdLoss(pairs=[("t", "s"), ("u", "s")], row_dims=2)
    teacher = {"t": torch.randn(4, 5, 7), "u": torch.randn(4, 5, 2, 3).bfloat16()}
    loss(torch.zeros(()), teacher, {"s": torch.randn(4, 5, 6).bfloat16()})
    assert loss.shapes == {(20, 6, 7, "float32"), (20, 6, 6, "bfloat16")}
