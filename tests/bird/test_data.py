"""The shipped images: complete, balanced, split without overlap, and made by the script beside them."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.reproduction.make_subset import choose, make_subset
from bird.lab.vision.data import Images, to_float
from bird.lab.vision.datasets.grey import read_idx
from tests.bird import official_files as official
from tests.bird.shipped import fashion


def prints(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


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


def test_labels_follow_the_order_of_the_classes() -> None:
    forward, backward = fashion([1, 8]), fashion([8, 1])
    trousers = prints(forward.test.images[forward.test.labels == 0])
    assert trousers == prints(backward.test.images[backward.test.labels == 1])
    # trousers are tall and narrow, bags broad
    columns = to_float(forward.test.images).mean(dim=(1, 2)) > 0.1
    widths = columns.sum(dim=1).float()
    assert widths[forward.test.labels == 0].mean() + 8 < widths[forward.test.labels == 1].mean()


def test_no_image_is_in_two_splits() -> None:
    splits = fashion(range(10))
    sets = [set(prints(part.images)) for part in (splits.train, splits.validation, splits.test)]
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
    chosen = choose(labels, 3, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [3] * 10
    assert not np.array_equal(chosen, choose(labels, 3, np.random.default_rng(1)))
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"not an IDX file"))
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes"):
        read_idx(tmp_path / "x.gz")
