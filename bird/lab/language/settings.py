"""How long and how language models are trained: one budget for classifiers and for tuned students."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """How long and how to train.

    Args:
        epochs: passes over the data.
        batch_size: texts, or pairs of responses, of an optimizer step; CKA compares all of them.
        micro_batch: so many in memory at a time, a divisor; None for all.
        lr: of Adam, along a cosine to zero.
        max_length: tokens of a text.
        preference_beta: DPO's own beta: how far from the reference the student may go.
        warmup: share of the steps in which the learning rate rises.
        bf16: autocast.
        adapters: rank of LoRA adapters on all linear layers; 0 trains every weight.
    """

    epochs: int = 1
    batch_size: int = 32
    micro_batch: int | None = None
    lr: float = 5e-5
    max_length: int | None = None
    preference_beta: float = 0.1
    warmup: float = 0.0
    bf16: bool = False
    adapters: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} must divide batch_size {self.batch_size}")
        for name in ("lr", "preference_beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1 or self.adapters < 0:
            raise ValueError(f"warmup must be in [0, 1) and adapters not negative, not {self.warmup}, {self.adapters}")
