"""Tensors and arrays in files: written atomically, read without running code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..files import atomic

UNREADABLE = "{} is not a whole checkpoint of this package: delete it to start over, or choose another folder"


def save(state: dict[str, Any], path: Path) -> None:
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
