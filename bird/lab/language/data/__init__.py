"""Rows of text as dataclasses, seeded splits that are equal on every machine, and prompts as text and tokens.

`datasets` is not used here; ``Dataset.from_dict(columns(rows))`` converts rows for a trainer that needs it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

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


def columns(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Rows of one dataclass as ``{field: values}``, the shape that ``datasets.Dataset.from_dict`` takes.

    Raises:
        ValueError: no rows, so nothing says which fields there are.
    """
    if not rows:
        raise ValueError("there are no rows")
    return {field.name: [getattr(row, field.name) for row in rows] for field in fields(rows[0])}


def split(rows: Sequence[T], sizes: Sequence[int], seed: int) -> list[list[T]]:
    """Disjoint random parts of the given sizes; remaining rows are dropped.

    Raises:
        ValueError: a negative size, or more rows asked for than there are.
    """
    if min(sizes, default=0) < 0 or sum(sizes) > len(rows):
        raise ValueError(f"{len(rows)} rows cannot be split into parts of {list(sizes)}")
    order = list(rows)
    random.Random(seed).shuffle(order)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [order[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def halves(rows: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """Two random halves: the weak teacher learns from the first, and labels the second for the strong student.

    Of an odd number the second has one more.
    """
    half = len(rows) // 2
    first, second = split(rows, (half, len(rows) - half), seed)
    return first, second


def balance(rows: Sequence[Labelled], seed: int) -> list[Labelled]:
    """Equally many rows of both classes: a random surplus is dropped, and the order of the others is kept.

    Raises:
        ValueError: a label that is not 0 or 1.
    """
    positions: tuple[list[int], list[int]] = [], []
    for i, row in enumerate(rows):
        if row.label not in (0, 1):
            raise ValueError(f"row {i} has the label {row.label!r}, which is not 0 or 1")
        positions[row.label].append(i)
    count = min(map(len, positions))
    draw = random.Random(seed)
    kept = sorted(i for of_class in positions for i in draw.sample(of_class, count))
    return [rows[i] for i in kept]


def plain(prompt: Prompt) -> str:
    """A prompt as readable text: of one message its content, of several a line ``role: content`` for each."""
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


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 ``[rows, longest]``.

    The mask follows from lengths, not from the padding's id, which may be a token of texts, too (many tokenizers pad
    with the end of text).
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

    Words are separated by white space and not normalised. Without any n-gram, as for empty responses, it is 0. It falls
    with the amount of text: compare equal numbers of responses with equal length limits.

    Raises:
        ValueError: ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    words = [text.split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
