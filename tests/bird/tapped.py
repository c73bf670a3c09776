"""Small networks for the tests of taps, teachers and losses, and what their layers give without hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bird.taps import Taps


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """Stem, two blocks in a ModuleList, a head; ``how`` says how the blocks are run."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 4)
        self.how, self.skip = how, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[: 1 if self.skip else 2]:
            if self.how == "no_grad":
                with torch.no_grad():
                    x = block(x)
            elif self.how == "plain":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x.mean((2, 3)))


def by_hand(net: Net, images: Tensor) -> dict[str, Tensor]:
    """The same features without hooks."""
    x = net.stem(images)
    features = {}
    for i, block in enumerate(net.blocks):
        x = block(x)
        features[f"blocks.{i}"] = x.flatten(2).sum(2) / x[0, 0].numel()
    return features


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def guidance(features: dict[str, Tensor]) -> Tensor:
    return sum((value.square() * torch.linspace(1, 2, 6)).sum() for value in features.values())


def plain_gradients(net: Net, images: Tensor, names: Any, pool: Any = "mean") -> list[Tensor]:
    """Of the sum of the logits and guidance by taps, in a plain forward."""
    with Taps(net, names, pool=pool) as taps:
        return gradients(net(images).sum() + guidance(taps.pop()), net)


# Features of a teacher and of a student, and the pairs of their layers

PAIRS = [("layer4", "features.3"), ("layer3", "features.2")]
WIDTHS = {"layer4": 5, "layer3": 7}, {"features.3": 6, "features.2": 4}
TASK = torch.tensor(1.75)


def features(seed: int, widths: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(16, width, generator=generator, dtype=torch.float64) for name, width in widths.items()}
    return {name: value.float() + 0.5 for name, value in rows.items()}


def wide(student: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in student.items()}
