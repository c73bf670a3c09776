r"""Gaussian kernels: distances by tiles, K and L, their moments, and dX = (2 / sigma^2) (W - diag(W 1)) X.

The mathematics is in `library_rbf`. For up to `plan.KEPT` rows only, since K and L are kept in memory as full matrices.
A matrix holds squared distances at first and then, in place, K - c, where c = exp(-t) is a typical entry. Five launches
forward and one backward; between distances and kernels, library operations compute the bandwidth.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import plan
from ...plan import ceil_div
from ...types import Problem, Route, Shapes, Stash
from .. import linalg
from ..library_rbf import bandwidth_of
from ..library_rbf.strips import SAME, Strips
from . import double
from .centre import counts, largest_of, rows_counted
from .double import mixed_centring_of, mixed_shifts_of, moments_kernel
from .launch import Launch, aligned, as_bytes, device_of, many_steps, precision_of
from .reduce import COEFFICIENTS, KK, ROOM_K, ROWS, SUM_K, WIDTH, arrive, store_sizes, sum_slots, upper_tile, weights_of
from .shift import Shift, padded_width

__all__ = ["backward", "forward", "stash_shapes"]

EPS = tl.constexpr(2.0**-23)
# After the common coefficients, per side: f for scaled features, c, the features' scale, the largest off-diagonal K.
FACTOR, LEVEL, SCALE, PEAK, SIDE = (tl.constexpr(i) for i in range(5))
NUMBERS = COEFFICIENTS.value + 2 * SIDE.value


@triton.jit
def distances_kernel(
    zx,  # [n, pa], from `shift.shift_kernel`
    zy,  # [n, qa]
    norms,  # fp32 [2, n]: of their rows, squared
    grams,  # out, fp32 [2, n, n]: squared distances, diagonal 0
    n,
    p,
    q,
    SAME: tl.constexpr,  # squared distances up to this many eps of the norms are rounding errors and set to zero
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
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


@triton.jit
def expm1(x):
    """exp(x) - 1; near zero, where the difference cancels, x (1 + x/2 (1 + x/3 (1 + ...)))."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(8):
        series = 1.0 + series * x * (1.0 / (9 - i))
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def kernels_kernel(
    grams,  # fp32 [2, n, n]: in, squared distances; out, K - c and L - c, UNBIASED with diagonal 0
    bandwidths,  # fp64 [2, 3]: f, t and c of each side
    scales,  # fp32 [2]: of the features
    mask,  # bytes [n]
    rows,  # out, fp64 [2, n]: row sums
    slots,  # fp64 [2, blocks]: parts of the totals, read by the last program
    tops,  # fp32 [2, blocks]: the largest off-diagonal entries of K, read by the last program
    counters,  # int32 [1], 0 before and after
    coefficients,  # out, fp64 [NUMBERS]
    n,
    MASKED: tl.constexpr,
    UNBIASED: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Grid (blocks of HEIGHT rows, sides): kernels from distances, their row sums, and coefficients."""
    block, blocks, side = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    i = block * HEIGHT + tl.arange(0, HEIGHT)
    counted_i = counts(mask, i, n, MASKED)
    factor = tl.load(bandwidths + side * 3 + 0).to(tl.float32)
    typical = tl.load(bandwidths + side * 3 + 1).to(tl.float32)
    exact_level = tl.load(bandwidths + side * 3 + 2)
    level = exact_level.to(tl.float32)
    grams += side.to(tl.int64) * n * n
    sums = tl.zeros([HEIGHT], tl.float64)
    top = tl.zeros([HEIGHT], tl.float32)
    for start in range(0, n, LENGTH):
        j = start + tl.arange(0, LENGTH)
        inside = (i < n)[:, None] & (j < n)[None, :]
        offsets = i.to(tl.int64)[:, None] * n + j[None, :]
        kernel = level * expm1(typical - factor * tl.load(grams + offsets, mask=inside, other=0.0))
        counted = counted_i[:, None] & counts(mask, j, n, MASKED)[None, :]
        diagonal = i[:, None] == j[None, :]
        top = tl.maximum(top, tl.max(tl.where(counted & (diagonal == 0), kernel + level, 0.0), 1))
        kernel = tl.where(diagonal, 0.0 if UNBIASED else (1.0 - exact_level).to(tl.float32), kernel)
        kernel = tl.where(counted, kernel, 0.0)
        tl.store(grams + offsets, kernel, mask=inside)
        sums += tl.sum(kernel, 1).to(tl.float64)
    tl.store(rows + side * n + i, sums, mask=i < n)
    tl.store(slots + side * blocks + block, tl.sum(sums, 0))
    tl.store(tops + side * blocks + block, tl.max(top, 0))
    if arrive(counters, 2 * blocks):
        tl.store(counters, 0)
        count = rows_counted(mask, n, MASKED, WIDTH)
        store_sizes(coefficients, (1.0, 1.0, count))  # Gaussian kernels are not scaled
        for each in tl.static_range(2):
            f, t = tl.load(bandwidths + each * 3 + 0), tl.load(bandwidths + each * 3 + 1)
            c = tl.load(bandwidths + each * 3 + 2)
            room = c * t * count  # the rounding error of an entry is c times that of t
            tl.store(coefficients + ROOM_K + each, room * room)
            tl.store(coefficients + SUM_K + each, sum_slots(slots, each, blocks))
            own = coefficients + COEFFICIENTS + each * SIDE
            tl.store(own + FACTOR, f)
            tl.store(own + LEVEL, c)
            tl.store(own + SCALE, tl.load(scales + each).to(tl.float64))
            tl.store(own + PEAK, largest_of(tops, each * blocks, (each + 1) * blocks, WIDTH).to(tl.float64))


@triton.jit
def rbf_backward_kernel(
    zx,  # [n, pa]
    zy,  # [n, qa]
    mask,  # bytes [n]
    grams,  # fp32 [2, n, n]: K - c and L - c
    rows,  # fp64 [2, n]: their row sums
    coefficients,  # fp64 [NUMBERS]
    grad,  # 0-d, upstream
    dx,  # out, [n, p]
    dy,  # out, [n, q]
    n,
    p,
    q,
    OF_X: tl.constexpr,  # whether dX is wanted
    MASKED: tl.constexpr,
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (column tiles of dX, then of dY, if wanted; row tiles).

    A tile of dX is sum_j W_ij (x_j - x_i), W = (d_kl Lc + 2 d_kk Kc) o K off the diagonal. W is computed in fp32, since
    it cancels as CKA -> 1, and scaled near 1 before it is rounded: Lc to n Lc/|L|, K to at most 1. Its row sums are
    those of the rounded entries, so that equal rows contribute exactly zero.
    """
    block, blocks_x = tl.program_id(0), tl.cdiv(p, BLOCK) if OF_X else 0
    of_x = block < blocks_x
    one = tl.where(of_x, 0, 1)
    z, out, d = tl.where(of_x, zx, zy), tl.where(of_x, dx, dy), tl.where(of_x, p, q)
    width = padded_width(d)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.where(of_x, block, block - blocks_x) * BLOCK + tl.arange(0, BLOCK)
    dtype = z.dtype.element_ty
    side = coefficients + COEFFICIENTS + one * SIDE
    size = tl.sqrt(tl.load(coefficients + KK + 1 - one)) / tl.load(coefficients + ROWS)
    outer, a, b = weights_of(coefficients, one, size, grad)
    peak = tl.maximum(tl.load(side + PEAK), 1e-37)
    inner_kernel = (1.0 / peak).to(tl.float32)
    level = tl.load(side + LEVEL).to(tl.float32)
    own = grams + one.to(tl.int64) * n * n
    other = grams + (1 - one).to(tl.int64) * n * n
    counted_i, centring = counts(mask, i, n, MASKED)[:, None], mixed_centring_of(coefficients, one, a, b, UNBIASED)
    shifts_i = mixed_shifts_of(rows, centring, i, one, n)[:, None]
    there = (columns < width)[None, :]

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, STEP):
        j = start + tl.arange(0, STEP)
        counted = counted_i & counts(mask, j, n, MASKED)[None, :] & (i[:, None] != j[None, :])
        offsets = i.to(tl.int64)[:, None] * n + j[None, :]
        k = tl.load(own + offsets, mask=counted, other=0.0)
        m = tl.load(other + offsets, mask=counted, other=0.0) * a + k * b
        m -= shifts_i + mixed_shifts_of(rows, centring, j, one, n)[None, :]
        w = tl.where(counted, m * ((k + level) * inner_kernel), 0.0).to(dtype)
        sums += tl.sum(w.to(tl.float32), 1)
        places = j.to(tl.int64)[:, None] * width + columns[None, :]
        features = tl.load(z + places, mask=(j < n)[:, None] & there, other=0.0)
        acc = tl.dot(w, features, acc, input_precision=PRECISION)

    places = i.to(tl.int64)[:, None] * width + columns[None, :]
    acc -= sums[:, None] * tl.load(z + places, mask=(i < n)[:, None] & there, other=0.0).to(tl.float32)
    factor = 2.0 * outer * peak * tl.load(side + FACTOR) * tl.load(side + SCALE)
    acc = tl.where(counted_i, acc * factor.to(tl.float32), 0.0)
    places = i.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(out + places, acc.to(dtype), mask=(i < n)[:, None] & (columns < d)[None, :])


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash: shifted features, K - c and L - c [2, n, n], their row sums."""
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
    """The launches of a problem: shift, distances, kernels and moments of a forward, and one for the backward."""

    def __init__(self, problem: Problem, precision: str) -> None:
        n, p, q = problem.n, problem.p, problem.q
        self.problem, self.stash = problem, stash_shapes(problem, "gram").values()
        t = plan.RBF_TILING
        tiles, self.blocks = ceil_div(n, t.block), ceil_div(n, double.HEIGHT)
        decided = dict(
            n=n, p=p, q=q, MASKED=problem.masked, STATISTIC=problem.statistic, UNBIASED=problem.estimator == "unbiased",
            PRECISION=precision, BLOCK=t.block, STEP=t.step, SAME=SAME, NUMBERS=NUMBERS, OF_X=problem.x_grad,
            HEIGHT=double.HEIGHT, LENGTH=double.LENGTH,
        )  # fmt: skip
        multiply = many_steps(problem, precision)
        self.shifted = Shift(problem, n, precision, always=True, cross=False)  # distances need small norms
        self.distances = Launch(distances_kernel, (tiles * (tiles + 1) // 2, 2), decided, **multiply)
        self.kernels = Launch(kernels_kernel, (self.blocks, 2), decided)
        self.moments = Launch(moments_kernel, (self.blocks, 1), decided)
        wide = ceil_div(p, t.block) * problem.x_grad + ceil_div(q, t.block) * problem.y_grad
        self.gradients = Launch(rbf_backward_kernel, (wide, tiles), decided, **multiply)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Value (0-d, fp32) and stash."""
        n = self.problem.n
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        known, memory = self.shifted(x, y, mask, zx=stash.xs, zy=stash.ys, ones=stash.xs)
        norms = torch.stack([torch.linalg.vecdot(z.float(), z.float()) for z in (stash.xs, stash.ys)])
        memory |= _named(stash) | dict(norms=norms, values=x.new_empty((), dtype=torch.float32))
        self.distances(known, memory)
        count = float(n) if mask is None else mask.sum(dtype=torch.float64)
        found = [
            bandwidth_of(_Whole(side, own, mask, self.problem), scale, count, i)
            for i, (side, own, scale) in enumerate(zip(stash.xx, norms, memory["scales"].double(), strict=True))
        ]
        numbers = tuple(number for b in found for number in (b.factor, b.typical, b.level))
        memory["bandwidths"] = linalg.pack(numbers, x.device)
        memory["tops"] = x.new_empty(2 * self.blocks, dtype=torch.float32)
        memory["slots"] = x.new_empty(3 * self.blocks, dtype=torch.float64)
        self.kernels(known, memory)
        self.moments(known, memory)
        return memory["values"], stash

    def backward(self, grad: Tensor, mask: Tensor | None, stash: Stash) -> tuple[Tensor, Tensor]:
        """dX [n, p] and dY [n, q] times ``grad``; an unwanted one is empty."""
        wanted = self.problem.x_grad, self.problem.y_grad
        n, p, q = self.problem.n, self.problem.p, self.problem.q
        dx, dy = (stash.xs.new_empty((n, d) if w else (0,)) for d, w in zip((p, q), wanted, strict=True))
        if any(wanted):
            bytes_ = grad if mask is None else as_bytes(mask)
            known = (grad.dtype, bytes_.dtype) if aligned(grad, bytes_, *stash) else None
            self.gradients(known, _named(stash) | dict(mask=bytes_, grad=grad, dx=dx, dy=dy))
        return dx, dy


def _named(stash: Stash) -> dict[str, Tensor]:
    """The tensors of a stash by the kernels' parameter names."""
    return dict(zx=stash.xs, zy=stash.ys, grams=stash.xx, rows=stash.rows, coefficients=stash.coefficients)


class _Whole(Strips):
    """`Strips` over squared distances that are in memory already, ``matrix`` [n, n]; upper strips are views of it."""

    def __init__(self, matrix: Tensor, norms: Tensor, mask: Tensor | None, problem: Problem) -> None:
        n, rows = problem.n, plan.strip_rows(problem)
        self.features, self.norms, self.mask, self.problem = matrix, norms, mask, problem
        self.wide = matrix.dtype
        self.blocks = [(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.kept = [matrix[i:j, i:] for i, j in self.blocks]


@lru_cache(maxsize=1024)
def _launches_of(problem: Problem, precision: str) -> _Gaussian:
    return _Gaussian(problem, precision)
