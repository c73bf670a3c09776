r"""Launch-bound problems: up to `plan.FEW_ROWS` rows, K = X X^T and L = Y Y^T, for any number of pairs at once.

Forward: `partials_kernel` shifts a share of some side's columns and multiplies it into a part of a tile of its Gram
matrix; `reduce_kernel` adds the parts in order. Biased, the columns were centred by their means, so these matrices are
centred and the last program to arrive combines their moments. Unbiased, the columns are shifted by a location that rows
that dominate do not move, the diagonals are zeroed, and `double.moments_kernel` centres what is left: a mean would have
spread such a row over all others. Backward: one launch.

One pair is a list of one. Addresses come as tuples of arguments and widths as constants, so a program finds its side (x
and y of the first pair, of the second, ...) by a row of selects, nothing is copied to the device, and a CUDA graph
keeps it all. The rows, dtype, mask and estimator are those of all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import small_tiling
from ...types import Problem, Shapes, Stash
from .centre import counts, locate, row_count, scale_of, scale_of_all, shifted_tile
from .double import COLUMN_BLOCK, ROW_BLOCK, both_shifts, moments_kernel, store_shifts
from .launch import Launch, aligned, as_bytes, ceil_div, few_steps, products
from .reduce import COEFFICIENTS, WIDTH, arrive, finish, sizes_of, store_sizes, sum_slots, upper_tile, weights_of

REDUCED = 8  # rows of a tile that one program adds up: 16 bytes of a part for each thread
UNROLL = tl.constexpr(8)  # parts that are under way at once


@triton.jit
def partials_kernel(
    sides,  # x and y of the first pair, of the second, ...: [n, d] each, dense
    mask,  # bytes [n]
    locations,  # out, fp32 [2, d] of each side, one after the other
    peaks,  # out, fp32 [splits]: the largest shifted entry of each
    partials,  # out, fp32 [splits, upper tiles, BLOCK, BLOCK], in the scale of the split
    counters,  # out, int32 [pairs]: cleared for the next kernel
    n,
    tiles,  # of BLOCK rows
    WIDTHS: tl.constexpr,  # d of each side
    SIDES: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of a split
    ROBUST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, splits of all sides): a split's part of a tile.

    Every tile's program of a split finds, and stores, the same locations and the same peak.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    x, d, side, first, location = sides[0], WIDTHS[0], 0, 0, 0
    begin, before = 0, 0
    for i in tl.static_range(SIDES):
        there = split >= begin
        x = tl.where(there, sides[i], x)
        d = tl.where(there, WIDTHS[i], d)
        side = tl.where(there, i, side)
        first = tl.where(there, begin, first)
        location = tl.where(there, before, location)
        begin += (WIDTHS[i] + CHUNK - 1) // CHUNK
        before += 2 * WIDTHS[i]
    if (tile == 0) & (split == first):
        tl.store(counters + side // 2, 0)  # either side of a pair
    begin = (split - first) * CHUNK
    end = tl.minimum(begin + CHUNK, d)
    location += locations
    peak = 0.0
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        peak = tl.maximum(peak, locate(x, mask, location, columns, n, d, ROBUST, MASKED, STEP))
    tl.store(peaks + split, peak)
    tl.debug_barrier()  # one thread stored a location that others load
    scale = scale_of(peak)

    row_tile, column_tile = upper_tile(tile, tiles)
    rows, others = row_tile * BLOCK + tl.arange(0, BLOCK), column_tile * BLOCK + tl.arange(0, BLOCK)
    counted_rows, counted_others = counts(mask, rows, n, MASKED), counts(mask, others, n, MASKED)
    dtype = x.dtype.element_ty
    part = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        left = shifted_tile(x, location, scale, counted_rows, rows, columns, d).to(dtype)
        right = shifted_tile(x, location, scale, counted_others, others, columns, d).to(dtype)
        part = tl.dot(left, tl.trans(right), part, input_precision=PRECISION)
    inner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK * BLOCK) + inner, part)


@triton.jit
def _sum_parts(partials, peaks, scale, begin, end, tile, upper, inner, BLOCK: tl.constexpr, HEIGHT: tl.constexpr):
    """The parts begin..end of a strip of a tile, added in order and in one scale."""
    total = tl.zeros([HEIGHT, BLOCK], tl.float32)
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    for split in tl.range(begin, end, loop_unroll_factor=UNROLL):
        part = tl.load(partials + (split * upper + tile).to(tl.int64) * (BLOCK * BLOCK) + inner)
        own = scale_of(tl.load(peaks + split)).to(tl.int32, bitcast=True) >> 23
        # The square of the ratio of the scales, a power of two and 1 at the most: nothing is rounded.
        total += part * ((127 + tl.maximum(2 * (exponent - own), -126)) << 23).to(tl.float32, bitcast=True)
    return total


@triton.jit
def reduce_kernel(
    peaks,  # fp32 [splits]
    partials,  # fp32 [splits, upper tiles, BLOCK, BLOCK]
    mask,  # bytes [n]
    grams,  # out, fp32 [pairs, 2, n, n]: K and L, with diagonal 0 if UNBIASED
    sums,  # fp64 [pairs, 2, tiles, n] (unbiased): row sums of each tile, for the last program
    shifts,  # out, fp64 [pairs, 2, n] (unbiased): see `double`
    rooms,  # out, fp64 [pairs, 2] (unbiased): see `reduce.finish`
    slots,  # fp64 [pairs, 3 or, unbiased, 4, programs]: for the programs of a pair to meet in
    counters,  # int32 [pairs]
    values,  # out, fp32 [pairs]; unbiased, the next kernel's
    coefficients,  # out, fp64 [pairs, COEFFICIENTS]
    n,
    tiles,
    WIDTHS: tl.constexpr, SIDES: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, STATISTIC: tl.constexpr,
    UNBIASED: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of HEIGHT rows, tiles, pairs): adds the parts of some rows of a tile of K and of L."""
    strip, column_tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    programs = tl.num_programs(0) * tiles
    program = strip * tiles + column_tile
    first, middle, last = 0, 0, 0
    begin = 0
    for i in tl.static_range(0, SIDES, 2):
        here = pair == i // 2
        first = tl.where(here, begin, first)
        begin += (WIDTHS[i] + CHUNK - 1) // CHUNK
        middle = tl.where(here, begin, middle)
        begin += (WIDTHS[i + 1] + CHUNK - 1) // CHUNK
        last = tl.where(here, begin, last)
    rows, columns = strip * HEIGHT + tl.arange(0, HEIGHT), column_tile * BLOCK + tl.arange(0, BLOCK)
    row_tile = strip * HEIGHT // BLOCK
    low, high = tl.minimum(row_tile, column_tile), tl.maximum(row_tile, column_tile)
    tile, upper = low * tiles - low * (low + 1) // 2 + high, tiles * (tiles + 1) // 2
    own, other = (rows % BLOCK)[:, None], (columns % BLOCK)[None, :]
    inner = tl.where(row_tile <= column_tile, own * BLOCK + other, other * BLOCK + own)  # below: the mirror image
    scale_x = scale_of_all(peaks, first, middle, WIDTH)
    scale_y = scale_of_all(peaks, middle, last, WIDTH)
    k_tile = _sum_parts(partials, peaks, scale_x, first, middle, tile, upper, inner, BLOCK, HEIGHT)
    l_tile = _sum_parts(partials, peaks, scale_y, middle, last, tile, upper, inner, BLOCK, HEIGHT)

    k = grams + (2 * pair).to(tl.int64) * n * n
    slots += (4 if UNBIASED else 3) * pair * programs
    if UNBIASED:
        sums += 2 * pair * tiles * n
        diagonal = rows[:, None] == columns[None, :]
        kappa = tl.sum(tl.where(diagonal, k_tile, 0.0), 1).to(tl.float64)
        lam = tl.sum(tl.where(diagonal, l_tile, 0.0), 1).to(tl.float64)
        k_tile, l_tile = tl.where(diagonal, 0.0, k_tile), tl.where(diagonal, 0.0, l_tile)
        tl.store(sums + column_tile * n + rows, tl.sum(k_tile.to(tl.float64), 1), mask=rows < n)
        tl.store(sums + (tiles + column_tile) * n + rows, tl.sum(l_tile.to(tl.float64), 1), mask=rows < n)
        tl.store(slots + 0 * programs + program, tl.sum(kappa, 0))
        tl.store(slots + 1 * programs + program, tl.sum(kappa * kappa, 0))
        tl.store(slots + 2 * programs + program, tl.sum(lam, 0))
        tl.store(slots + 3 * programs + program, tl.sum(lam * lam, 0))
    else:  # fp32 inside a strip, since nothing overflows in these scales
        tl.store(slots + 0 * programs + program, tl.sum(tl.sum(k_tile * l_tile, 1), 0).to(tl.float64))
        tl.store(slots + 1 * programs + program, tl.sum(tl.sum(k_tile * k_tile, 1), 0).to(tl.float64))
        tl.store(slots + 2 * programs + program, tl.sum(tl.sum(l_tile * l_tile, 1), 0).to(tl.float64))
    offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(k + offsets, k_tile, mask=inside)
    tl.store(k + n * n + offsets, l_tile, mask=inside)

    if arrive(counters + pair, programs):
        count = row_count(mask, n, MASKED, WIDTH)
        coefficients += pair * COEFFICIENTS
        if UNBIASED:
            tl.store(counters + pair, 0)
            store_sizes(coefficients, scale_x.to(tl.float64), scale_y.to(tl.float64), count)
            for side in tl.static_range(2):
                # The product of two rows is off by eps of their norms' product; over all pairs of rows, squared.
                trace = sum_slots(slots, 2 * side, programs)
                squares = sum_slots(slots, 2 * side + 1, programs)
                tl.store(rooms + 2 * pair + side, tl.maximum(trace * trace - squares, 0.0))
                store_shifts(sums + side * tiles * n, tiles, shifts + (2 * pair + side) * n, count, n, True)
        else:
            finish(
                slots=slots,
                programs=programs,
                room_k=0.0,
                room_l=0.0,
                sum_k=0.0,
                sum_l=0.0,
                scale_x=scale_x,
                scale_y=scale_y,
                n=count,
                value=values + pair,
                coefficients=coefficients,
                STATISTIC=STATISTIC,
                UNBIASED=False,
            )


@triton.jit
def backward_kernel(
    wanted,  # the sides that want a gradient: [n, d] each, dense
    gradients,  # out, theirs
    mask,  # bytes [n]
    locations,  # fp32 [2, d] of each side
    grams,  # fp32 [pairs, 2, n, n]
    shifts,  # fp64 [pairs, 2, n] (unbiased)
    coefficients,  # fp64 [pairs, COEFFICIENTS]
    grad,  # of the values, upstream
    stride_grad,
    n,
    WIDTHS: tl.constexpr,  # of the sides that want one, and below:
    WANTED: tl.constexpr,  # their numbers among all sides
    STARTS: tl.constexpr,  # where their locations begin
    COUNT: tl.constexpr,
    MASKED: tl.constexpr,
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (column tiles of all wanted gradients, row tiles): a tile of dX = M X, M = a Lc + b Kc, or of dY likewise.

    M is formed in fp32, where it cancels as CKA -> 1, and brought to the size of sqrt(n) L/|L| before it is rounded:
    its entries lie below fp16's normal range at n = 128 already.
    """
    block = tl.program_id(0)
    x, dx, d, number, first, start_location = wanted[0], gradients[0], WIDTHS[0], WANTED[0], 0, STARTS[0]
    begin = 0
    for i in tl.static_range(COUNT):
        there = block >= begin
        x = tl.where(there, wanted[i], x)
        dx = tl.where(there, gradients[i], dx)
        d = tl.where(there, WIDTHS[i], d)
        number = tl.where(there, WANTED[i], number)
        first = tl.where(there, begin, first)
        start_location = tl.where(there, STARTS[i], start_location)
        begin += (WIDTHS[i] + BLOCK - 1) // BLOCK
    pair, side = number // 2, number % 2
    own = grams + (2 * pair + side).to(tl.int64) * n * n
    other = grams + (2 * pair + 1 - side).to(tl.int64) * n * n
    shifts += 2 * pair * n
    coefficients += pair * COEFFICIENTS
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = (block - first) * BLOCK + tl.arange(0, BLOCK)
    dtype = dx.dtype.element_ty
    outer, inner_other, inner_own = weights_of(coefficients, side, True)
    scale_x, scale_y, _ = sizes_of(coefficients)
    scale = tl.where(side == 0, scale_x, scale_y)
    if UNBIASED:
        row_shifts = both_shifts(shifts, rows, n, side, inner_other, inner_own)

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, n, STEP):
        inner = start + tl.arange(0, STEP)
        inside = (rows < n)[:, None] & (inner < n)[None, :]
        offsets = rows[:, None] * n + inner[None, :]
        m = tl.load(other + offsets, mask=inside, other=0.0) * inner_other
        m += tl.load(own + offsets, mask=inside, other=0.0) * inner_own
        if UNBIASED:
            m -= row_shifts[:, None] + both_shifts(shifts, inner, n, side, inner_other, inner_own)[None, :]
            m = tl.where(rows[:, None] == inner[None, :], 0.0, m)
        counted = counts(mask, inner, n, MASKED)
        tile = shifted_tile(x, locations + start_location, scale.to(tl.float32), counted, inner, columns, d)
        acc = tl.dot(m.to(dtype), tile.to(dtype), acc, input_precision=PRECISION)

    acc *= (2.0 * outer * scale * tl.load(grad + pair * stride_grad)).to(tl.float32)
    acc = tl.where(counts(mask, rows, n, MASKED)[:, None], acc, 0.0)
    out = rows.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(dx + out, acc.to(dtype), mask=(rows < n)[:, None] & (columns < d)[None, :])


def shapes_of(problems: Sequence[Problem]) -> Shapes:
    """Shape and dtype of every tensor of the stash of some pairs.

    ``coefficients`` are by pair, ``xs`` holds locations [2, d] of one side after the other, ``xx`` K and L by pair and
    ``rows`` their shifts (unbiased only).
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


class Small:
    """The launches of some pairs: two forward (unbiased three), one backward."""

    def __init__(self, problems: tuple[Problem, ...], precision: str) -> None:
        t = small_tiling(problems)
        first, pairs = problems[0], len(problems)
        n, unbiased, masked = first.n, first.estimator == "unbiased", dict(MASKED=first.masked)
        widths = tuple(d for problem in problems for d in (problem.p, problem.q))
        sides = dict(WIDTHS=widths, SIDES=len(widths), CHUNK=t.chunk)
        multiply = dict(PRECISION=precision, BLOCK=t.block, STEP=t.step)
        end = dict(STATISTIC=first.statistic, UNBIASED=unbiased)
        tiles, strips, splits = ceil_div(n, t.block), ceil_div(n, REDUCED), sum(t.splits)
        upper = tiles * (tiles + 1) // 2
        self.partials = Launch(
            partials_kernel, (upper, splits), (n, tiles), sides | dict(ROBUST=unbiased) | masked | multiply,
            **few_steps(first),
        )  # fmt: skip
        self.reduce = Launch(
            reduce_kernel, (strips, tiles, pairs), (n, tiles),
            sides | masked | end | dict(BLOCK=t.block, HEIGHT=REDUCED),
        )  # fmt: skip
        blocks = ceil_div(n, ROW_BLOCK)
        self.moments = Launch(
            moments_kernel, (blocks, pairs), (n,),
            dict(NUMBERS=COEFFICIENTS.value) | masked | end | dict(HEIGHT=ROW_BLOCK, LENGTH=COLUMN_BLOCK),
        )  # fmt: skip
        self.unbiased = unbiased
        wants = [wanted for problem in problems for wanted in (problem.x_grad, problem.y_grad)]
        self.wanted = tuple(side for side, wanted in enumerate(wants) if wanted)
        own = dict(
            WIDTHS=tuple(widths[side] for side in self.wanted), WANTED=self.wanted,
            STARTS=tuple(2 * sum(widths[:side]) for side in self.wanted), COUNT=len(self.wanted),
        )  # fmt: skip
        self.gradients = Launch(
            backward_kernel, (sum(ceil_div(widths[side], t.block) for side in self.wanted), tiles), (n,),
            own | masked | dict(UNBIASED=unbiased) | multiply, **products(first, precision),
        )  # fmt: skip
        self.stash = tuple(shapes_of(problems).values())
        self.workspace = (
            ((splits,), torch.float32), ((splits * upper * t.block**2,), torch.float32), ((pairs,), torch.int32),
            ((2 * pairs * unbiased,), torch.float64), ((2 * pairs * tiles * n * unbiased,), torch.float64),
            ((pairs * max((3 + unbiased) * strips * tiles, 3 * blocks),), torch.float64),
            ((pairs,) if pairs > 1 else (), torch.float32),
        )  # fmt: skip

    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Values [pairs], of one pair 0-d, fp32, and stash for x and y of the first pair, of the second, ..."""
        sides = tuple(x.contiguous() for x in tensors)
        any_ = sides[0]
        bytes_ = any_ if mask is None else as_bytes(mask)
        stash = Stash(*(any_.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        peaks, partials, counters, rooms, sums, slots, values = (
            any_.new_empty(shape, dtype=dtype) for shape, dtype in self.workspace
        )
        known = "dense" if aligned(*sides, bytes_) else None
        end = slots, counters, values, stash.coefficients
        self.partials(known, sides, bytes_, stash.xs, peaks, partials, counters)
        self.reduce(known, peaks, partials, bytes_, stash.xx, sums, stash.rows, rooms, *end)
        if self.unbiased:
            self.moments(known, stash.xx, stash.rows, bytes_, rooms, *end)
        return values, stash

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: Stash
    ) -> list[Tensor | None]:
        """The gradients of all sides times ``grad`` [pairs], in the order of ``tensors``; None where unwanted."""
        found: list[Tensor | None] = [None] * len(tensors)
        if self.wanted:
            wanted = tuple(tensors[side].contiguous() for side in self.wanted)
            new = tuple(x.new_empty(x.shape) for x in wanted)
            bytes_ = wanted[0] if mask is None else as_bytes(mask)
            stride = grad.stride(0) if grad.dim() else 0
            known = (stride, grad.dtype) if aligned(*wanted, *new, bytes_, grad, *stash) else None
            kept = stash.xs, stash.xx, stash.rows, stash.coefficients
            self.gradients(known, wanted, new, bytes_, *kept, grad, stride)
            for side, gradient in zip(self.wanted, new, strict=True):
                found[side] = gradient
        return found


@lru_cache(maxsize=1024)
def small_of(problems: tuple[Problem, ...], precision: str) -> Small:
    """The launches of these pairs, found once; ``precision`` is what `launch.precision_of` made of it."""
    return Small(problems, precision)
