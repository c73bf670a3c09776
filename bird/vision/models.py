"""Two small networks of different families and widths for 28x28 grey images: quick on a CPU.

Both take float32 ``[n, 1, height, width]`` in 0-1, normalise it themselves, and return logits ``[n,
classes]``. Layers worth tapping, with the shape of what they give for a 28x28 image:

| network    | layer    | shape          |
|------------|----------|----------------|
| `PlainNet` | ``block1`` | ``[n, 32, 14, 14]`` |
|            | ``block2`` | ``[n, 64, 7, 7]``   |
|            | ``block3`` | ``[n, 96, 7, 7]``   |
| `ResNet`   | ``layer1`` | ``[n, 16, 14, 14]`` |
|            | ``layer2`` | ``[n, 24, 7, 7]``   |
|            | ``layer3`` | ``[n, 48, 4, 4]``   |
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

FASHION_MEAN, FASHION_STD = 0.286, 0.353


def _conv(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps (or strides) the picture's size, then batch normalisation."""
    return [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class PlainNet(nn.Module):
    """Four 3x3 convolutions, one after the other: 79,000 parameters, 96 features at the end."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(1, 16, stride=2), nn.ReLU())
        self.block1 = nn.Sequential(*_conv(16, 32), nn.ReLU())
        self.block2 = nn.Sequential(*_conv(32, 64, stride=2), nn.ReLU())
        self.block3 = nn.Sequential(*_conv(64, 96), nn.ReLU())
        self.head = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1, h, w]`` in 0-1 to logits ``[n, classes]``."""
        x = self.stem((x - FASHION_MEAN) / FASHION_STD)
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
    """Three residual blocks: 47,000 parameters, 48 features at the end."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(1, 16, stride=2), nn.ReLU())
        self.layer1 = ResidualBlock(16, 16, stride=1)
        self.layer2 = ResidualBlock(16, 24, stride=2)
        self.layer3 = ResidualBlock(24, 48, stride=2)
        self.head = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1, h, w]`` in 0-1 to logits ``[n, classes]``."""
        x = self.stem((x - FASHION_MEAN) / FASHION_STD)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(x.mean(dim=(2, 3)))
