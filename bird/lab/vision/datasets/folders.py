"""Image files in folders, decoded once to 32x32: TinyImageNet, its corrupted copy, any folder of classes.

Images are converted to RGB; the largest centred square is resized with Pillow's box filter, the mean of the
pixels that a new one covers (rounded along rows, then along columns), with which ImageNet-32 was made, too. For
the 64x64 of TinyImageNet these are blocks of 2x2. Decoded images are cached beside the folder, as
``NAME.32x32-FINGERPRINT.npy``. The fingerprint is a hash of all paths, sizes and modification times: a changed
folder is decoded again.
"""

from __future__ import annotations

import contextlib
import glob
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ....files import atomic
from ...tensors import load_array
from ..data import Images
from .layout import Counts, files_fingerprint, require_file

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))  # torchvision's
_CHUNK = 256  # images per task of a thread


# Pillow's names of the formats of SUFFIXES. By default it detects a format by content only, so an EPS file called
# .png would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


def _decode(path: Path, size: int = 32) -> np.ndarray:
    """One image, uint8 ``[3, size, size]``; raises a ValueError if it cannot be decoded."""
    from PIL import Image, ImageOps

    require_file(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            small = ImageOps.fit(_eight_bits(image).convert("RGB"), (size, size), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of them
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    return np.asarray(small).transpose(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """The image with 8 bits per channel; Pillow's own conversion would clip 16-bit values at 255.

    Raises:
        ValueError: the range of its pixel values is not known.
    """
    from PIL import Image

    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 is the bits of a sample, 262 what its 0 means
    if image.mode.startswith("I;16") and (tags.get(262) == 0 or {*tags.get(258, ())} - {16}):
        raise ValueError("a grey TIFF of 9 to 15 bits, or whose 0 is white: save it with 8 or 16 bits, 0 as black")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 0 to 65,535
        return Image.fromarray(np.rint(np.asarray(image) / 257.0).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {'whole' if image.mode == 'I' else 'real'} numbers, and not of 8 or 16 bits")
    return image


def _decode_all(files: Sequence[Path], size: int, label: str) -> np.ndarray:
    """uint8 ``[n, 3, size, size]``, decoded by a pool of threads: Pillow releases Python's global lock."""
    images = np.empty((len(files), 3, size, size), np.uint8)

    def work(start: int) -> int:
        chunk = files[start : start + _CHUNK]
        for i, path in enumerate(chunk, start):
            images[i] = _decode(path, size)
        return len(chunk)

    pool = ThreadPoolExecutor()
    try:
        with tqdm(total=len(files), desc=label, unit="image", leave=False, disable=None) as bar:
            for done in pool.map(work, range(0, len(files), _CHUNK)):
                bar.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def decoded(folder: Path, files: Sequence[Path], size: int = 32) -> np.ndarray:
    """The images of ``files`` below ``folder``, from the cache beside it if nothing has changed.

    Returns:
        uint8 ``[n, 3, size, size]``, in the order of the files.

    Raises:
        ValueError: a file cannot be decoded.
        ImportError: Pillow is not installed.
    """
    stem = f"{folder.name}.{size}x{size}-"
    state = files_fingerprint((str(path.relative_to(folder)), path) for path in files)
    cache = folder.with_name(f"{stem}{state}.npy")
    with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: damaged, or another kind of file
        images = load_array(cache, "c")
        if images.shape == (len(files), 3, size, size) and images.dtype == np.uint8:
            return images
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("image files are decoded by Pillow: pip install 'bird-kernels[vision]'") from error
    images = _decode_all(files, size, f"decode {folder.name}")
    _keep(images, cache, stem)
    return images


def _keep(images: np.ndarray, cache: Path, stem: str) -> None:
    """Write the cache and remove those of earlier states of the folder; warn if that fails."""
    try:
        with atomic(cache) as partial:
            np.save(partial, images)
        for old in set(cache.parent.glob(f"{glob.escape(stem)}{'[0-9a-f]' * 16}.npy")) - {cache}:
            old.unlink(missing_ok=True)
    except OSError as error:  # no permission, a full disk
        warnings.warn(f"the decoded images cannot be kept, the next run decodes again: {error}", stacklevel=2)


def class_names(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted, without hidden files and folders (copies, thumbnails)."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_classes(folder: Path, names: Sequence[str], inner: str = "") -> Images:
    """Images of ``folder/NAME/inner/**``, label k for the k-th name, sorted by path within a class.

    Raises:
        ValueError: a class without images, or a folder that is not a class; also as `decoded`.
    """
    if unknown := set(class_names(folder)) - set(names):
        raise ValueError(f"{folder} has folders that are no class: {', '.join(sorted(unknown)[:5])}")
    files: list[Path] = []
    counts = []
    for name in names:
        of_class = _images(folder / name / inner)
        if not of_class:
            raise ValueError(f"{folder / name / inner} has no images ({', '.join(sorted(SUFFIXES))})")
        files += of_class
        counts.append(len(of_class))
    labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
    return Images(torch.from_numpy(decoded(folder, files)), torch.from_numpy(labels))


def read_image_folder(paths: list[Path], counts: Counts) -> tuple[Images, Images]:
    """Training and test images, with a folder per class; classes are numbered by the training folder's sorted names."""
    names = class_names(paths[0])
    return read_classes(paths[0], names), read_classes(paths[1], names)


def read_tiny_imagenet(paths: list[Path], counts: Counts) -> tuple[Images, Images]:
    """Training and test images; classes are numbered by sorted WordNet ids, as in torchvision's ``ImageFolder``.

    The test set is the official validation set, ordered by class and name like Tiny-ImageNet-C.
    """
    wnids, train, annotations, val = paths
    names = sorted(require_file(wnids).read_text(encoding="utf-8").split())
    number = {name: k for k, name in enumerate(names)}
    rows = [
        line.split("\t")[:2]
        for line in require_file(annotations).read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    if not rows:
        raise ValueError(f"{annotations} names no images")
    if wrong := [row for row in rows if len(row) < 2 or row[1] not in number]:
        raise ValueError(f"{annotations}: {wrong[0]} is not a file name and a class of {wnids.name}, tab-separated")
    if missing := {name for name, _ in rows} - {path.name for path in val.iterdir()}:
        raise ValueError(f"{val}: {len(missing)} of {len(rows)} images are missing, {min(missing)} first")
    ordered = sorted((number[wnid], name) for name, wnid in rows)
    images = decoded(val, [val / name for _, name in ordered])
    test = Images(torch.from_numpy(images), torch.tensor([label for label, _ in ordered]))
    return read_classes(train, names, "images"), test
