"""How much a batch's CKA, and its gradient, say about all samples: values and directions by the number of rows.

    python -m benchmarks.accuracy.batches    # a minute; writes batches.csv and batches.png beside this file

A linear student layer x = u W at W = 1, and a teacher that knows every other one of its directions, and as much that it
does not. Inputs have 256 directions, of equal variance ("white") or of variance 1/k ("power law", nearer to trained
networks). Of up to 20 batches of n rows: mean of the value, its standard deviation, and the mean cosine of the gradient
with respect to W to that of 16,384 samples.
"""

from __future__ import annotations

import argparse
import importlib.util
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.rows import Row, origin_of, write_rows
from bird_kernels import cka

RESULTS = Path(__file__).with_name("batches.csv")
SPECTRA = {"white": 0.0, "power law": 0.5}  # of direction k the spread is k to minus that power
ESTIMATORS = "biased", "unbiased"
ROWS = 16, 32, 64, 128, 256, 512, 1024, 4096
ALL, WIDTH, BATCHES = 16_384, 256, 20


@cache
def samples(spectrum: str) -> tuple[Tensor, Tensor]:
    """Inputs u [`ALL`, `WIDTH`] and teacher features of the same size, fp64."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -SPECTRA[spectrum]
    u, other = (torch.randn(ALL, WIDTH, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
    known = torch.arange(WIDTH) % 2
    return u, (known * u + (1 - known) * other) @ turn


def value_and_gradient(spectrum: str, rows: slice, estimator: str) -> tuple[float, Tensor]:
    """CKA of these samples, and its gradient with respect to W."""
    u, y = (side[rows] for side in samples(spectrum))
    weights = torch.eye(WIDTH, dtype=u.dtype, requires_grad=True)
    value = cka(u @ weights, y, estimator=estimator)
    (gradient,) = torch.autograd.grad(value, weights)
    return value.item(), gradient.flatten()


def of_batches(spectrum: str, estimator: str, n: int) -> Row:
    """One row of the table."""
    whole, truth = value_and_gradient(spectrum, slice(ALL), "unbiased")
    starts = range(0, n * min(BATCHES, ALL // n), n)
    found = [value_and_gradient(spectrum, slice(start, start + n), estimator) for start in starts]
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    cosines = [torch.cosine_similarity(gradient, truth, dim=0).item() for _, gradient in found]
    return dict(
        spectrum=spectrum, estimator=estimator, n=n, batches=len(found), all=round(whole, 3),
        value=round(values.mean().item(), 3), deviation=round(values.std().item(), 3), cosine=round(fmean(cosines), 2),
    )  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """Values and cosines against n, a column of panels for each spectrum. None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (column, spectrum), estimator in product(enumerate(SPECTRA), ESTIMATORS):
        own = [row for row in rows if (row["spectrum"], row["estimator"]) == (spectrum, estimator)]
        n, value = ([row[name] for row in own] for name in ("n", "value"))
        axes[0, column].errorbar(n, value, [row["deviation"] for row in own], marker="o", capsize=3, label=estimator)
        axes[1, column].plot(n, [row["cosine"] for row in own], marker="o", label=estimator)
        axes[0, column].axhline(own[0]["all"], color="grey", linewidth=1)
        axes[0, column].set_title(f"{WIDTH} directions, {spectrum}")
        axes[1, column].set_xlabel("rows of a batch")
    axes[0, 0].set_ylabel("CKA, mean and deviation of batches")
    axes[1, 0].set_ylabel("cosine to the gradient of all")
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].legend()
    figure.savefig(path, format="png", dpi=80)


def main() -> None:
    """Measure, write and draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    origin = origin_of(torch.device("cpu"))
    rows = [of_batches(*cell) for cell in product(SPECTRA, ESTIMATORS, ROWS)]
    write_rows(RESULTS, [row | {"torch": origin["torch"], "date": origin["date"]} for row in rows])
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
