"""Decoders whose lowest blocks keep their weights, and what these make of a text, which is computed once.

The blocks above learn as they would with the whole network in front of them, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .data import padded_batch


def require_freezable(config: Any, blocks: int) -> None:
    """Raise a ValueError unless a network of this configuration has blocks above the lowest ``blocks`` to train.

    It must be of Llama's architecture, as SmolLM2 is: others add or scale something where their blocks begin.
    """
    if config.model_type != "llama":
        raise ValueError(f"frozen is for networks of Llama's architecture, not {config.model_type!r}")
    if not blocks < config.num_hidden_layers:
        raise ValueError(f"frozen = {blocks} leaves none of {config.num_hidden_layers} blocks to train")


class LowerBlocks:
    """The embeddings and the lowest blocks of a decoder, and their outputs for every text so far, in memory.

    Args:
        model: what ``AutoModel`` gives; it is used itself, cut and frozen.
        blocks: how many blocks are kept.
    """

    def __init__(self, model: Any, blocks: int) -> None:
        require_freezable(model.config, blocks)
        model.layers, model.norm = model.layers[:blocks], nn.Identity()
        self.model = model.eval().requires_grad_(False)
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``[B, T, D]`` of token ids and a mask ``[B, T]``, 0 for padding, where they are zero."""
        here = mask.ne(0)
        rows = [tuple(row[of].tolist()) for row, of in zip(ids, here, strict=True)]
        if new := sorted({*rows} - self.kept.keys()):
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                hidden = self.model.to(ids.device)(**padded_batch(new, device=ids.device), use_cache=False)[0]
            self.kept |= {row: states[: len(row)].clone() for row, states in zip(new, hidden, strict=True)}
        states = torch.cat([self.kept[row].to(ids.device) for row in rows])
        return states.new_zeros(*ids.shape, states.shape[1]).masked_scatter(here[:, :, None], states)


class UpperBlocks(nn.Module):
    """A decoder of which the blocks above the frozen ones are parameters, and nothing else.

    Args:
        model: what ``AutoModel`` gives; it is used itself, and cut.
        lower: its embeddings and lowest blocks; shared, no part of this module, so not in its state.
    """

    def __init__(self, model: Any, lower: LowerBlocks) -> None:
        super().__init__()
        model.layers, model.embed_tokens = model.layers[len(lower.model.layers) :], None
        self.upper, self.lower, self.config = model, lower, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Any:
        """The final hidden state ``[B, T, D]``, as the whole network's output has it."""
        states = self.lower(input_ids, attention_mask)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        return self.upper(inputs_embeds=states, **given)
