"""How much of a result of `fashion/views` is of the weights, and how much of batch normalisation's running statistics?

A student that is shown views beside its task's images updates the running means and variances with both, and is scored
with the mixture. Here they are taken anew from clean training images alone, for every student alike.

    python -m benchmarks.reproduction.recalibrated RUNS DATA benchmarks/reproduction/fashion-views/recalibrated.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bird.lab.tables import write_csv
from bird.lab.vision.data import Images, to_float
from bird.lab.vision.datasets import load_splits
from bird.lab.vision.evaluation import first, robustness
from bird.lab.vision.experiment import Made, VisionExperiment
from bird.lab.vision.recipe import read_vision

IMAGES, BATCH = 6400, 64  # of the task's batches, whose statistics are averaged


@torch.no_grad()
def recalibrate(model: nn.Module, clean: Images) -> None:
    """Take the running statistics of a model's batch normalisation anew, as plain means over batches."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for images in clean.images.split(BATCH):
        model(to_float(images))
    model.eval()


def main(root: Path, data: Path, path: Path) -> None:
    torch.set_num_threads(1)
    recipe, device = read_vision("fashion/views"), torch.device("cpu")
    rows: list[list[Any]] = [["variant", "method", "seed", "corruption", "severity", "accuracy"]]
    for cell in VisionExperiment(recipe, root, device, data).cells():
        splits = load_splits(recipe.student.data, data, classes=recipe.student.classes, seed=cell.seed)
        assert cell.training is not None
        model = Made(recipe.networks[cell.networks].student, recipe.student, cell.training).model(root, device)
        recalibrate(model, first(splits.train, IMAGES))
        found = robustness(model, first(splits.test, recipe.scoring.images), recipe.scoring.corruptions)
        start = [cell.variant, cell.method, cell.seed]
        rows.append([*start, "none", 0, found.clean])
        for kind, accuracies in found.corrupted.items():
            rows += [[*start, kind, severity, accuracy] for severity, accuracy in enumerate(accuracies, 1)]
        print(*start, f"{found.clean:.3f}", flush=True)
    write_csv(path, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("root", "data", "path"):
        parser.add_argument(name, type=Path)
    main(**vars(parser.parse_args()))
