"""The data sets of the paper's vision experiments, all in memory, at 32x32.

Nothing is downloaded: the official files are read below one root, from the folders that torchvision and the official
archives use; errors say which files are missing and where to get them. Python's unpickler is not used (`unpickling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...recipe import data_root
from ..data import Splits, require_classes, split_by_class
from .catalogue import DATASETS
from .corrupted import available_corruptions, load_corrupted
from .layout import Dataset, FileLayout

__all__ = ["DATASETS", "Dataset", "FileLayout", "available_corruptions", "data_root", "load_corrupted", "load_splits"]


def load_splits(
    name: str,
    root: Path | str | None = None,
    *,
    classes: Sequence[int] | None = None,
    seed: int = 0,
    validation: float = 0.1,
    limit_per_class: int | None = None,
) -> Splits:
    """Load a data set, and set a share of its training images aside for validation.

    The test set is the official one (TinyImageNet and ImageNet: the official validation set, as the labels of
    their test sets are not public; ``"digits"``: the last fifth of each class) and does not depend on the seed.
    Images are ordered by class. 28x28 images are padded with zeros, digits scaled bilinearly, image files of
    any size cropped to a square and resized with a box filter; they are decoded once and cached beside their
    folder. What the three sets of ``"fashion-photos"`` lie over are parts of different photographs (`photographs`).
    While splitting, the training images are in memory twice (ImageNet-32: 7.9 GB), unless they come from that cache.

    Args:
        name: a key of `DATASETS`, where each entry describes its files.
        root: the folder with the data sets' own folders, such as ``cifar-10-batches-py``; for
            ``"image-folder"`` the one with ``train`` and ``test`` or ``val``. None: the environment variable
            ``BIRD_DATA``, else ``data`` in the working directory, where PyTorch's tutorials put theirs.
        classes: None for all; these and the others as of `bird.lab.vision.data.split_by_class`.
        seed: decides which training images of each class are used for validation.
        validation: their share.
        limit_per_class: the most images of each class in each of the three sets.

    Returns:
        The three sets, with images uint8 ``[n, 3 or 1, 32, 32]`` and labels int64 ``[n]``.

    Raises:
        FileNotFoundError: the data set was not found; says which files are expected where, and where to get them.
        ValueError: an unknown name or class, a share or limit out of range, a broken file.
        ImportError: Pillow or scikit-learn is needed and not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation is a share of the training images, 0 or more and below 1, got {validation}")
    dataset = DATASETS[name]
    train, test = dataset.read(data_root(root))
    number = dataset.classes or int(train.labels.max()) + 1
    kept = range(number) if classes is None else classes
    require_classes(kept, number)
    splits = split_by_class(train, test, kept, validation=validation, seed=seed, limit_per_class=limit_per_class)
    return splits if dataset.finish is None else dataset.finish(splits, data_root(root))
