"""The data sets by name: their sizes, their layouts on disk, and their sources."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from .batches import read_binary, read_dicts
from .folders import read_image_folder, read_tiny_imagenet
from .grey import read_digits, read_fashion, read_fashion_subset
from .layout import Dataset, FileLayout
from .photographs import PHOTOGRAPHS, over_levels, over_photographs

_CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_IMAGENET32_TRAIN = tuple(f"train_data_batch_{i}" for i in range(1, 11))
_FROM_ONE = partial(read_dicts, lowest=1)
_FASHION = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

DATASETS: dict[str, Dataset] = {
    "cifar10": Dataset(
        title="CIFAR-10",
        classes=10,
        channels=3,
        counts=(50_000, 10_000),
        layouts=(
            FileLayout(
                "cifar-10-batches-bin", tuple(f"{file}.bin" for file in _CIFAR10), partial(read_binary, label_bytes=1)
            ),
            FileLayout("cifar-10-batches-py", _CIFAR10, read_dicts),
        ),
        source="Get cifar-10-binary.tar.gz or cifar-10-python.tar.gz from "
        "https://www.cs.toronto.edu/~kriz/cifar.html (no licence is stated; cite Krizhevsky, 2009), "
        "or torchvision.datasets.CIFAR10(root, download=True).",
    ),
    "cifar100": Dataset(
        title="CIFAR-100",
        classes=100,
        channels=3,
        counts=(50_000, 10_000),
        layouts=(
            FileLayout("cifar-100-binary", ("train.bin", "test.bin"), partial(read_binary, label_bytes=2)),
            FileLayout("cifar-100-python", ("train", "test"), partial(read_dicts, key="fine_labels")),
        ),
        source="Get cifar-100-binary.tar.gz or cifar-100-python.tar.gz from "
        "https://www.cs.toronto.edu/~kriz/cifar.html (no licence is stated; cite Krizhevsky, 2009), "
        "or torchvision.datasets.CIFAR100(root, download=True).",
    ),
    "tiny-imagenet": Dataset(
        title="TinyImageNet",
        classes=200,
        channels=3,
        counts=(100_000, 10_000),
        layouts=(
            FileLayout(
                "tiny-imagenet-200",
                ("wnids.txt", "train", "val/val_annotations.txt", "val/images"),
                read_tiny_imagenet,
            ),
        ),
        source="Get http://cs231n.stanford.edu/tiny-imagenet-200.zip (ImageNet's terms: research, not commercial).",
    ),
    "imagenet32": Dataset(
        title="ImageNet-32",
        classes=1000,
        channels=3,
        counts=(1_281_167, 50_000),
        layouts=(
            FileLayout("imagenet32", (*_IMAGENET32_TRAIN, "val_data"), _FROM_ONE, ("", ".npz")),
            FileLayout(
                ".",  # as the official archives unpack
                (*(f"Imagenet32_train/{file}" for file in _IMAGENET32_TRAIN), "Imagenet32_val/val_data"),
                _FROM_ONE,
            ),
            FileLayout(
                ".",
                (
                    *(f"Imagenet32_train_npz/{file}.npz" for file in _IMAGENET32_TRAIN),
                    "Imagenet32_val_npz/val_data.npz",
                ),
                _FROM_ONE,
            ),
            FileLayout("imagenet", ("train", "val"), read_image_folder),  # ImageNet itself, a folder per class
        ),
        source="Get Imagenet32_train and Imagenet32_val, .zip or _npz.zip, from "
        "https://image-net.org/download-images.php (after a login; ImageNet's terms: research, not commercial).",
    ),
    "image-folder": Dataset(
        title="A folder of images",
        classes=None,
        channels=3,
        counts=(0, 0),
        layouts=(
            FileLayout(".", ("train", "test"), read_image_folder),
            FileLayout(".", ("train", "val"), read_image_folder),
        ),
        source="One folder a class: train/CLASS/*.png and test/CLASS/*.png, or val/ where there is no test/.",
    ),
    "fashion-mnist": Dataset(
        title="Fashion-MNIST",
        classes=10,
        channels=1,
        counts=(60_000, 10_000),
        layouts=(
            FileLayout("FashionMNIST/raw", _FASHION, read_fashion, ("", ".gz")),
            FileLayout("/usr/share/datasets/fashion-mnist", _FASHION, read_fashion, ("", ".gz")),
        ),
        source="On Debian and Ubuntu: apt install dataset-fashion-mnist. Elsewhere: "
        "https://github.com/zalandoresearch/fashion-mnist (MIT), or "
        "torchvision.datasets.FashionMNIST(root, download=True).",
    ),
    "fashion-mnist-subset": Dataset(
        title="The part of Fashion-MNIST that ships with the package",
        classes=10,
        channels=1,
        counts=(12_000, 2_500),
        layouts=(FileLayout(str(Path(__file__).parents[1] / "fashion"), ("fashion_mnist.npz",), read_fashion_subset),),
        source="It comes with the package: install it again.",
    ),
    "digits": Dataset(
        title="scikit-learn's digits",
        classes=10,
        channels=1,
        counts=(0, 0),  # 1,797 in all, split by `read_digits`
        layouts=(FileLayout(".", (), read_digits),),
        source="They come with scikit-learn (UCI's optical recognition of handwritten digits, CC BY 4.0).",
    ),
}
DATASETS["fashion-levels"] = replace(
    DATASETS["fashion-mnist"], title="Fashion-MNIST over random levels of grey", channels=3, finish=over_levels
)
DATASETS["fashion-photos"] = replace(
    DATASETS["fashion-mnist"],
    title="Fashion-MNIST over photographs",
    channels=3,
    needs=PHOTOGRAPHS,
    finish=over_photographs,
)
