"""Tensors, arrays and plain data in files: written atomically, read without running code.

What is damaged, something else or of a later version ends in one ValueError, which names the file and says what to do.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..files import atomic, write_json

FORMAT = 1  # of what is written; raised when a file would mislead the version before
UNREADABLE = "{} is not a whole checkpoint of this package: delete it to start over, or choose another folder"


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts to ``path``, atomically.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    # Into an open file: by a path PyTorch would write the file's name, which is drawn, into it.
    with atomic(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # PyTorch's writer speaks of positions where the disk is full
            raise OSError(f"{path} could not be written, as happens when the disk is full: {error}") from error


def load_tensors(path: Path) -> dict[str, Any]:
    """Read what `save_tensors` wrote, onto the CPU; whatever the file is, no code in it runs.

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


def load_array(path: Path, mmap_mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """Read the array of a ``.npy`` file; no object in it is made. ``mmap_mode`` as of `numpy.load`.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is damaged, or something else.
    """
    try:
        found = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header fails in any way: SyntaxError, OverflowError, MemoryError, ...
        raise ValueError(f"{path}: no whole .npy file: {error or type(error).__name__}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path}: no .npy file, but an archive")
    return found


def read_json(path: Path, advice: str) -> Any:
    """Plain data out of a JSON file.

    Raises:
        OSError: there is no such file, or it cannot be read now.
        ValueError: it is damaged, or something else: what to do, as ``advice`` says.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers with too many digits
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error


def write_checked(data: Mapping[str, Any], path: Path) -> None:
    """Write an object as JSON, atomically, with the version of its format and a checksum, for `read_checked`."""
    plain = json.loads(json.dumps({**data, "format": FORMAT}))  # as it will be read: names as strings, tuples as lists
    write_json(plain | {"sha256": _checksum(plain)}, path)


def read_checked(path: Path, advice: str) -> dict[str, Any]:
    """What `write_checked` wrote; or an object without version and checksum, as they were once written.

    Raises:
        OSError: there is no such file, or it cannot be read now.
        ValueError: it is damaged, something else, or of a later version: what to do.
    """
    found = read_json(path, advice)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds {type(found).__name__}, no object): {advice}")
    if not found:
        raise ValueError(f"{path} is damaged (it is empty): {advice}")
    require_format(found, path)
    said = found.pop("sha256", None)
    if ("format" in found) != (said is not None) or said not in (None, _checksum(found)):
        raise ValueError(f"{path} is damaged (its checksum is of other contents): {advice}")
    found.pop("format", None)
    return found


def require_format(state: Mapping[str, Any], path: Path) -> None:
    """Raises a ValueError if a file says that a later version wrote it."""
    if isinstance(state.get("format"), int) and state["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {state['format']}, of a later version of bird-kernels; this one reads {FORMAT}: "
            "update, or choose another folder"
        )


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
