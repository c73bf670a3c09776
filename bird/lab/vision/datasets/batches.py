"""CIFAR and ImageNet-32: files of rows of 3,072 bytes, the red plane first, then green, then blue."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ..data import Images
from .layout import Counts, require_file
from .unpickling import LARGEST_FILE, load_batch

PIXELS = 3 * 32 * 32
Batch: TypeAlias = tuple[Path, Any, np.ndarray]  # (file, rows uint8 [n, 3072], labels [n])


def stack_batches(batches: Iterable[Batch], count: int) -> Images:
    """All batches as one array, filled in place, so that earlier batches are never copied.

    Args:
        batches: the contents of the files, in order.
        count: the expected number of images; if there are fewer, the result is shorter.

    Raises:
        ValueError: a batch has another shape or dtype, labels do not fit it, or there are more than ``count`` images.
    """
    images = np.empty((count, 3, 32, 32), np.uint8)
    labels = np.empty(count, np.int64)
    done = 0
    for path, rows, numbers in batches:
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape != (len(numbers), PIXELS):
            found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise ValueError(f"{path}: {len(numbers)} labels need images uint8 [{len(numbers)}, 3072], found {found}")
        end = done + len(rows)
        if end > count:
            raise ValueError(f"{path}: with it there are {end} images, more than {count}")
        images[done:end] = rows.reshape(-1, 3, 32, 32)
        labels[done:end] = numbers
        done = end
    return Images(torch.from_numpy(images[:done]), torch.from_numpy(labels[:done]))


def _train_and_test(batches: Iterator[Batch], files: int, counts: Counts) -> tuple[Images, Images]:
    """The training images of all files but the last, and the test images of the last."""
    train = stack_batches(islice(batches, files - 1), counts[0])
    return train, stack_batches(batches, counts[1])


def read_binary(paths: list[Path], counts: Counts, *, label_bytes: int) -> tuple[Images, Images]:
    """Training and test images from records of labels, a byte each, the last of which is used, and an image."""
    record = label_bytes + PIXELS

    def batches() -> Iterator[Batch]:
        for path in paths:
            raw = np.fromfile(require_file(path), np.uint8)
            if raw.size % record:
                raise ValueError(
                    f"{path}: {raw.size} bytes are no whole number of records of {record}; it is cut short"
                )
            rows = raw.reshape(-1, record)
            yield path, rows[:, label_bytes:], rows[:, label_bytes - 1]

    return _train_and_test(batches(), len(paths), counts)


def read_dicts(paths: list[Path], counts: Counts, *, key: str = "labels", lowest: int = 0) -> tuple[Images, Images]:
    """Training and test images from dicts, pickled or ``.npz``, of ``data`` and labels from ``lowest`` up."""

    def batches() -> Iterator[Batch]:
        for path in paths:
            content = _arrays(path) if path.suffix == ".npz" else load_batch(path)
            if "data" not in content or key not in content:
                raise ValueError(f'{path}: needs "data" and "{key}", holds {sorted(content)}')
            labels = content[key]
            if isinstance(labels, list) and all(type(label) is int for label in labels):  # else NumPy may never end
                labels = np.asarray(labels)
            if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
                found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else "something else"
                raise ValueError(f'{path}: "{key}" must be a list of integers, it is {found}')
            yield path, content["data"], labels.astype(np.int64) - lowest

    return _train_and_test(batches(), len(paths), counts)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(require_file(path)) as archive:  # a small file may hold, or say that it holds, any size
            members = archive.infolist()
            if (size := sum(member.file_size for member in members)) > LARGEST_FILE:
                raise ValueError(f"{size} bytes are in it; a batch of images has at most {LARGEST_FILE}")
            for member in members:
                with archive.open(member) as file:
                    np.lib.format.read_magic(file)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    said = f"the header says {dtype} {list(shape)}"
                    raise ValueError(f"{member.filename}: {said}, and {member.file_size} bytes are there")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # from zipfile, zlib or NumPy
        raise ValueError(f"{path}: {error}") from error
