r"""The parts of Gram matrices of sides whose columns are read once: a program holds all rows of its columns.

For up to 64 rows, and for up to `plan.ROWS_AT_ONCE` where features are wide: there a call takes as long as reading
them. Columns are centred in registers, and the result is both operands of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import GROUPS, counts, median_of_means, quotient, scale_of
from .gradient import entry, side_of


@triton.jit
def _middle(
    tile, counted, groups, n, ROBUST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """By column, the mean of tile [BLOCK, STEP], or, ROBUST, the median of the means of its groups; in tile's dtype.

    Rows that are not ``counted`` are zero. ``n`` is the number of the others.
    """
    if not ROBUST:
        return quotient(tl.sum(tile, 0), tl.zeros([STEP], tile.dtype) + tl.maximum(n, 1).to(tile.dtype))
    elif MASKED:
        order = tl.arange(0, GROUPS)
        sums, numbers = tl.zeros([GROUPS, STEP], tile.dtype), tl.zeros([GROUPS], tile.dtype)
        for group in tl.static_range(GROUPS):
            own = counted & (groups == group)
            total = tl.sum(tl.where(own[:, None], tile, 0.0), 0)
            sums = tl.where((order == group)[:, None], total[None, :], sums)
            numbers = tl.where(order == group, tl.sum(own.to(tile.dtype), 0), numbers)
        return median_of_means(sums, numbers, GROUPS, GROUPS, STEP)
    else:
        return median_of_means(tile, counted.to(tile.dtype), GROUPS, BLOCK, STEP)


@triton.jit
def whole_kernel(
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
    HELD: tl.constexpr,  # rows that a program holds: n or more, a power of two
    BLOCK: tl.constexpr,  # rows and columns of a tile of ``partials``
    STEP: tl.constexpr,  # columns of a side that are multiplied at a time
):
    """Grid (splits of all sides): a split's part of the Gram matrix.

    Sums of fp32 columns are fp64; halves are divided by HELD before they are added in fp32, so that bf16's do not
    overflow. Of equal entries both are exact, so constant columns become zero. The scale of a split follows the largest
    entry so far, and the part is scaled with it.
    """
    split = tl.program_id(0)
    side = side_of(split, SPLITS, SIDES)
    x, d, first = entry(sides, side, SIDES), entry(WIDTHS, side, SIDES), entry(SPLITS, side, SIDES)
    location = locations + entry(STARTS, side, SIDES)
    if split == first:
        tl.store(counters + side // 2, 0)  # either side of a pair
    begin = (split - first) * CHUNK
    rows = tl.arange(0, HELD)
    counted = counts(mask, rows, n, MASKED)
    ones = counted.to(tl.int32)
    groups = (tl.cumsum(ones, 0) - ones) % GROUPS
    number = tl.sum(ones, 0)
    dtype = x.dtype.element_ty
    places = rows.to(tl.int64)[:, None] * d

    peak = 0.0
    part = tl.zeros([HELD, HELD], tl.float32)
    for start in range(begin, tl.minimum(begin + CHUNK, d), STEP):
        columns = start + tl.arange(0, STEP)
        there = columns < d
        tile = tl.load(x + places + columns[None, :], mask=counted[:, None] & there[None, :], other=0.0).to(tl.float32)
        if dtype == tl.float32:
            middle = _middle(tile.to(tl.float64), counted, groups, number, UNBIASED, MASKED, HELD, STEP)
            high = middle.to(tl.float32)
            low = (middle - high.to(tl.float64)).to(tl.float32)
            tile = tl.where(counted[:, None], (tile - high[None, :]) - low[None, :], 0.0)
        else:
            high = _middle(tile * (1.0 / HELD), counted, groups, number, UNBIASED, MASKED, HELD, STEP) * HELD
            low = tl.zeros([STEP], tl.float32)
            tile = tl.where(counted[:, None], tile - high[None, :], 0.0)
        tl.store(location + columns, high, mask=there)
        tl.store(location + d + columns, low, mask=there)
        largest = tl.maximum(peak, tl.max(tl.abs(tile)))
        scale = scale_of(largest)
        if scale < scale_of(peak):
            shrunk = scale / scale_of(peak)
            part *= shrunk * shrunk
        peak = largest
        z = (tile * scale).to(dtype)
        part = tl.dot(z, tl.trans(z), part, input_precision=PRECISION)
    tl.store(peaks + split, peak)
    tiles, row_tile, column_tile = tl.cdiv(n, BLOCK), rows[:, None] // BLOCK, rows[None, :] // BLOCK
    place = row_tile * tiles - row_tile * (row_tile + 1) // 2 + column_tile
    inner = place * (BLOCK * BLOCK) + rows[:, None] % BLOCK * BLOCK + rows[None, :] % BLOCK
    size = tiles * (tiles + 1) // 2 * (BLOCK * BLOCK)
    upper = (row_tile <= column_tile) & (column_tile < tiles)
    tl.store(partials + split.to(tl.int64) * size + inner, part, mask=upper)
