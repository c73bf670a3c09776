"""Every data set, from tiny files in its official layout: values, splits, torchvision's reading, errors."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets as torchvision_datasets

from bird.lab.recipe import data_root
from bird.lab.vision.data import Images, to_float
from bird.lab.vision.datasets import DATASETS, load_splits
from bird.lab.vision.datasets.batches import stack_batches
from bird.lab.vision.datasets.grey import read_idx
from tests.bird import official_files as official
from tests.bird.shipped import fashion
from tools.make_subset import choose_images, make_subset

DEBIAN = Path(DATASETS["fashion-mnist"].layouts[1].folder)


def assert_holds(data: Images, images: np.ndarray, labels: np.ndarray) -> None:
    assert np.array_equal(data.images.numpy(), images)
    assert np.array_equal(data.labels.numpy(), labels)


def prints(data: Images) -> list[bytes]:
    return [image.numpy().tobytes() for image in data.images]


CIFAR = {
    "cifar10": (10, "cifar-10-batches-bin", "cifar-10-batches-py", torchvision_datasets.CIFAR10),
    "cifar100": (100, "cifar-100-binary", "cifar-100-python", torchvision_datasets.CIFAR100),
}


@pytest.mark.parametrize("dump", [None, *official.PICKLERS])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_holds_what_was_written_and_torchvision_reads(
    name: str, dump: str | None, tmp_path: Path, expect: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    classes, binary, python, theirs = CIFAR[name]
    train, test = official.make_arrays(5 * classes, classes, 3), official.make_arrays(2 * classes, classes, 4)
    pickler = official.PICKLERS[dump] if dump else None
    official.write_cifar(tmp_path / (python if dump else binary), train, test, pickler, fine=name == "cifar100")
    expect(name, counts=(5 * classes, 2 * classes))
    read = DATASETS[name].read(tmp_path)
    for data, made in zip(read, (train, test), strict=True):
        assert_holds(data, *made)
    if dump is None:
        splits = load_splits(name, tmp_path, validation=0)
        assert_holds(splits.test, *official.by_class(*test))
        assert sorted(prints(splits.train)) == sorted(image.tobytes() for image in train[0])
        assert len(splits.validation) == 0
        return
    for attribute in ("train_list", "test_list"):  # their checksums are the real files'
        monkeypatch.setattr(theirs, attribute, [[file, None] for file, _ in getattr(theirs, attribute)])
    monkeypatch.setattr(theirs, "meta", theirs.meta | {"md5": None})
    for data, is_train in zip(read, (True, False), strict=True):
        other = theirs(str(tmp_path), train=is_train)
        assert_holds(data, other.data.transpose(0, 3, 1, 2), np.array(other.targets))


@pytest.mark.parametrize(
    ("folder", "npz"),
    [("imagenet32", False), ("imagenet32", True), ("split", False), ("split_npz", True)],
)
def test_imagenet32(folder: str, npz: bool, tmp_path: Path, expect: Callable[..., None]) -> None:
    train, test = official.make_arrays(1000, 1000, 5), official.make_arrays(1000, 1000, 6)
    if folder == "imagenet32":
        official.write_imagenet32(tmp_path / folder, train, test, npz=npz)
    else:  # as the official archives unpack
        end = "_npz" if npz else ""
        official.write_imagenet32(tmp_path / f"Imagenet32_train{end}", train, test, npz=npz)
        (tmp_path / f"Imagenet32_val{end}").mkdir()
        file = "val_data.npz" if npz else "val_data"
        (tmp_path / f"Imagenet32_train{end}" / file).rename(tmp_path / f"Imagenet32_val{end}" / file)
    expect("imagenet32", counts=(1000, 1000))
    read_train, read_test = DATASETS["imagenet32"].read(tmp_path)
    assert_holds(read_train, *train)
    assert_holds(read_test, *test)


def test_batches_fill_one_array() -> None:
    """ImageNet-32 is 3.9 GB: peak memory is the array and two batches, not the array twice."""
    import tracemalloc

    def batches() -> Any:
        for k in range(20):
            yield Path("x"), np.full((100, 3072), k, np.uint8), np.full(100, k)

    tracemalloc.start()
    data = stack_batches(batches(), 2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.images[::100, 0, 0, 0].tolist() == data.labels[::100].tolist() == list(range(20))
    assert peak < 1.2 * data.images.numel()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["FashionMNIST/raw", "debian"])
def test_fashion_is_padded_with_zeros(suffix: str, place: str, tmp_path: Path, expect: Callable[..., None]) -> None:
    train, test = (official.make_arrays(n, 10, n, (28, 28)) for n in (60, 20))
    official.write_fashion(tmp_path / place, train, test, suffix)
    first, second = DATASETS["fashion-mnist"].layouts
    layouts = (first, replace(second, folder=str(tmp_path / "debian")))
    expect("fashion-mnist", counts=(60, 20), layouts=layouts)
    read_train, read_test = DATASETS["fashion-mnist"].read(tmp_path)
    for data, (images, labels) in ((read_train, train), (read_test, test)):
        padded = np.zeros((len(images), 1, 32, 32), np.uint8)
        padded[:, 0, 2:30, 2:30] = images
        assert_holds(data, padded, labels)
    if not suffix and place != "debian":
        theirs = torchvision_datasets.FashionMNIST(str(tmp_path), train=False)
        assert torch.equal(read_test.images[:, 0, 2:30, 2:30], theirs.data)
        assert torch.equal(read_test.labels, theirs.targets)


def test_idx_files_are_checked(tmp_path: Path) -> None:
    path, zipped = tmp_path / "x-ubyte", tmp_path / "x-ubyte.gz"
    official.write_idx(path, np.arange(6).reshape(2, 3))
    assert read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    good = path.read_bytes()
    for bad, message in (
        (b"\x00\x00\x0d" + good[3:], "not an IDX file of unsigned bytes"),  # floats
        (good[:9], "not an IDX file"),
        (good[:-1], r"the header says \[2, 3\], 6 bytes, but 5 follow"),
        (good + b"1", "but more follow"),
        (b"\x00\x00\x08\xc8" + 200 * b"\x00\x00\x00\x01" + b"1", "not an IDX file"),
        (b"\x00\x00\x08\x04" + bytes(4) + 3 * b"\xff" * 4, "at most 1073741824 are read"),
        (b"\x00\x00\x08\x02" + 2 * b"\xff" * 4, "at most 1073741824 are read"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"x-ubyte.*{message}"):
            read_idx(path)
    for bad in (gzip.compress(good)[:-9], b"no gzip file at all"):
        zipped.write_bytes(bad)
        with pytest.raises(ValueError, match="not a whole gzip file"):
            read_idx(zipped)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path: Path) -> None:
    splits = load_splits("fashion-mnist", tmp_path)
    assert splits.train.labels.bincount().tolist() == [5400] * 10
    assert splits.validation.labels.bincount().tolist() == [600] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    train = torch.cat([splits.train.images, splits.validation.images])[:, :, 2:30, 2:30].double() / 255
    assert train.mean().item() == pytest.approx(0.2860, abs=5e-5)  # known for the whole training set
    assert train.std().item() == pytest.approx(0.3530, abs=5e-5)
    # the shipped subset's test images are these, found by their positions in the official file
    with (
        (resources.files("bird.lab.vision") / "fashion" / "fashion_mnist.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        index = torch.from_numpy(arrays["test_index"].astype(np.int64))
    official_order = read_idx(DEBIAN / "t10k-labels-idx1-ubyte.gz").argsort(kind="stable")
    mine = torch.isin(torch.from_numpy(official_order), index)
    shipped = fashion(range(10)).test
    assert torch.equal(splits.test.images[mine], shipped.images)
    assert torch.equal(splits.test.labels[mine], shipped.labels)


def test_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = DATASETS["digits"].read(Path())
    assert len(train) + len(test) == 1797
    positions = (np.arange(32) + 0.5) / 4 - 0.5  # of the new pixels' centres among the old ones'; edges repeat
    weights = np.stack([np.interp(positions, np.arange(8), row) for row in np.eye(8)])
    for k in range(10):
        small = digits.images[digits.target == k]
        truth = weights.T @ small @ weights * 255 / 16
        count = round(len(small) / 5)
        for data, part in ((train, truth[:-count]), (test, truth[-count:])):
            mine = data.images[data.labels == k][:, 0].numpy()
            assert mine.shape == part.shape
            assert np.abs(mine - part).max() <= 0.5 + 1e-6
    assert test.images.max() == 255


def test_splits(tmp_path: Path, expect: Callable[..., None]) -> None:
    train, test = official.make_arrays(300, 10, 8), official.make_arrays(50, 10, 9)
    official.write_cifar(tmp_path / "cifar-10-batches-bin", train, test)
    expect("cifar10", counts=(300, 50))
    first, again, other = (load_splits("cifar10", tmp_path, seed=seed, validation=0.2) for seed in (0, 0, 1))
    for splits in (first, other):
        assert splits.train.labels.bincount().tolist() == [24] * 10
        assert splits.validation.labels.bincount().tolist() == [6] * 10
        assert_holds(splits.test, *official.by_class(*test))
        both = prints(splits.train) + prints(splits.validation)
        assert sorted(both) == sorted(image.tobytes() for image in train[0])
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.validation.images, other.validation.images)

    few = load_splits("cifar10", tmp_path, classes=[7, 2], validation=0.5, limit_per_class=4)
    for part in (few.train, few.validation, few.test):
        assert part.labels.tolist() == [0] * 4 + [1] * 4
    assert prints(few.test)[:4] == [image.tobytes() for image in test[0][test[1] == 7][:4]]
    assert set(prints(few.train)[4:]) <= {image.tobytes() for image in train[0][train[1] == 2]}
    tiny = load_splits("cifar10", tmp_path, validation=1e-9)
    assert tiny.validation.labels.bincount().tolist() == [1] * 10

    for arguments, message in (
        (dict(classes=[1, 1]), "classes must be different numbers from 0 to 9"),
        (dict(classes=[10]), "classes must be different numbers from 0 to 9"),
        (dict(validation=1.0), "below 1, got 1.0"),
        (dict(validation=-0.1), "below 1, got -0.1"),
        (dict(validation=0.99), "30 of class 0's 30 training images validate"),
        (dict(limit_per_class=0), "limit_per_class must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_splits("cifar10", tmp_path, **arguments)
    with pytest.raises(ValueError, match="no data set 'cifar'; there are cifar10, cifar100"):
        load_splits("cifar")


def test_missing_files_are_named(tmp_path: Path, expect: Callable[..., None]) -> None:
    arrays = official.make_arrays(10, 10, 1)
    official.write_cifar(tmp_path / "cifar-10-batches-bin", arrays, arrays)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_splits("cifar10", tmp_path)
    message = str(error.value)
    assert f"{tmp_path}/cifar-10-batches-bin: data_batch_1.bin, " in message
    assert "(missing: data_batch_4.bin)" in message
    assert f"{tmp_path}/cifar-10-batches-py: data_batch_1, " in message
    assert "(missing: all of them)" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message
    assert "BIRD_DATA" in message

    first, second = DATASETS["fashion-mnist"].layouts
    expect("fashion-mnist", layouts=(first, replace(second, folder=str(tmp_path / "debian"))))
    for name in ("cifar100", "tiny-imagenet", "imagenet32", "image-folder", "fashion-mnist"):
        with pytest.raises(FileNotFoundError) as error:
            load_splits(name, tmp_path)
        for layout in DATASETS[name].layouts:
            assert str(tmp_path / layout.folder) in str(error.value)
        assert DATASETS[name].source in str(error.value)
    assert "apt install dataset-fashion-mnist" in DATASETS["fashion-mnist"].source
    assert str(DEBIAN) == "/usr/share/datasets/fashion-mnist"


def test_broken_files_are_named(tmp_path: Path, expect: Callable[..., None]) -> None:
    train, test = official.make_arrays(50, 10, 1), official.make_arrays(10, 10, 2)
    expect("cifar10", counts=(50, 10))

    def refuses(message: str, folder: str, change: Callable[[Path], object]) -> None:
        change(tmp_path / folder)
        with pytest.raises(ValueError, match=message) as error:
            load_splits("cifar10", tmp_path)
        assert "CIFAR-10 is broken" in str(error.value)
        assert "https://www.cs.toronto.edu" in str(error.value)

    folder = "cifar-10-batches-py"
    official.write_cifar(tmp_path / folder, train, test, official.python2_pickle)
    whole = (tmp_path / folder / "test_batch").read_bytes()
    rows = test[0].reshape(-1, 3072)
    refuses("test_batch: ", folder, lambda path: (path / "test_batch").write_bytes(whole[:-100]))
    for data, labels, message in (
        (rows, None, r'test_batch: needs "data" and "labels", holds \[\'data\'\]'),
        (rows[:, 1:], [0] * 10, r"found uint8 \[10, 3071\]"),
        (rows / 2, [0] * 10, "found float64"),
        ("pixels", [0] * 10, "found str"),
        (rows, [0] * 9, "9 labels need images"),
        (rows, [0.5] * 10, '"labels" must be a list of integers'),
        (rows, [10] * 10, "labels from 10 to 10, of 10 classes"),
        (rows, [-1] * 10, "labels from -1 to -1"),
        (rows[:9], [1] * 9, r"50 \+ 9 images instead of 50 \+ 10"),
        (rows.repeat(2, axis=0), [1] * 20, "20 images, more than 10"),
    ):
        content = official.python3_pickle({"data": data} | ({} if labels is None else {"labels": labels}))
        refuses(message, folder, lambda path, content=content: (path / "test_batch").write_bytes(content))
    folder = "cifar-10-batches-bin"  # which is preferred
    official.write_cifar(tmp_path / folder, train, test)
    raw = (tmp_path / folder / "data_batch_2.bin").read_bytes()
    cut = "data_batch_2.bin: 30729 bytes are no whole number of records of 3073; it is cut short"
    refuses(cut, folder, lambda path: (path / "data_batch_2.bin").write_bytes(raw[:-1]))

    (tmp_path / folder / "data_batch_2.bin").unlink()
    refuses("data_batch_2.bin is no file", folder, lambda path: (path / "data_batch_2.bin").mkdir())

    official.write_imagenet32(tmp_path / "imagenet32", train, test, npz=True)
    np.savez(tmp_path / "imagenet32" / "val_data.npz", data=np.array([{}]), labels=np.array([1]))
    expect("imagenet32", counts=(50, 10))
    with pytest.raises(ValueError, match=r"val_data.npz: Object arrays cannot be loaded when allow_pickle=False"):
        load_splits("imagenet32", tmp_path)


def test_the_root_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BIRD_DATA", raising=False)
    assert data_root(None) == tmp_path / "data"
    monkeypatch.setenv("BIRD_DATA", "~/sets")
    assert data_root(None) == Path.home() / "sets"
    assert data_root(tmp_path / "here") == tmp_path / "here"
    with pytest.raises(FileNotFoundError, match=str(Path.home() / "sets" / "cifar-10-batches-py")):
        load_splits("cifar10")


# The images that ship with the package


def test_the_archive_is_balanced_and_says_where_it_comes_from() -> None:
    folder = resources.files("bird.lab.vision") / "fashion"
    assert "MIT License" in (folder / "LICENSE.txt").read_text()
    with (folder / "fashion_mnist.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        for split, each, total in (("train", 1200, 60_000), ("test", 250, 10_000)):
            assert arrays[f"{split}_images"].shape == (10 * each, 28, 28)
            assert np.bincount(arrays[f"{split}_labels"]).tolist() == [each] * 10
            index = arrays[f"{split}_index"]
            assert (np.diff(index.astype(int)) > 0).all()
            assert index.max() < total
        # Fashion-MNIST's mean and standard deviation, known for the whole data set
        scaled = arrays["train_images"] / 255
        assert scaled.mean() == pytest.approx(0.2860, abs=0.004)
        assert scaled.std() == pytest.approx(0.3530, abs=0.004)


def test_splits_have_the_promised_sizes_and_labels() -> None:
    splits = fashion(range(5, 10))
    for part, each in ((splits.train, 1080), (splits.validation, 120), (splits.test, 250)):
        assert part.images.shape == (5 * each, 1, 32, 32)
        assert part.labels.bincount().tolist() == [each] * 5
    small = fashion([3, 7], limit_per_class=9)
    assert [len(part) for part in (small.train, small.validation, small.test)] == [18, 18, 18]


def test_no_image_is_in_two_splits() -> None:
    splits = fashion(range(10))
    sets = [set(prints(part)) for part in (splits.train, splits.validation, splits.test)]
    assert len(sets[0] | sets[1] | sets[2]) == 12_000 + 2_500


def test_images_refuse_what_they_are_not() -> None:
    good, labels = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"images must be uint8 .* got torch.float32"):
        Images(good.float(), labels)
    with pytest.raises(ValueError, match=r"labels must be int64 \[2\], got torch.int64 \(3,\)"):
        Images(good, torch.tensor([0, 1, 2]))


def test_to_float_runs_from_0_to_1() -> None:
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])


def test_the_script_makes_the_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    originals = {}
    for prefix, each in (("train", 1300), ("t10k", 260)):
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), each))
        images = rng.integers(0, 256, (10 * each, 2, 3), dtype=np.uint8)
        official.write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        official.write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
        originals[prefix] = images, labels
    assert np.array_equal(read_idx(tmp_path / "train-images-idx3-ubyte.gz"), originals["train"][0])
    make_subset(tmp_path, tmp_path / "subset.npz")
    with np.load(tmp_path / "subset.npz") as arrays:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = originals[prefix]
            index = arrays[f"{split}_index"]
            assert np.array_equal(images[index], arrays[f"{split}_images"])
            assert np.array_equal(labels[index], arrays[f"{split}_labels"])
            assert len(set(np.bincount(labels[index]))) == 1


def test_the_choice_is_random_and_refuses_another_file(tmp_path: Path) -> None:
    labels = np.arange(100) % 10
    chosen = choose_images(labels, 3, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [3] * 10
    assert not np.array_equal(chosen, choose_images(labels, 3, np.random.default_rng(1)))
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"not an IDX file"))
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes"):
        read_idx(tmp_path / "x.gz")
