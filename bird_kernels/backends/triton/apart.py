r"""Kernels of the unbiased estimator's cross route: a few rows that may dominate are taken out of z, and enter by
their own products with all rows (`backends.dominating`).

Rows are x_i and y_i minus the means of the rows that are left in z. Of these, kappa_i and lambda_i are the squared
norms, zero for the rows S that were taken out; e_K = X X_S^T [n, few], zero where a row meets itself; and
r_K = sum(e_K) - kappa are the row sums of K without its diagonal::

    <K', L'> = |C|^2 + sum(2 e_K e_L) - sum(kappa lambda) - 2/(n-2) <r_K, r_L> + sum(r_K) sum(r_L) / ((n-1)(n-2))

with C of the rows in z, and 2 replaced by 1 in the rows S, since e_K holds their products among themselves twice. The
gradient's formula is in `backends.library`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...moments import ROUNDING
from .centre import counts
from .reduce import (
    D_KK,
    D_KL,
    NOISE,
    ROOM_K,
    ROOM_L,
    ROWS,
    SCALE_X,
    SUM_K,
    SUM_L,
    store_results,
    store_sizes,
    sum_slots,
)
from .shift import column_sums, padded_width, zero_for_infinite

EPS = tl.constexpr(ROUNDING * 2.0**-23)


@triton.jit
def take_kernel(
    x,  # [n, p]
    y,  # [n, q]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    strides,  # of x, then of y
    few,  # int64 [FEW]: the rows to take out
    shifts,  # fp32 [qa + pa]
    scales,  # fp32 [2]
    sums,  # fp64 [shares, qa + pa + 8]
    z,  # in and out, [.., qa + pa + 8]: zero in the rows that are taken out
    beside,  # out, fp32 [FEW + 1, qa + pa]: these rows minus the means of the others, and the means
    totals,  # out, fp64 [qa + pa + 8]: the sums of the others, their number (at least 1), and that of all that count
    n,  # rows of x and y
    p,  # columns of x
    q,  # columns of y
    shares,  # the number of shares in ``sums``
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    FEW: tl.constexpr,  # how many rows are taken out
    TAKEN: tl.constexpr,  # FEW or more, a power of two
    BLOCK: tl.constexpr,  # columns per program
):
    """Grid (blocks of columns of y, then of x)."""
    block = tl.program_id(0)
    pa, qa = padded_width(p), padded_width(q)
    both, blocks_y = qa + pa, tl.cdiv(qa, BLOCK)
    of_y = block < blocks_y
    x, d, start = tl.where(of_y, y, x), tl.where(of_y, q, p), tl.where(of_y, 0, qa)
    width, scale = tl.where(of_y, qa, pa), tl.load(scales + tl.where(of_y, 1, 0))
    row, column = tl.where(of_y, strides[2], strides[0]), tl.where(of_y, strides[3], strides[1])
    own = tl.where(of_y, block, block - blocks_y) * BLOCK + tl.arange(0, BLOCK)
    columns = start + own
    taken = tl.arange(0, TAKEN)
    rows = tl.load(few + taken, mask=taken < FEW, other=n)
    counted = counts(mask, rows, n, MASKED)
    there = (taken < FEW)[:, None] & (own < width)[None, :]
    places = z + rows[:, None] * (both + 8) + columns[None, :]
    near = zero_for_infinite(tl.load(places, mask=there, other=0.0).to(tl.float64))
    count = tl.sum(column_sums(sums, both + tl.arange(0, 1), both + 8, shares), 0)
    left = count - tl.sum(counted.to(tl.float64), 0)
    total = column_sums(sums, columns, both + 8, shares) - tl.sum(near, 0)
    mean = total / tl.maximum(left, 1.0)
    inside = counted[:, None] & (own < d)[None, :]
    heavy = tl.load(x + rows[:, None] * row + own.to(tl.int64)[None, :] * column, mask=inside, other=0.0)
    shift = tl.load(shifts + columns, mask=own < d, other=0.0)
    heavy = ((heavy.to(tl.float32) - shift[None, :]) * scale).to(tl.float64) - mean[None, :]
    tl.store(beside + taken[:, None] * both + columns[None, :], tl.where(inside, heavy, 0.0).to(tl.float32), mask=there)
    tl.store(beside + FEW * both + columns, mean.to(tl.float32), mask=own < width)
    tl.store(totals + columns, total, mask=own < width)
    tl.store(places, tl.zeros([TAKEN, BLOCK], z.dtype.element_ty), mask=there)
    if block == 0:
        eight = tl.arange(0, 8)
        tl.store(totals + both + eight, tl.where(eight == 0, tl.maximum(left, 1.0), count))


@triton.jit
def _whole(z, beside, i, at, counted, columns, width, both, FEW: tl.constexpr):
    """Rows i of a side, centred, with the rows that were taken out put back; fp32, 0 in rows not ``counted``.

    ``z`` and ``beside`` point to the side's columns; ``at`` is 1 + the place of a row that was taken out, else 0.
    """
    there = (columns < width)[None, :]
    ordinary = (counted & (at == 0))[:, None] & there
    tile = tl.load(z + i.to(tl.int64)[:, None] * (both + 8) + columns[None, :], mask=ordinary, other=0.0)
    mean = tl.load(beside + FEW * both + columns, mask=columns < width, other=0.0)
    heavy = tl.load(beside + (at - 1)[:, None] * both + columns[None, :], mask=(at > 0)[:, None] & there, other=0.0)
    return tl.where(ordinary, tile.to(tl.float32) - mean[None, :], heavy)


@triton.jit
def taken_rows(beside, columns, width, both, FEW: tl.constexpr, TAKEN: tl.constexpr):
    """Columns of the rows that were taken out: [TAKEN, columns]."""
    taken = tl.arange(0, TAKEN)
    inside = (taken < FEW)[:, None] & (columns < width)[None, :]
    return tl.load(beside + taken[:, None] * both + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _products(
    z, beside, e, i, at, counted, width, both, n,
    FEW: tl.constexpr, TAKEN: tl.constexpr, PRECISION: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores rows i of e [n, FEW] and returns them, fp64 [HEIGHT, TAKEN], and their squared norms, 0 in the rows S."""
    taken = tl.arange(0, TAKEN)
    products = tl.zeros([HEIGHT, TAKEN], tl.float32)
    norms = tl.zeros([HEIGHT], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tile = _whole(z, beside, i, at, counted, columns, width, both, FEW)
        heavy = taken_rows(beside, columns, width, both, FEW, TAKEN)
        products = tl.dot(tile, tl.trans(heavy), products, input_precision=PRECISION)
        norms += tl.sum(tile * tile, 1)
    products = tl.where((at - 1)[:, None] == taken[None, :], 0.0, products)
    inside = (i < n)[:, None] & (taken < FEW)[None, :]
    tl.store(e + i.to(tl.int64)[:, None] * FEW + taken[None, :], products, mask=inside)
    return products.to(tl.float64), tl.where(at > 0, 0.0, norms).to(tl.float64)


@triton.jit
def _noise_among(
    beside, slots, width, both,
    FEW: tl.constexpr, TAKEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the sum over pairs of the rows S of (sum_k |x_ik x_jk|)^2, and the sum of their squared norms."""
    taken = tl.arange(0, TAKEN)
    among = tl.zeros([TAKEN, TAKEN], tl.float32)
    norms = tl.zeros([TAKEN], tl.float64)
    for start in range(0, width, BLOCK):
        heavy = tl.abs(taken_rows(beside, start + tl.arange(0, BLOCK), width, both, FEW, TAKEN))
        among = tl.dot(heavy, tl.trans(heavy), among, input_precision=PRECISION)
        norms += tl.sum(heavy.to(tl.float64) * heavy, 1)
    pairs = tl.where(taken[:, None] == taken[None, :], 0.0, among).to(tl.float64)
    tl.store(slots, tl.sum(tl.sum(pairs * pairs, 1), 0))
    tl.store(slots + 1, tl.sum(norms, 0))


@triton.jit
def rows_kernel(
    z,  # [.., qa + pa + 8]
    beside,  # fp32 [FEW + 1, qa + pa]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    few,  # int64 [FEW]: the rows S
    totals,  # fp64 [qa + pa + 8]
    rows,  # out, fp32 [5, n]: kappa, lambda, r_K, r_L, and 1 + the place of a row that was taken out, else 0
    e,  # out, fp32 [2, n, FEW]: e_K and e_L
    row_slots,  # out, fp64 [9 blocks + 4]: for `store_results_apart`
    n,  # rows of x and y
    p,  # columns of x
    q,  # columns of y
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    FEW: tl.constexpr,  # how many rows were taken out
    TAKEN: tl.constexpr,  # FEW or more, a power of two: the height of their tiles
    PRECISION: tl.constexpr,  # of the products: "ieee" or "tf32x3"
    HEIGHT: tl.constexpr,  # rows per program
    BLOCK: tl.constexpr,  # columns that are read at a time
):
    """Grid (blocks of HEIGHT rows, and two more programs for the noise of x and of y): products with the rows S."""
    block, blocks = tl.program_id(0), tl.num_programs(0) - 2
    pa, qa = padded_width(p), padded_width(q)
    both = qa + pa
    if block < blocks:
        i, taken = block * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, TAKEN)
        known = tl.load(few + taken, mask=taken < FEW, other=-1)
        at = tl.sum(tl.where(i[:, None] == known[None, :], taken[None, :] + 1, 0), 1)
        counted = counts(mask, i, n, MASKED)
        e_k, kappa = _products(
            z + qa, beside + qa, e, i, at, counted, pa, both, n, FEW, TAKEN, PRECISION, HEIGHT, BLOCK
        )  # fmt: skip
        e_l, lam = _products(
            z, beside, e + tl.cast(n, tl.int64) * FEW, i, at, counted, qa, both, n, FEW, TAKEN, PRECISION, HEIGHT, BLOCK
        )  # fmt: skip
        r_k, r_l = tl.sum(e_k, 1) - kappa, tl.sum(e_l, 1) - lam
        tl.store(rows + i, kappa.to(tl.float32), mask=i < n)
        tl.store(rows + n + i, lam.to(tl.float32), mask=i < n)
        tl.store(rows + 2 * n + i, r_k.to(tl.float32), mask=i < n)
        tl.store(rows + 3 * n + i, r_l.to(tl.float32), mask=i < n)
        tl.store(rows + 4 * n + i, at.to(tl.float32), mask=i < n)
        share = 2.0 / (tl.maximum(tl.load(totals + both + 1), 4.0) - 2.0)
        twice = tl.where(at > 0, 1.0, 2.0)
        row_slots += block
        tl.store(row_slots, tl.sum(twice * tl.sum(e_k * e_l, 1) - kappa * lam - share * r_k * r_l, 0))
        tl.store(row_slots + blocks, tl.sum(twice * tl.sum(e_k * e_k, 1) - kappa * kappa - share * r_k * r_k, 0))
        tl.store(row_slots + 2 * blocks, tl.sum(twice * tl.sum(e_l * e_l, 1) - lam * lam - share * r_l * r_l, 0))
        tl.store(row_slots + 3 * blocks, tl.sum(r_k, 0))
        tl.store(row_slots + 4 * blocks, tl.sum(r_l, 0))
        tl.store(row_slots + 5 * blocks, tl.sum(kappa, 0))
        tl.store(row_slots + 6 * blocks, tl.sum(lam, 0))
        tl.store(row_slots + 7 * blocks, tl.sum(kappa * kappa, 0))
        tl.store(row_slots + 8 * blocks, tl.sum(lam * lam, 0))
    else:
        side = block - blocks
        beside += tl.where(side == 0, qa, 0)
        width = tl.where(side == 0, pa, qa)
        _noise_among(beside, row_slots + 9 * blocks + 2 * side, width, both, FEW, TAKEN, PRECISION, BLOCK)


@triton.jit
def _bound(whole, among, heavy, norms, squares):
    """What rounding may leave of a self-HSIC, fp64: see `dominating.noise`; the products' part is a difference."""
    return (among + norms * (norms + 2.0 * heavy) - squares) * NOISE + (whole + squares) * EPS


@triton.jit
def store_results_apart(
    slots,  # fp64 [5, programs]: of `cross_finish_kernel`: the rows in z
    programs,
    row_slots,  # fp64 [9 blocks + 4], of `rows_kernel`
    blocks,
    coefficients,  # out, fp64 [COEFFICIENTS]
    value,  # out, fp32, 0-d
    scale_x,
    scale_y,
    count,  # of all rows that count
    STATISTIC: tl.constexpr,
):
    """Adds the moments of both parts, and stores the value and all coefficients.

    SUM_K and SUM_L are the totals of r_K and r_L; ROOM_K and ROOM_L are |A|^2 and |B|^2, zero if they are rounding.
    """
    kl, kk, ll = sum_slots(slots, 0, programs), sum_slots(slots, 1, programs), sum_slots(slots, 2, programs)
    trace_x, trace_y = sum_slots(slots, 3, programs), sum_slots(slots, 4, programs)
    kk = tl.where(kk <= trace_x * trace_x * NOISE, 0.0, kk)
    ll = tl.where(ll <= trace_y * trace_y * NOISE, 0.0, ll)
    kl = tl.where((kk == 0.0) | (ll == 0.0), 0.0, kl)
    tl.store(coefficients + ROOM_K, kk)
    tl.store(coefficients + ROOM_L, ll)
    n = tl.maximum(count, 4.0)
    t_k, t_l = sum_slots(row_slots, 3, blocks), sum_slots(row_slots, 4, blocks)
    pairs = 1.0 / ((n - 1.0) * (n - 2.0))
    last = row_slots + 9 * blocks
    norms, squares = sum_slots(row_slots, 5, blocks), sum_slots(row_slots, 7, blocks)
    bound_k = _bound(kk, tl.load(last), tl.load(last + 1), norms, squares)
    norms, squares = sum_slots(row_slots, 6, blocks), sum_slots(row_slots, 8, blocks)
    bound_l = _bound(ll, tl.load(last + 2), tl.load(last + 3), norms, squares)
    kl += sum_slots(row_slots, 0, blocks) + t_k * t_l * pairs
    kk += sum_slots(row_slots, 1, blocks) + t_k * t_k * pairs
    ll += sum_slots(row_slots, 2, blocks) + t_l * t_l * pairs
    kk, ll = tl.where(kk <= bound_k, 0.0, kk), tl.where(ll <= bound_l, 0.0, ll)
    store_sizes(coefficients, (scale_x, scale_y, n))
    tl.store(coefficients + SUM_K, t_k)
    tl.store(coefficients + SUM_L, t_l)
    store_results(kl, kk, ll, coefficients, value, (scale_x, scale_y, count), STATISTIC, True)


@triton.jit
def weights_apart(coefficients, SIDE: tl.constexpr, grad):
    """d, a and b of d (a L' + b K'), twice ``grad`` times the value's derivative with respect to K (SIDE 1: to L).

    The norms of a C and b A are at most 16, so that their entries can be rounded to a dtype of small range; d, fp64,
    includes the features' scale; a and b are fp32.
    """
    cross, own = tl.load(coefficients + D_KL), tl.load(coefficients + D_KK + SIDE)
    kk, ll = tl.load(coefficients + ROOM_K), tl.load(coefficients + ROOM_L)
    size = tl.abs(cross) * tl.sqrt(tl.sqrt(kk * ll)) + 2.0 * tl.abs(own) * tl.sqrt(ll if SIDE else kk)
    size = tl.where(size == 0.0, tl.abs(cross) + tl.abs(own), size)  # all rows were taken out, or the rest is alike
    dead = size == 0.0
    unit = 16.0 / tl.where(dead, 1.0, size)
    outer = 2.0 / unit * tl.load(coefficients + SCALE_X + SIDE) * tl.load(grad).to(tl.float64)
    return tl.where(dead, 0.0, outer), (cross * unit).to(tl.float32), (2.0 * own * unit).to(tl.float32)


@triton.jit
def _row_weights(rows, i, inside, n, a, b, SIDE: tl.constexpr):
    """rho, and the diagonal of a L + b K in the rows in z."""
    diagonal = a * tl.load(rows + (1 - SIDE) * n + i, mask=inside, other=0.0)
    diagonal += b * tl.load(rows + SIDE * n + i, mask=inside, other=0.0)
    rho = a * tl.load(rows + (3 - SIDE) * n + i, mask=inside, other=0.0)
    return rho + b * tl.load(rows + (2 + SIDE) * n + i, mask=inside, other=0.0), diagonal


@triton.jit
def pull_kernel(
    own,  # the side's columns of z, [.., width], rows qa + pa + 8 apart
    beside,  # fp32 [FEW + 1, qa + pa]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    rows,  # fp32 [5, n]
    coefficients,  # fp64 [COEFFICIENTS]
    grad,  # 0-d
    pulls,  # out, fp32 [grid 1, width]: sum(rho x) of each share of the rows
    n,  # rows of x and y
    p,  # columns of x
    q,  # columns of y
    share,  # rows per program
    SIDE: tl.constexpr,  # 0: of x, for dX; 1: of y, for dY
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    FEW: tl.constexpr,  # how many rows were taken out
    BLOCK: tl.constexpr,  # columns per program, and rows at a time
):
    """Grid (blocks of a side's columns, shares of the rows)."""
    pa, qa = padded_width(p), padded_width(q)
    both, width = qa + pa, qa if SIDE else pa
    beside += 0 if SIDE else qa
    _outer, a, b = weights_apart(coefficients, SIDE, grad)
    columns, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    pull = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(part * share, tl.minimum(part * share + share, n), BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tl.load(rows + 4 * n + i, mask=i < n, other=0.0).to(tl.int32)
        rho, _diagonal = _row_weights(rows, i, i < n, n, a, b, SIDE)
        counted = counts(mask, i, n, MASKED)
        pull += rho[:, None] * _whole(own, beside, i, at, counted, columns, width, both, FEW)
    tl.store(pulls + part * width + columns, tl.sum(pull, 0), mask=columns < width)


@triton.jit
def add_kernel(
    own,  # the side's columns of z, [.., width], rows qa + pa + 8 apart
    beside,  # fp32 [FEW + 1, qa + pa]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    rows,  # fp32 [5, n]
    e,  # fp32 [2, n, FEW]
    coefficients,  # fp64 [COEFFICIENTS]
    grad,  # 0-d
    product,  # [.., width]: z w
    taken_product,  # fp32 [FEW, width]: the same of the rows that were taken out
    pull,  # fp32 [width]: sum(rho x) / (n - 2)
    out,  # out, [n, d]: the gradient
    n,  # rows of x and y
    p,  # columns of x
    q,  # columns of y
    SIDE: tl.constexpr,  # 0: of x, for dX; 1: of y, for dY
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    FEW: tl.constexpr,  # how many rows were taken out
    TAKEN: tl.constexpr,  # FEW or more, a power of two: the height of their tiles
    PRECISION: tl.constexpr,  # of the products: "ieee" or "tf32x3"
    HEIGHT: tl.constexpr,  # rows per program
    BLOCK: tl.constexpr,  # columns that are processed at a time
):
    """Grid (blocks of HEIGHT rows): adds the terms of the rows to the product, and scales the sum."""
    pa, qa = padded_width(p), padded_width(q)
    both, width, d = qa + pa, qa if SIDE else pa, q if SIDE else p
    beside += 0 if SIDE else qa
    outer, a, b = weights_apart(coefficients, SIDE, grad)
    i, taken = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, TAKEN)
    at = tl.load(rows + 4 * n + i, mask=i < n, other=0.0).to(tl.int32)
    counted = counts(mask, i, n, MASKED)
    rho, diagonal = _row_weights(rows, i, i < n, n, a, b, SIDE)
    few = n.to(tl.int64) * FEW
    places = i.to(tl.int64)[:, None] * FEW + taken[None, :]
    inside = (i < n)[:, None] & (taken < FEW)[None, :]
    weights = a * tl.load(e + (1 - SIDE) * few + places, mask=inside, other=0.0)
    weights += b * tl.load(e + SIDE * few + places, mask=inside, other=0.0)
    count = tl.load(coefficients + ROWS)
    total = a * tl.load(coefficients + SUM_K + 1 - SIDE) + b * tl.load(coefficients + SUM_K + SIDE)
    share = rho / (count - 2.0).to(tl.float32)
    u = share - (total / ((count - 1.0) * (count - 2.0))).to(tl.float32)
    from_product, from_taken = (counted & (at == 0))[:, None], (at > 0)[:, None]
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        there = (columns < width)[None, :]
        offsets = i.to(tl.int64)[:, None] * width + columns[None, :]
        tile = tl.load(product + offsets, mask=from_product & there, other=0.0).to(tl.float32)
        offsets = (at - 1)[:, None] * width + columns[None, :]
        tile += tl.load(taken_product + offsets, mask=from_taken & there, other=0.0)
        tile += (u + share - diagonal)[:, None] * _whole(own, beside, i, at, counted, columns, width, both, FEW)
        heavy = taken_rows(beside, columns, width, both, FEW, TAKEN)
        tile = tl.dot(weights, heavy, tile, input_precision=PRECISION)
        tile -= u[:, None] * tl.sum(heavy, 0)[None, :]
        tile -= tl.load(pull + columns, mask=columns < width, other=0.0)[None, :]
        tile = tl.where(counted[:, None], (tile * outer).to(tl.float32), 0.0)
        offsets, there = i.to(tl.int64)[:, None] * d + columns[None, :], (i < n)[:, None] & (columns < d)[None, :]
        tl.store(out + offsets, tile.to(out.dtype.element_ty), mask=there)
