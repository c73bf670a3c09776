r"""Locations of the columns of a side (their mean, or a robust centre), and tiles of features minus their locations.

``x - location = (x - high) - low`` with two fp32 numbers per column: the error is relative to the spread of the
features, not to their mean, and zero for a constant column. A power of two, from the columns' extremes, scales entries
to near 1. The kernels shift and scale when they load; no shifted copy is stored. A program reads all rows of a column.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUPS = tl.constexpr(8)  # of rows, for the median of means; rows that are not masked are assigned to them in turn
SLOTS = tl.constexpr(32)  # rows that are loaded together


@triton.jit
def counts(mask, rows, n, MASKED: tl.constexpr):
    """Which of these rows count, that is are below n and not masked; ``mask`` is [n] bytes."""
    keep = rows < n
    if MASKED:
        keep = keep & (tl.load(mask + rows, mask=keep, other=0) != 0)
    return keep


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
def largest_of(peaks, begin, end, WIDTH: tl.constexpr):
    """The largest of peaks[begin:end], which are not negative."""
    peak = tl.zeros([WIDTH], tl.float32)
    for start in range(begin, end, WIDTH):
        places = start + tl.arange(0, WIDTH)
        peak = tl.maximum(peak, tl.load(peaks + places, mask=places < end, other=0.0))
    return tl.max(peak, 0)


@triton.jit
def _sampled(index, every):
    """One row of each block of ``every`` rows, at a pseudo-random place in it."""
    return index * every + ((index.to(tl.uint32) * 2654435761) >> 16).to(tl.int32) % every


@triton.jit
def dealt(mask, start, before, every, samples, n, MASKED: tl.constexpr, SLOTS: tl.constexpr):
    """Assigns SLOTS sampled rows, from the ``start``-th on, to slots: each slot's row, whether it has one, ``before``.

    One row of each ``every`` is sampled. The r-th of those that count is assigned to slot r mod SLOTS, so that slots,
    and groups of them, fill evenly even if a mask is periodic. ``before`` is the number that counted so far.
    """
    slots = tl.arange(0, SLOTS)
    rows = _sampled(start + slots, every)
    counted = (start + slots < samples) & counts(mask, rows, n, MASKED)
    if MASKED:
        ones = counted.to(tl.int32)
        rank = before + tl.cumsum(ones, 0) - ones
        takes = counted[:, None] & ((rank % SLOTS)[:, None] == slots[None, :])
        rows = _sampled(start + tl.sum(tl.where(takes, slots[:, None], 0), 0), every)
        counted = tl.sum(takes.to(tl.int32), 0) > 0
        before += tl.sum(ones, 0)
    return rows, counted, before


@triton.jit
def quotient(a, b):
    """a / b, both of one shape and dtype, rounded to nearest: in fp32 "/" may be off by two units in the last place."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def median_of_means(sums, numbers, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """By column, the median over groups of sums [SLOTS, BLOCK] / numbers [SLOTS]; slot s is in group s mod GROUPS.

    Of an even number it is the mean of the middle two; groups without rows are left out; without any group it is 0.
    """
    number = tl.sum(tl.reshape(numbers, [SLOTS // GROUPS, GROUPS]), 0)
    total = tl.sum(tl.reshape(sums, [SLOTS // GROUPS, GROUPS, BLOCK]), 0)
    mean = quotient(total, tl.broadcast_to(tl.maximum(number, 1.0)[:, None], [GROUPS, BLOCK]))
    there = number > 0.0
    order = tl.arange(0, GROUPS)
    ties = (order[:, None] < order[None, :])[:, :, None] & (mean[:, None, :] == mean[None, :, :])
    before = ((mean[:, None, :] < mean[None, :, :]) | ties) & there[:, None, None]
    rank = tl.sum(before.to(tl.int32), 0)
    groups = tl.sum(there.to(tl.int32), 0)
    middle = ((rank == (groups - 1) // 2) | (rank == groups // 2)) & there[:, None]
    return tl.sum(tl.where(middle, mean, 0.0), 0) * tl.where(groups % 2 == 0, 0.5, 1.0)


@triton.jit
def store_location(
    x,  # [n, d], dense
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    location,  # out, fp32 [2, d]: high and low part
    columns,  # [BLOCK]
    n,
    d,
    ROBUST: tl.constexpr,  # the median of the means of GROUPS groups of rows, which few dominating rows do not move
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the location of these columns, their mean if not ROBUST; returns the largest distance of an entry."""
    there = columns < d
    total = tl.zeros([SLOTS, BLOCK], tl.float64)
    number = tl.zeros([SLOTS], tl.float64)
    low = tl.full([SLOTS, BLOCK], float("inf"), tl.float32)
    high = tl.full([SLOTS, BLOCK], float("-inf"), tl.float32)
    before = 0
    for start in range(0, n, SLOTS):
        rows, counted, before = dealt(mask, start, before, 1, n, n, MASKED, SLOTS)
        inside = counted[:, None] & there[None, :]
        tile = tl.load(x + rows.to(tl.int64)[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tile.to(tl.float64)
        number += counted.to(tl.float64)
        low = tl.minimum(low, tl.where(inside, tile, float("inf")))
        high = tl.maximum(high, tl.where(inside, tile, float("-inf")))
    if ROBUST:
        exact = median_of_means(total, number, GROUPS, SLOTS, BLOCK)
    else:
        exact = tl.sum(total, 0) / tl.maximum(tl.sum(number, 0), 1.0)
    centre = exact.to(tl.float32)
    tl.store(location + columns, centre, mask=there)
    tl.store(location + d + columns, (exact - centre.to(tl.float64)).to(tl.float32), mask=there)
    spread = tl.maximum(tl.max(high, 0) - centre, centre - tl.min(low, 0))  # -inf without rows
    return tl.max(tl.where(there, spread, 0.0), 0)
