"""The problems that are measured, by name, and the features they are measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One size of the loss: student ``x [n, p]``, which needs a gradient, and frozen teacher ``y [n, q]``."""

    name: str
    n: int
    p: int
    q: int

    def features(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Student and teacher features that share part of their geometry and look like pooled activations.

        A common signal of 32 directions plus noise of each side's own, through a ReLU: not negative, with a
        mean of about the spread, so that a provider which centres badly is caught by the gate.
        """
        generator = torch.Generator().manual_seed(self.n)
        signal = torch.randn(self.n, 32, generator=generator)

        def side(width: int) -> Tensor:
            mixing = torch.randn(32, width, generator=generator) / 32**0.5
            noise = torch.randn(self.n, width, generator=generator)
            return torch.relu(signal @ mixing + noise + 0.5).to(device=device, dtype=dtype)

        return side(self.p), side(self.q)


PROBLEMS = (
    Problem("bird", 128, 512, 512),  # the paper's setting: ResNet18 to ResNet18, pooled
    Problem("bird-wide", 128, 512, 1280),  # ResNet18 learns from MobileNetV2
    Problem("conv", 128, 25_088, 25_088),  # 512 channels of 7 x 7, not pooled: memory-bound
    Problem("n512", 512, 512, 512),
    Problem("tall", 8192, 256, 256),  # n >> d: the feature form's ground
    Problem("n4096", 4096, 1024, 1024),
)

# Shapes for the claim that no hand-written form is faster: both sides of the crossing at n = 2d.
SWEEP = tuple(
    Problem(f"{n} x {p} x {q}", n, p, q)
    for n, p, q in (
        (16, 64, 64),
        (32, 512, 512),
        (64, 2048, 2048),
        (128, 64, 64),
        (128, 128, 768),
        (128, 512, 512),
        (128, 512, 1280),
        (128, 2048, 512),
        (256, 256, 256),
        (333, 200, 700),
        (512, 64, 2048),
        (512, 512, 512),
        (1024, 512, 512),
        (1024, 2048, 2048),
        (2048, 128, 128),
        (2048, 1024, 1024),
        (4096, 576, 1024),
    )
)
