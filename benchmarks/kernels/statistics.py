"""`Statistics` of a data set in batches beside pytorch-cka's loop, which averages HSIC over the batches.

They are two estimators: `Statistics` is the unbiased CKA of all rows at once, and what it keeps can be merged; the loop
is the minibatch estimator of Nguyen et al. 2021. At batches of 128 rows and more they agree to two digits here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import bird_kernels
from benchmarks.harness import Contestant, calling, gate_of
from benchmarks.kernels.loss import Case
from benchmarks.rows import version_of
from benchmarks.run import CPU, Benchmark, Contest

TOLERANCE = 2e-2  # between two estimators
RowBatches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StatisticsQuestion:
    """``batches`` of ``n`` rows of ``width`` features on both sides."""

    batches: int
    n: int
    width: int

    def contest(self) -> Contest:
        """Both loops, and the truth: CKA of all rows in fp64."""
        x, y = Case("", self.batches * self.n, self.width, self.width).features(CPU)
        parts = list(zip(x.split(self.n), y.split(self.n), strict=True))
        truth = calling(partial(bird_kernels.cka, x.double(), y.double(), estimator="unbiased"), backward=False)
        candidates = [Contestant(name, calling(partial(loop, parts), backward=False)) for name, loop in LOOPS.items()]
        return Contest(candidates, gate_of(truth, TOLERANCE, TOLERANCE), lambda name: {"version": VERSIONS.get(name)})


def statistics(batches: RowBatches) -> Tensor:
    found = bird_kernels.Statistics()
    for x, y in batches:
        found.update(x, y)
    return found.cka("unbiased")


def minibatches(batches: RowBatches) -> Tensor:
    from cka.hsic import hsic  # loads matplotlib, and is not everywhere: late

    total = sum(torch.stack([h.flatten()[0] for h in hsic((x @ x.T)[None], (y @ y.T)[None])]) for x, y in batches)
    kl, kk, ll = total
    return kl / (kk * ll).sqrt()


LOOPS: dict[str, Callable[[RowBatches], Tensor]] = {"Statistics": statistics, "pytorch-cka": minibatches}
VERSIONS = {"pytorch-cka": version_of("pytorch-cka")}
SIZES = ((128, 64), (512, 64), (1024, 256), (512, 512))
BENCHMARK = Benchmark(
    "Statistics", "statistics", Path(__file__).parent / "results", [StatisticsQuestion(16, *s) for s in SIZES], """\
Median of a data set in batches, and in brackets how many times the first provider's; fp32, both sides of one width.
""",
    ours={"Statistics"},
)  # fmt: skip
