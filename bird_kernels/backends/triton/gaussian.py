r"""Gaussian kernels: distances by tiles, then K and L, their moments, and their gradients as of any Gram matrices.

The mathematics is in `library_rbf`. For up to `plan.KEPT` rows only, since K and L are kept in memory as full matrices.
A matrix holds squared distances at first and then, in place, K - c, where c = exp(-t) is a typical entry; `bandwidth`
finds c in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import plan
from ...plan import ceil_div
from ...types import Problem, Shapes, Stash
from ..library_rbf.strips import SAME
from .bandwidth import BINS, PLACES, TOGETHER, blocks_of, rules, select_kernel
from .double import HEIGHT
from .finish import gram_rows_kernel
from .gradient import Pairs, memory_of
from .launch import Launch, many_steps
from .reduce import COEFFICIENTS, upper_tile
from .shift import SHIFTED, Shift, padded_width

EPS = tl.constexpr(2.0**-23)


@triton.jit
def _norms_of(norms, rows, n, begin, end):
    """The squared norms of these rows of z, from those of the blocks ``begin`` to ``end`` of its columns."""
    total = tl.zeros(rows.shape, tl.float32)
    for first in range(begin, end, TOGETHER):
        blocks = first + tl.arange(0, TOGETHER)[:, None]
        there = (blocks < end) & (rows < n)[None, :]
        total += tl.sum(tl.load(norms + blocks * n + rows[None, :], mask=there, other=0.0), 0)
    return total


@triton.jit
def distances_kernel(
    zx,  # [n, pa], from `shift.shift_kernel`
    zy,  # [n, qa]
    norms,  # fp32 [blocks of SHIFTED columns of y, then of x, n]: of their rows, squared
    grams,  # out, fp32 [2, n, n]: squared distances, diagonal 0
    n,  # rows of zx and zy
    p,  # columns of x
    q,  # columns of y
    SAME: tl.constexpr,  # squared distances up to this many eps of the norms are rounding errors and set to zero
    PRECISION: tl.constexpr,  # of fp32 products: "ieee", "tf32" or "tf32x3"
    SHIFTED: tl.constexpr,  # columns of a block in ``norms``
    BLOCK: tl.constexpr,  # rows and columns of a tile
    STEP: tl.constexpr,  # columns of z that are multiplied at a time
):
    """Grid (upper tiles, sides): a tile of squared distances and its mirror image."""
    tile, side = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = upper_tile(tile, tl.cdiv(n, BLOCK))
    rows, others = row_tile * BLOCK + tl.arange(0, BLOCK), column_tile * BLOCK + tl.arange(0, BLOCK)
    z, d = tl.where(side == 0, zx, zy), padded_width(tl.where(side == 0, p, q))
    begin, end = blocks_of(side, p, q, SHIFTED)
    of_rows, of_others = _norms_of(norms, rows, n, begin, end), _norms_of(norms, others, n, begin, end)
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, d, STEP):
        columns = start + tl.arange(0, STEP)
        there = (columns < d)[None, :]
        left, right = z + rows.to(tl.int64)[:, None] * d, z + others.to(tl.int64)[:, None] * d
        left = tl.load(left + columns[None, :], mask=(rows < n)[:, None] & there, other=0.0)
        right = tl.load(right + columns[None, :], mask=(others < n)[:, None] & there, other=0.0)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    pairs = of_rows[:, None] + of_others[None, :]
    squares = pairs - 2.0 * product
    none = (squares <= pairs * (SAME * EPS)) | (rows[:, None] == others[None, :])  # NaN stays
    squares = tl.where(none, 0.0, squares)
    inside = (rows < n)[:, None] & (others < n)[None, :]
    grams += side.to(tl.int64) * n * n
    r, c = rows.to(tl.int64)[:, None], others.to(tl.int64)[None, :]
    tl.store(grams + r * n + c, squares, mask=inside)
    tl.store(grams + c * n + r, squares, mask=inside & (row_tile != column_tile))


def gaussian_shapes(problem: Problem) -> Shapes:
    """Shape and dtype of every tensor of the stash.

    ``xs`` and ``ys`` are shifted features, ``xx`` K - c and L - c [2, n, n], ``yy`` the largest off-diagonal entries of
    K and L by blocks of rows, ``xy`` f, t, c and the features' scale of both, ``rows`` the shifts of K's and L's rows.
    """
    n = problem.n
    return dict(
        coefficients=((COEFFICIENTS.value,), torch.float64),
        xs=((n, 8 * ceil_div(problem.p, 8)), problem.dtype),
        ys=((n, 8 * ceil_div(problem.q, 8)), problem.dtype),
        xx=((2, n, n), torch.float32),
        yy=((2, ceil_div(n, HEIGHT)), torch.float32),
        xy=((8,), torch.float64),
        rows=((2, n), torch.float64),
    )


class Gaussian(Pairs):
    """The launches of a pair: shift (two), distances, bandwidths, kernels and moments of a forward; the backward."""

    def __init__(self, problems: tuple[Problem, ...], precision: str) -> None:
        (self.problem,), t = problems, plan.RBF_TILING
        super().__init__(problems, precision, t, gaussian_shapes(self.problem))
        n, p, q, kernel = self.problem.n, self.problem.p, self.problem.q, self.problem.kernel
        assert kernel is not None
        tiles, fixed = plan.upper(ceil_div(n, t.block)), kernel.sigmas is not None
        programs = 1 if fixed else min(tiles, plan.PROGRAMS * plan.CROWD // 2)
        self.shifted = Shift(self.problem, n, precision, always=True, cross=False)  # distances need small norms
        decided = self.decided | rules(kernel) | dict(p=p, q=q, SAME=SAME, TF32=precision == "tf32", SHIFTED=SHIFTED)
        decided |= dict(shares=self.shifted.shares, FIXED=fixed, NONZERO=kernel.threshold is None)
        self.sizes = dict(values=((), torch.float32), slots=((6 * self.blocks,), torch.float64))
        self.sizes |= dict(rows=((2, n), torch.float64), found=((2, 2), torch.int32))
        self.sizes |= dict(histograms=((2, programs, BINS.value), torch.int32))
        distances = Launch(distances_kernel, (tiles, 2), decided, **many_steps(self.problem, precision))
        places = (decided | dict(place=place) for place in PLACES[-1 if fixed else 0 :])
        selects = (Launch(select_kernel, (programs, 2), digit, num_warps=8) for digit in places)
        kernels = Launch(gram_rows_kernel, (2 * self.blocks,), decided)
        self.launches = distances, *selects, kernels, self.moments

    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Value (0-d, fp32) and stash."""
        x, y = tensors
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        known, memory = self.shifted(x, y, mask, zx=stash.xs, zy=stash.ys, ones=stash.xs)
        memory |= memory_of(stash) | {name: x.new_empty(size, dtype=of) for name, (size, of) in self.sizes.items()}
        for launch in self.launches:
            launch(known, memory)
        return memory["values"], stash
