r"""Column statistics of both sides: the mean, and a power of two that brings the centred entries near 1.

One pass over the inputs. Sums are taken in fp64 (n p additions: 2 us of an H100's at 65536 x 1024) and the mean is kept
as two fp32 numbers, ``x - mean = (x - high) - low``: exact to the spread of the features, not to the size of their
mean, and exactly zero for a constant column. The extremes of a column bound its centred entries, whose largest sets the
scale. The other kernels subtract and scale as they load: no centred copy exists. Up to `plan.SMALL` rows there is no
pass of its own either: whoever multiplies a share of the features finds their statistics first (`share_stats`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def centred_tile(
    x, mean, scale, mask, rows, columns, n, d, stride_n, stride_d,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(x[rows, columns] - mean[columns]) * scale in fp32; zero outside and in rows masked out. ``mean`` is [2, d]."""
    inside = _inside(mask, rows, columns, n, d, MASKED)
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return _centre(tl.load(x + offsets, mask=inside, other=0.0), mean, scale, columns, d, inside)


@triton.jit
def centred_block(
    x, mean, scale, mask, row, column, n, d, stride_n, stride_d,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`centred_tile`, HEIGHT x WIDTH from (row, column) on.

    ``x`` is a pointer or, if DESCRIBED, a descriptor of such blocks: then the copy unit finds the addresses.
    """
    rows, columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
    if DESCRIBED:
        inside = _inside(mask, rows, columns, n, d, MASKED)
        return _centre(x.load([row, column]), mean, scale, columns, d, inside)
    else:
        return centred_tile(x, mean, scale, mask, rows, columns, n, d, stride_n, stride_d, MASKED)


@triton.jit
def block_of(
    x, row, column, n, d,
    DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """HEIGHT x WIDTH entries of the dense x [n, d] from (row, column) on, zero outside; ``x`` as above."""
    if DESCRIBED:
        return x.load([row, column])
    else:
        rows, columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        offsets = rows.to(tl.int64)[:, None] * d + columns[None, :]
        return tl.load(x + offsets, mask=(rows < n)[:, None] & (columns < d)[None, :], other=0.0)


@triton.jit
def _inside(mask, rows, columns, n, d, MASKED: tl.constexpr):
    keep = rows < n
    if MASKED:
        keep = keep & (tl.load(mask + rows, mask=keep, other=0) != 0)
    return keep[:, None] & (columns < d)[None, :]


@triton.jit
def _centre(tile, mean, scale, columns, d, inside):
    high = tl.load(mean + columns, mask=columns < d, other=0.0)
    low = tl.load(mean + d + columns, mask=columns < d, other=0.0)
    return tl.where(inside, ((tile.to(tl.float32) - high[None, :]) - low[None, :]) * scale, 0.0)


@triton.jit
def scale_of(peak):
    """2^k with 1 <= 2^k peak < 2; finite for zero, Inf and NaN."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -120), 120)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(peaks, count, WIDTH: tl.constexpr):
    """The scale of the largest of ``count`` peaks."""
    peak = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, WIDTH):
        offsets = start + tl.arange(0, WIDTH)
        peak = tl.maximum(peak, tl.load(peaks + offsets, mask=offsets < count, other=0.0))
    return scale_of(tl.max(peak, 0))


@triton.jit
def row_count(count, n, MASKED: tl.constexpr):
    """The number of rows that count, in fp32."""
    if MASKED:
        return tl.load(count)
    else:
        return n.to(tl.float32)


@triton.jit
def count_rows(mask, n, MASKED: tl.constexpr, WIDTH: tl.constexpr):
    """The same from the mask itself."""
    if MASKED:
        kept = tl.zeros([WIDTH], tl.float32)
        for start in range(0, n, WIDTH):
            rows = start + tl.arange(0, WIDTH)
            kept += (tl.load(mask + rows, mask=rows < n, other=0) != 0).to(tl.float32)
        return tl.sum(kept, 0)
    else:
        return n.to(tl.float32)


@triton.jit
def _partial_stats(
    x, mask, columns, begin, end, d, stride_n, stride_d,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_D], tl.float64)
    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        keep = rows < end
        if MASKED:
            keep = keep & (tl.load(mask + rows, mask=keep, other=0) != 0)
        inside = keep[:, None] & (columns < d)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
        tile = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tile.to(tl.float64), 0)
        low = tl.minimum(low, tl.min(tl.where(inside, tile, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, tile, float("-inf")), 0))
    return total, low, high


@triton.jit
def _store_stats(mean, columns, d, total, low, high, count):
    """Stores the means and returns the largest centred entries, both by column."""
    exact = total / tl.maximum(count, 1.0).to(tl.float64)
    centre = exact.to(tl.float32)
    tl.store(mean + columns, centre, mask=columns < d)
    tl.store(mean + d + columns, (exact - centre.to(tl.float64)).to(tl.float32), mask=columns < d)
    spread = tl.maximum(high - centre, centre - low)  # -inf without any row
    return tl.where(columns < d, spread, 0.0)


@triton.jit
def share_stats(
    x, mask, mean, count, begin, end, n, d, stride_n, stride_d,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores the means of the columns begin..end for this program to read; returns the largest centred entry."""
    peak = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        total, low, high = _partial_stats(x, mask, columns, 0, n, d, stride_n, stride_d, MASKED, BLOCK_N, BLOCK_D)
        peak = tl.maximum(peak, _store_stats(mean, columns, d, total, low, high, count))
    tl.debug_barrier()  # one thread stores a mean that others load
    return tl.max(peak, 0)


@triton.jit
def _column_stats(
    x, mask, mean, peaks, partials, count, block, split, splits, n, d, stride_n, stride_d,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.cdiv(n, splits * BLOCK_N) * BLOCK_N
    begin = split * chunk
    end = tl.minimum(begin + chunk, n)
    total, low, high = _partial_stats(x, mask, columns, begin, end, d, stride_n, stride_d, MASKED, BLOCK_N, BLOCK_D)
    if SPLIT:
        offsets = split * d + columns
        tl.store(partials + offsets, total, mask=columns < d)
        tl.store(partials + splits * d + offsets, low.to(tl.float64), mask=columns < d)
        tl.store(partials + 2 * splits * d + offsets, high.to(tl.float64), mask=columns < d)
    else:
        spread = _store_stats(mean, columns, d, total, low, high, row_count(count, n, MASKED))
        tl.store(peaks + block, tl.max(spread, 0))


@triton.jit
def _finish_stats(
    mean, peaks, partials, count, block, splits, n, d,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    total = tl.zeros([BLOCK_D], tl.float64)
    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for split in range(0, splits):
        offsets = split * d + columns
        total += tl.load(partials + offsets, mask=inside, other=0.0)
        low = tl.minimum(low, tl.load(partials + splits * d + offsets, mask=inside, other=0.0).to(tl.float32))
        high = tl.maximum(high, tl.load(partials + 2 * splits * d + offsets, mask=inside, other=0.0).to(tl.float32))
    spread = _store_stats(mean, columns, d, total, low, high, row_count(count, n, MASKED))
    tl.store(peaks + block, tl.max(spread, 0))


@triton.jit
def column_stats_kernel(
    x, y, mask, mean_x, mean_y, peaks, partials, count, counter,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, blocks_x, splits,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks of x, then of y; row splits). Also clears the counter of the kernels that follow."""
    block, split = tl.program_id(0), tl.program_id(1)
    if (block == 0) & (split == 0):
        tl.store(counter, 0)
    if block < blocks_x:
        _column_stats(
            x, mask, mean_x, peaks, partials, count, block, split, splits, n, p, stride_xn, stride_xp,
            MASKED, SPLIT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _column_stats(
            y, mask, mean_y, peaks + blocks_x, partials + 3 * splits * p, count, block - blocks_x, split, splits,
            n, q, stride_yn, stride_yq, MASKED, SPLIT, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def finish_stats_kernel(
    mean_x, mean_y, peaks, partials, count, n, p, q, blocks_x, splits,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks of x, then of y): adds the row splits in order."""
    block = tl.program_id(0)
    if block < blocks_x:
        _finish_stats(mean_x, peaks, partials, count, block, splits, n, p, MASKED, BLOCK_D)
    else:
        _finish_stats(
            mean_y, peaks + blocks_x, partials + 3 * splits * p, count, block - blocks_x, splits, n, q, MASKED, BLOCK_D
        )
