"""Files that are whole or not there, and tensors in them that load without running code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
import json
import os
import zipfile

import torch

PARTIAL = ".partial."  # before the name of a file that is being written
UNREADABLE = "{} is not a whole checkpoint of this package: delete it to start over, or choose another folder"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it becomes ``path`` in one step if all goes well, else it goes."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(data: Any, path: Path) -> None:
    """Write plain data as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def save(state: dict[str, Any], path: Path) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts to ``path``, atomically.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    with atomic(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # PyTorch's writer speaks of positions where the disk is full
            raise OSError(f"{path} could not be written, as happens when the disk is full: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU; whatever the file is, no code in it runs.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is damaged, or something else.
    """
    with path.open("rb") as file:
        try:
            if zipfile.ZipFile(file).testzip() is not None:  # PyTorch writes checksums, but does not look at them
                raise zipfile.BadZipFile("a checksum is wrong")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, by what is wrong
            raise ValueError(UNREADABLE.format(path)) from error
    if not isinstance(state, dict):
        raise ValueError(UNREADABLE.format(path))
    return state
