r"""Launch-bound problems: up to `plan.FEW_ROWS` rows, K = X X^T and L = Y Y^T, for any number of pairs at once.

Forward: `partials_kernel` shifts a range (split) of a side's columns and multiplies it to a part of a tile of the Gram
matrix; `reduce_kernel` adds the parts in order. Biased, the columns are centred by their means, so the matrices are
centred and the last program combines their moments. Unbiased, the columns are shifted by a location that dominating
rows do not move (a mean would add such a row to all others), the diagonals are zeroed, and `double.moments_kernel`
centres the matrices. Backward: one launch.

One pair is a list of one. Pointers are passed as tuples of arguments and widths as constants, so a program selects its
side (x and y of the first pair, of the second, ...) by a chain of selects, nothing is copied to the device, and CUDA
graphs can capture the call. All pairs have the same rows, dtype, mask and estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import ceil_div, small_tiling
from ...types import Problem, Shapes, Stash
from . import double
from .centre import counts, largest_of, rows_counted, scale_of, shifted_tile, store_location
from .double import mixed_centring_of, mixed_shifts_of, moments_kernel, store_totals
from .launch import Launch, aligned, as_bytes, few_steps, many_steps
from .reduce import (
    COEFFICIENTS,
    KK,
    ROWS,
    SCALE_X,
    WIDTH,
    arrive,
    finish,
    store_no_totals,
    store_sizes,
    upper_tile,
    weights_of,
)

REDUCED = 8  # rows of a tile per program of `reduce_kernel`: 16 bytes of a part for each thread
UNROLL = tl.constexpr(8)  # parts that are loaded at once


@triton.jit
def partials_kernel(
    sides,  # x and y of the first pair, of the second, ...: [n, d] each, dense
    mask,  # bytes [n]
    locations,  # out, fp32 [2, d] of each side, concatenated
    peaks,  # out, fp32 [splits]: the largest shifted entry of each
    partials,  # out, fp32 [splits, upper tiles, BLOCK, BLOCK], times the square of the split's scale
    counters,  # out, int32 [pairs]: set to zero for the next kernel
    n,
    WIDTHS: tl.constexpr,  # d of each side
    SIDES: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of a split
    UNBIASED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (upper tiles, splits of all sides): a split's part of a tile.

    All programs of a split compute, and store, the same locations and the same peak.
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
        peak = tl.maximum(peak, store_location(x, mask, location, columns, n, d, UNBIASED, MASKED, STEP))
    tl.store(peaks + split, peak)
    tl.debug_barrier()  # one thread stored a location that others load
    scale = scale_of(peak)

    row_tile, column_tile = upper_tile(tile, tl.cdiv(n, BLOCK))
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
    mask,  # bytes [n]
    grams,  # out, fp32 [pairs, 2, n, n]: K and L, with diagonal 0 if UNBIASED
    sums,  # fp64 [pairs, 2, tiles, n] (unbiased): row sums of each tile, read by the last program
    rows,  # out, fp64 [pairs, 2, n] (unbiased): row sums
    slots,  # fp64 [pairs, 3 or, unbiased, 6, programs]: partial sums of the programs of a pair
    counters,  # int32 [pairs]
    values,  # out, fp32 [pairs]; unbiased, the next kernel writes them
    coefficients,  # out, fp64 [pairs, COEFFICIENTS]
    n,
    WIDTHS: tl.constexpr,
    SIDES: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
    STATISTIC: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    REDUCED: tl.constexpr,  # rows per program
):
    """Grid (blocks of REDUCED rows, tiles, pairs): sums the parts of REDUCED rows of a tile of K and of L."""
    strip, column_tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(1)
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
    i, j = strip * REDUCED + tl.arange(0, REDUCED), column_tile * BLOCK + tl.arange(0, BLOCK)
    row_tile = strip * REDUCED // BLOCK
    low, high = tl.minimum(row_tile, column_tile), tl.maximum(row_tile, column_tile)
    tile, upper = low * tiles - low * (low + 1) // 2 + high, tiles * (tiles + 1) // 2
    own, other = (i % BLOCK)[:, None], (j % BLOCK)[None, :]
    inner = tl.where(row_tile <= column_tile, own * BLOCK + other, other * BLOCK + own)  # below: transposed
    scale_x = scale_of(largest_of(peaks, first, middle, WIDTH))
    scale_y = scale_of(largest_of(peaks, middle, last, WIDTH))
    k_tile = _sum_parts(partials, peaks, scale_x, first, middle, tile, upper, inner, BLOCK, REDUCED)
    l_tile = _sum_parts(partials, peaks, scale_y, middle, last, tile, upper, inner, BLOCK, REDUCED)

    k = grams + (2 * pair).to(tl.int64) * n * n
    slots += (6 if UNBIASED else 3) * pair * programs
    own = slots + program
    if UNBIASED:
        sums += 2 * pair * tiles * n
        diagonal = i[:, None] == j[None, :]
        for side in tl.static_range(2):
            tile = l_tile if side else k_tile
            squares = tl.sum(tl.where(diagonal, tile, 0.0), 1).to(tl.float64)
            row_sums = tl.sum(tl.where(diagonal, 0.0, tile).to(tl.float64), 1)
            tl.store(sums + (side * tiles + column_tile) * n + i, row_sums, mask=i < n)
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
        sizes = scale_x.to(tl.float64), scale_y.to(tl.float64), rows_counted(mask, n, MASKED, WIDTH)
        coefficients += pair * COEFFICIENTS
        store_sizes(coefficients, sizes)
        if UNBIASED:
            tl.store(counters + pair, 0)
            store_totals(coefficients, slots, programs, True)
            for start in range(0, 2 * n, WIDTH):
                places = start + tl.arange(0, WIDTH)
                there = places < 2 * n
                parts = sums + (places // n * tiles) * n + places % n
                total = tl.zeros([WIDTH], tl.float64)
                for _ in range(0, tiles):
                    total += tl.load(parts, mask=there, other=0.0, cache_modifier=".cg")
                    parts += n
                tl.store(rows + 2 * pair * n + places, total, mask=there)
        else:
            store_no_totals(coefficients)
            finish(slots, programs, coefficients, values + pair, sizes, (0.0, 0.0), STATISTIC, False)


@triton.jit
def backward_kernel(
    wanted,  # the sides of which the gradient is wanted: [n, d] each, dense
    gradients,  # out, their gradients
    mask,  # bytes [n]
    locations,  # fp32 [2, d] of each side
    grams,  # fp32 [pairs, 2, n, n]
    rows,  # fp64 [pairs, 2, n] (unbiased)
    coefficients,  # fp64 [pairs, COEFFICIENTS]
    grad,  # upstream gradient of the values
    stride_grad,
    n,
    WIDTHS: tl.constexpr,  # of the sides in ``wanted``, and below:
    WANTED: tl.constexpr,  # their indices among all sides
    STARTS: tl.constexpr,  # the offsets of their locations
    COUNT: tl.constexpr,  # their number
    MASKED: tl.constexpr,
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (column tiles of all wanted gradients, row tiles): a tile of dX = M X, M = a Lc + b Kc, or of dY likewise.

    M is computed in fp32, since it cancels as CKA -> 1, and scaled to the size of sqrt(n) L/|L| before it is rounded:
    otherwise its entries would be below fp16's normal range at n = 128 already.
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
    rows += 2 * pair * n
    coefficients += pair * COEFFICIENTS
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = (block - first) * BLOCK + tl.arange(0, BLOCK)
    dtype = dx.dtype.element_ty
    size = tl.sqrt(tl.load(coefficients + KK + 1 - side) / tl.load(coefficients + ROWS))
    outer, a, b = weights_of(coefficients, side, size, grad + pair * stride_grad)
    scale = tl.load(coefficients + SCALE_X + side).to(tl.float32)
    if UNBIASED:
        centring = mixed_centring_of(coefficients, side, a, b, True)
        shifts_i = mixed_shifts_of(rows, centring, i, side, n)[:, None]

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, n, STEP):
        j = start + tl.arange(0, STEP)
        inside = (i < n)[:, None] & (j < n)[None, :]
        offsets = i[:, None] * n + j[None, :]
        m = tl.load(other + offsets, mask=inside, other=0.0) * a + tl.load(own + offsets, mask=inside, other=0.0) * b
        if UNBIASED:
            m -= shifts_i + mixed_shifts_of(rows, centring, j, side, n)[None, :]
            m = tl.where(i[:, None] == j[None, :], 0.0, m)
        counted = counts(mask, j, n, MASKED)
        tile = shifted_tile(x, locations + start_location, scale, counted, j, columns, d)
        acc = tl.dot(m.to(dtype), tile.to(dtype), acc, input_precision=PRECISION)

    acc = tl.where(counts(mask, i, n, MASKED)[:, None], acc * outer.to(tl.float32), 0.0)
    out = i.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(dx + out, acc.to(dtype), mask=(i < n)[:, None] & (columns < d)[None, :])


def shapes_of(problems: Sequence[Problem]) -> Shapes:
    """Shape and dtype of every tensor of the common stash of some pairs.

    ``coefficients`` are per pair, ``xs`` holds the locations [2, d] of all sides, concatenated, ``xx`` K and L per pair
    and ``rows`` their row sums (unbiased only).
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
    """The launches of some pairs: two forward (unbiased: three), one backward."""

    def __init__(self, problems: tuple[Problem, ...], precision: str) -> None:
        t = small_tiling(problems)
        first, pairs = problems[0], len(problems)
        n, self.unbiased = first.n, first.estimator == "unbiased"
        widths = tuple(d for problem in problems for d in (problem.p, problem.q))
        wants = [wanted for problem in problems for wanted in (problem.x_grad, problem.y_grad)]
        self.wanted = tuple(side for side, wanted in enumerate(wants) if wanted)
        tiles, strips, splits = ceil_div(n, t.block), ceil_div(n, REDUCED), sum(t.splits)
        upper, blocks = tiles * (tiles + 1) // 2, ceil_div(n, double.HEIGHT)
        decided = dict(
            n=n, WIDTHS=widths, SIDES=len(widths), CHUNK=t.chunk, MASKED=first.masked, STATISTIC=first.statistic,
            UNBIASED=self.unbiased, PRECISION=precision, BLOCK=t.block, STEP=t.step, REDUCED=REDUCED,
            NUMBERS=COEFFICIENTS.value, HEIGHT=double.HEIGHT, LENGTH=double.LENGTH,
        )  # fmt: skip
        of_wanted = dict(
            WIDTHS=tuple(widths[side] for side in self.wanted),
            WANTED=self.wanted,
            STARTS=tuple(2 * sum(widths[:side]) for side in self.wanted),
            COUNT=len(self.wanted),
        )
        self.partials = Launch(partials_kernel, (upper, splits), decided, **few_steps(first))
        self.reduce = Launch(reduce_kernel, (strips, tiles, pairs), decided)
        self.moments = Launch(moments_kernel, (blocks, pairs), decided)
        columns = sum(ceil_div(widths[side], t.block) for side in self.wanted)
        self.gradients = Launch(backward_kernel, (columns, tiles), decided | of_wanted, **many_steps(first, precision))
        self.stash = tuple(shapes_of(problems).values())
        self.workspace: Shapes = dict(
            peaks=((splits,), torch.float32),
            partials=((splits * upper * t.block**2,), torch.float32),
            counters=((pairs,), torch.int32),
            sums=((2 * pairs * tiles * n * self.unbiased,), torch.float64),
            slots=((pairs * max(3 * (1 + self.unbiased) * strips * tiles, 3 * blocks),), torch.float64),
            values=((pairs,) if pairs > 1 else (), torch.float32),
        )

    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Values [pairs] (0-d for one pair), fp32, and stash for x and y of the first pair, of the second, ..."""
        sides = tuple(x.contiguous() for x in tensors)
        bytes_ = sides[0] if mask is None else as_bytes(mask)
        stash = Stash(*(sides[0].new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        memory: dict[str, Any] = _named(stash) | dict(sides=sides, mask=bytes_)
        memory |= {name: sides[0].new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.workspace.items()}
        known = "dense" if aligned(*sides, bytes_) else None
        self.partials(known, memory)
        self.reduce(known, memory)
        if self.unbiased:
            self.moments(known, memory)
        return memory["values"], stash

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: Stash
    ) -> list[Tensor | None]:
        """The gradients of all sides times ``grad`` [pairs], in the order of ``tensors``; None where not wanted."""
        found: list[Tensor | None] = [None] * len(tensors)
        if self.wanted:
            wanted = tuple(tensors[side].contiguous() for side in self.wanted)
            new = tuple(x.new_empty(x.shape) for x in wanted)
            bytes_ = wanted[0] if mask is None else as_bytes(mask)
            stride = grad.stride(0) if grad.dim() else 0
            memory = dict(wanted=wanted, gradients=new, mask=bytes_, grad=grad, stride_grad=stride)
            known = (stride, grad.dtype) if aligned(*wanted, *new, bytes_, grad, *stash) else None
            self.gradients(known, memory | _named(stash))
            for side, gradient in zip(self.wanted, new, strict=True):
                found[side] = gradient
        return found


def _named(stash: Stash) -> dict[str, Any]:
    """The tensors of a stash by the kernels' parameter names."""
    return dict(locations=stash.xs, grams=stash.xx, rows=stash.rows, coefficients=stash.coefficients)


@lru_cache(maxsize=1024)
def small_of(problems: tuple[Problem, ...], precision: str) -> Small:
    """The launches of these pairs, cached; ``precision`` is from `launch.precision_of`."""
    return Small(problems, precision)
