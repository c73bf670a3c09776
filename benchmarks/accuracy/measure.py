"""How far the gradient of a CKA loss is off, as the features move away from the origin: the README's first table.

    python -m benchmarks.accuracy.measure    # some seconds; writes results.csv beside this file

Features have the same mean in every column and spread 1. The truth is autograd's in fp64, of the same features in the
dtype that the loss is given; the error is |g - truth| / |truth|, the largest of three seeds. An implementation that
computes the unbiased estimator is compared with the unbiased truth.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels import providers
from bird_kernels import cka_loss

RESULTS = Path(__file__).with_name("results.csv")
ROWS, WIDTH, TEACHER_WIDTH, SEEDS = 128, 256, 320, (0, 1, 2)
MEANS = 0, 16, 64, 1000
DTYPES = torch.float32, torch.bfloat16


# What the README calls them, the loss, and the estimator that it computes.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "cka_loss": (cka_loss, "biased"),
    "cka_loss, unbiased": (partial(cka_loss, estimator="unbiased"), "unbiased"),
    "authors' formula": (providers.naive, "biased"),
    "formula in fp64": (providers.fp64, "biased"),
    "pytorch-cka": (providers.pytorch_cka, "unbiased"),
}


@dataclass(frozen=True)
class AccuracyRow:
    """One cell of the table, and what it was computed with."""

    loss: str
    estimator: str
    dtype: str
    mean: int
    error: float  # NaN: the gradient is not finite
    torch: str
    date: str


def features(mean: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's: half of the teacher's geometry is the student's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    mixing = torch.randn(WIDTH, TEACHER_WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    noise = torch.randn(ROWS, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
    y = (x @ mixing + noise) / 2**0.5
    return (x + mean).to(dtype), (y + mean).to(dtype)


def gradient_of(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of the loss with respect to x, in fp64."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(x, y), x)
    return found.double()


def error(name: str, mean: int, dtype: torch.dtype) -> float:
    """The relative error of a loss's gradient, the largest of the seeds; NaN if one of them is not finite."""
    loss, estimator = LOSSES[name]
    worst = 0.0
    for seed in SEEDS:
        x, y = features(mean, dtype, seed)
        truth = gradient_of(partial(providers.by_grams, estimator=estimator), x.double(), y.double())
        off = float((gradient_of(loss, x, y) - truth).norm() / truth.norm())
        worst = off if off != off else max(worst, off)
        if worst != worst:
            break
    return worst


def every_cell() -> list[AccuracyRow]:
    """All cells."""
    date = datetime.date.today().isoformat()
    return [
        AccuracyRow(
            name, estimator, str(dtype).removeprefix("torch."), mean, error(name, mean, dtype), torch.__version__, date
        )
        for dtype in DTYPES
        for name, (_, estimator) in LOSSES.items()
        for mean in MEANS
    ]


def committed() -> list[AccuracyRow]:
    """The rows of the file."""
    return rows.load_rows(RESULTS, AccuracyRow)


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows.write_rows(RESULTS, [replace(row, error=float(f"{row.error:.2g}")) for row in every_cell()])


if __name__ == "__main__":
    main()
