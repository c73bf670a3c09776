"""Grey images: Fashion-MNIST's IDX files, the subset of it in this package, and the digits of scikit-learn."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..data import Images
from .layout import Counts, require_file

LARGEST = 1 << 30  # bytes of an IDX file's data; Fashion-MNIST has 47 MB


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The header is big-endian: two zeros, type 8, the rank, and one uint32 size for each dimension.

    Raises:
        ValueError: not such a file, its data is shorter or longer than the header says, or the header says more than
            four dimensions or `LARGEST` bytes.
    """
    require_file(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            rank = start[3] if start[:3] == b"\x00\x00\x08" and len(start) == 4 else 255
            if rank > 4 or len(sizes := file.read(4 * rank)) < 4 * rank:
                raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {start!r}")
            shape = [int(size) for size in np.frombuffer(sizes, ">u4")]
            count = math.prod(shape)
            if math.prod(max(size, 1) for size in shape) > LARGEST:
                raise ValueError(f"{path}: the header says {shape}, {count} bytes; at most {LARGEST} are read")
            data = file.read(count + 1)  # bounded, since a gzip file may expand to a thousand times its size
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(data) != count:
        found = f"{len(data)} follow" if len(data) < count else "more follow"
        raise ValueError(f"{path}: the header says {shape}, {count} bytes, but {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _padded(pixels: np.ndarray, numbers: np.ndarray) -> Images:
    return Images(F.pad(torch.tensor(pixels).unsqueeze(1), (2, 2, 2, 2)), torch.tensor(numbers).long())


def _from_idx(images: Path, labels: Path) -> Images:
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.shape[1:] != (28, 28) or numbers.shape != pixels.shape[:1]:
        raise ValueError(f"{images} holds {list(pixels.shape)}, {labels} {list(numbers.shape)}: not n 28x28 and n")
    return _padded(pixels, numbers)


def read_fashion(paths: list[Path], counts: Counts) -> tuple[Images, Images]:
    """Training and test images, 28x28 padded by two rows and columns of zeros (the background) on every side."""
    return _from_idx(*paths[:2]), _from_idx(*paths[2:])


def read_fashion_subset(paths: list[Path], counts: Counts) -> tuple[Images, Images]:
    """As `read_fashion`, from one NumPy archive, without unpickling."""
    with np.load(paths[0], allow_pickle=False) as arrays:
        train, test = (_padded(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
    return train, test


def read_digits(paths: list[Path], counts: Counts) -> tuple[Images, Images]:
    """Training and test images, 8x8 in 0-16, scaled to 0-255 and bilinearly to 32x32; a class's last fifth is test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'bird-kernels[vision]'") from error
    digits = load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    data = Images(images, torch.from_numpy(digits.target).long())
    test = torch.zeros(len(data), dtype=torch.bool)
    for c in range(10):
        members = (data.labels == c).nonzero().squeeze(1)
        test[members[-round(0.2 * len(members)) :]] = True
    return data.select((~test).nonzero().squeeze(1)), data.select(test.nonzero().squeeze(1))
