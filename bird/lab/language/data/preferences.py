"""Preferences as published: any set in TRL's format, and PKU-SafeRLHF, whose answers are also judged one by one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import Preference
from .files import read_rows

PKU = "PKU-Alignment/PKU-SafeRLHF"


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, and whether people found it safe."""

    prompt: str
    response: str
    safe: bool


def preferences(source: Path | str, split: str = "train", *, drop: bool = False) -> list[Preference]:
    """A preference set with the fields ``chosen`` and ``rejected``, and ``prompt`` or a shared beginning.

    An implicit prompt is taken off as TRL's trainers do it (`trl.data_utils.maybe_extract_prompt`): whole messages of a
    conversation, characters of strings. A string as the prompt of conversations that hold it again gives way to theirs.

    Args:
        source: a .jsonl, .json or .parquet file, a folder, or a hub id (see `bird.lab.language.data.files.read_rows`).
        split: which part.
        drop: leave out rows that prefer nothing: an empty prompt or response, or twice the same response. Some
            published sets have a few; a warning says how many.

    Raises:
        FileNotFoundError: nothing there, or the hub cannot be reached.
        ValueError: a row without these fields or with others' types, or one that prefers nothing; which.
        ImportError: TRL is not installed.
    """
    kept, dropped = [], []
    for i, row in enumerate(read_rows(source, split)):
        where = f"{source}, {split} row {i}"
        _check_types(row, where)
        preference, fault = _extract(row)
        if preference is not None:
            kept.append(preference)
        elif drop:
            dropped.append(f"row {i}: {fault}")
        else:
            raise ValueError(f"{where}: {fault} (drop=True leaves such rows out)")
    if dropped:
        message = (
            f"{source}, {split}: {len(dropped)} of {len(kept) + len(dropped)} rows dropped, the first {dropped[0]}"
        )
        warnings.warn(message, stacklevel=2)
    return kept


def pku_preferences(source: Path | str = PKU, split: str = "train", *, by: str = "safer") -> list[Preference]:
    """PKU-SafeRLHF as conversations: the safer of two answers, or the better, is chosen.

    Pairs that are both safe or both unsafe are kept: annotators ranked them, too. Pairs of equal answers are left out.

    Args:
        source: the hub id, or a file or folder of the published fields.
        split: ``"train"`` or ``"test"``, as published.
        by: ``"safer"`` or ``"better"`` (more helpful, whatever it helps with).

    Raises:
        FileNotFoundError, ValueError: as `preferences`; an unknown ``by``.
    """
    if by not in ("safer", "better"):
        raise ValueError(f"by must be 'safer' or 'better', got {by!r}")
    pairs = []
    for i, row in enumerate(read_rows(source, split)):
        where = f"{source}, {split} row {i}"
        answers = [_string(row, f"response_{k}", where) for k in (0, 1)]
        best = row.get(f"{by}_response_id")
        if isinstance(best, bool) or best not in (0, 1):
            raise ValueError(f"{where}: {by}_response_id must be 0 or 1, got {best!r}")
        if answers[0].strip() != answers[1].strip():
            prompt, chosen, rejected = _string(row, "prompt", where), answers[best], answers[1 - best]
            pairs.append(Preference(_say("user", prompt), _say("assistant", chosen), _say("assistant", rejected)))
    return pairs


def pku_answers(source: Path | str = PKU, split: str = "train") -> list[Answer]:
    """PKU-SafeRLHF's answers one by one, each once, to train a teacher that classifies safety.

    An answer that was judged safe in one pair and unsafe in another is left out. Arguments and errors are those of
    `pku_preferences`.
    """
    verdicts: dict[tuple[str, str], set[bool]] = {}
    for i, row in enumerate(read_rows(source, split)):
        where = f"{source}, {split} row {i}"
        prompt = _string(row, "prompt", where)
        for k in (0, 1):
            safe = row.get(f"is_response_{k}_safe")
            if not isinstance(safe, bool):
                raise ValueError(f"{where}: is_response_{k}_safe must be true or false, got {safe!r}")
            verdicts.setdefault((prompt, _string(row, f"response_{k}", where)), set()).add(safe)
    return [Answer(*key, safe=safe.pop()) for key, safe in verdicts.items() if len(safe) == 1]


def _say(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _string(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field} must be a text, got {value!r}; it has {sorted(row)}")
    return value


def _check_types(row: Mapping[str, Any], where: str) -> None:
    for field in ("chosen", "rejected", "prompt"):
        value = row.get(field)
        if value is None:
            if field == "prompt":
                continue
            raise ValueError(f"{where} has no {field!r}; it has {sorted(row)}")
        if not isinstance(value, str) and not _is_conversation(value):
            raise ValueError(f"{where}: {field} must be a string or a list of messages with role and content")
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise ValueError(f"{where}: chosen and rejected must both be strings, or both lists of messages")
    if isinstance(row["chosen"], str) and not isinstance(row.get("prompt") or "", str):
        raise ValueError(f"{where}: the prompt is a list of messages, chosen and rejected are strings")


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def _is_empty(value: Any) -> bool:
    """No words at all, or a conversation that ends without any."""
    last = value[-1]["content"] if value and isinstance(value, list) else value
    return not last or not last.strip()


def _extract(row: Mapping[str, Any]) -> tuple[Preference | None, str]:
    """(the preference, or None; the reason if it is None)."""
    try:
        from trl.data_utils import maybe_extract_prompt
    except ImportError as error:
        raise ImportError("TRL is needed to read preferences: pip install 'bird-kernels[language]'") from error

    given = {field: row[field] for field in ("prompt", "chosen", "rejected") if row.get(field) is not None}
    for field, value in given.items():
        if _is_empty(value):
            return None, f"{field} is empty"
    if given["chosen"] == given["rejected"]:
        return None, "chosen and rejected are equal"
    parts = maybe_extract_prompt(given)
    for field in ("prompt", "chosen", "rejected"):
        if _is_empty(parts[field]):
            return None, "chosen and rejected share no beginning" if field == "prompt" else f"{field} is empty"
    return Preference(parts["prompt"], parts["chosen"], parts["rejected"]), ""
