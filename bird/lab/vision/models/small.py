"""Small networks of three families for a CPU: a step of 64 images in 10 to 20 ms on one core.

All take float32 ``[n, channels, height, width]`` in 0-1, normalise it themselves, begin with a strided convolution, and
return logits ``[n, classes]``. For a 32x32 image the stages of `ResNet` have 16x16, 8x8 and 4x4 positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .normalise import Normalise, Standardise


def _conv(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the image's size (divided by the stride), then batch normalisation."""
    return [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class PlainNet(nn.Module):
    """Four 3x3 convolutions without shortcuts: 79,000 parameters, 96 features before the head."""

    def __init__(self, classes: int, *, channels: int = 1) -> None:
        super().__init__()
        self.normalise = Normalise(channels)
        self.stem = nn.Sequential(*_conv(channels, 16, stride=2), nn.ReLU())
        self.block1 = nn.Sequential(*_conv(16, 32), nn.ReLU())
        self.block2 = nn.Sequential(*_conv(32, 64, stride=2), nn.ReLU())
        self.block3 = nn.Sequential(*_conv(64, 96), nn.ReLU())
        self.head = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, h, w]`` in 0-1 to logits ``[n, classes]``."""
        x = self.stem(self.normalise(x))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """``relu(shortcut(x) + conv(relu(conv(x))))``, after He et al. (2016)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(inputs, outputs, stride=stride), nn.ReLU(), *_conv(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, size=1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        return F.relu(self.shortcut(x) + self.body(x))


class ResNet(nn.Module):
    """Three residual blocks, each with half the positions of the one before; the default has 47,000 parameters.

    Args:
        classes: how many logits.
        channels: of the images, 1 or 3.
        widths: channels of the three blocks; the last is the number of features before the head.
        own: standardise each image by itself, not by a data set's mean and deviation.
    """

    def __init__(
        self, classes: int, *, channels: int = 1, widths: Sequence[int] = (16, 24, 48), own: bool = False
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.normalise = (Standardise if own else Normalise)(channels)
        self.stem = nn.Sequential(*_conv(channels, first, stride=2), nn.ReLU())
        self.layer1 = ResidualBlock(first, first, stride=1)
        self.layer2 = ResidualBlock(first, second, stride=2)
        self.layer3 = ResidualBlock(second, third, stride=2)
        self.head = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, h, w]`` in 0-1 to logits ``[n, classes]``."""
        x = self.stem(self.normalise(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(x.mean(dim=(2, 3)))
