"""Tiny data sets in the official layouts, and what is in them, for the tests of `bird.lab.vision.datasets`."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Arrays = tuple[np.ndarray, np.ndarray]


def make_arrays(count: int, classes: int, seed: int, shape: tuple[int, ...] = (3, 32, 32)) -> Arrays:
    """Random images uint8 and labels in which every class occurs equally often, shuffled."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.resize(np.arange(classes), count))
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), labels


def by_class(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """In the order that `load` promises."""
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


def python2_pickle(entry: dict[str, object]) -> bytes:
    """What Python 2's cPickle and NumPy of 2009 write at protocol 2, opcode by opcode, as the official files are."""

    def opcodes(value: object) -> bytes:
        if isinstance(value, str):
            return opcodes(value.encode("latin1"))
        if isinstance(value, bytes):  # a str of Python 2
            size = len(value)
            return (b"U" + bytes([size]) if size < 256 else b"T" + struct.pack("<i", size)) + value
        if isinstance(value, int):
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.uint8
        blank = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = opcodes(value.shape[0]) + opcodes(value.shape[1]) + b"\x86"
        return blank + b"(K\x01" + shape + dtype + b"\x89" + opcodes(value.tobytes()) + b"tb"

    items = b"".join(opcodes(key) + opcodes(value) for key, value in entry.items())
    return b"\x80\x02}(" + items + b"u."


# What wrote a pickle: Python 2, Python 3, and Python 3 at protocol 2, whose bytes go through ``_codecs.encode``.
PICKLERS: dict[str, Callable[[dict[str, object]], bytes]] = {
    "python 2": python2_pickle,
    "python 3": lambda entry: pickle.dumps(entry, protocol=4),
    "python 3, old protocol": lambda entry: pickle.dumps(entry, protocol=2),
}
python3_pickle = PICKLERS["python 3"]


def write_cifar(folder: Path, train: Arrays, test: Arrays, dump: Any = None, *, fine: bool = False) -> None:
    """CIFAR-10, or with ``fine`` labels CIFAR-100, as pickles by ``dump``, or as records of bytes."""
    folder.mkdir(parents=True)
    parts = [train] if fine else zip(np.split(train[0], 5), np.split(train[1], 5), strict=True)
    names = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    for name, (images, labels) in [*zip(names, parts, strict=True), ("test" if fine else "test_batch", test)]:
        pixels = images.reshape(-1, 3072)
        if dump is None:
            columns = np.stack([labels // 5, labels] if fine else [labels], axis=1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(np.concatenate([columns, pixels], axis=1).tobytes())
        elif fine:
            entry = {"coarse_labels": (labels // 5).tolist(), "fine_labels": labels.tolist(), "data": pixels}
            (folder / name).write_bytes(dump(entry))
        else:
            entry = {"batch_label": name, "labels": labels.tolist(), "data": pixels, "filenames": ["a.png"]}
            (folder / name).write_bytes(dump(entry))
    if dump is not None:
        meta = {"fine_label_names": [str(k) for k in range(100)]} if fine else {"label_names": list("abcdefghij")}
        (folder / ("meta" if fine else "batches.meta")).write_bytes(dump(meta))


def write_imagenet32(folder: Path, train: Arrays, test: Arrays, *, npz: bool) -> None:
    folder.mkdir(parents=True)
    parts = zip(np.array_split(train[0], 10), np.array_split(train[1], 10), strict=True)
    named = [*((f"train_data_batch_{i}", part) for i, part in enumerate(parts, 1)), ("val_data", test)]
    for name, (images, labels) in named:
        entry = {"data": images.reshape(-1, 3072), "labels": (labels + 1).tolist(), "mean": np.zeros(3072)}
        if npz:
            np.savez(folder / f"{name}.npz", **entry)
        else:
            (folder / name).write_bytes(python3_pickle(entry))


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_fashion(folder: Path, train: Arrays, test: Arrays, suffix: str = "") -> None:
    folder.mkdir(parents=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Pixels uint8 ``[h, w, 3]``, or ``[h, w]`` for a grey file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_tiny_imagenet(folder: Path, wnids: list[str], each: int, each_test: int) -> None:
    """Smooth random 64x64 JPEGs, the first of each class grey."""
    rng = np.random.default_rng(7)

    def picture(i: int) -> np.ndarray:
        colour = rng.integers(0, 256, (8, 8, 3) if i else (8, 8), dtype=np.uint8)
        return colour.repeat(8, axis=0).repeat(8, axis=1)

    lines = []
    for wnid in wnids:
        for i in range(each):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", picture(i))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("not an image")
    for i in range(each_test * len(wnids)):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", picture(i % each_test))
        lines.append(f"val_{i}.JPEG\t{wnids[i % len(wnids)]}\t0\t0\t62\t62\n")
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))


def mean_of_blocks(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[32 k, 32 k, 3]`` to ``[3, 32, 32]``: means of k pixels in a row, then in a column, each rounded."""
    size = len(pixels) // 32
    rows = np.floor(pixels.reshape(32 * size, 32, size, 3).mean(axis=2) + 0.5)
    return np.floor(rows.reshape(32, size, 32, 3).mean(axis=1) + 0.5).astype(np.uint8).transpose(2, 0, 1)


def mean_of_file(path: Path) -> np.ndarray:
    return mean_of_blocks(np.asarray(Image.open(path).convert("RGB")))
