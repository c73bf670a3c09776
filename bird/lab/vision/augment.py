"""The usual augmentations of small pictures, and views for a guide; batched, decided by sample and epoch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .corruptions.random import Noise, keys

PADDING = 4


class CropFlip:
    """A random crop after padding with zeros by four pixels, and a flip about the vertical axis half of the time.

    What networks for 32x32 pictures are commonly trained with (He et al. 2016, section 4.2).

    Args:
        seed: the same sample meets something else in every epoch, and the same for the same seed.
        flip: whether to flip; not for digits.
    """

    def __init__(self, seed: int = 0, *, flip: bool = True) -> None:
        self.seed, self.flip = seed, flip

    def __call__(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Images ``[n, c, h, w]``, their numbers int64 ``[n]`` and the epoch to images of the same shape."""
        n, _, height, width = x.shape
        noise = Noise(keys(index.to(x.device), 1_000_003 * self.seed + epoch, 0xC209))
        down, right = noise.integers(2 * PADDING + 1, 2).unbind(1)
        rows = down[:, None] + torch.arange(height, device=x.device)
        columns = right[:, None] + torch.arange(width, device=x.device)
        if self.flip:
            flipped = noise.integers(2, 1) == 1
            columns = torch.where(flipped, columns.flip(1), columns)
        sample = torch.arange(n, device=x.device)[:, None, None]
        padded = F.pad(x, [PADDING] * 4).permute(0, 2, 3, 1)
        return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class PhotometricViews:
    """What both networks see where one guides the other: another background, contrast and brightness in each picture.

    Black pixels take a grey level b, then the contrast about the picture's mean is multiplied by c, and a level a is
    added: ``c (x - mean) + mean + a``, with b uniform in 0-1, c in 0.25-1, a in -0.25-0.25, clamped to 0-1.

    Args:
        seed: the same sample meets something else in every epoch, and the same for the same seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Images ``[n, c, h, w]`` in 0-1, their numbers int64 ``[n]`` and the epoch to images of the same shape."""
        noise = Noise(keys(index.to(x.device), 1_000_003 * self.seed + epoch, 0x71E5))
        background, contrast, added = (noise.uniform().view(-1, 1, 1, 1) for _ in range(3))
        x = torch.where(x == 0, background, x)
        mean = x.mean((1, 2, 3), keepdim=True)
        return ((0.25 + 0.75 * contrast) * (x - mean) + mean + 0.5 * added - 0.25).clamp(0, 1)
