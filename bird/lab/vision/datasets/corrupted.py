"""The published corrupted test sets: CIFAR-10-C, CIFAR-100-C and Tiny-ImageNet-C.

Hendrycks and Dietterich (2019), "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations". Images are in the order of `load_splits`' test set, so that corrupted and clean ones correspond.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...recipe import data_root
from ...tensors import load_array
from ..data import Images, of_classes, require_classes
from .catalogue import DATASETS
from .folders import class_names, read_classes
from .layout import Counts, Dataset, FileLayout

SEVERITIES = range(1, 6)
_FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "tiny-imagenet": "Tiny-ImageNet-C"}
_RECORDS = {"cifar10": 2535967, "cifar100": 3555552, "tiny-imagenet": 2536630}


def available_corruptions(name: str, root: Path | str | None = None) -> list[str]:
    """The corruptions of a published set that exist below ``root``, sorted; empty if its folder does not exist."""
    folder = data_root(root) / _folder(name)
    if name == "tiny-imagenet":
        return class_names(folder) if folder.is_dir() else []
    return sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels")


def load_corrupted(
    name: str,
    root: Path | str | None,
    corruption: str,
    severity: int,
    *,
    classes: Sequence[int] | None = None,
) -> Images:
    """Load one corruption at one severity of a published corrupted test set, at 32x32.

    Args:
        name: ``"cifar10"``, ``"cifar100"`` or ``"tiny-imagenet"``.
        root: as for `load_splits`; it contains ``CIFAR-10-C``, ``CIFAR-100-C`` or ``Tiny-ImageNet-C``, as unpacked.
        corruption: the file's or folder's name, e.g. ``"gaussian_noise"``.
        severity: 1 to 5.
        classes: as for `load_splits`.

    Raises:
        FileNotFoundError: it was not found; says which files are expected where, and where to get them.
        ValueError: an unknown set, severity or class, or a broken file.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to 5, got {severity}")
    published = _folder(name)
    clean = DATASETS[name]
    number = clean.classes or 0  # never None for these three
    kept = range(number) if classes is None else classes
    require_classes(kept, number)

    if name == "tiny-imagenet":
        layout = FileLayout(f"{published}/{corruption}", (str(severity),), _read_folder)
    else:
        layout = FileLayout(published, (f"{corruption}.npy", "labels.npy"), partial(_read_block, severity=severity))
    there = ", ".join(available_corruptions(name, root)) or "none"
    dataset = Dataset(
        title=f"{published}, {corruption}",
        classes=number,
        channels=3,
        counts=clean.counts[1:],
        layouts=(layout,),
        source=f"Corruptions there: {there}. Get {published}.tar from https://zenodo.org/records/{_RECORDS[name]} "
        "(CC BY 4.0).",
    )
    (images,) = dataset.read(data_root(root))
    return of_classes(images, kept)


def _read_block(paths: list[Path], counts: Counts, severity: int) -> tuple[Images, ...]:
    """One severity's block of a CIFAR file, uint8 ``[5 * n, 32, 32, 3]``; only this block is read from disk."""
    (count,) = counts
    images, labels = (load_array(path, "r") for path in paths)
    if images.dtype != np.uint8 or images.shape != (len(SEVERITIES) * count, 32, 32, 3):
        raise ValueError(f"{paths[0]}: {images.dtype} {list(images.shape)}, not uint8 [{5 * count}, 32, 32, 3]")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(f"{paths[1]}: {labels.dtype} {list(labels.shape)}, not {len(images)} integers")
    block = slice((severity - 1) * count, severity * count)
    pixels = np.ascontiguousarray(images[block].transpose(0, 3, 1, 2))
    return (Images(torch.from_numpy(pixels), torch.from_numpy(labels[block].astype(np.int64))),)


def _read_folder(paths: list[Path], counts: Counts) -> tuple[Images, ...]:
    names = class_names(paths[0])
    if len(names) != DATASETS["tiny-imagenet"].classes:
        raise ValueError(f"{paths[0]} has {len(names)} folders, not one for each class")
    return (read_classes(paths[0], names),)


def _folder(name: str) -> str:
    if name not in _FOLDERS:
        raise ValueError(f"corrupted copies are published of {', '.join(_FOLDERS)}, not of {name!r}")
    return _FOLDERS[name]
