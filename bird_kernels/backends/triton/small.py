r"""Up to `plan.FEW_ROWS` rows: K = X X^T and L = Y Y^T, for any number of pairs at once.

Forward: `partials_kernel` shifts a range (split) of a side's columns and multiplies it to a part of a tile of the Gram
matrix (of up to 64 rows, or of wide features, `whole.whole_kernel`); `reduce_kernel` adds the parts in order. Biased,
the columns are centred by their means, so the matrices are centred and the last program combines their moments.
Unbiased, the columns are shifted by a location that dominating rows do not move (a mean would add such a row to all
others), the diagonals are zeroed, and `double.moments_kernel` centres the matrices. Backward: one launch (`gradient`).

One pair is a list of one. All pairs have the same rows, dtype, mask and estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import FEW_ROWS, ceil_div, small_tiling
from ...types import Problem, Shapes, Stash
from .centre import counts, largest_of, scale_of, shifted_tile, store_location
from .double import store_totals
from .gradient import Pairs, entry, memory_of, side_of
from .launch import Launch, aligned, as_bytes, capability, few_steps, multiprocessors
from .reduce import COEFFICIENTS, WIDTH, arrive, finish, store_no_totals, store_sizes, upper_tile
from .whole import whole_kernel

MOST = tl.constexpr(FEW_ROWS)  # rows, a power of two
REDUCED = 8  # rows of a tile that a program of `reduce_kernel` sums


@triton.jit
def part_of_tile(
    side, tile, begin, end, n, MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """What columns [begin, end) of a side, (x, d, location, scale, mask), add to a tile, (row, column), of its Gram
    matrix: fp32 [BLOCK, BLOCK]."""
    x, d, location, scale, mask = side
    row_tile, column_tile = tile
    rows, others = row_tile * BLOCK + tl.arange(0, BLOCK), column_tile * BLOCK + tl.arange(0, BLOCK)
    counted_rows, counted_others = counts(mask, rows, n, MASKED), counts(mask, others, n, MASKED)
    dtype = x.dtype.element_ty
    part = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        left = shifted_tile(x, location, scale, counted_rows, rows, columns, d).to(dtype)
        right = shifted_tile(x, location, scale, counted_others, others, columns, d).to(dtype)
        part = tl.dot(left, tl.trans(right), part, input_precision=PRECISION)
    return part


@triton.jit
def partials_kernel(
    sides,  # x and y of the first pair, of the second, ...: [n, d] each, dense
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    locations,  # out, fp32 [2, d] of each side, concatenated
    peaks,  # out, fp32 [splits]: the largest shifted entry of each
    partials,  # out, fp32 [splits, upper tiles, BLOCK, BLOCK], times the square of the split's scale
    counters,  # out, int32 [pairs]: set to zero for the next kernel
    n,  # rows of all sides
    WIDTHS: tl.constexpr,  # d of each side
    STARTS: tl.constexpr,  # the offset of each side's locations
    SPLITS: tl.constexpr,  # the first split of each side, and the number of splits
    SIDES: tl.constexpr,  # the number of sides: two per pair
    CHUNK: tl.constexpr,  # columns of a split
    UNBIASED: tl.constexpr,  # columns are shifted by a robust location; else by their mean
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    PRECISION: tl.constexpr,  # of fp32 products: "ieee", "tf32" or "tf32x3"
    BLOCK: tl.constexpr,  # rows and columns of a tile
    STEP: tl.constexpr,  # columns of a side that are multiplied at a time
):
    """Grid (upper tiles, splits of all sides): a split's part of a tile.

    All programs of a split compute, and store, the same locations and the same peak.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    side = side_of(split, SPLITS, SIDES)
    x, d, first = entry(sides, side, SIDES), entry(WIDTHS, side, SIDES), entry(SPLITS, side, SIDES)
    location = locations + entry(STARTS, side, SIDES)
    if (tile == 0) & (split == first):
        tl.store(counters + side // 2, 0)  # either side of a pair
    begin = (split - first) * CHUNK
    end = tl.minimum(begin + CHUNK, d)
    peak = 0.0
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        peak = tl.maximum(peak, store_location(x, mask, location, columns, n, d, UNBIASED, MASKED, STEP))
    tl.store(peaks + split, peak)
    tl.debug_barrier()  # one thread stored a location that others load
    scale = scale_of(peak)

    row_tile, column_tile = upper_tile(tile, tl.cdiv(n, BLOCK))
    own = x, d, location, scale, mask
    part = part_of_tile(own, (row_tile, column_tile), begin, end, n, MASKED, PRECISION, BLOCK, STEP)
    inner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK * BLOCK) + inner, part)


@triton.jit
def _sum_parts(
    partials,
    peaks,
    scale,
    begin,
    end,
    tile,
    upper,
    inner,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The sum of parts[begin:end] of a strip of a tile, in order and in a common scale."""
    total = tl.zeros([HEIGHT, BLOCK], tl.float32)
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    for split in tl.range(begin, end, loop_unroll_factor=UNROLL):
        part = tl.load(partials + (split * upper + tile).to(tl.int64) * (BLOCK * BLOCK) + inner)
        own = scale_of(tl.load(peaks + split)).to(tl.int32, bitcast=True) >> 23
        # The factor is the squared ratio of the scales, a power of two of at most 1: the product is exact.
        total += part * ((127 + tl.maximum(2 * (exponent - own), -126)) << 23).to(tl.float32, bitcast=True)
    return total


@triton.jit
def reduce_kernel(
    peaks,  # fp32 [splits]
    partials,  # fp32 [splits, upper tiles, BLOCK, BLOCK]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    grams,  # out, fp32 [pairs, 2, n, n]: K and L, with diagonal 0 if UNBIASED
    rows,  # out, fp64 [pairs, 2, tiles, n] (unbiased): row sums of each column of tiles
    slots,  # fp64 [pairs, 3 or, unbiased, 6, programs]: partial sums of the programs of a pair
    counters,  # int32 [pairs]
    values,  # out, fp32 [pairs]; unbiased, the next kernel writes them
    coefficients,  # out, fp64 [pairs, COEFFICIENTS]
    n,  # rows and columns of K and L
    SPLITS: tl.constexpr,  # the first split of each side, and the number of splits
    SIDES: tl.constexpr,  # the number of sides: two per pair
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    STATISTIC: tl.constexpr,  # "cka_loss", "sqrt_cka_loss", "cka" or "hsic"
    UNBIASED: tl.constexpr,  # whether the estimator is the unbiased one; else the biased
    BLOCK: tl.constexpr,  # rows and columns of a tile
    REDUCED: tl.constexpr,  # rows per program
    UNROLL: tl.constexpr,  # parts that are loaded at once
):
    """Grid (blocks of REDUCED rows, tiles, pairs): sums the parts of REDUCED rows of a tile of K and of L."""
    strip, column_tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(1)
    programs = tl.num_programs(0) * tiles
    program = strip * tiles + column_tile
    first, middle = entry(SPLITS, 2 * pair, SIDES), entry(SPLITS, 2 * pair + 1, SIDES)
    last = entry(SPLITS, 2 * pair + 2, SIDES + 1)
    i, j = strip * REDUCED + tl.arange(0, REDUCED), column_tile * BLOCK + tl.arange(0, BLOCK)
    row_tile = strip * REDUCED // BLOCK
    low, high = tl.minimum(row_tile, column_tile), tl.maximum(row_tile, column_tile)
    tile, upper = low * tiles - low * (low + 1) // 2 + high, tiles * (tiles + 1) // 2
    own, other = (i % BLOCK)[:, None], (j % BLOCK)[None, :]
    inner = tl.where(row_tile <= column_tile, own * BLOCK + other, other * BLOCK + own)  # below: transposed
    scale_x = scale_of(largest_of(peaks, first, middle, WIDTH))
    scale_y = scale_of(largest_of(peaks, middle, last, WIDTH))
    k_tile = _sum_parts(partials, peaks, scale_x, first, middle, tile, upper, inner, BLOCK, REDUCED, UNROLL)
    l_tile = _sum_parts(partials, peaks, scale_y, middle, last, tile, upper, inner, BLOCK, REDUCED, UNROLL)

    k = grams + (2 * pair).to(tl.int64) * n * n
    slots += (6 if UNBIASED else 3) * pair * programs
    own = slots + program
    if UNBIASED:
        rows += 2 * pair * tiles * n
        diagonal = i[:, None] == j[None, :]
        for side in tl.static_range(2):
            tile = l_tile if side else k_tile
            squares = tl.sum(tl.where(diagonal, tile, 0.0), 1).to(tl.float64)
            row_sums = tl.sum(tl.where(diagonal, 0.0, tile).to(tl.float64), 1)
            tl.store(rows + (side * tiles + column_tile) * n + i, row_sums, mask=i < n)
            tl.store(own + (3 * side + 0) * programs, tl.sum(row_sums, 0))
            tl.store(own + (3 * side + 1) * programs, tl.sum(squares, 0))
            tl.store(own + (3 * side + 2) * programs, tl.sum(squares * squares, 0))
        k_tile, l_tile = tl.where(diagonal, 0.0, k_tile), tl.where(diagonal, 0.0, l_tile)
    else:  # fp32 within a strip: scaled entries do not overflow
        tl.store(own + 0 * programs, tl.sum(tl.sum(k_tile * l_tile, 1), 0).to(tl.float64))
        tl.store(own + 1 * programs, tl.sum(tl.sum(k_tile * k_tile, 1), 0).to(tl.float64))
        tl.store(own + 2 * programs, tl.sum(tl.sum(l_tile * l_tile, 1), 0).to(tl.float64))
    offsets = i.to(tl.int64)[:, None] * n + j[None, :]
    inside = (i < n)[:, None] & (j < n)[None, :]
    tl.store(k + offsets, k_tile, mask=inside)
    tl.store(k + n * n + offsets, l_tile, mask=inside)

    if arrive(counters + pair, programs):
        count = tl.sum(counts(mask, tl.arange(0, MOST), n, MASKED).to(tl.int32), 0).to(tl.float64)
        sizes = scale_x.to(tl.float64), scale_y.to(tl.float64), count
        coefficients += pair * COEFFICIENTS
        store_sizes(coefficients, sizes)
        if UNBIASED:
            tl.store(counters + pair, 0)
            store_totals(coefficients, slots, programs, True)
        else:
            store_no_totals(coefficients)
            finish(slots, programs, coefficients, values + pair, sizes, (0.0, 0.0), STATISTIC, False)


def small_shapes(problems: Sequence[Problem]) -> Shapes:
    """Shape and dtype of every tensor of the common stash of some pairs.

    ``coefficients`` are per pair, ``xs`` holds the locations [2, d] of all sides, concatenated, ``xx`` K and L per pair
    and ``rows`` the shifts of their rows (unbiased only).
    """
    first, pairs, none = problems[0], len(problems), ((0,), torch.float32)
    return dict(
        coefficients=((pairs, COEFFICIENTS.value), torch.float64),
        xs=((2 * sum(problem.p + problem.q for problem in problems),), torch.float32),
        ys=none,
        xx=((pairs, 2, first.n, first.n), torch.float32),
        yy=none,
        xy=none,
        rows=((pairs, 2, first.n) if first.estimator == "unbiased" else (0,), torch.float64),
    )


class Small(Pairs):
    """The launches of some pairs: two forward (unbiased: three), one backward."""

    def __init__(self, problems: tuple[Problem, ...], precision: str) -> None:
        t = small_tiling(problems, multiprocessors(problems[0].device))
        super().__init__(problems, precision, t, small_shapes(problems))
        n, pairs, sides = problems[0].n, len(problems), len(self.widths)
        tiles, splits = ceil_div(n, t.block), sum(t.splits)
        strips, upper = ceil_div(n, REDUCED), tiles * (tiles + 1) // 2
        decided = self.decided | dict(
            WIDTHS=self.widths, STARTS=self.starts, SIDES=sides, CHUNK=t.chunk, REDUCED=REDUCED,
            UNROLL=8 if t.block == 64 else 32,  # of tiles of 32 rows a thread has 8 bytes of each part, else 16
            SPLITS=tuple(accumulate(t.splits, initial=0)), HELD=t.rows,
        )  # fmt: skip
        options, step = few_steps(problems[0]), t.step
        if t.rows > 64:  # 16 warps, of 128 registers a thread, would spill up to 112 bytes elsewhere
            large = capability(problems[0].device)[0] == 9 and not self.unbiased
            options, step = dict(num_warps=16 if large else 8, num_stages=2), t.step if large else t.step // 2
        decided |= dict(STEP=step)
        if t.rows:
            self.partials = Launch(whole_kernel, (splits,), decided, **options)
        else:
            self.partials = Launch(partials_kernel, (upper, splits), decided, **options)
        self.reduce = Launch(reduce_kernel, (strips, tiles, pairs), decided)
        self.workspace: Shapes = dict(
            peaks=((splits,), torch.float32),
            partials=((splits * upper * t.block**2,), torch.float32),
            counters=((pairs,), torch.int32),
            rows=((2 * pairs * tiles * n * self.unbiased,), torch.float64),
            slots=((pairs * max(3 * (1 + self.unbiased) * strips * tiles, 3 * self.blocks),), torch.float64),
            values=((pairs,) if pairs > 1 else (), torch.float32),
        )

    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Values [pairs] (0-d for one pair), fp32, and stash for x and y of the first pair, of the second, ..."""
        sides = tuple(x.contiguous() for x in tensors)
        bytes_ = sides[0] if mask is None else as_bytes(mask)
        stash = Stash(*(sides[0].new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        memory: dict[str, Any] = memory_of(stash) | dict(sides=sides, mask=bytes_)
        memory |= {name: sides[0].new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.workspace.items()}
        known = "dense" if aligned(*sides, bytes_) else None
        self.partials(known, memory)
        self.reduce(known, memory)
        if self.unbiased:
            self.moments(known, memory)
        return memory["values"], stash
