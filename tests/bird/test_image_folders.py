"""TinyImageNet, folders of images and their cache, files that are not what their names say."""

from __future__ import annotations

import gzip
import os
import struct
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from bird.lab.vision.datasets import DATASETS, available_corruptions, folders, load_corrupted, load_splits
from bird.lab.vision.datasets.grey import read_idx
from tests.bird import official_files as official

WNIDS = ["n02124075", "n01443537", "n04067472"]  # not sorted, like the official list
EACH, EACH_TEST = 4, 3


@pytest.fixture
def tiny(tmp_path: Path, expect: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small TinyImageNet, decoded in several chunks; the path is the root's."""
    monkeypatch.setattr(folders, "_CHUNK", 5)
    official.write_tiny_imagenet(tmp_path / "tiny-imagenet-200", WNIDS, EACH, EACH_TEST)
    expect("tiny-imagenet", classes=3, counts=(3 * EACH, 3 * EACH_TEST))
    return tmp_path


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from here on."""
    seen: list[Path] = []
    decode = folders._decode

    def watched(path: Path, size: int) -> np.ndarray:
        seen.append(path)
        return decode(path, size)

    monkeypatch.setattr(folders, "_decode", watched)
    return seen


def test_tiny_imagenet_is_the_mean_of_blocks(tiny: Path) -> None:
    folder = tiny / "tiny-imagenet-200"
    train, test = DATASETS["tiny-imagenet"].read(tiny)
    assert train.labels.tolist() == [k for k in range(3) for _ in range(EACH)]
    theirs = ImageFolder(str(folder / "train"))
    assert train.labels.tolist() == theirs.targets
    for image, (path, _) in zip(train.images, theirs.samples, strict=True):
        assert np.array_equal(image.numpy(), official.mean_of_file(Path(path)))
    assert torch.equal(train.images[0, 0], train.images[0, 1]), "the grey file"
    assert not torch.equal(train.images[1, 0], train.images[1, 1])

    rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    expected = sorted((sorted(WNIDS).index(row[1]), row[0]) for row in rows)
    assert test.labels.tolist() == [label for label, _ in expected]
    for image, (_, name) in zip(test.images, expected, strict=True):
        assert np.array_equal(image.numpy(), official.mean_of_file(folder / "val" / "images" / name))
    splits = load_splits("tiny-imagenet", tiny, classes=[2, 0], validation=0.25)
    assert torch.equal(splits.test.images[:EACH_TEST], test.images[test.labels == 2])
    assert splits.train.labels.tolist() == [0] * 3 + [1] * 3


def test_images_are_decoded_once(tiny: Path, decodings: list[Path]) -> None:
    train, test = DATASETS["tiny-imagenet"].read(tiny)
    assert len(decodings) == 3 * (EACH + EACH_TEST)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # from_numpy warns of arrays that cannot be written
            again, test_again = DATASETS["tiny-imagenet"].read(tiny)
    finally:
        torch.set_warn_always(False)
    assert len(decodings) == 3 * (EACH + EACH_TEST)
    assert torch.equal(train.images, again.images)
    assert torch.equal(test.images, test_again.images)
    kept = sorted(path.relative_to(tiny).as_posix() for path in tiny.rglob("*32x32*"))
    assert [path.split(".32x32-")[0] for path in kept] == ["tiny-imagenet-200/train", "tiny-imagenet-200/val/images"]
    assert not list(tiny.rglob(".*"))


def test_a_changed_folder_is_decoded_again(tiny: Path, decodings: list[Path]) -> None:
    train, _ = DATASETS["tiny-imagenet"].read(tiny)
    folder = tiny / "tiny-imagenet-200" / "train"
    (old,) = folder.parent.glob("train.32x32-*.npy")
    files = sorted((folder / sorted(WNIDS)[0] / "images").iterdir())
    small, big = sorted(range(EACH), key=lambda i: files[i].stat().st_size)[::3]
    status = files[big].stat()
    own = [old.with_name(f"train.32x32-{name}.npy") for name in ("my-features", "0123", "0123456789abcdef-mine")]
    for path in own:
        path.write_text("mine")
    files[big].write_bytes(files[small].read_bytes().ljust(status.st_size, b"\0"))  # only the time of change tells
    os.utime(files[big], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    del decodings[:]
    changed, _ = DATASETS["tiny-imagenet"].read(tiny)
    assert len(decodings) == 3 * EACH
    assert torch.equal(changed.images[big], train.images[small])
    (new,) = {*folder.parent.glob("train.32x32-*.npy")} - {*own}
    assert new != old
    assert [path.read_text() for path in own] == ["mine"] * 3

    whole = new.read_bytes()
    for damaged in (whole[:-5], b"", b"something else"):
        new.write_bytes(damaged)
        del decodings[:]
        again, _ = DATASETS["tiny-imagenet"].read(tiny)
        assert len(decodings) == 3 * EACH
        assert torch.equal(again.images, changed.images)
        assert new.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, images: np.ndarray) -> None:
        file.write_bytes(b"the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="decodes again: .*No space left on device"):
        splits = load_splits("tiny-imagenet", tiny)
    assert len(splits.test) == 3 * EACH_TEST
    assert not [path for path in tiny.rglob("*") if "32x32" in path.name]


def test_what_is_not_installed_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("tiny-imagenet", "PIL"), ("digits", "sklearn.datasets")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install 'bird-kernels\[vision\]'"):
            load_splits(name, tiny)


def test_a_broken_tiny_imagenet_is_refused(tiny: Path) -> None:
    folder = tiny / "tiny-imagenet-200"
    annotations, image = folder / "val" / "val_annotations.txt", folder / "val" / "images" / "val_0.JPEG"
    text, pixels = annotations.read_text(), image.read_bytes()

    def refuses(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            load_splits("tiny-imagenet", tiny)
        assert "http://cs231n.stanford.edu/tiny-imagenet-200.zip" in str(error.value)

    image.write_bytes(pixels[: len(pixels) // 2])
    refuses("val_0.JPEG cannot be decoded: .*[Tt]runcated")
    image.write_bytes(b"no image")
    refuses("val_0.JPEG cannot be decoded")
    image.unlink()
    refuses("1 of 9 images are missing, val_0.JPEG first")
    image.write_bytes(pixels)
    annotations.write_text(text.replace(WNIDS[0], "n00000000"))
    refuses(r"val_annotations.txt: \['val_0.JPEG', 'n00000000'\] is not a file name and a class of wnids.txt")
    annotations.write_text("".join(text.splitlines(keepends=True)[:-1]))
    refuses(r"12 \+ 8 images instead of 12 \+ 9")
    annotations.write_text("\n")
    refuses("val_annotations.txt names no images")
    annotations.write_text(text)
    (folder / "train" / ".cache").mkdir()  # hidden: nobody's class
    assert len(load_splits("tiny-imagenet", tiny, validation=0).train) == 12
    (folder / "train" / "n99999999").mkdir()
    refuses("train has folders that are no class: n99999999")
    (folder / "train" / "n99999999").rmdir()
    for path in (folder / "train" / WNIDS[1] / "images").iterdir():
        path.unlink()
    refuses(f"{WNIDS[1]}/images has no images")


def test_an_image_folder_reads_like_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for name in ("zebra", "ant"):
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3) if i else (32, 32), dtype=np.uint8)
                official.write_image(tmp_path / part / name / f"{i}.PNG", pixels)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    for part, data in zip(("train", "val"), DATASETS["image-folder"].read(tmp_path), strict=True):
        theirs = ImageFolder(str(tmp_path / part))
        assert data.labels.tolist() == theirs.targets
        assert np.array_equal(data.images.numpy(), [np.asarray(image).transpose(2, 0, 1) for image, _ in theirs])
    monkeypatch.setitem(DATASETS, "imagenet32", replace(DATASETS["imagenet32"], classes=2, counts=(10, 4)))
    (tmp_path / "imagenet").mkdir()
    for part in ("train", "val"):
        (tmp_path / "imagenet" / part).symlink_to(tmp_path / part)
    assert torch.equal(
        load_splits("imagenet32", tmp_path).test.images, load_splits("image-folder", tmp_path).test.images
    )
    splits = load_splits("image-folder", tmp_path, classes=[1], validation=0.2)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 1, 2]

    for name in ("ant", "zebra"):  # test/ goes before val/
        official.write_image(tmp_path / "test" / name / "only.png", np.full((32, 32, 3), 9, np.uint8))
    assert load_splits("image-folder", tmp_path).test.images.unique().tolist() == [9]
    official.write_image(tmp_path / "test" / "yak" / "only.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="test has folders that are no class: yak"):
        load_splits("image-folder", tmp_path)


def test_other_sizes_give_the_square_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((96, 160, 3), np.uint8)
    inside = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    wide[:, 32:128] = inside
    official.write_image(tmp_path / "wide.png", wide)
    official.write_image(tmp_path / "high.png", wide.transpose(1, 0, 2))
    small = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    official.write_image(tmp_path / "small.png", small)
    assert np.array_equal(folders._decode(tmp_path / "wide.png"), official.mean_of_blocks(inside))
    assert np.array_equal(folders._decode(tmp_path / "high.png"), official.mean_of_blocks(inside.transpose(1, 0, 2)))
    doubled = small.repeat(2, axis=0).repeat(2, axis=1).transpose(2, 0, 1)
    assert np.array_equal(folders._decode(tmp_path / "small.png"), doubled)


# Files that are not what their names say


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


def grey_tiff(bits: int, zero_is_black: bool) -> bytes:
    """32 x 32 white pixels of so many bits, by the TIFF 6.0 specification."""
    pixels = (b"\xff" if zero_is_black else b"\0") * (32 * 32 * bits // 8)
    fields = {256: 32, 257: 32, 258: bits, 259: 1, 262: int(zero_is_black), 273: 8, 277: 1, 278: 32, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return header + pixels + struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)


def test_tiffs_of_other_depths_are_refused(tmp_path: Path) -> None:
    """White of 12 bits would be nearly black, and so would white that is written as 0."""
    path = tmp_path / "a.tif"
    path.write_bytes(grey_tiff(16, zero_is_black=True))
    assert (folders._decode(path) == 255).all()
    for bits, black in ((12, True), (16, False)):
        path.write_bytes(grey_tiff(bits, black))
        with pytest.raises(
            ValueError, match=r"a.tif cannot be decoded: a grey TIFF of 9 to 15 bits, or whose 0 is white"
        ):
            folders._decode(path)


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


@pytest.fixture
def cifar_c(tmp_path: Path, expect: Callable[..., None]) -> tuple[Path, np.ndarray, np.ndarray]:
    """The root of a CIFAR-10 with its CIFAR-10-C, the corrupted images ``[5, 20, 3, 32, 32]``, and the labels."""
    train, test = official.make_arrays(50, 10, 1), official.make_arrays(20, 10, 2)
    official.write_cifar(tmp_path / "cifar-10-batches-bin", train, test)
    expect("cifar10", counts=(50, 20))
    corrupted, _ = official.make_arrays(100, 10, 3)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "gaussian_noise.npy", corrupted.transpose(0, 2, 3, 1))
    np.save(folder / "saturate.npy", 255 - corrupted.transpose(0, 2, 3, 1))
    np.save(folder / "labels.npy", np.tile(test[1], 5))
    return tmp_path, corrupted.reshape(5, 20, 3, 32, 32), test[1]


def test_cifar_c_pairs_with_the_test_set(cifar_c: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, corrupted, labels = cifar_c
    clean = load_splits("cifar10", root).test
    for severity in range(1, 6):
        images, ordered = official.by_class(corrupted[severity - 1], labels)
        for name, truth in (("gaussian_noise", images), ("saturate", 255 - images)):
            data = load_corrupted("cifar10", root, name, severity)
            assert np.array_equal(data.images.numpy(), truth)
            assert data.labels.tolist() == ordered.tolist() == clean.labels.tolist()
    few = load_corrupted("cifar10", root, "gaussian_noise", 5, classes=[8, 3])
    assert few.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(few.images[2:].numpy(), corrupted[4][labels == 3])
    assert available_corruptions("cifar10", root) == ["gaussian_noise", "saturate"]
    assert available_corruptions("cifar100", root) == available_corruptions("tiny-imagenet", root) == []


def test_a_broken_cifar_c_is_refused(cifar_c: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, _, _ = cifar_c
    with pytest.raises(ValueError, match="severity must be 1 to 5, got 0"):
        load_corrupted("cifar10", root, "saturate", 0)
    with pytest.raises(ValueError, match="classes must be different numbers from 0 to 9"):
        load_corrupted("cifar10", root, "saturate", 1, classes=[10])
    with pytest.raises(ValueError, match="published of cifar10, cifar100, tiny-imagenet, not of 'digits'"):
        load_corrupted("digits", root, "saturate", 1)
    with pytest.raises(FileNotFoundError) as error:
        load_corrupted("cifar10", root, "fog", 1)
    for words in ("missing: fog.npy)", "gaussian_noise, saturate", "https://zenodo.org/records/2535967"):
        assert words in str(error.value)

    path = root / "CIFAR-10-C" / "saturate.npy"
    whole = path.read_bytes()
    for write, message in (
        (lambda: path.write_bytes(whole[:-1]), "saturate.npy: "),
        (lambda: path.write_bytes(b""), "saturate.npy: "),
        (lambda: np.save(path, np.zeros((99, 32, 32, 3), np.uint8)), r"uint8 \[99, 32, 32, 3\], not uint8 \[100, 32"),
        (lambda: np.save(path, np.zeros((100, 32, 32, 3))), r"float64 \[100, 32, 32, 3\], not uint8"),
        (lambda: np.save(path, np.array([{}]), allow_pickle=True), "saturate.npy: .*pickle|Python objects"),
        (lambda: np.save(path.with_name("labels.npy"), np.zeros(99, int)), "labels.npy: .*not 100 integers"),
    ):
        if "labels" in message:
            path.write_bytes(whole)
        write()
        with pytest.raises(ValueError, match=message) as broken:
            load_corrupted("cifar10", root, "saturate", 1)
        assert "CIFAR-10-C, saturate is broken" in str(broken.value)


def test_tiny_imagenet_c_pairs_with_the_test_set(tiny: Path, decodings: list[Path]) -> None:
    source, target = tiny / "tiny-imagenet-200" / "val", tiny / "Tiny-ImageNet-C" / "fog" / "3"
    for line in (source / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (target / wnid).mkdir(parents=True, exist_ok=True)
        (target / wnid / name).write_bytes((source / "images" / name).read_bytes())
    clean = load_splits("tiny-imagenet", tiny).test
    data = load_corrupted("tiny-imagenet", tiny, "fog", 3)
    assert torch.equal(data.images, clean.images)  # the copies are not corrupted: so the order shows
    assert torch.equal(data.labels, clean.labels)
    del decodings[:]
    few = load_corrupted("tiny-imagenet", tiny, "fog", 3, classes=[2])
    assert decodings == []
    assert torch.equal(few.images, clean.images[clean.labels == 2])
    assert available_corruptions("tiny-imagenet", tiny) == ["fog"]
    with pytest.raises(FileNotFoundError, match=r"fog: 4 \(missing: all of them\)\nCorruptions there: fog"):
        load_corrupted("tiny-imagenet", tiny, "fog", 4)
    (target / sorted(WNIDS)[0] / "val_1.JPEG").unlink()
    with pytest.raises(ValueError, match="8 images instead of 9"):
        load_corrupted("tiny-imagenet", tiny, "fog", 3)
