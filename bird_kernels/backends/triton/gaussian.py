"""The Triton backend's Gaussian kernels: five launches (six above 2048 rows), the library's bandwidth between them.

The backward is one. Up to `plan.KEPT` only: K and L stay in memory, both halves of both. The linear part's column
statistics, row norms and product tiles are used as they are; `rbf` has the rest. Triton computes
the distances, PyTorch's operations find sigma in them (`median`), Triton goes on.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ... import plan
from ...types import Problem, Route, Shapes, Stash
from .. import linalg
from ..library_rbf import bandwidth_of
from ..library_rbf.strips import SAME, Strips
from . import cross, rbf
from .launch import Launch, device_of, distances, precision_of, products
from .routes import (
    NORMS,
    STATS_COLUMNS,
    STATS_ROWS,
    Statistics,
    Workspace,
    as_bytes,
    ceil_div,
    empty_gradients,
    known_of,
)

__all__ = ["backward", "forward", "stash_shapes"]

ROWS, COLUMNS = 8, 256  # of a matrix, that a program reads at a time where there is nothing to multiply
NUMBERS = 14  # coefficients: see `triton.rbf`


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash: means, K - c and L - c [2, n, n], row shifts."""
    n, p, q = problem.n, problem.p, problem.q
    return dict(
        coefficients=((NUMBERS,), torch.float64),
        xs=((2, p), torch.float32),
        ys=((2, q), torch.float32),
        xx=((2, n, n), torch.float32),
        yy=((0,), torch.float32),
        xy=((0,), torch.float32),
        rows=((2, n), torch.float64),
    )


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    with device_of(x):
        return _launches_of(problem, precision_of(problem)).forward(x, y, mask)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    with device_of(x):
        return _launches_of(problem, precision_of(problem)).backward(grad, x, y, mask, stash)


class _Gaussian:
    """Statistics, norms and distances; the library's bandwidth; kernels, moments; the backward."""

    def __init__(self, problem: Problem, precision: str) -> None:
        n, p, q = problem.n, problem.p, problem.q
        self.problem = problem
        self.stash = tuple(stash_shapes(problem, "gram").values())
        self.wanted = problem.x_grad, problem.y_grad
        self.statistics = Statistics(problem)
        peaks = self.statistics.peaks
        t = plan.rbf_tiling(problem)
        tiles, self.blocks, self.norm_blocks = (ceil_div(n, size) for size in (t.block, ROWS, STATS_ROWS))

        masked = dict(MASKED=problem.masked)
        unbiased = dict(UNBIASED=problem.estimator == "unbiased")
        multiply = dict(PRECISION=precision, BLOCK=t.block, STEP=t.step)
        parts = dict(ROWS=ROWS, COLUMNS=COLUMNS)
        self.norms = Launch(
            cross.row_norms_kernel, (self.norm_blocks, 1), (n, p, q, *peaks),
            masked | dict(BLOCK_N=STATS_ROWS, BLOCK_D=STATS_COLUMNS), **NORMS,
        )  # fmt: skip
        self.distances = Launch(
            rbf.rbf_distances_kernel, (plan.tile_count(problem, "gram", t.block), 2), (n, p, q, tiles, *peaks),
            masked | multiply | dict(SAME=SAME), **distances(problem, precision),
        )  # fmt: skip
        self.kernels = Launch(rbf.rbf_kernels_kernel, (self.blocks, 2), (n,), masked | unbiased | parts)
        self.moments = Launch(
            rbf.rbf_moments_kernel, (self.blocks, 1), (n,),
            masked | dict(STATISTIC=problem.statistic) | unbiased | parts,
        )  # fmt: skip
        blocks = tuple(wanted * ceil_div(d, t.block) for wanted, d in zip(self.wanted, (p, q), strict=True))
        self.gradients = Launch(
            rbf.rbf_backward_kernel, (sum(blocks), tiles), (n, p, q, blocks[0]),
            dict(X_GRAD=problem.x_grad, Y_GRAD=problem.y_grad) | masked | multiply,
            **products(problem, "gram", precision),
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Value (0-d, fp32) and stash."""
        n = self.problem.n
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        ws = Workspace(x, mask, sum(self.statistics.peaks), 0, 3 * self.blocks, False)
        norms = x.new_empty((2, n), dtype=torch.float32)
        norm_slots = x.new_empty(5 * self.norm_blocks, dtype=torch.float64)
        sums = x.new_empty((2, n), dtype=torch.float64)
        tops = x.new_empty((2, self.blocks), dtype=torch.float64)
        known = known_of(x, y, ws.mask)
        inputs = x, y, ws.mask, stash.xs, stash.ys, ws.peaks
        strides = *x.stride(), *y.stride()
        self.statistics.launch(known, x, y, stash, ws)
        self.norms(known, *inputs, norms, norm_slots, *strides)
        self.distances(known, *inputs, norms, stash.xx, stash.coefficients, *strides)
        count = float(n) if mask is None else ws.count.double()
        found = [
            bandwidth_of(_Whole(side, own, mask, self.problem), stash.coefficients[8 + 4 * i], count, i)
            for i, (side, own) in enumerate(zip(stash.xx, norms, strict=True))
        ]
        bandwidths = linalg.pack(tuple(number for b in found for number in (b.factor, b.typical, b.level)), x.device)
        self.kernels(
            known, stash.xx, bandwidths, ws.mask, ws.count, sums, tops, stash.rows, stash.coefficients, ws.counter
        )
        self.moments(
            known, stash.xx, stash.rows, bandwidths, ws.mask, ws.count, ws.slots, ws.counter, ws.value,
            stash.coefficients,
        )  # fmt: skip
        return ws.value, stash

    def backward(self, grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash) -> tuple[Tensor, Tensor]:
        """dX and dY times ``grad``; an unwanted one is empty."""
        dx, dy = empty_gradients(x, y, self.wanted)
        if any(self.wanted):
            bytes_ = x if mask is None else as_bytes(mask)
            self.gradients(
                known_of(x, y, grad, bytes_, *stash), x, y, bytes_, stash.xs, stash.ys, stash.xx, stash.rows,
                stash.coefficients, grad, dx, dy, *x.stride(), *y.stride(),
            )  # fmt: skip
        return dx, dy


class _Whole(Strips):
    """Squared distances that a kernel has left in ``matrix`` [n, n], upper strip by upper strip."""

    def __init__(self, matrix: Tensor, norms: Tensor, mask: Tensor | None, problem: Problem) -> None:
        n, rows = problem.n, plan.strip_rows(problem)
        self.features, self.norms, self.mask, self.problem = matrix, norms, mask, problem
        self.wide = matrix.dtype
        self.blocks = [(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.kept = [matrix[i:j, i:] for i, j in self.blocks]


@lru_cache(maxsize=1024)
def _launches_of(problem: Problem, precision: str) -> _Gaussian:
    return _Gaussian(problem, precision)
