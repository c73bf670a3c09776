"""`fit` in chunks: the same training, a part of the batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bird import BirdLoss, Hints, Taps, Teacher
from bird.lab.tensors import load_tensors
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.training import TransferGuide, fit


class Cut(Exception):
    """The power goes off."""


def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(50) % 3)


def plain_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def noisy_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(6 * 36, 3)
    )


def train(make: Callable[[], nn.Module], method: str, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    student = make()
    torch.manual_seed(5)
    teacher = Teacher(plain_network(), ["0"])
    guides = {
        "bird": lambda: BirdLoss(pairs=[("0", "0")]),
        "hints": lambda: Hints(pairs=[("0", "0")], teacher_widths={"0": 6}, student_widths={"0": 6}),
    }
    taps = Taps(student, ["0"])
    guide = TransferGuide(teacher, taps, guides[method]()) if method in guides else None
    keys = ("folder", "resume", "augment", "validate")
    rest = {key: options.pop(key) for key in keys if key in options}
    settings = Settings(**({"steps": 8, "batch_size": 32, "lr": 0.05, "log_every": 3, "save_every": 3} | options))
    history = fit(student, images(), settings, guide=guide, progress=False, **rest)
    return student, history


@pytest.mark.parametrize("method", ["none", "hints", "bird"])
def test_fit_in_chunks_is_fit(method: str) -> None:
    """50 images: batches of 32 and 18 in chunks of at most 7."""
    sizes = []

    def watch(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        sizes.append(len(index))
        return x

    whole, rows = train(plain_network, method)
    cut, cut_rows = train(plain_network, method, chunk_size=7, augment=watch)
    passes = 2 if method == "bird" else 1
    assert sizes[: 8 * passes] == passes * [7, 7, 6, 6, 6] + passes * [6, 6, 6]
    for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert [list(row) for row in cut_rows.train] == [list(row) for row in rows.train]
    for ours, theirs in zip(cut_rows.train, rows.train, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("method", "fetched"), [("none", 19), ("hints", 19), ("bird", 38)])
def test_a_resumed_run_in_chunks_ends_with_the_same_bits(tmp_path: Path, method: str, fetched: int) -> None:
    """The power goes off within the fifth step, once ``fetched`` chunks of 5 + 3 + 5 + 3 + 5 were made."""
    left = iter(range(fetched))

    def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        if next(left, None) is None:
            raise Cut
        return x

    whole, history = train(noisy_network, method, chunk_size=7)
    again = {"folder": tmp_path, "resume": True, "chunk_size": 7}
    with pytest.raises(Cut):
        train(noisy_network, method, augment=augment, **again)
    assert load_tensors(tmp_path / "last.pt")["step"] == 3
    resumed, rows = train(noisy_network, method, **again)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert rows == history


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_low_precision_in_chunks_stays_near(amp: str) -> None:
    """float16 with loss scaling, which must reach both passes."""
    options = {"steps": 3, "log_every": 1, "batch_size": 50}
    _, full = train(plain_network, "bird", **options)
    _, low = train(plain_network, "bird", chunk_size=16, amp=amp, **options)
    assert low.train[2]["loss"] == pytest.approx(full.train[2]["loss"], rel=0.05)
    assert low.train[0]["loss"] != full.train[0]["loss"]


def test_a_chunk_is_a_batch_to_normalisation() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 4, not 3"):
        Settings(steps=1, chunk_size=3)
