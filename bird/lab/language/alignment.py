"""How much of a teacher's geometry a language model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bird_kernels import cka

from ...language.guidance import Guide, Sequences
from .data import padded_batch, token_ids


@torch.no_grad()
def text_alignment(guide: Guide, model: Any, tokenizer: Any, texts: Sequence[str], size: int = 32) -> float:
    """Unbiased CKA of teacher and student over texts, each pooled as in training.

    For ``completion_only`` the first token stands for the prompt. In the middle of a decoder its state is a hundred
    times as long as the others (Sun et al., Massive Activations in Large Language Models, 2024), so that a mean over
    all tokens says little more than how long a text is.
    """
    ours, theirs, only = [], [], guide.guidance.completion_only
    device = next(model.parameters()).device
    for start in range(0, len(texts), size):
        # With the end that TRL's trainer adds, since the last token is the one that is read.
        rows = [[*token_ids(tokenizer, text), tokenizer.eos_token_id] for text in texts[start : start + size]]
        batch = padded_batch(rows, device=device)
        guide.taps.listen()
        model(**batch)
        completion = batch["attention_mask"].clone()
        completion[:, 0] = 0
        sequences = Sequences(batch["input_ids"], batch["attention_mask"], completion if only else None)
        ours.append(guide.student_rows(sequences))
        theirs.append(guide.teacher_rows(sequences))
    guide.taps.remove()
    return cka(torch.cat(ours), torch.cat(theirs), estimator="unbiased").item()
