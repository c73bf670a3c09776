r"""Shifted operands: z = (x - s) u in the features' own dtype, and the sums of its columns.

The shift s of a column is its location, a number of that dtype; u is a power of two for a whole side. The subtraction
is exact, or as good as exact, so that products of z lose nothing to the mean, and what is left of the mean is taken off
their results. In half precision a column whose location is within six spreads keeps it: entries much smaller than the
shift lose bits to it. (Above five, entries within three spreads of the location lose none.)

Location and spread are medians of the means of 16 groups of up to 1,024 rows in all, so that a few rows that dominate
move neither. The rows are one of every ``every``, at another place in each stretch: sorted and drifting batches are
seen whole, and no period of the batch meets the sample's own. Those that count are dealt to the groups in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import counts, dealt, median_of_means

SAMPLE = 1024  # rows that location and spread are judged by
GROUPS = tl.constexpr(16)  # of the sampled rows that count
SLOTS = tl.constexpr(64)  # sampled rows that are loaded together


@triton.jit
def _sample(
    x,  # [n, d], any strides
    mask,  # bytes [n]
    first,  # of the sampled rows
    before,  # how many sampled rows counted so far
    columns,  # [BLOCK]
    n,
    d,
    stride_n,
    stride_d,
    every,  # one row of so many is sampled
    samples,
    MASKED: tl.constexpr,
):
    """Sampled rows first..first + SLOTS: entries, fp32, which of them there are, which rows count, and ``before``."""
    index = first + tl.arange(0, SLOTS)
    rows = index * every + ((index.to(tl.uint32) * 2654435761) >> 16).to(tl.int32) % every
    keep = (index < samples) & counts(mask, rows, n, MASKED)
    if MASKED:
        place, keep, before = dealt(keep, before, SLOTS)
        index = first + place
        rows = index * every + ((index.to(tl.uint32) * 2654435761) >> 16).to(tl.int32) % every
    inside = keep[:, None] & (columns < d)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32), inside, keep.to(tl.float32), before


@triton.jit
def _locate(
    x,  # [n, d], any strides
    mask,  # bytes [n]
    shifts,  # out, fp32 [d]
    peak,  # out, fp32: the largest sampled |x - s|
    columns,  # [BLOCK]
    n,
    d,
    stride_n,
    stride_d,
    every,
    samples,
    MASKED: tl.constexpr,
    ALWAYS: tl.constexpr,  # every column is shifted
    BLOCK: tl.constexpr,
):
    """Stores the shifts of these columns, and the peak: in two passes over the sample, location and then spread."""
    sums = tl.zeros([SLOTS, BLOCK], tl.float32)
    numbers = tl.zeros([SLOTS], tl.float32)
    before = 0
    for first in range(0, samples, SLOTS):
        tile, _, keep, before = _sample(
            x, mask, first, before, columns, n, d, stride_n, stride_d, every, samples, MASKED
        )
        sums += tile
        numbers += keep
    location = median_of_means(sums, numbers, GROUPS, SLOTS, BLOCK)
    sums = tl.zeros([SLOTS, BLOCK], tl.float32)
    largest = tl.zeros([SLOTS, BLOCK], tl.float32)
    before = 0
    for first in range(0, samples, SLOTS):
        tile, inside, _, before = _sample(
            x, mask, first, before, columns, n, d, stride_n, stride_d, every, samples, MASKED
        )
        away = tl.where(inside, tl.abs(tile - location[None, :]), 0.0)
        sums += away
        largest = tl.maximum(largest, away)
    shift = location.to(x.dtype.element_ty).to(tl.float32)
    if not ALWAYS:  # six standard deviations of a normal distribution, whose mean distance is 0.8 of one
        spread = median_of_means(sums, numbers, GROUPS, SLOTS, BLOCK)
        shift = tl.where(tl.abs(location) > 7.5 * spread, shift, 0.0)
    tl.store(shifts + columns, shift, mask=columns < d)
    tl.store(peak, tl.max(tl.max(largest, 0) + tl.abs(location - shift), 0))


@triton.jit
def locate_kernel(
    x,  # [n, p]
    y,  # [n, q]
    mask,  # bytes [n]
    shifts,  # out, fp32 [qa + pa]: of the columns of y, then of x
    peaks,  # out, fp32 [programs]: the largest sampled |x - s| of each block of columns
    counters,  # out, int32 [2]: cleared for the kernels that follow
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, qa,
    blocks_y,  # blocks of columns of y, which come first
    every, samples,  # one row of ``every``, so many of them
    MASKED: tl.constexpr,
    ALWAYS: tl.constexpr,  # fp32: every column is shifted
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of columns of y, then of x)."""
    block = tl.program_id(0)
    if block == 0:
        tl.store(counters + tl.arange(0, 2), tl.zeros([2], tl.int32))
    if block < blocks_y:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        _locate(
            y, mask, shifts, peaks + block, columns, n, q, stride_yn, stride_yq, every, samples, MASKED, ALWAYS, BLOCK
        )
    else:
        columns = (block - blocks_y) * BLOCK + tl.arange(0, BLOCK)
        _locate(
            x, mask, shifts + qa, peaks + block, columns, n, p, stride_xn, stride_xp, every, samples, MASKED, ALWAYS,
            BLOCK,
        )  # fmt: skip


@triton.jit
def round_tf32(x):
    """fp32 rounded to the ten bits that a matrix unit reads of it; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 4095 + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True), x)


@triton.jit
def _scale(peaks, count, WIDTH: tl.constexpr):
    """2^k that brings the peak into 1/4..16, the nearest; finite for Inf and NaN, 1 if all that was sampled is alike.

    fp16 then has room for rows that the sample missed, 100,000 times as large, keeps all its bits for entries a
    100,000th of a large peak, and a gradient's weights for both sides are of similar size.
    """
    peak = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, WIDTH):
        offsets = start + tl.arange(0, WIDTH)
        peak = tl.maximum(peak, tl.load(peaks + offsets, mask=offsets < count, other=0.0))
    largest = tl.max(peak, 0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    power = tl.minimum(tl.maximum(exponent, -2), 3) - exponent
    power = tl.minimum(tl.maximum(power, -120), 120)
    return tl.where(largest == 0.0, 1.0, ((127 + power) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _shift(
    x, mask, shifts, scale, z, sums, columns, first, last, n, d, width, stride_n, stride_d, pitch,
    MASKED: tl.constexpr, TF32: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows first..last of these columns; rows from n on and columns from d on are zero."""
    shift = tl.load(shifts + columns, mask=columns < d, other=0.0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        keep = counts(mask, rows, n, MASKED)
        inside = keep[:, None] & (columns < d)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
        tile = (tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - shift[None, :]) * scale
        tile = tl.where(inside, tile, 0.0)
        if TF32:
            tile = round_tf32(tile)
        tile = tile.to(z.dtype.element_ty)
        there = (rows < last)[:, None] & (columns < width)[None, :]
        tl.store(z + rows.to(tl.int64)[:, None] * pitch + columns[None, :], tile, mask=there)
        total += tile.to(tl.float32)
    tl.store(sums + columns, tl.sum(total, 0), mask=columns < width)


@triton.jit
def shift_kernel(
    x,  # [n, p]
    y,  # [n, q]
    mask,  # bytes [n]
    shifts,  # fp32 [qa + pa]
    peaks,  # fp32 [peaks_y + peaks_x], of `locate_kernel`
    zx,  # out, [rows, pa], rows 8 ``pitch_x`` apart
    zy,  # out, [rows, qa], rows 8 ``pitch_y`` apart
    ones,  # out (cross), [rows, 8], rows 8 ``pitch_x`` apart: 1 1 0 0 0 0 0 0 for a row that counts
    sums,  # out, fp32 [grid 1, qa + pa + 8]: column sums of zy, zx and (cross and gram) ones, by shares of the rows
    scales,  # out, fp32 [2]: of x and of y
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, pa, qa,
    rows,  # of z, n or more
    share,  # rows of a program
    pitch_x, pitch_y,  # in eights: the compiler sees that rows are aligned
    blocks_y, blocks_x, peaks_y, peaks_x,
    MASKED: tl.constexpr,
    CROSS: tl.constexpr,
    TF32: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # peaks that are read together
):  # fmt: skip
    """Grid (blocks of columns of y, of x, and one for the ones; shares of the rows)."""
    block, part = tl.program_id(0), tl.program_id(1)
    first = part * share
    last = tl.minimum(first + share, rows)
    sums += part * (qa + pa + 8)
    if block < blocks_y:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        scale = _scale(peaks, peaks_y, WIDTH)
        tl.store(scales + 1, scale, mask=(block == 0) & (part == 0))
        _shift(
            y, mask, shifts, scale, zy, sums, columns, first, last, n, q, qa, stride_yn, stride_yq, pitch_y * 8,
            MASKED, TF32, ROWS, BLOCK,
        )  # fmt: skip
    elif block < blocks_y + blocks_x:
        columns = (block - blocks_y) * BLOCK + tl.arange(0, BLOCK)
        scale = _scale(peaks + peaks_y, peaks_x, WIDTH)
        tl.store(scales, scale, mask=(block == blocks_y) & (part == 0))
        _shift(
            x, mask, shifts + qa, scale, zx, sums + qa, columns, first, last, n, p, pa, stride_xn, stride_xp,
            pitch_x * 8, MASKED, TF32, ROWS, BLOCK,
        )  # fmt: skip
    else:
        eight = tl.arange(0, 8)
        count = tl.zeros([ROWS, 8], tl.float32)
        for start in range(first, last, ROWS):
            index = start + tl.arange(0, ROWS)
            keep = counts(mask, index, n, MASKED)
            one = tl.where(keep[:, None] & (eight < 2)[None, :], 1.0, 0.0)
            count += one
            if CROSS:
                offsets = index.to(tl.int64)[:, None] * (pitch_x * 8) + eight[None, :]
                tl.store(ones + offsets, one.to(ones.dtype.element_ty), mask=(index < last)[:, None])
        tl.store(sums + qa + pa + eight, tl.sum(count, 0))
