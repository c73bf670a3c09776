"""The first layer of every network: normalises images in 0-1 by the mean and deviation of a data set, or their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Mean and standard deviation of all training pixels, by the number of channels: Fashion-MNIST's, CIFAR-10's.
STATISTICS = {
    1: ((0.286,), (0.353,)),
    3: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


class Normalise(nn.Module):
    """``(x - mean) / std``, channel by channel: Fashion-MNIST's for grey images, CIFAR-10's for colour.

    Args:
        channels: 1 or 3.

    Raises:
        ValueError: another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels not in STATISTICS:
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), not {channels}")
        for name, values in zip(("mean", "std"), STATISTICS[channels], strict=True):
            # Constants: they move with the network, but are not in its state_dict.
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[n, channels, h, w]``; the shape stays."""
        return (x - self.mean) / self.std


class Standardise(Normalise):
    """Each image by itself: ``(x - mean) / deviation`` over its pixels and channels; one that does not vary becomes 0.

    In the network and not in the data: corruptions act on images of 8 bits in 0-1, and what one adds to every pixel
    (brightness, most of a fog) or scales (contrast) is taken away again before the first weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Standardise ``[n, channels, h, w]``; the shape stays."""
        centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
        return centred / centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1 / 255)
