"""Published preferences: any set in TRL's format, and PKU-SafeRLHF, where every answer also has a verdict."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from . import Labelled, Material, Preference, Text, as_text, random_halves
from .files import Record, field_of, read_each, read_rows

PKU = "PKU-Alignment/PKU-SafeRLHF"


def preference_material(source: Path | str, seed: int, held_out: int | None) -> Material:
    """The material of a set of preferences in TRL's format, of whose splits "train" and "test" are read.

    Nothing says which responses are good by themselves: the teacher learns what was chosen, from a random half of the
    pairs; students get the other half.

    Args:
        source: as of `preferences`.
        seed: decides the halves.
        held_out: at most so many prompts and texts; None for all.
    """
    shown, pairs = random_halves(preferences(source, "train"), seed)
    tested = preferences(source, "test")
    held = tested[:held_out]
    taught = [(row.prompt, text, label) for row in shown for label, text in enumerate((row.rejected, row.chosen))]
    return Material(
        pairs=pairs,
        prompts=[row.prompt for row in held],
        texts=[as_text(row.prompt) + as_text(row.chosen) for row in held],
        taught=taught,
        judged=[Labelled(as_text(text), label) for _, text, label in taught],
        tested=tested,
    )


def preferences(source: Path | str, split: str = "train") -> list[Preference]:
    """A preference set with the fields ``chosen`` and ``rejected``, and ``prompt`` or a shared beginning.

    An implicit prompt is taken off as TRL's trainers do it (`trl.data_utils.maybe_extract_prompt`): whole messages of a
    conversation, characters of strings. A string as the prompt of conversations that hold it again gives way to theirs.
    Rows that prefer nothing, of which some published sets have a few, are left out: those with an empty prompt or
    response, or twice the same response. A warning says how many there are.

    Args:
        source: a .jsonl, .json or .parquet file, a folder, or a hub id (see `bird.lab.language.data.files.read_rows`).
        split: which part.

    Raises:
        FileNotFoundError: nothing there, or the hub cannot be reached.
        ValueError: a row without these fields or with others' types; which.
    """
    found = read_each(read_rows(source, split), f"{source}, {split}", _extract)
    dropped = [f"row {i}: {fault}" for i, fault in enumerate(found) if isinstance(fault, str)]
    if dropped:
        warnings.warn(
            f"{source}, {split}: {len(dropped)} of {len(found)} rows dropped, the first {dropped[0]}", stacklevel=2
        )
    return [preference for preference in found if isinstance(preference, Preference)]


def pku_material(source: Path | str, held_out: int | None) -> Material:
    """The material of PKU-SafeRLHF as conversations, of whose splits "train" and "test" are read.

    The safer of two answers is chosen. Pairs that are both safe or both unsafe are kept, since annotators ranked them,
    too; pairs of equal answers are left out. The teacher learns from every answer, once, whether people found it safe;
    an answer that was judged safe in one pair and unsafe in another is left out. Held-out texts are safe answers.

    Args:
        source: the hub id, or a folder with files of the published fields.
        held_out: at most so many prompts and texts; None for all.

    Raises:
        FileNotFoundError: nothing there, or the hub cannot be reached.
        ValueError: a row that is not as published; which.
    """
    train, test = _pku(source, "train"), _pku(source, "test")
    answers = _judged_once(test)
    return Material(
        pairs=_pairs(train),
        prompts=[_say("user", prompt) for prompt in [*dict.fromkeys(prompt for prompt, _ in answers)][:held_out]],
        texts=[response for (_, response), is_safe in answers.items() if is_safe][:held_out],
        taught=[
            (_say("user", prompt), _say("assistant", response), int(is_safe))
            for (prompt, response), is_safe in _judged_once(train).items()
        ],
        judged=[],
        tested=_pairs(test),
    )


class _Pku(NamedTuple):
    """A row of PKU-SafeRLHF: ``safer`` is the number of the safer answer, ``are_safe`` whether each is safe."""

    prompt: str
    answers: tuple[str, str]
    are_safe: tuple[bool, bool]
    safer: int


def _pku(source: Path | str, split: str) -> list[_Pku]:
    def read(row: Record) -> _Pku:
        prompt, first, second = (field_of(row, name, str) for name in ("prompt", "response_0", "response_1"))
        safe, second_safe = (field_of(row, f"is_response_{k}_safe", bool) for k in (0, 1))
        safer = field_of(row, "safer_response_id", int)
        if safer not in (0, 1):
            raise ValueError(f"safer_response_id must be 0 or 1, got {safer}")
        return _Pku(prompt, (first, second), (safe, second_safe), safer)

    return read_each(read_rows(source, split), f"{source}, {split}", read)


def _judged_once(rows: list[_Pku]) -> dict[tuple[str, str], bool]:
    """Every prompt with an answer, and whether the answer is safe; those with contradictory verdicts are left out."""
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for row in rows:
        for answer, is_safe in zip(row.answers, row.are_safe, strict=True):
            verdicts.setdefault((row.prompt, answer), set()).add(is_safe)
    return {said: safe.pop() for said, safe in verdicts.items() if len(safe) == 1}


def _pairs(rows: list[_Pku]) -> list[Preference]:
    pairs = []
    for row in rows:
        good, bad = row.answers if row.safer == 0 else row.answers[::-1]
        if good.strip() != bad.strip():
            pairs.append(Preference(_say("user", row.prompt), _say("assistant", good), _say("assistant", bad)))
    return pairs


def _say(role: str, content: str) -> Text:
    return [{"role": role, "content": content}]


def _extract(row: Record) -> Preference | str:
    """The preference in a row, or why the row prefers nothing; a ValueError if it is none."""
    from trl.data_utils import maybe_extract_prompt

    given = {field: row[field] for field in ("prompt", "chosen", "rejected") if row.get(field) is not None}
    for field in ("chosen", "rejected"):
        if field not in given:
            raise ValueError(f"there is no {field!r}")
    for field, value in given.items():
        if not isinstance(value, str) and not _is_conversation(value):
            raise ValueError(f"{field} must be a string or a list of messages with role and content")
    are_strings = isinstance(given["chosen"], str)
    if are_strings != isinstance(given["rejected"], str):
        raise ValueError("chosen and rejected must both be strings, or both lists of messages")
    if are_strings and not isinstance(given.get("prompt") or "", str):
        raise ValueError("the prompt is a list of messages, chosen and rejected are strings")
    for field, value in given.items():
        if _is_empty(value):
            return f"{field} is empty"
    if given["chosen"] == given["rejected"]:
        return "chosen and rejected are equal"
    parts = maybe_extract_prompt(given)
    for field in ("prompt", "chosen", "rejected"):
        if _is_empty(parts[field]):
            return "chosen and rejected share no beginning" if field == "prompt" else f"{field} is empty"
    return Preference(parts["prompt"], parts["chosen"], parts["rejected"])


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def _is_empty(value: Any) -> bool:
    """Whether a string has no words, or a conversation ends with a message that has none."""
    last = value[-1]["content"] if value and isinstance(value, list) else value
    return not last or not last.strip()
