"""How far the gradient of a CKA loss is off, as the features move away from the origin: the README's first table.

    python -m benchmarks.accuracy.measure    # some seconds; writes results.csv beside this file

Features have the same mean in every column and spread 1. The truth is autograd's in fp64, of the same features in the
dtype that the loss is given; the error is |g - truth| / |truth|, the largest of three seeds. An implementation that
computes the unbiased estimator is compared with the unbiased truth.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import calling, gate_of
from benchmarks.kernels import forms
from benchmarks.kernels.forms import Loss
from benchmarks.rows import Row, origin_of, write_rows
from bird_kernels import cka_loss

RESULTS = Path(__file__).with_name("results.csv")
ROWS, WIDTH, TEACHER_WIDTH, SEEDS = 128, 256, 320, (0, 1, 2)
MEANS = 0, 16, 64, 1000
DTYPES = "float32", "bfloat16"
# What the README calls them, the loss, and the estimator that it computes.
LOSSES: dict[str, tuple[Loss, str]] = {
    "cka_loss": (cka_loss, "biased"),
    "cka_loss, unbiased": (partial(cka_loss, estimator="unbiased"), "unbiased"),
    "authors' formula": (forms.naive, "biased"),
    "features in fp64": (forms.fp64, "biased"),
    "pytorch-cka": (forms.pytorch_cka, "unbiased"),
}


def features(mean: int, dtype: str, seed: int) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's: half of the teacher's geometry is the student's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    mixing = torch.randn(WIDTH, TEACHER_WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    noise = torch.randn(ROWS, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
    y = (x @ mixing + noise) / 2**0.5
    return (x + mean).to(getattr(torch, dtype)), (y + mean).to(getattr(torch, dtype))


def gradient_error(name: str, mean: int, dtype: str) -> float:
    """The relative error of a loss's gradient, the largest of the seeds; NaN if one of them is not finite."""
    loss, estimator = LOSSES[name]
    errors = []
    for seed in SEEDS:
        x, y = features(mean, dtype, seed)
        truth = calling(partial(forms.by_grams, y=y.double(), estimator=estimator), x.double())
        gate = gate_of(truth, torch.inf, torch.inf)
        errors.append(gate(calling(lambda student, y=y: loss(student, y), x)()).gradient_error)
    return max(errors) if max(errors) < torch.inf else torch.nan


def main() -> None:
    """Measure and write, to two digits."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    origin = origin_of(torch.device("cpu"))
    about = {"torch": origin["torch"], "date": origin["date"]}
    cells = product(DTYPES, LOSSES, MEANS)
    rows: list[Row] = [dict(loss=name, estimator=LOSSES[name][1], dtype=d, mean=m) for d, name, m in cells]
    for row in rows:
        row["error"] = float(f"{gradient_error(row['loss'], row['mean'], row['dtype']):.2g}")
    write_rows(RESULTS, [row | about for row in rows])


if __name__ == "__main__":
    main()
