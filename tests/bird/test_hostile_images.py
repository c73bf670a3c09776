"""Image files that are not what their names say, and ranges that Pillow would cut off."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bird.lab.tensors import load_array
from bird.lab.vision.datasets import folders
from bird.lab.vision.datasets.grey import read_idx

Image = pytest.importorskip("PIL.Image", reason="image files need the extra vision")


def test_only_image_formats_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its content Pillow would take this for EPS, and start Ghostscript on it."""
    path, started = tmp_path / "a.png", []
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *_: started.append(path) or Image.new("RGB", (8, 8)).im
    )
    with Image.open(path) as image:
        image.load()
    assert started == [path]
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        folders._decode(path)
    assert started == [path]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"a\.png is no file"):
        folders._decode(path)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_become_eight(name: str, tmp_path: Path) -> None:
    """257 steps of 16 bits are one of 8. Cut off at 255, all but 256 of the 65,536 values would be white."""
    grey = np.repeat(np.arange(32, dtype=np.uint16)[None] * 2056, 32, axis=0)
    Image.fromarray(grey).save(tmp_path / name)
    expected = np.broadcast_to(np.arange(32) * 8, (3, 32, 32))
    assert np.array_equal(folders._decode(tmp_path / name), expected)


@pytest.mark.parametrize(("dtype", "words"), [(np.float32, "real numbers"), (np.int32, "whole numbers")])
def test_numbers_without_a_range_are_refused(dtype: type[np.generic], words: str, tmp_path: Path) -> None:
    """Of floats in [0, 1] the conversion to 8 bits leaves 0 and 1."""
    Image.fromarray(np.linspace(0, 1, 32 * 32).reshape(32, 32).astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif cannot be decoded: its pixels are {words}"):
        folders._decode(tmp_path / "a.tif")


def test_hidden_copies_do_not_count(tmp_path: Path) -> None:
    """What file managers and archivers leave: thumbnails, deleted files, macOS's `._` files."""
    for place in ("x/a.png", "x/.thumbnails/a.png", "x/deep/b.png", "x/deep/.trash/deep/b.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / place)
    (tmp_path / "x" / "._a.png").write_bytes(b"Mac OS X")
    assert [path.name for path in folders._images(tmp_path / "x")] == ["a.png", "b.png"]
    assert len(folders.read_classes(tmp_path, ["x"])) == 2


def test_a_bomb_of_zeros_takes_little_memory(tmp_path: Path) -> None:
    """A gzip file of 1 MB with 1 GB behind a header of 12 bytes: no more is read than the header says."""
    path = tmp_path / "x-ubyte.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\x00\x00\x08\x01" + (12).to_bytes(4, "big"))
        for _ in range(256):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"\[12\], 12 bytes, but more follow"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_damaged_arrays_end_in_one_kind_of_error(tmp_path: Path) -> None:
    """300 changes of the first 128 bytes of a .npy file, its header; whole ones come back as they were, or smaller."""
    path = tmp_path / "a.npy"
    array = np.arange(60, dtype=np.uint8).reshape(5, 12)
    np.save(path, array)
    whole, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    assert np.array_equal(load_array(path), array)
    for _ in range(300):
        content = bytearray(whole)
        for place in random.integers(128, size=random.integers(1, 4)):
            content[place] = random.integers(256)
        path.write_bytes(content)
        for mode in (None, "r"):
            messages = []
            try:
                load_array(path, mode)
            except ValueError as error:
                messages.append(str(error))
            assert all(str(path) in message for message in messages)
            refused += len(messages)
    assert refused > 100
