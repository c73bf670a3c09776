"""TRL's trainers with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl import DPOTrainer, SFTTrainer

from .guidance import Sequences
from .mixin import BirdMixin


class BirdSFTTrainer(BirdMixin, SFTTrainer):
    """`trl.SFTTrainer` with ``guidance=``, see `BirdMixin`. The tokens that the loss counts are the completion."""


class BirdDPOTrainer(BirdMixin, DPOTrainer):
    """`trl.DPOTrainer` with ``guidance=``, see `BirdMixin`, for any of its losses and reference models.

    A batch of B pairs has 2 B sequences, chosen ones and then rejected ones; ``Guidance(rows=)`` selects among them.
    """

    def bird_sequences(self, inputs: Mapping[str, Any]) -> Sequences:
        """The sequences of a preference batch that ``Guidance(rows=)`` selects."""
        whole, rows = super().bird_sequences(inputs), self.bird_guide.guidance.rows
        part = {"both": slice(None), "rejected": slice(len(whole.ids) // 2, None)}.get(rows, slice(len(whole.ids) // 2))
        ids, mask, completion = whole.ids[part], whole.mask[part], inputs["completion_mask"][part]
        if rows == "prompt":
            mask, completion = mask * (1 - completion), completion * 0
        return Sequences(ids, mask, completion, part)
