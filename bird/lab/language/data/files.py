"""Rows of a published data set, from a file, a folder or the Hugging Face hub. No pickle is read, no script is run.

Files are not read by `datasets`, which fills in missing fields, converts strings that look like times, does not say
which line is damaged, and copies each file to its cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ...recipe import at_home, data_root

T = TypeVar("T")
Record: TypeAlias = "dict[str, Any]"

SUFFIXES = (".jsonl", ".json", ".parquet")
# What publishers call the parts.
SPLITS = {"validation": ("validation", "valid", "val", "dev")}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_rows(source: Path | str, split: str) -> list[Record]:
    """The rows of one split, each a dictionary of the published fields.

    Args:
        source: a .jsonl, .json (an array) or .parquet file, which is the split in its name, else ``"train"``;
            a folder with such files at any depth, named ``train.jsonl`` or ``train-00000-of-00001.parquet``; a folder
            that ``save_to_disk`` of `datasets` has written; or a hub id.
        split: ``"train"``, ``"validation"`` (also called valid, val or dev in files) or ``"test"``.

    Raises:
        FileNotFoundError: nothing there, or the hub cannot be reached; what would be read instead.
        ValueError: a file that is not what its name says, with the line; a split that is not there.
    """
    path = at_home(source)
    if path.is_file():
        own = _split_of(path)
        if split != (own or "train"):
            raise ValueError(
                f"{path} is the split {own or 'train'!r}, not {split!r}; give a folder with both, or a file"
            )
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    if path.suffix in SUFFIXES or not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{path} is not there; {_expected(split)}")
    return _read_hub(str(source), split)


def read_each(rows: Sequence[Record], where: str, read: Callable[[Record], T]) -> list[T]:
    """``read(row)`` for each row; if it raises a ValueError, the error says where the row is and what it has."""
    found = []
    for i, row in enumerate(rows):
        try:
            found.append(read(row))
        except ValueError as error:
            raise ValueError(f"{where} row {i}: {error}; it has {sorted(row)}") from error
    return found


def field_of(row: Record, name: str, kind: type) -> Any:
    """A field's value, or a ValueError unless it is of the type, and a string not blank."""
    value = row.get(name)
    if type(value) is not kind or not str(value).strip():
        raise ValueError(f"{name} must be of type {kind.__name__} and not empty, got {value!r}")
    return value


def local_or_hub(name: str, hub: str, root: Path | str | None) -> Path | str:
    """The folder ``name`` of the data folder if it is there, else the hub id."""
    folder = data_root(root) / name
    return folder if folder.is_dir() else hub


def _expected(split: str) -> str:
    return (
        f"expected is a .jsonl, .json or .parquet file, a folder with {split}.jsonl (or .json, .parquet), "
        "a folder saved by `datasets`, or a hub id"
    )


def _split_of(path: Path) -> str | None:
    """The split that a file's name begins with."""
    word = re.split(r"[-_.]", path.stem)[0]
    return next((s for s in ("train", "validation", "test") if word in SPLITS.get(s, (s,))), None)


def _read_file(path: Path) -> list[Record]:
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.suffix == ".json":
        rows = _parse(path.read_bytes(), str(path))
    elif path.suffix == ".jsonl":
        # Not splitlines: JSON allows U+2028 and similar characters inside a string.
        lines = path.read_bytes().split(b"\n")
        rows = [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    else:
        raise ValueError(f"{path}: only {', '.join(SUFFIXES)} files are read")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold objects, one a row")
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{where}: not JSON: {error}") from error


def _read_parquet(path: Path) -> list[Record]:
    from pyarrow import parquet

    try:
        rows: list[Record] = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's own are of many kinds
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    return rows


def _read_folder(folder: Path, split: str) -> list[Record]:
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _read_saved(folder, split)
    for suffix in SUFFIXES:
        paths = sorted(path for path in folder.rglob(f"*{suffix}") if _split_of(path) == split)
        if paths:
            return [row for path in paths for row in _read_file(path)]
    raise FileNotFoundError(f"{folder} holds no {split!r} files; {_expected(split)}")


def _read_saved(folder: Path, split: str) -> list[Record]:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # a damaged file in it fails in any way
        raise ValueError(f"{folder}: not whole as `datasets` saves it ({error}): save it again") from error
    parts = saved if hasattr(saved, "keys") else {"train": saved}
    for name in SPLITS.get(split, (split,)):
        if name in parts:
            return list(parts[name])
    raise ValueError(f"{folder} holds the splits {sorted(parts)}, not {split!r}")


def _read_hub(name: str, split: str) -> list[Record]:
    from datasets import load_dataset

    try:
        try:
            return list(load_dataset(name, split=split))
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Older sets are scripts, which nobody should run; the hub keeps what they gave as parquet files.
            return list(load_dataset(name, split=split, revision="refs/convert/parquet"))
    except OSError as error:  # no such set, and no connection, are among these
        raise FileNotFoundError(
            f"{name!r} is no file or folder here and does not come from the Hugging Face hub ({error}); "
            + _expected(split)
        ) from error
