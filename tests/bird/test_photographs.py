"""Fashion-MNIST over photographs: composed as by hand, photographs of one set in no other, the same whenever read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bird.lab.vision.corruptions.random import Noise
from bird.lab.vision.data import Images, Splits
from bird.lab.vision.datasets import DATASETS, load_splits, photographs
from bird.lab.vision.datasets.photographs import FILES, PHOTOGRAPHS, SIDE, over, over_levels, patches
from tests.bird import official_files as official

SHADES = {(3 * k, 255 - 3 * k, 100): k for k in range(len(FILES))}  # of each photograph here, which has no other


@pytest.fixture
def root(tmp_path: Path, expect: Callable[..., None]) -> Path:
    """Photographs of one shade each, and garments of which every second is black."""
    for shade, k in SHADES.items():
        path = tmp_path / "photographs" / FILES[k]
        official.write_image(path.with_suffix(".png"), np.full((SIDE + k, SIDE, 3), shade, np.uint8))
        path.with_suffix(".png").rename(path)
    train, test = (official.make_arrays(n, 10, n, (28, 28)) for n in (400, 100))
    for images, _ in (train, test):
        images[::2] = 0
        images[::2, 0, 0] = np.arange(len(images[::2])) % 256  # else they were one garment
        images[::2, 0, 1] = np.arange(len(images[::2])) // 256
    official.write_fashion(tmp_path / "FashionMNIST/raw", train, test)
    for name in ("fashion-mnist", "fashion-photos"):
        expect(name, counts=(400, 100))
    return tmp_path


def shades(images: Tensor) -> set[int]:
    """Which photographs the pictures of black garments lie over."""
    corners = [tuple(pixel.tolist()) for pixel in images[:, :, -1, -1]]  # where no garment is
    return {SHADES[corner] for corner in corners}


def test_the_difference_by_hand() -> None:
    background = torch.tensor([10, 200, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    garment = torch.tensor([[50, 0, 255]], dtype=torch.uint8).view(1, 1, 1, 3)
    assert over(background, garment).tolist() == [[[[40, 10, 245]], [[150, 200, 55]], [[20, 30, 225]]]]


def test_a_background_is_a_part_of_a_photograph() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (3, 3, 36, 40), dtype=torch.uint8, generator=generator)
    found = patches(pictures, Noise(torch.arange(200)))
    windows = [p[:, i : i + 32, j : j + 32] for p in pictures for i in range(5) for j in range(9)]
    numbers = {w.numpy().tobytes(): n for n, w in enumerate([*windows, *(w.flip(2) for w in windows)])}
    which = [numbers[patch.numpy().tobytes()] for patch in found]
    assert {n % 135 // 45 for n in which} == {0, 1, 2}  # all pictures, plain and mirrored, and most places
    assert 70 < sum(n >= 135 for n in which) < 130
    assert len({n % 45 for n in which}) > 40


def test_a_photograph_is_in_one_set(root: Path) -> None:
    splits = load_splits("fashion-photos", root, validation=0.25)
    three = [shades(part.images) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part.images) for part in PHOTOGRAPHS.read(root)] == [43, 14, 14]
    for k, own in enumerate(three):
        assert own <= {n for n in range(len(FILES)) if n % 5 in ((0, 1, 2), (3,), (4,))[k]}
    assert len(three[0]) > 38  # ... of which nearly all are used
    assert min(len(three[1]), len(three[2])) > 10
    assert len({Path(name).parts[-4] if "contents" in name else Path(name).stem for name in FILES}) == len(FILES)


def test_a_garment_keeps_its_background(root: Path) -> None:
    plain = load_splits("fashion-mnist", root, validation=0.25)
    whole = load_splits("fashion-photos", root, validation=0.25)
    again = load_splits("fashion-photos", root, validation=0.25, classes=[7, 2], limit_per_class=5)
    assert again.test.images.shape == (10, 3, 32, 32)
    known = {picture.numpy().tobytes() for picture in whole.test.images}
    assert all(picture.numpy().tobytes() in known for picture in again.test.images)
    for found, garments in ((whole.test, plain.test), (whole.train, plain.train)):
        backgrounds = found.images[:, :, -1:, -1:].int()  # the padding shows the photograph
        assert torch.equal(found.images.int(), (backgrounds - garments.images.int()).abs())
    other = load_splits("fashion-photos", root, validation=0.25, seed=1)
    assert torch.equal(other.test.images, whole.test.images)
    order = torch.randperm(100)
    shuffled = over_levels(Splits(*(plain.test.select(order),) * 3), root).test
    assert torch.equal(shuffled.images, over_levels(Splits(*(plain.test,) * 3), root).test.images[order])


def test_levels_of_grey() -> None:
    black = Images(torch.zeros(2000, 1, 32, 32, dtype=torch.uint8), torch.zeros(2000).long())
    black.images[:, 0, 5, 5], black.images[:, 0, 5, 6] = torch.arange(2000) % 256, torch.arange(2000) // 256
    found = over_levels(Splits(black, black, black), Path()).train.images
    levels = found[:, :, :1, :1]
    assert torch.equal(found, over(levels, black.images))
    assert torch.equal(levels, levels[:, :1].expand(-1, 3, -1, -1))
    counts = torch.bincount(levels[:, 0, 0, 0].long(), minlength=256).view(16, 16).sum(1)
    assert counts.min() > 80  # 125 each
    assert counts.max() < 175


def test_what_is_missing_or_broken_is_named(root: Path) -> None:
    photographs._photographs.cache_clear()
    file = root / "photographs" / FILES[30]
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=f"Photographs for backgrounds is broken: .*{file.name} cannot be decoded"):
        load_splits("fashion-photos", root)
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        DATASETS["fashion-photos"].locate(root)
    assert f"(missing: {FILES[30]})" in str(error.value)
    assert "apt-get download gnome-backgrounds" in str(error.value)
    assert "dpkg -x" in str(error.value)
