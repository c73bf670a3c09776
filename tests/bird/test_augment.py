"""Random crops and flips: each result is one of the 162 that there are, and depends on sample and epoch alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bird.lab.vision.augment import CropFlip


def choices(x: Tensor) -> Tensor:
    """All crops of one image ``[c, h, w]`` after padding by four, plain and flipped, ``[2, 9, 9, c, h, w]``."""
    padded = F.pad(x, [4] * 4)
    height, width = x.shape[1:]
    crops = torch.stack([torch.stack([padded[:, i : i + height, j : j + width] for j in range(9)]) for i in range(9)])
    return torch.stack([crops, crops.flip(-1)])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 12, 10)])
def test_every_result_is_a_crop(shape: tuple[int, int, int], flip: bool) -> None:
    n = 1500
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = CropFlip(1, flip=flip)(image.expand(n, *shape).contiguous(), torch.arange(n), 0)
    known = choices(image).flatten(0, 2).flatten(1)
    distance = torch.cdist(found.flatten(1).double(), known.double())
    nearest = distance.argmin(1)
    assert torch.equal(known[nearest], found.flatten(1))
    counts = torch.bincount(nearest, minlength=162)
    used = counts if flip else counts[:81]
    assert counts.sum() == used.sum()
    expected = n / len(used)  # chi-square of a uniform choice: at 161 degrees its 99.9 % lies at 223, at 80 at 125
    assert ((used - expected) ** 2 / expected).sum() < {162: 223, 81: 125}[len(used)]


def test_it_depends_on_sample_epoch_and_seed_alone() -> None:
    x = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    index = torch.randperm(1000)[:50]
    whole = CropFlip(2)(x, index, 3)
    some = torch.tensor([7, 3, 40])
    assert CropFlip(2)(x[some], index[some], 3).equal(whole[some])
    assert not CropFlip(2)(x, index, 4).equal(whole)
    assert not CropFlip(3)(x, index, 3).equal(whole)
