r"""Double centring of Gram matrices in memory: K_ij - s_i - s_j with shifts s from the row sums r of K::

    biased    s_i = r_i / n - sum(r) / (2 n^2)                                                  (Gretton et al. 2005)
    unbiased  s_i = r_i / (n-2) - sum(r) / (2 (n-1) (n-2)), of K with diagonal 0, which stays   (Szekely and Rizzo 2014)

Then HSIC(K, L) is <Kc, Lc> over the estimator's norm, and all other moments are zero. The centred matrix is not
stored: each kernel that reads K subtracts the shifts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import counts
from .reduce import COEFFICIENTS, ROOM_K, ROOM_L, ROWS, SUM_K, SUM_L, arrive, finish, sizes_of, sum_slots

HEIGHT, LENGTH = 8, 256  # of the tile that a program without matrix products reads at a time


@triton.jit
def store_totals(coefficients, slots, programs, UNBIASED: tl.constexpr):
    """Stores totals and rooms from slots [2, 3, programs]: sums of K, of its diagonal, of the diagonal's squares."""
    for side in tl.static_range(2):
        own = slots + 3 * side * programs
        tl.store(coefficients + SUM_K + side, sum_slots(own, 0, programs))
        room = sum_slots(own, 1, programs)
        room *= room
        if UNBIASED:
            room -= sum_slots(own, 2, programs)
        # The error of two rows' product is eps times the product of their norms; this is its square over all pairs.
        tl.store(coefficients + ROOM_K + side, room)


@triton.jit
def _centring_of(coefficients, UNBIASED: tl.constexpr):
    """The share and the corrections of K and L, fp64, for shifts from row sums: s = share * r - correction."""
    n = tl.load(coefficients + ROWS)
    share, half = 1.0 / n, 0.5 / (n * n)
    if UNBIASED:
        share, half = 1.0 / (n - 2.0), 0.5 / ((n - 1.0) * (n - 2.0))
    return share, half * tl.load(coefficients + SUM_K), half * tl.load(coefficients + SUM_L)


@triton.jit
def _shifts_of(rows, index, n, share, correction, PARTS: tl.constexpr):
    """The shifts of these rows of a matrix, whose row sums are in ``rows`` [PARTS, n]; fp64."""
    sums = tl.zeros(index.shape, tl.float64)
    for part in tl.static_range(PARTS):
        sums += tl.load(rows + part * n + index, mask=index < n, other=0.0)
    return sums * share - correction


@triton.jit
def mixed_shifts(shifts, index, side, a, b, n):
    """The shifts of these rows of a L + b K (``side`` 1: a K + b L), added in fp64 since they may cancel; fp32."""
    other = tl.load(shifts + (1 - side) * n + index, mask=index < n, other=0.0)
    own = tl.load(shifts + side * n + index, mask=index < n, other=0.0)
    return (other * a + own * b).to(tl.float32)


@triton.jit
def moments_kernel(
    grams,  # fp32 [pairs, 2, n, n]: K and L of each pair
    rows,  # fp64 [pairs, 2, PARTS, n]: their row sums, in parts
    shifts,  # out, fp64 [pairs, 2, n]: for the backward
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    slots,  # fp64 [pairs, 3, programs]: partial sums of the programs of a pair
    counters,  # int32 [pairs], zero
    values,  # out, fp32 [pairs]
    coefficients,  # fp64 [pairs, COEFFICIENTS]: sizes, totals and rooms are read, the others are written
    n,  # rows and columns of K and L
    PARTS: tl.constexpr,  # the number of parts in ``rows``
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    STATISTIC: tl.constexpr,  # "cka_loss", "sqrt_cka_loss", "cka" or "hsic"
    UNBIASED: tl.constexpr,  # the diagonal is left out
    HEIGHT: tl.constexpr,  # rows per program
    LENGTH: tl.constexpr,  # columns that are read at a time
):
    """Grid (blocks of HEIGHT rows, pairs): <Kc,Lc>, <Kc,Kc>, <Lc,Lc> from upper triangles, value and coefficients.

    Squares are fp64: the squared products of dominating rows leave fp32's range.
    """
    block, blocks, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    k = grams + 2 * pair.to(tl.int64) * n * n
    l = k + tl.cast(n, tl.int64) * n
    rows_k = rows + 2 * pair * PARTS * n
    rows_l = rows_k + PARTS * n
    coefficients += pair * COEFFICIENTS
    share, of_k, of_l = _centring_of(coefficients, UNBIASED)
    i = block * HEIGHT + tl.arange(0, HEIGHT)
    counted_i = counts(mask, i, n, MASKED)
    k_i = _shifts_of(rows_k, i, n, share, of_k, PARTS)
    l_i = _shifts_of(rows_l, i, n, share, of_l, PARTS)
    tl.store(shifts + 2 * pair * n + i, k_i, mask=i < n)
    tl.store(shifts + (2 * pair + 1) * n + i, l_i, mask=i < n)
    k_i, l_i = k_i.to(tl.float32)[:, None], l_i.to(tl.float32)[:, None]
    kl = tl.zeros([HEIGHT], tl.float64)
    kk = tl.zeros([HEIGHT], tl.float64)
    ll = tl.zeros([HEIGHT], tl.float64)
    for start in range(block * HEIGHT // LENGTH * LENGTH, n, LENGTH):
        j = start + tl.arange(0, LENGTH)
        above = i[:, None] < j[None, :] if UNBIASED else i[:, None] <= j[None, :]
        counted = counted_i[:, None] & counts(mask, j, n, MASKED)[None, :] & above
        offsets = i.to(tl.int64)[:, None] * n + j[None, :]
        k_tile = tl.load(k + offsets, mask=counted, other=0.0) - k_i
        l_tile = tl.load(l + offsets, mask=counted, other=0.0) - l_i
        k_tile -= _shifts_of(rows_k, j, n, share, of_k, PARTS).to(tl.float32)[None, :]
        l_tile -= _shifts_of(rows_l, j, n, share, of_l, PARTS).to(tl.float32)[None, :]
        once = tl.where(i[:, None] == j[None, :], 0.5, 1.0)
        k_tile = tl.where(counted, k_tile, 0.0).to(tl.float64)
        l_tile = tl.where(counted, l_tile, 0.0).to(tl.float64)
        kl += tl.sum(k_tile * l_tile * once, 1)
        kk += tl.sum(k_tile * k_tile * once, 1)
        ll += tl.sum(l_tile * l_tile * once, 1)
    slots += 3 * pair * blocks
    tl.store(slots + 0 * blocks + block, 2.0 * tl.sum(kl, 0))
    tl.store(slots + 1 * blocks + block, 2.0 * tl.sum(kk, 0))
    tl.store(slots + 2 * blocks + block, 2.0 * tl.sum(ll, 0))
    if arrive(counters + pair, blocks):
        rooms = tl.load(coefficients + ROOM_K), tl.load(coefficients + ROOM_L)
        finish(slots, blocks, coefficients, values + pair, sizes_of(coefficients), rooms, STATISTIC, UNBIASED)
