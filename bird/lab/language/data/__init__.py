"""Rows of text as dataclasses, seeded splits that are equal on every machine, and prompts as text and tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

T = TypeVar("T")

# What TRL calls standard (a string) or conversational (messages with "role" and "content").
Text: TypeAlias = "str | list[dict[str, str]]"
# A string that is continued as it is, or messages {"role": ..., "content": ...} for the chat template.
Prompt: TypeAlias = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Labelled:
    """A text and its class: 0 or 1 everywhere in this package."""

    text: str
    label: int


@dataclass(frozen=True)
class Preference:
    """A prompt and two completions, in TRL's explicit format: all three strings, or all three lists of messages.

    Strings are joined as they stand: ``prompt + chosen`` is the text. The space between them begins the completion, as
    tokenizers merge a space with the word behind it.
    """

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Material:
    """The texts of one seed for a recipe of preferences; what is held out is in no other part.

    Args:
        pairs: preferences, to train students on.
        prompts: held out, to be answered.
        texts: held out, for perplexity and alignment.
        taught: (prompt, response) and whether it is good, to train the teacher on.
        judged: texts and whether they are good, to train a bag of words on.
        tested: preferences that are held out; none where there is one set of pairs for all.
    """

    pairs: list[Preference]
    prompts: list[Text]
    texts: list[str]
    taught: list[tuple[Text, Text, int]]
    judged: list[Labelled]
    tested: list[Preference] = field(default_factory=list)


def random_parts(rows: Sequence[T], first: int, seed: int) -> tuple[list[T], list[T]]:
    """``first`` random rows, and the others; both in random order."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order[:first], order[first:]


def random_halves(rows: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """Two random halves; of an odd number the second has one more."""
    return random_parts(rows, len(rows) // 2, seed)


def balance(rows: Sequence[Labelled], seed: int) -> list[Labelled]:
    """Equally many rows of both classes: a random surplus is dropped, and the order of the others is kept."""
    positions = [[i for i, row in enumerate(rows) if row.label == label] for label in (0, 1)]
    count = min(map(len, positions))
    draw = random.Random(seed)
    kept = sorted(i for of_class in positions for i in draw.sample(of_class, count))
    return [rows[i] for i in kept]


def as_text(prompt: Prompt) -> str:
    """A prompt as readable text: the content of a single message, or a line ``role: content`` for each of several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt. The tokenizer adds its special tokens to a string; a chat template has its own.

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


def padded_batch(
    rows: Sequence[Sequence[int]], *, left: bool = False, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` for rows of token ids, int64 ``[rows, longest]``.

    The mask follows from lengths, not from the padding's id, which may be a token of texts, too (many tokenizers pad
    with the end of text).
    """
    side = "left" if left else "right"
    ids, mask = (
        pad_sequence([torch.tensor(row) for row in table], batch_first=True, padding_side=side)
        for table in (rows, [[1] * len(row) for row in rows])
    )
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def distinct_pairs(texts: Sequence[str]) -> float:
    """Distinct-2 (Li et al., NAACL 2016): different pairs of neighbouring words of all texts, over all such pairs.

    Words are separated by white space and not normalised. Without any pair, as for empty responses, it is 0. It falls
    with the amount of text: compare equal numbers of responses with equal length limits.
    """
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
