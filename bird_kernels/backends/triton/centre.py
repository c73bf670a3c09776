r"""Where the columns of a side lie, and tiles of its features as seen from there: for programs that read all rows.

``x - location = (x - high) - low`` with two fp32 numbers a column: exact to the spread of the features, not to the size
of their mean, and exactly zero for a constant column. The extremes of a column bound its entries, whose largest sets a
power of two that brings them near 1. The kernels shift and scale as they load; no shifted copy exists.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUPS = tl.constexpr(8)  # of rows, whose means are compared: row i is in group i mod GROUPS
DEEP = tl.constexpr(4)  # rows of each group that are loaded together


@triton.jit
def counts(mask, rows, n, MASKED: tl.constexpr):
    """Which of these rows count; ``mask`` is [n] bytes."""
    keep = rows < n
    if MASKED:
        keep = keep & (tl.load(mask + rows, mask=keep, other=0) != 0)
    return keep


@triton.jit
def row_count(mask, n, MASKED: tl.constexpr, WIDTH: tl.constexpr):
    """The number of rows that count, fp64."""
    if MASKED:
        kept = tl.zeros([WIDTH], tl.float64)
        for start in range(0, n, WIDTH):
            kept += counts(mask, start + tl.arange(0, WIDTH), n, MASKED).to(tl.float64)
        return tl.sum(kept, 0)
    else:
        return n.to(tl.float64)


@triton.jit
def shifted_tile(x, location, scale, counted, rows, columns, d):
    """(x[rows, columns] - location[columns]) * scale, fp32; zero outside and in rows that are not ``counted``.

    ``x`` is [n, d] and dense, ``location`` [2, d] fp32.
    """
    there = columns < d
    inside = counted[:, None] & there[None, :]
    tile = tl.load(x + rows.to(tl.int64)[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(location + columns, mask=there, other=0.0)
    low = tl.load(location + d + columns, mask=there, other=0.0)
    return tl.where(inside, ((tile - high[None, :]) - low[None, :]) * scale, 0.0)


@triton.jit
def scale_of(peak):
    """2^k with 1 <= 2^k peak < 2; finite for zero, Inf and NaN."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -120), 120)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_of_all(peaks, begin, end, WIDTH: tl.constexpr):
    """The scale of the largest of the peaks begin..end."""
    peak = tl.zeros([WIDTH], tl.float32)
    for start in range(begin, end, WIDTH):
        places = start + tl.arange(0, WIDTH)
        peak = tl.maximum(peak, tl.load(peaks + places, mask=places < end, other=0.0))
    return scale_of(tl.max(peak, 0))


@triton.jit
def _median(values, there):
    """The median of values [GROUPS, *] by column, of those rows that are ``there`` [GROUPS]; 0 of none."""
    order = tl.arange(0, GROUPS)
    ties = (order[:, None] < order[None, :])[:, :, None] & (values[:, None, :] == values[None, :, :])
    before = ((values[:, None, :] < values[None, :, :]) | ties) & there[:, None, None]
    rank = tl.sum(before.to(tl.int32), 0)
    number = tl.sum(there.to(tl.int32), 0)
    middle = ((rank == (number - 1) // 2) | (rank == number // 2)) & there[:, None]
    return tl.sum(tl.where(middle, values, 0.0), 0) * tl.where(number % 2 == 0, 0.5, 1.0)


@triton.jit
def locate(
    x, mask, location, columns, n, d,
    ROBUST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the location of these BLOCK columns of x [n, d]; returns how far their entries are from it at the most.

    Their mean; if ROBUST, the median of the means of GROUPS groups of rows, which a few rows that dominate do not move.
    """
    row = tl.arange(0, DEEP)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    there = columns < d
    total = tl.zeros([DEEP, GROUPS, BLOCK], tl.float64)
    number = tl.zeros([DEEP, GROUPS], tl.float64)
    low = tl.full([DEEP, GROUPS, BLOCK], float("inf"), tl.float32)
    high = tl.full([DEEP, GROUPS, BLOCK], float("-inf"), tl.float32)
    for start in range(0, n, DEEP * GROUPS):
        counted = counts(mask, start + row, n, MASKED)
        inside = counted[:, :, None] & there[None, None, :]
        offsets = (start + row).to(tl.int64)[:, :, None] * d + columns[None, None, :]
        tile = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tile.to(tl.float64)
        number += counted.to(tl.float64)
        low = tl.minimum(low, tl.where(inside, tile, float("inf")))
        high = tl.maximum(high, tl.where(inside, tile, float("-inf")))
    sums, sizes = tl.sum(total, 0), tl.sum(number, 0)
    if ROBUST:
        exact = _median(sums / tl.maximum(sizes, 1.0)[:, None], sizes > 0.0)
    else:
        exact = tl.sum(sums, 0) / tl.maximum(tl.sum(sizes, 0), 1.0)
    centre = exact.to(tl.float32)
    tl.store(location + columns, centre, mask=there)
    tl.store(location + d + columns, (exact - centre.to(tl.float64)).to(tl.float32), mask=there)
    spread = tl.maximum(tl.max(tl.max(high, 0), 0) - centre, centre - tl.min(tl.min(low, 0), 0))  # -inf of no row
    return tl.max(tl.where(there, spread, 0.0), 0)
