r"""Gaussian kernels: distances by tiles, K and L, their moments, and dX = (2 / sigma^2) (W - diag(W 1)) X.

The mathematics is that of `library_rbf`. Up to `plan.KEPT` only: K and L stay in memory, both halves of both. A matrix
holds squared distances first and then, in the same place, K - c with c = exp(-t) a typical entry. Five launches and one
for the backward; between distances and kernels, library operations find the bandwidth.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import plan
from ...types import Problem, Route, Shapes, Stash
from .. import linalg
from ..library_rbf import bandwidth_of
from ..library_rbf.strips import SAME, Strips
from . import shift
from .centre import counts, row_count
from .double import COLUMN_BLOCK, ROW_BLOCK, both_shifts, moments_kernel, store_shifts
from .launch import Launch, aligned, as_bytes, ceil_div, device_of, precision_of, products
from .reduce import COEFFICIENTS, WIDTH, arrive, store_sizes, upper_tile, weights_of

__all__ = ["backward", "forward", "stash_shapes"]

LOCATED, SHIFTED, SHARES = 32, 64, 64  # columns, and rows and columns, of a program; programs that share a column
EPS = tl.constexpr(2.0**-23)
# Behind the common coefficients, by side: f of scaled features, c, the features' scale, the largest K off the diagonal.
FACTOR, LEVEL, SCALE, PEAK, SIDE = (tl.constexpr(i) for i in range(5))
NUMBERS = COEFFICIENTS.value + 2 * SIDE.value


@triton.jit
def distances_kernel(
    zx, zy,  # [n, 8 width_x] and [n, 8 width_y], of `shift.shift_kernel`
    norms,  # fp32 [2, n]: of their rows, squared
    matrices,  # out, fp32 [2, n, n]: squared distances, diagonal 0
    n, width_x, width_y,
    tiles,  # in a row
    SAME: tl.constexpr,  # distances up to so many units in the last place of the norms are rounding, and zero
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, sides): a tile and its mirror image."""
    tile, side = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = upper_tile(tile, tiles)
    rows, others = row_tile * BLOCK + tl.arange(0, BLOCK), column_tile * BLOCK + tl.arange(0, BLOCK)
    z, d = tl.where(side == 0, zx, zy), 8 * tl.where(side == 0, width_x, width_y)
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, d, STEP):
        columns = start + tl.arange(0, STEP)
        there = (columns < d)[None, :]
        left = tl.load(
            z + rows.to(tl.int64)[:, None] * d + columns[None, :], mask=(rows < n)[:, None] & there, other=0.0
        )
        right = tl.load(
            z + others.to(tl.int64)[:, None] * d + columns[None, :], mask=(others < n)[:, None] & there, other=0.0
        )
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    norms += side * n
    pairs = tl.load(norms + rows, mask=rows < n, other=0.0)[:, None]
    pairs += tl.load(norms + others, mask=others < n, other=0.0)[None, :]
    squares = pairs - 2.0 * product
    none = (squares <= pairs * (SAME * EPS)) | (rows[:, None] == others[None, :])  # NaN stays
    squares = tl.where(none, 0.0, squares)
    inside = (rows < n)[:, None] & (others < n)[None, :]
    matrices += side.to(tl.int64) * n * n
    r, c = rows.to(tl.int64)[:, None], others.to(tl.int64)[None, :]
    tl.store(matrices + r * n + c, squares, mask=inside)
    tl.store(matrices + c * n + r, squares, mask=inside & (row_tile != column_tile))


@triton.jit
def expm1(x):
    """exp(x) - 1; near zero, where the difference cancels, x (1 + x/2 (1 + x/3 (1 + ...)))."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(8):
        series = 1.0 + series * x * (1.0 / (9 - i))
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def _largest(slots, count):
    """The largest of slots [count], none negative."""
    largest = tl.zeros([WIDTH], tl.float64)
    for start in range(0, count, WIDTH):
        places = start + tl.arange(0, WIDTH)
        largest = tl.maximum(largest, tl.load(slots + places, mask=places < count, other=0.0, cache_modifier=".cg"))
    return tl.max(largest, 0)


@triton.jit
def kernels_kernel(
    matrices,  # fp32 [2, n, n]: from squared distances to K - c and L - c; UNBIASED with diagonal 0
    bandwidths,  # fp64 [2, 3]: f, t and c of each side
    scales,  # fp32 [2]: of the features
    mask,  # bytes [n]
    sums,  # fp64 [2, n]: row sums, for the last program
    tops,  # fp64 [2, blocks]: the largest entries of K off the diagonal, for the last program
    shifts,  # out, fp64 [2, n]: see `double`
    rooms,  # out, fp64 [2]: see `reduce.finish`
    counter,  # int32, 0 before and after
    coefficients,  # out, fp64 [NUMBERS]
    n,
    MASKED: tl.constexpr, UNBIASED: tl.constexpr, HEIGHT: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of HEIGHT rows, sides); the last program makes shifts of the row sums."""
    block, blocks, side = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    rows = block * HEIGHT + tl.arange(0, HEIGHT)
    counted_rows = counts(mask, rows, n, MASKED)
    factor = tl.load(bandwidths + side * 3 + 0).to(tl.float32)
    typical = tl.load(bandwidths + side * 3 + 1).to(tl.float32)
    exact_level = tl.load(bandwidths + side * 3 + 2)
    level = exact_level.to(tl.float32)
    matrices += side.to(tl.int64) * n * n
    row_sums = tl.zeros([HEIGHT], tl.float64)
    top = tl.zeros([HEIGHT], tl.float32)
    for start in range(0, n, LENGTH):
        columns = start + tl.arange(0, LENGTH)
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
        kernel = level * expm1(typical - factor * tl.load(matrices + offsets, mask=inside, other=0.0))
        counted = counted_rows[:, None] & counts(mask, columns, n, MASKED)[None, :]
        diagonal = rows[:, None] == columns[None, :]
        top = tl.maximum(top, tl.max(tl.where(counted & (diagonal == 0), kernel + level, 0.0), 1))
        if UNBIASED:
            kernel = tl.where(diagonal, 0.0, kernel)
        else:
            kernel = tl.where(diagonal, (1.0 - exact_level).to(tl.float32), kernel)
        kernel = tl.where(counted, kernel, 0.0)
        tl.store(matrices + offsets, kernel, mask=inside)
        row_sums += tl.sum(kernel, 1).to(tl.float64)
    tl.store(sums + side * n + rows, row_sums, mask=rows < n)
    tl.store(tops + side * blocks + block, tl.max(top, 0).to(tl.float64))
    if arrive(counter, 2 * blocks):
        tl.store(counter, 0)
        count = row_count(mask, n, MASKED, WIDTH)
        store_sizes(coefficients, 1.0, 1.0, count)  # a kernel has no scale
        for each in tl.static_range(2):
            store_shifts(sums + each * n, 1, shifts + each * n, count, n, UNBIASED)
            f, t = tl.load(bandwidths + each * 3 + 0), tl.load(bandwidths + each * 3 + 1)
            c = tl.load(bandwidths + each * 3 + 2)
            room = c * t * count  # entries may differ by no more than their rounding, which is that of t
            tl.store(rooms + each, room * room)
            own = coefficients + COEFFICIENTS + each * SIDE
            tl.store(own + FACTOR, f)
            tl.store(own + LEVEL, c)
            tl.store(own + SCALE, tl.load(scales + each).to(tl.float64))
            tl.store(own + PEAK, _largest(tops + each * blocks, blocks))


@triton.jit
def rbf_backward_kernel(
    zx, zy,  # [n, 8 width_x] and [n, 8 width_y]
    mask,  # bytes [n]
    matrices,  # fp32 [2, n, n]: K - c and L - c
    shifts,  # fp64 [2, n]
    coefficients,  # fp64 [NUMBERS]
    grad,  # 0-d, upstream
    dx, dy,  # out, [n, p] and [n, q]
    n, p, q, width_x, width_y,
    blocks_x,  # 0 if dX is not wanted
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (column tiles of dX, then of dY, of those that are wanted; row tiles).

    A tile of dX is sum_j W_ij (x_j - x_i), W = (d_kl Lc + 2 d_kk Kc) o K off the diagonal. W is formed in fp32, where
    it cancels as CKA -> 1, and brought near 1 before it is rounded: Lc to the size of n Lc/|L|, K to at most 1. Its row
    sums are those of the rounded entries, so equal rows pull nowhere.
    """
    block = tl.program_id(0)
    of_x = block < blocks_x
    one = tl.where(of_x, 0, 1)
    z, width = tl.where(of_x, zx, zy), 8 * tl.where(of_x, width_x, width_y)
    out, d = tl.where(of_x, dx, dy), tl.where(of_x, p, q)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.where(of_x, block, block - blocks_x) * BLOCK + tl.arange(0, BLOCK)
    dtype = z.dtype.element_ty
    side = coefficients + COEFFICIENTS + one * SIDE
    d_cross, inner_other, inner_own = weights_of(coefficients, one, False)
    peak = tl.maximum(tl.load(side + PEAK), 1e-37)
    inner_kernel = (1.0 / peak).to(tl.float32)
    level = tl.load(side + LEVEL).to(tl.float32)
    own = matrices + one.to(tl.int64) * n * n
    other = matrices + (1 - one).to(tl.int64) * n * n
    counted_rows = counts(mask, rows, n, MASKED)
    row_shifts = both_shifts(shifts, rows, n, one, inner_other, inner_own)
    there = (columns < width)[None, :]

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, STEP):
        inner = start + tl.arange(0, STEP)
        counted = counted_rows[:, None] & counts(mask, inner, n, MASKED)[None, :] & (rows[:, None] != inner[None, :])
        offsets = rows.to(tl.int64)[:, None] * n + inner[None, :]
        k = tl.load(own + offsets, mask=counted, other=0.0)
        v = tl.load(other + offsets, mask=counted, other=0.0) * inner_other + k * inner_own
        v -= row_shifts[:, None] + both_shifts(shifts, inner, n, one, inner_other, inner_own)[None, :]
        w = tl.where(counted, v * ((k + level) * inner_kernel), 0.0).to(dtype)
        sums += tl.sum(w.to(tl.float32), 1)
        places = inner.to(tl.int64)[:, None] * width + columns[None, :]
        acc = tl.dot(
            w, tl.load(z + places, mask=(inner < n)[:, None] & there, other=0.0), acc, input_precision=PRECISION
        )

    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    acc -= sums[:, None] * tl.load(z + places, mask=(rows < n)[:, None] & there, other=0.0).to(tl.float32)
    factor = 4.0 * d_cross * peak * tl.load(side + FACTOR) * tl.load(side + SCALE) * tl.load(grad)
    acc = tl.where(counted_rows[:, None], acc * factor.to(tl.float32), 0.0)
    places = rows.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(out + places, acc.to(dtype), mask=(rows < n)[:, None] & (columns < d)[None, :])


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash: shifted features, K - c and L - c [2, n, n], row shifts."""
    n, none = problem.n, ((0,), torch.float32)
    return dict(
        coefficients=((NUMBERS,), torch.float64),
        xs=((n, 8 * ceil_div(problem.p, 8)), problem.dtype),
        ys=((n, 8 * ceil_div(problem.q, 8)), problem.dtype),
        xx=((2, n, n), torch.float32),
        yy=none,
        xy=none,
        rows=((2, n), torch.float64),
    )


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    with device_of(x):
        return _launches_of(problem, precision_of(problem)).forward(x, y, mask)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    with device_of(x):
        return _launches_of(problem, precision_of(problem)).backward(grad, mask, stash)


class _Gaussian:
    """Locations, shifted features and distances; the library's bandwidth; kernels, moments; the backward."""

    def __init__(self, problem: Problem, precision: str) -> None:
        n, p, q = problem.n, problem.p, problem.q
        self.problem, self.stash = problem, stash_shapes(problem, "gram").values()
        t = plan.rbf_tiling(problem)
        tiles, self.blocks = ceil_div(n, t.block), ceil_div(n, ROW_BLOCK)
        masked, unbiased = dict(MASKED=problem.masked), dict(UNBIASED=problem.estimator == "unbiased")
        multiply = dict(PRECISION=precision, BLOCK=t.block, STEP=t.step)
        parts = dict(HEIGHT=ROW_BLOCK, LENGTH=COLUMN_BLOCK)
        width_x, width_y = ceil_div(p, 8), ceil_div(q, 8)
        self.width = 8 * (width_x + width_y)
        located, shifted = ((ceil_div(q, size), ceil_div(p, size)) for size in (LOCATED, SHIFTED))
        every, share = ceil_div(n, shift.SAMPLE), SHIFTED * ceil_div(n, SHIFTED * SHARES)
        self.peaks, self.shares = sum(located), ceil_div(n, share)
        self.locate = Launch(
            shift.locate_kernel, (self.peaks,), (n, p, q, 8 * width_y, located[0], every, ceil_div(n, every)),
            masked | dict(ALWAYS=True, BLOCK=LOCATED), num_warps=8,  # the mean distance is taken from the norms
        )  # fmt: skip
        self.shift = Launch(
            shift.shift_kernel, (sum(shifted) + 1, self.shares),
            (n, p, q, 8 * width_x, 8 * width_y, n, share, width_x, width_y, *shifted, *located),
            masked | dict(CROSS=False, TF32=precision == "tf32", ROWS=SHIFTED, BLOCK=SHIFTED, WIDTH=WIDTH.value),
            num_warps=8,
        )  # fmt: skip
        self.distances = Launch(
            distances_kernel, (tiles * (tiles + 1) // 2, 2), (n, width_x, width_y, tiles), dict(SAME=SAME) | multiply,
            **products(problem, precision),
        )  # fmt: skip
        self.kernels = Launch(kernels_kernel, (self.blocks, 2), (n,), masked | unbiased | parts)
        self.moments = Launch(
            moments_kernel, (self.blocks, 1), (n,),
            dict(NUMBERS=NUMBERS) | masked | dict(STATISTIC=problem.statistic) | unbiased | parts,
        )  # fmt: skip
        wide = ceil_div(p, t.block) * problem.x_grad, ceil_div(q, t.block) * problem.y_grad
        self.gradients = Launch(
            rbf_backward_kernel, (sum(wide), tiles), (n, p, q, width_x, width_y, wide[0]), masked | multiply,
            **products(problem, precision),
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Value (0-d, fp32) and stash."""
        n = self.problem.n
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        shifts, peaks, column_sums, scales = (
            x.new_empty(size, dtype=torch.float32)
            for size in (self.width, self.peaks, self.shares * (self.width + 8), 2)
        )
        sums, tops, slots, rooms = (
            x.new_empty(size, dtype=torch.float64) for size in (2 * n, 2 * self.blocks, 3 * self.blocks, 2)
        )
        counters, value = x.new_empty(2, dtype=torch.int32), x.new_empty((), dtype=torch.float32)
        bytes_ = x if mask is None else as_bytes(mask)
        strides, zs = (*x.stride(), *y.stride()), (stash.xs, stash.ys)
        known = strides if aligned(x, y, bytes_) else None
        self.locate(known, x, y, bytes_, shifts, peaks, counters, *strides)
        self.shift(known, x, y, bytes_, shifts, peaks, *zs, stash.xs, column_sums, scales, *strides)
        norms = torch.stack([torch.linalg.vecdot(z.float(), z.float()) for z in zs])
        self.distances(known, *zs, norms, stash.xx)
        count = float(n) if mask is None else mask.sum(dtype=torch.float64)
        found = [
            bandwidth_of(_Whole(side, own, mask, self.problem), scale, count, i)
            for i, (side, own, scale) in enumerate(zip(stash.xx, norms, scales.double(), strict=True))
        ]
        numbers = tuple(number for b in found for number in (b.factor, b.typical, b.level))
        bandwidths = linalg.pack(numbers, x.device)
        counter = counters[:1]
        self.kernels(
            known, stash.xx, bandwidths, scales, bytes_, sums, tops, stash.rows, rooms, counter, stash.coefficients
        )
        self.moments(known, stash.xx, stash.rows, bytes_, rooms, slots, counter, value, stash.coefficients)
        return value, stash

    def backward(self, grad: Tensor, mask: Tensor | None, stash: Stash) -> tuple[Tensor, Tensor]:
        """dX and dY times ``grad``; an unwanted one is empty."""
        wanted = self.problem.x_grad, self.problem.y_grad
        n, p, q = self.problem.n, self.problem.p, self.problem.q
        dx, dy = (stash.xs.new_empty((n, d) if w else (0,)) for d, w in zip((p, q), wanted, strict=True))
        if any(wanted):
            bytes_ = grad if mask is None else as_bytes(mask)
            known = (grad.dtype, bytes_.dtype) if aligned(grad, bytes_, *stash) else None
            self.gradients(
                known, stash.xs, stash.ys, bytes_, stash.xx, stash.rows, stash.coefficients, grad, dx, dy
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
