"""Prompts as text and as tokens, batches of them, and whether texts repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A string that is continued as it is, or messages {"role": ..., "content": ...} for the chat template.
Prompt: TypeAlias = str | Sequence[Mapping[str, str]]


def plain(prompt: Prompt) -> str:
    """A prompt as a person reads it: of one message its content, of several a line ``role: content`` for each."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of a prompt. The tokenizer adds its special ones to a string; a chat template brings its own.

    Raises:
        ValueError: messages, but the tokenizer has no chat template; no tokens.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not getattr(tokenizer, "chat_template", None):
        raise ValueError("a prompt of messages needs a chat template, and the tokenizer has none: pass a string")
    else:
        text = tokenizer.apply_chat_template([*prompt], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens, so there is nothing to continue")
    return list(ids)


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 ``[rows, longest]``.

    The mask comes from lengths: what stands in the padding is never looked at, and may well be a token of texts (with
    many tokenizers the end of text pads).
    """
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n (Li et al., NAACL 2016): different n-grams of all texts together, over all n-grams.

    Words are what stands between spaces, as written. Texts without an n-gram give 0, as does a student that says
    nothing. It falls with the amount of text: compare equally many responses of equal limits.

    Raises:
        ValueError: ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    words = [text.split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
