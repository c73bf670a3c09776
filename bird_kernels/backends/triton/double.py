r"""Centring of matrices that are in memory, from both sides: K_ij - s_i - s_j with shifts s from the row sums r of K::

    biased    s_i = r_i / n - sum(r) / (2 n^2)                                                  (Gretton et al. 2005)
    unbiased  s_i = r_i / (n-2) - sum(r) / (2 (n-1) (n-2)), of K with diagonal 0, which stays   (Szekely and Rizzo 2014)

Then HSIC(K, L) is <Kc, Lc> over the estimator's norm, and all other moments are zero. The centred matrix is never
stored: whoever reads K takes the shifts off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import counts
from .reduce import WIDTH, arrive, finish, sizes_of

ROW_BLOCK, COLUMN_BLOCK = 8, 256  # of the two matrices, that a program reads at a time where there is no product


@triton.jit
def store_shifts(sums, parts, shifts, count, n, UNBIASED: tl.constexpr):
    """Row sums [parts, n] of other programs -> shifts [n], both fp64; ``count`` rows count, fp64."""
    if UNBIASED:
        count = tl.where(count >= 4.0, count, 4.0)  # the value is NaN then
        share = 1.0 / (count - 2.0)
        rest = 0.5 / ((count - 1.0) * (count - 2.0))
    else:
        share = 1.0 / count
        rest = 0.5 / (count * count)
    total = tl.zeros([WIDTH], tl.float64)
    for start in range(0, n, WIDTH):
        rows = start + tl.arange(0, WIDTH)
        row_sums = tl.zeros([WIDTH], tl.float64)
        for part in range(0, parts):
            row_sums += tl.load(sums + part * n + rows, mask=rows < n, other=0.0, cache_modifier=".cg")
        total += row_sums
        tl.store(shifts + rows, row_sums * share, mask=rows < n)
    correction = tl.sum(total, 0) * rest
    for start in range(0, n, WIDTH):  # each thread reads back what it wrote
        rows = start + tl.arange(0, WIDTH)
        own = tl.load(shifts + rows, mask=rows < n, other=0.0)
        tl.store(shifts + rows, own - correction, mask=rows < n)


@triton.jit
def both_shifts(shifts, rows, n, side, inner_other, inner_own):
    """inner_other * (the other side's shifts) + inner_own * (one's own), of shifts [2, n]; fp32."""
    own = tl.load(shifts + side * n + rows, mask=rows < n, other=0.0).to(tl.float32)
    other = tl.load(shifts + (1 - side) * n + rows, mask=rows < n, other=0.0).to(tl.float32)
    return other * inner_other + own * inner_own


@triton.jit
def moments_kernel(
    matrices,  # fp32 [pairs, 2, n, n]: K and L of each pair
    shifts,  # fp64 [pairs, 2, n]
    mask,  # bytes [n]: the rows that count
    rooms,  # fp64 [pairs, 2]: a self-product that is rounding of it is zero
    slots,  # fp64 [pairs, 3, programs]: for the programs of a pair to meet in
    counters,  # int32 [pairs], zero
    values,  # out, fp32 [pairs]
    coefficients,  # fp64 [pairs, NUMBERS]: scales and number of rows are there, the others are written
    n,
    NUMBERS: tl.constexpr, MASKED: tl.constexpr, STATISTIC: tl.constexpr,
    UNBIASED: tl.constexpr,  # the diagonal does not count
    HEIGHT: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of HEIGHT rows, pairs): <Kc,Lc>, <Kc,Kc>, <Lc,Lc>, twice what is above the diagonal, and the end."""
    block, blocks, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    k = matrices + 2 * pair.to(tl.int64) * n * n
    l = k + n.to(tl.int64) * n
    shifts += 2 * pair * n
    rows = block * HEIGHT + tl.arange(0, HEIGHT)
    counted_rows = counts(mask, rows, n, MASKED)
    k_rows = tl.load(shifts + rows, mask=rows < n, other=0.0).to(tl.float32)
    l_rows = tl.load(shifts + n + rows, mask=rows < n, other=0.0).to(tl.float32)
    kl = tl.zeros([HEIGHT], tl.float64)
    kk = tl.zeros([HEIGHT], tl.float64)
    ll = tl.zeros([HEIGHT], tl.float64)
    for start in range(block * HEIGHT // LENGTH * LENGTH, n, LENGTH):
        columns = start + tl.arange(0, LENGTH)
        above = rows[:, None] < columns[None, :] if UNBIASED else rows[:, None] <= columns[None, :]
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        counted = counted_rows[:, None] & counts(mask, columns, n, MASKED)[None, :] & above
        offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
        k_columns = tl.load(shifts + columns, mask=columns < n, other=0.0).to(tl.float32)
        l_columns = tl.load(shifts + n + columns, mask=columns < n, other=0.0).to(tl.float32)
        k_tile = tl.load(k + offsets, mask=inside, other=0.0) - k_rows[:, None] - k_columns[None, :]
        l_tile = tl.load(l + offsets, mask=inside, other=0.0) - l_rows[:, None] - l_columns[None, :]
        once = tl.where(rows[:, None] == columns[None, :], 0.5, 1.0)
        k_tile, l_tile = tl.where(counted, k_tile, 0.0), tl.where(counted, l_tile, 0.0)
        kl += tl.sum(k_tile * l_tile * once, 1).to(tl.float64)
        kk += tl.sum(k_tile * k_tile * once, 1).to(tl.float64)
        ll += tl.sum(l_tile * l_tile * once, 1).to(tl.float64)
    slots += 3 * pair * blocks
    tl.store(slots + 0 * blocks + block, 2.0 * tl.sum(kl, 0))
    tl.store(slots + 1 * blocks + block, 2.0 * tl.sum(kk, 0))
    tl.store(slots + 2 * blocks + block, 2.0 * tl.sum(ll, 0))
    if arrive(counters + pair, blocks):
        coefficients += pair * NUMBERS
        scale_x, scale_y, count = sizes_of(coefficients)
        finish(
            slots=slots,
            programs=blocks,
            room_k=tl.load(rooms + 2 * pair),
            room_l=tl.load(rooms + 2 * pair + 1),
            sum_k=0.0,
            sum_l=0.0,
            scale_x=scale_x,
            scale_y=scale_y,
            n=count,
            value=values + pair,
            coefficients=coefficients,
            STATISTIC=STATISTIC,
            UNBIASED=UNBIASED,
        )
