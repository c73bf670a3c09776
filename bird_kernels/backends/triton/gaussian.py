r"""Gaussian kernels: distances by tiles, then K and L, their moments, and their gradients as of any Gram matrices.

The mathematics is in `library_rbf`. For up to `plan.KEPT` rows only, since K and L are kept in memory as full matrices.
A matrix holds squared distances at first and then, in place, K - c, where c = exp(-t) is a typical entry. Five launches
forward and one backward; between distances and kernels, library operations compute the bandwidth.
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
from .. import linalg
from ..library_rbf import bandwidth_of
from ..library_rbf.strips import SAME, Strips
from .double import HEIGHT
from .finish import gram_rows_kernel
from .gradient import Pairs, memory_of
from .launch import Launch, many_steps
from .reduce import COEFFICIENTS, upper_tile
from .shift import Shift, padded_width

EPS = tl.constexpr(2.0**-23)


@triton.jit
def distances_kernel(
    zx,  # [n, pa], from `shift.shift_kernel`
    zy,  # [n, qa]
    norms,  # fp32 [2, n]: of their rows, squared
    grams,  # out, fp32 [2, n, n]: squared distances, diagonal 0
    n,  # rows of zx and zy
    p,  # columns of x
    q,  # columns of y
    SAME: tl.constexpr,  # squared distances up to this many eps of the norms are rounding errors and set to zero
    PRECISION: tl.constexpr,  # of fp32 products: "ieee", "tf32" or "tf32x3"
    BLOCK: tl.constexpr,  # rows and columns of a tile
    STEP: tl.constexpr,  # columns of z that are multiplied at a time
):
    """Grid (upper tiles, sides): a tile of squared distances and its mirror image."""
    tile, side = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = upper_tile(tile, tl.cdiv(n, BLOCK))
    rows, others = row_tile * BLOCK + tl.arange(0, BLOCK), column_tile * BLOCK + tl.arange(0, BLOCK)
    z, d = tl.where(side == 0, zx, zy), padded_width(tl.where(side == 0, p, q))
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, d, STEP):
        columns = start + tl.arange(0, STEP)
        there = (columns < d)[None, :]
        left, right = z + rows.to(tl.int64)[:, None] * d, z + others.to(tl.int64)[:, None] * d
        left = tl.load(left + columns[None, :], mask=(rows < n)[:, None] & there, other=0.0)
        right = tl.load(right + columns[None, :], mask=(others < n)[:, None] & there, other=0.0)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    norms += side * n
    pairs = tl.load(norms + rows, mask=rows < n, other=0.0)[:, None]
    pairs += tl.load(norms + others, mask=others < n, other=0.0)[None, :]
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
    """The launches of a pair: shift (two), distances, kernels and moments of a forward, and one for the backward."""

    def __init__(self, problems: tuple[Problem, ...], precision: str) -> None:
        (self.problem,), t = problems, plan.RBF_TILING
        super().__init__(problems, precision, t, gaussian_shapes(self.problem))
        n, p, q = self.problem.n, self.problem.p, self.problem.q
        tiles = ceil_div(n, t.block)
        self.shifted = Shift(self.problem, n, precision, always=True, cross=False)  # distances need small norms
        decided = self.decided | dict(p=p, q=q, SAME=SAME, TF32=precision == "tf32", shares=self.shifted.shares)
        multiply = many_steps(self.problem, precision)
        self.distances = Launch(distances_kernel, (tiles * (tiles + 1) // 2, 2), decided, **multiply)
        self.kernels = Launch(gram_rows_kernel, (2 * self.blocks,), decided)

    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Value (0-d, fp32) and stash."""
        x, y = tensors
        n = self.problem.n
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        known, memory = self.shifted(x, y, mask, zx=stash.xs, zy=stash.ys, ones=stash.xs)
        norms = torch.stack([torch.linalg.vecdot(z.float(), z.float()) for z in (stash.xs, stash.ys)])
        memory |= memory_of(stash) | dict(norms=norms, values=x.new_empty((), dtype=torch.float32))
        self.distances(known, memory)
        count = float(n) if mask is None else mask.sum(dtype=torch.float64)
        scales = memory["scales"].double()
        found = [
            bandwidth_of(_Whole(side, own, mask, self.problem), scale, count, i)
            for i, (side, own, scale) in enumerate(zip(stash.xx, norms, scales, strict=True))
        ]
        numbers = tuple(number for b in found for number in (b.factor, b.typical, b.level, linalg.scalar(b.scale)))
        memory["bandwidths"] = linalg.pack(numbers, x.device)
        memory["slots"] = x.new_empty(6 * self.blocks, dtype=torch.float64)
        memory["rows"] = torch.empty_like(stash.rows)
        self.kernels(known, memory)
        self.moments(known, memory)
        return memory["values"], stash._replace(xy=memory["bandwidths"])


class _Whole(Strips):
    """`Strips` over squared distances that are in memory already, ``matrix`` [n, n]; upper strips are views of it."""

    def __init__(self, matrix: Tensor, norms: Tensor, mask: Tensor | None, problem: Problem) -> None:
        n, rows = problem.n, plan.strip_rows(problem)
        self.features, self.norms, self.mask, self.problem = matrix, norms, mask, problem
        self.wide = matrix.dtype
        self.blocks = [(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.kept = [matrix[i:j, i:] for i, j in self.blocks]
