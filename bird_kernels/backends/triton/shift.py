r"""Shifted operands: z = (x - s) u in the features' own dtype, and the sums of its columns.

The shift s of a column is its location (a robust mean) in that dtype; u is one power of two per side. The subtraction
is exact or nearly so, products of z are accurate whatever the mean, and the remaining mean is subtracted from their
results. In half precision a column is not shifted if its location is within six standard deviations of 0: entries much
smaller than the shift would lose bits. (Above five, entries within three of the location lose none.)

Location and spread are medians of the means of 16 groups of up to 1,024 sampled rows in all, so that a few dominating
rows change neither. One row is sampled of each block of ``every`` rows, at a pseudo-random place: the sample covers
sorted and drifting batches, and periodic ones do not alias. Rows that count are assigned to the groups in turn.

For the unbiased estimator's cross route (`apart`) rows have scores, too: the squared norms of x - s and of y - s, each
divided by what the spreads of the columns let expect. The last program of each share of the rows adds them up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import ceil_div
from ...types import Problem
from .centre import counts, dealt, largest_of, median_of_means
from .launch import Known, Launch, aligned, as_bytes
from .reduce import WIDTH, arrive

SAMPLE = 1024  # rows from which location and spread are estimated
LOCATED, SHIFTED = 32, 64  # columns per program of `locate_kernel`, and of `shift_kernel` (also its rows at a time)
SHARES = 64  # the most programs among which the rows of a column are divided
GROUPS = tl.constexpr(16)  # of the sampled rows that count
SLOTS = tl.constexpr(64)  # sampled rows that are loaded together


@triton.jit
def _tile(x, rows, columns, counted, d, row, column):
    """x[rows, columns], fp32, with strides ``row`` and ``column``; zero outside and in rows not ``counted``."""
    offsets = rows.to(tl.int64)[:, None] * row + columns.to(tl.int64)[None, :] * column
    return tl.load(x + offsets, mask=counted[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def padded_width(d):
    """d rounded up to a multiple of 8, in a form from which the compiler infers divisibility."""
    return (d + 7) // 8 * 8


@triton.jit
def column_sums(sums, columns, width, shares):
    """Sums of these columns of z over all rows, fp64; ``sums`` [shares, width], at most 64 shares."""
    share = tl.arange(0, 64)
    inside = (share < shares)[:, None] & (columns < width)[None, :]
    return tl.sum(tl.load(sums + share[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float64), 0)


@triton.jit
def locate_kernel(
    x,  # [n, p]
    y,  # [n, q]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    strides,  # of x, then of y: between rows, between columns
    shifts,  # out, fp32 [qa + pa]: of the columns of y, then of x
    peaks,  # out, fp32 [programs]: the largest sampled |x - s| of each block of columns
    expected,  # out (SCORED), fp32 [programs]: about the norm of an ordinary row of x - s in these columns
    counters,  # out, int32 [1 + shares]: set to zero for later kernels
    n,  # rows of x and y
    p,  # columns of x
    q,  # columns of y
    every,  # one row of this many is sampled
    shares,  # the number of shares of the rows in `shift_kernel`
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    ALWAYS: tl.constexpr,  # whether all columns are shifted
    SCORED: tl.constexpr,  # whether rows have scores, for `apart`
    LOCATED: tl.constexpr,  # columns per program
):
    """Grid (blocks of columns of y, then of x): location and spread, in two passes over the sample."""
    block, blocks_y = tl.program_id(0), tl.cdiv(q, LOCATED)
    if block == 0:
        tl.store(counters + tl.arange(0, 128), 0, mask=tl.arange(0, 128) <= shares)
    of_y, samples = block < blocks_y, tl.cdiv(n, every)
    x, d = tl.where(of_y, y, x), tl.where(of_y, q, p)
    row, column = tl.where(of_y, strides[2], strides[0]), tl.where(of_y, strides[3], strides[1])
    columns = tl.where(of_y, block, block - blocks_y) * LOCATED + tl.arange(0, LOCATED)
    sums = tl.zeros([SLOTS, LOCATED], tl.float32)
    numbers = tl.zeros([SLOTS], tl.float32)
    before = 0
    for first in range(0, samples, SLOTS):
        rows, counted, before = dealt(mask, first, before, every, samples, n, MASKED, SLOTS)
        sums += _tile(x, rows, columns, counted, d, row, column)
        numbers += counted.to(tl.float32)
    location = median_of_means(sums, numbers, GROUPS, SLOTS, LOCATED)
    sums = tl.zeros([SLOTS, LOCATED], tl.float32)
    largest = tl.zeros([SLOTS, LOCATED], tl.float32)
    before = 0
    for first in range(0, samples, SLOTS):
        rows, counted, before = dealt(mask, first, before, every, samples, n, MASKED, SLOTS)
        tile = _tile(x, rows, columns, counted, d, row, column)
        away = tl.where(counted[:, None], tl.abs(tile - location[None, :]), 0.0)  # 0 in padding columns
        sums += away
        largest = tl.maximum(largest, away)
    shift = location.to(x.dtype.element_ty).to(tl.float32)
    if SCORED or not ALWAYS:
        spread = median_of_means(sums, numbers, GROUPS, SLOTS, LOCATED)
        if not ALWAYS:  # six standard deviations of a normal distribution, whose mean distance is 0.8 of one
            shift = tl.where(tl.abs(location) > 7.5 * spread, shift, 0.0)
        if SCORED:
            away = spread + tl.abs(location - shift)
            unit = tl.maximum(tl.max(away, 0), 1e-37)  # squares may leave fp32's range
            tl.store(expected + block, unit * tl.sqrt(tl.sum((away / unit) * (away / unit), 0)))
    tl.store(shifts + tl.where(of_y, 0, padded_width(q)) + columns, shift, mask=columns < d)
    tl.store(peaks + block, tl.max(tl.max(largest, 0) + tl.abs(location - shift), 0))


@triton.jit
def rounded(x, like, TF32: tl.constexpr):
    """fp32 rounded as matrix products do: to the dtype of ``like``, or to tf32's ten bits; NaN stays NaN."""
    if TF32:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(x == x, ((bits + 4095 + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True), x)
    else:
        return x.to(like.dtype.element_ty)


@triton.jit
def _scale(peaks, count, WIDTH: tl.constexpr):
    """2^k nearest to 1 that brings the peak into [1/4, 16); finite for Inf and NaN, 1 for a peak of 0.

    Then rows that the sample missed fit into fp16 up to thousands of times the peak, entries of a 100,000th of a
    large peak keep all bits, and the weights of a gradient are of similar size for both sides.
    """
    largest = largest_of(peaks, 0, count, WIDTH)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    power = tl.minimum(tl.maximum(exponent, -2), 3) - exponent
    power = tl.minimum(tl.maximum(power, -120), 120)
    return tl.where(largest == 0.0, 1.0, ((127 + power) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _sum_of_squares(numbers, count, scale, WIDTH: tl.constexpr):
    """The sum of the squares of ``count`` numbers times ``scale``, in a fixed order; fp32."""
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, WIDTH):
        places = start + tl.arange(0, WIDTH)
        number = tl.load(numbers + places, mask=places < count, other=0.0) * scale
        total += number * number
    return tl.sum(total, 0)


@triton.jit
def zero_for_infinite(x):
    """x with 0 for infinite entries; NaN stays NaN."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def shift_kernel(
    x,  # [n, p]
    y,  # [n, q]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    strides,  # of x, then of y
    shifts,  # fp32 [qa + pa]
    peaks,  # fp32 [blocks of LOCATED columns], of `locate_kernel`
    expected,  # fp32 [blocks of LOCATED columns] (SCORED), of `locate_kernel`
    zx,  # out, [rows, pa]
    zy,  # out, [rows, qa]
    ones,  # out (CROSS), [rows, 8]: 1 1 0 0 0 0 0 0 for a row that counts
    sums,  # out, [grid 1, qa + pa + 8]: column sums of zy, zx and (cross and gram) ones, by shares; fp32, SCORED fp64
    scales,  # out, fp32 [2]: of x and of y
    norms,  # out, fp32 [grid 0 - 1, length]: each block's share of the scores (SCORED), of |z|^2 of the rows (NORMED)
    scores,  # out (SCORED), fp32 [length]
    counters,  # int32 [1 + grid 1], 0
    n,  # rows of x and y
    p,  # columns of x
    q,  # columns of y
    length,  # rows of z, n or more
    share,  # rows per program
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    CROSS: tl.constexpr,  # z is [zy | zx | ones]
    TF32: tl.constexpr,  # whether z is rounded to tf32; else to its dtype
    SCORED: tl.constexpr,  # whether rows have scores, for `apart`
    NORMED: tl.constexpr,  # whether the rows of z have squared norms, for distances
    LOCATED: tl.constexpr,  # columns per program of `locate_kernel`
    SHIFTED: tl.constexpr,  # columns per program, and rows that it processes at a time
    WIDTH: tl.constexpr,  # peaks, or scores, that are read together
):
    """Grid (blocks of columns of y, of x, and one for the ones; shares of the rows). Padding and masked rows are 0."""
    block, part = tl.program_id(0), tl.program_id(1)
    pa, qa = padded_width(p), padded_width(q)
    blocks_y, peaks_y = tl.cdiv(qa, SHIFTED), tl.cdiv(q, LOCATED)
    first, last = part * share, tl.minimum(part * share + share, length)
    sums += part * (qa + pa + 8)
    if block < blocks_y + tl.cdiv(pa, SHIFTED):
        of_y = block < blocks_y
        x, z = tl.where(of_y, y, x), tl.where(of_y, zy, zx)
        d, width, start = tl.where(of_y, q, p), tl.where(of_y, qa, pa), tl.where(of_y, 0, qa)
        row, column = tl.where(of_y, strides[2], strides[0]), tl.where(of_y, strides[3], strides[1])
        pitch = qa + pa + 8 if CROSS else width
        columns = tl.where(of_y, block, block - blocks_y) * SHIFTED + tl.arange(0, SHIFTED)
        before, located = tl.where(of_y, 0, peaks_y), tl.where(of_y, peaks_y, tl.cdiv(p, LOCATED))
        scale = _scale(peaks + before, located, WIDTH)
        if SCORED:
            unit = _sum_of_squares(expected + before, located, scale, WIDTH) + 1e-12
        tl.store(scales + tl.where(of_y, 1, 0), scale, mask=((block == 0) | (block == blocks_y)) & (part == 0))
        shift = tl.load(shifts + start + columns, mask=columns < d, other=0.0)
        total = tl.zeros([SHIFTED, SHIFTED], sums.dtype.element_ty)
        for begin in range(first, last, SHIFTED):
            rows = begin + tl.arange(0, SHIFTED)
            counted = counts(mask, rows, n, MASKED)
            tile = (_tile(x, rows, columns, counted, d, row, column) - shift[None, :]) * scale
            tile = tl.where(counted[:, None] & (columns < d)[None, :], tile, 0.0)
            if SCORED:
                tl.store(norms + block.to(tl.int64) * length + rows, tl.sum(tile * tile, 1) / unit, mask=rows < last)
            tile = rounded(tile, zx, TF32)
            if NORMED:
                wide = tile.to(tl.float32)
                tl.store(norms + block.to(tl.int64) * length + rows, tl.sum(wide * wide, 1), mask=rows < last)
            there = (rows < last)[:, None] & (columns < width)[None, :]
            tl.store(z + rows.to(tl.int64)[:, None] * pitch + columns[None, :], tile, mask=there)
            if SCORED:  # rows beyond fp16's range may be taken out of z, and out of its sums
                total += zero_for_infinite(tile.to(sums.dtype.element_ty))
            else:
                total += tile.to(tl.float32)
        tl.store(sums + start + columns, tl.sum(total, 0), mask=columns < width)
    else:
        eight = tl.arange(0, 8)
        count = tl.zeros([SHIFTED, 8], tl.float32)
        for begin in range(first, last, SHIFTED):
            rows = begin + tl.arange(0, SHIFTED)
            one = tl.where(counts(mask, rows, n, MASKED)[:, None] & (eight < 2)[None, :], 1.0, 0.0)
            count += one
            if CROSS:
                offsets = rows.to(tl.int64)[:, None] * (qa + pa + 8) + eight[None, :]
                tl.store(ones + offsets, one.to(ones.dtype.element_ty), mask=(rows < last)[:, None])
        tl.store(sums + qa + pa + eight, tl.sum(count, 0))
    if SCORED:
        blocks = tl.num_programs(0) - 1
        if arrive(counters + 1 + part, blocks + 1):
            for begin in range(first, last, WIDTH):
                rows = begin + tl.arange(0, WIDTH)
                score = tl.zeros([WIDTH], tl.float32)
                for index in range(0, blocks):
                    offsets = tl.cast(index, tl.int64) * length + rows
                    score += tl.load(norms + offsets, mask=rows < last, other=0.0, cache_modifier=".cg")
                tl.store(scores + rows, score, mask=rows < last)


class Shift:
    """The launches of `locate_kernel` and `shift_kernel`, for z of ``length`` rows, ``scored`` or not."""

    def __init__(
        self, problem: Problem, length: int, precision: str, *, always: bool, cross: bool, scored: bool = False
    ) -> None:
        n, p, q = problem.n, problem.p, problem.q
        located = ceil_div(q, LOCATED) + ceil_div(p, LOCATED)
        columns = ceil_div(q, SHIFTED) + ceil_div(p, SHIFTED)
        share = SHIFTED * ceil_div(length, SHIFTED * SHARES)
        self.shares = ceil_div(length, share)
        self.width = 8 * (ceil_div(p, 8) + ceil_div(q, 8))
        single, double, normed = torch.float32, torch.float64, problem.kernel is not None
        self.sizes = dict(
            shifts=(self.width, single), peaks=(located, single), scales=(2, single),
            sums=(self.shares * (self.width + 8), double if scored else single),
            counters=(1 + self.shares, torch.int32), expected=(located if scored else 0, single),
            norms=(columns * length if scored or normed else 0, single), scores=(length if scored else 0, single),
        )  # fmt: skip
        decided = dict(
            n=n, p=p, q=q, every=ceil_div(n, SAMPLE), shares=self.shares, length=length, share=share,
            MASKED=problem.masked, ALWAYS=always, CROSS=cross, TF32=precision == "tf32", SCORED=scored, NORMED=normed,
            LOCATED=LOCATED, SHIFTED=SHIFTED, WIDTH=WIDTH.value,
        )  # fmt: skip
        self.locate = Launch(locate_kernel, (located,), decided, num_warps=4 if scored else 8)  # 8 would spill
        self.shift = Launch(shift_kernel, (columns + 1, self.shares), decided, num_warps=8)

    def __call__(self, x: Tensor, y: Tensor, mask: Tensor | None, **z: Tensor) -> tuple[Known, dict[str, Any]]:
        """Write ``zx``, ``zy`` and ``ones``; returns the `Known` of later launches, and all tensors by parameter."""
        memory: dict[str, Any] = {name: x.new_empty(size, dtype=of) for name, (size, of) in self.sizes.items()}
        memory |= dict(x=x, y=y, strides=(*x.stride(), *y.stride()), **z)
        memory["mask"] = bytes_ = memory["counters"] if mask is None else as_bytes(mask)  # None: any valid pointer
        known = memory["strides"] if aligned(x, y, bytes_) else None
        self.locate(known, memory)
        self.shift(known, memory)
        return known, memory
