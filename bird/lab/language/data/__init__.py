"""Rows of text as plain data, and what divides them: seeded, and the same on every machine.

Nothing here is a `datasets` object; ``Dataset.from_dict(columns(rows))`` makes one where a trainer wants it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

# What TRL calls standard (a string) or conversational (messages with "role" and "content").
Text: TypeAlias = "str | list[dict[str, str]]"


@dataclass(frozen=True)
class Labelled:
    """A text and its class: 0 or 1 everywhere in this package."""

    text: str
    label: int


@dataclass(frozen=True)
class Preference:
    """A prompt and two ways to go on, in TRL's explicit format: all three strings, or all three lists of messages.

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
    """Disjoint random parts of the given sizes; what is left over is in none of them.

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
    """As many of either class: a random surplus is dropped, and the order of the others stays.

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
