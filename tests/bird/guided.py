"""Features of a teacher and of a student, and the pairs of their layers, for the tests of the guided losses."""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = [("layer4", "features.3"), ("layer3", "features.2")]
WIDTHS = {"layer4": 5, "layer3": 7}, {"features.3": 6, "features.2": 4}
TASK = torch.tensor(1.75)


def features(seed: int, widths: dict[str, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(16, width, generator=generator, dtype=torch.float64).to(dtype) + 0.5
        for name, width in widths.items()
    }


def wide(student: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in student.items()}
