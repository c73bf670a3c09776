"""Make the Fashion-MNIST subset that ships with the package.

    python -m tools.make_subset FOLDER_WITH_THE_FOUR_IDX_FILES [OUTPUT.npz]

The four gzipped IDX files come from https://github.com/zalandoresearch/fashion-mnist, or from the Debian
package ``dataset-fashion-mnist``. The subset holds the same number of images of every class, chosen at random
from the original training and test sets with a fixed seed; the choice is stored with the images
(``train_index``, ``test_index``), so that every one of them can be found again in the original.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bird.lab.vision.datasets.grey import read_idx

CLASSES = 10
PER_CLASS = {"train": 1200, "test": 250}
FILES = {"train": "train", "test": "t10k"}
SEED = 0
SHIPPED = Path(__file__).resolve().parents[1] / "bird/lab/vision/fashion/fashion_mnist.npz"


def choose_images(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of ``per_class`` random samples of each class, in ascending order."""
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(CLASSES)]
    return np.sort(np.concatenate(chosen))


def make_subset(source: Path, target: Path) -> None:
    """Write the balanced subset of the IDX files in ``source`` to ``target``, a compressed ``.npz``."""
    rng = np.random.default_rng(SEED)
    arrays = {}
    for split, prefix in FILES.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        index = choose_images(labels, PER_CLASS[split], rng)
        arrays[f"{split}_images"] = images[index]
        arrays[f"{split}_labels"] = labels[index]
        arrays[f"{split}_index"] = index.astype(np.uint16)
    partial = target.with_name(f".{target.name}")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the four gzipped IDX files")
    parser.add_argument("target", type=Path, nargs="?", default=SHIPPED, help="default: the package's own")
    arguments = parser.parse_args()
    make_subset(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
