r"""The Gram route: K = X X^T and L = Y Y^T by upper tiles, their moments, and dX = (a L + b K) X in one launch.

A program owns one tile of both K and L, so <K,L> never leaves its registers. Where tiles are few the features are split
over programs; their partial tiles meet in a second kernel, in a fixed order. Up to `plan.SMALL` rows these programs
centre their features themselves, and the whole forward is two launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import centred_block, count_rows, power_of_two, scale_of, share_stats
from .reduce import WIDTH, finish, store_norm_sums, upper_tile

UNROLL = tl.constexpr(8)  # parts of a tile that are under way at once


@triton.jit
def gram_tile(
    x, mean, scale, mask, row_tile, column_tile, begin, end, n, d, stride_n, stride_d,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Centred x[row_tile] @ x[column_tile].T over the features begin..end, fp32 [BLOCK, BLOCK]."""
    row, column = row_tile * BLOCK, column_tile * BLOCK
    dtype = x.dtype if DESCRIBED else x.dtype.element_ty
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(begin, end, STEP):
        left = centred_block(x, mean, scale, mask, row, start, n, d, stride_n, stride_d, MASKED, DESCRIBED, BLOCK, STEP)
        right = centred_block(
            x, mean, scale, mask, column, start, n, d, stride_n, stride_d, MASKED, DESCRIBED, BLOCK, STEP
        )
        tile = tl.dot(left.to(dtype), tl.trans(right.to(dtype)), tile, input_precision=PRECISION)
    return tile


@triton.jit
def store_symmetric(matrix, tile, rows, columns, n, row_tile, column_tile):
    """A tile of a symmetric [n, n] matrix and its mirror image; a tile on the diagonal is its own."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    r, c = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    tl.store(matrix + r * n + c, tile, mask=inside)
    if row_tile != column_tile:
        tl.store(matrix + c * n + r, tile, mask=inside)


@triton.jit
def weighted_sum(a, b, weight):
    """weight * sum(a * b): fp32 inside a tile (the sides are scaled, nothing overflows), fp64 from there on."""
    return tl.sum(tl.sum(a * b, 1), 0).to(tl.float64) * weight


@triton.jit
def _gram_epilogue(
    k_tile, l_tile, row_tile, column_tile, rows, columns, k, l, norms, slots, program, programs, n,
    UNBIASED: tl.constexpr,
):  # fmt: skip
    """Stores a tile of K and L, both halves, and its share of the moments into slots [3 or, unbiased, 8, programs]."""
    if UNBIASED:
        diagonal = rows[:, None] == columns[None, :]
        kappa = tl.sum(tl.where(diagonal, k_tile, 0.0), 1)
        lam = tl.sum(tl.where(diagonal, l_tile, 0.0), 1)
        k_tile = tl.where(diagonal, 0.0, k_tile)
        l_tile = tl.where(diagonal, 0.0, l_tile)
        if row_tile == column_tile:
            tl.store(norms + rows, kappa, mask=rows < n)
            tl.store(norms + n + rows, lam, mask=rows < n)
        store_norm_sums(slots + 3 * programs, program, programs, kappa, lam)
    store_symmetric(k, k_tile, rows, columns, n, row_tile, column_tile)
    store_symmetric(l, l_tile, rows, columns, n, row_tile, column_tile)
    weight = tl.where(row_tile == column_tile, 1.0, 2.0).to(tl.float64)
    tl.store(slots + 0 * programs + program, weighted_sum(k_tile, l_tile, weight))
    tl.store(slots + 1 * programs + program, weighted_sum(k_tile, k_tile, weight))
    tl.store(slots + 2 * programs + program, weighted_sum(l_tile, l_tile, weight))


@triton.jit
def gram_moments_kernel(
    x, y, mask, mean_x, mean_y, peaks, count, k, l, norms, slots, counter, value, coefficients,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, tiles, n_peaks_x, n_peaks_y,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles): a tile of K and of L, whole. If DESCRIBED, x and y are descriptors of [BLOCK, STEP]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_tile, column_tile = upper_tile(program, tiles)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    scale_x = power_of_two(peaks, n_peaks_x, WIDTH)
    scale_y = power_of_two(peaks + n_peaks_x, n_peaks_y, WIDTH)
    k_tile = gram_tile(
        x, mean_x, scale_x, mask, row_tile, column_tile, 0, p, n, p, stride_xn, stride_xp,
        MASKED, DESCRIBED, PRECISION, BLOCK, STEP,
    )  # fmt: skip
    l_tile = gram_tile(
        y, mean_y, scale_y, mask, row_tile, column_tile, 0, q, n, q, stride_yn, stride_yq,
        MASKED, DESCRIBED, PRECISION, BLOCK, STEP,
    )  # fmt: skip
    _gram_epilogue(
        k_tile, l_tile, row_tile, column_tile, rows, columns, k, l, norms, slots, program, programs, n, UNBIASED
    )
    finish(
        counter, programs, slots, slots + 3 * programs, programs, scale_x, scale_y, count, n, value,
        coefficients, MASKED, STATISTIC, UNBIASED, False,
    )  # fmt: skip


@triton.jit
def _partial_tile(
    x, mask, mean, peaks, n_peaks, kept, split, chunk, row_tile, column_tile, n, d, stride_n, stride_d,
    MASKED: tl.constexpr, CENTRES: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The ``split``-th ``chunk`` of features' part of a tile; if it CENTRES, in the scale of ``peaks[split]``."""
    begin = split * chunk
    end = tl.minimum(begin + chunk, d)
    if CENTRES:
        # Every tile's program finds, and stores, the same means and the same peak.
        peak = share_stats(x, mask, mean, kept, begin, end, n, d, stride_n, stride_d, MASKED, BLOCK, STEP)
        tl.store(peaks + split, peak)
        scale = scale_of(peak)
    else:
        scale = power_of_two(peaks, n_peaks, WIDTH)
    return gram_tile(
        x, mean, scale, mask, row_tile, column_tile, begin, end, n, d, stride_n, stride_d,
        MASKED, False, PRECISION, BLOCK, STEP,
    )  # fmt: skip


@triton.jit
def gram_partials_kernel(
    x, y, mask, mean_x, mean_y, peaks, count, partials, counter,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, tiles, splits_x, chunk, n_peaks_x, n_peaks_y,
    MASKED: tl.constexpr, CENTRES: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, splits of x, then of y): a part of a tile of K or of L into partials [splits, tiles, tile].

    If it CENTRES, no kernel ran before: it also counts the rows of the mask and clears the counter of the next one.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = upper_tile(tile, tiles)
    kept = 0.0
    if CENTRES:
        kept = count_rows(mask, n, MASKED, WIDTH)
        if (tile == 0) & (split == 0):
            tl.store(counter, 0)
            if MASKED:
                tl.store(count, kept)
    if split < splits_x:
        part = _partial_tile(
            x, mask, mean_x, peaks, n_peaks_x, kept, split, chunk, row_tile, column_tile, n, p, stride_xn, stride_xp,
            MASKED, CENTRES, PRECISION, BLOCK, STEP,
        )  # fmt: skip
    else:
        part = _partial_tile(
            y, mask, mean_y, peaks + n_peaks_x, n_peaks_y, kept, split - splits_x, chunk, row_tile, column_tile, n, q,
            stride_yn, stride_yq, MASKED, CENTRES, PRECISION, BLOCK, STEP,
        )  # fmt: skip
    inner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK * BLOCK) + inner, part)


@triton.jit
def _sum_parts(
    partials, peaks, scale, begin, end, tile, tiles, inner,
    CENTRES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The parts begin..end of a strip of a tile, added in order and in one scale."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for split in tl.range(begin, end, loop_unroll_factor=UNROLL):
        part = tl.load(partials + (split * tiles + tile).to(tl.int64) * (BLOCK * BLOCK) + inner)
        if CENTRES:
            ratio = scale / scale_of(tl.load(peaks + split))  # a power of two, 1 at the most: nothing is rounded
            part *= ratio * ratio
        total += part
    return total


@triton.jit
def gram_reduce_kernel(
    peaks, count, partials, k, l, norms, slots, counter, value, coefficients,
    n, tiles, splits_x, splits_y, n_peaks_x, n_peaks_y,
    MASKED: tl.constexpr, CENTRES: tl.constexpr, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, BLOCK / ROWS): adds the parts of ROWS rows of a tile of K and of L."""
    tile, strip = tl.program_id(0), tl.program_id(1)
    upper, strips = tl.num_programs(0), tl.num_programs(1)
    program, programs = tile * strips + strip, upper * strips
    row_tile, column_tile = upper_tile(tile, tiles)
    local = strip * ROWS + tl.arange(0, ROWS)
    inner = local[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale_x = power_of_two(peaks, n_peaks_x, WIDTH)
    scale_y = power_of_two(peaks + n_peaks_x, n_peaks_y, WIDTH)
    splits = splits_x + splits_y
    k_tile = _sum_parts(partials, peaks, scale_x, 0, splits_x, tile, upper, inner, CENTRES, BLOCK, ROWS)
    l_tile = _sum_parts(partials, peaks, scale_y, splits_x, splits, tile, upper, inner, CENTRES, BLOCK, ROWS)
    rows = row_tile * BLOCK + local
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    _gram_epilogue(
        k_tile, l_tile, row_tile, column_tile, rows, columns, k, l, norms, slots, program, programs, n, UNBIASED
    )
    finish(
        counter, programs, slots, slots + 3 * programs, programs, scale_x, scale_y, count, n, value,
        coefficients, MASKED, STATISTIC, UNBIASED, False,
    )  # fmt: skip


@triton.jit
def gram_backward_kernel(
    x, y, mask, mean_x, mean_y, k, l, norms, coefficients, grad, dx, dy,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, blocks_x,
    X_GRAD: tl.constexpr, Y_GRAD: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr, UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (feature tiles of dX [n, p], then of dY [n, q], of those that are wanted; row tiles).

    If DESCRIBED, x and y are descriptors of [STEP, BLOCK], k and l of [BLOCK, STEP].
    """
    block = tl.program_id(0)
    # A constant of the compiler and a number of the program: one after the other.
    if X_GRAD:  # noqa: SIM102
        if block < blocks_x:
            _gram_backward(
                x, mean_x, mask, k, l, norms, coefficients, grad, dx, block, n, p, stride_xn, stride_xp,
                0, MASKED, DESCRIBED, UNBIASED, PRECISION, BLOCK, STEP,
            )  # fmt: skip
    if Y_GRAD:  # noqa: SIM102
        if block >= blocks_x:
            _gram_backward(
                y, mean_y, mask, l, k, norms, coefficients, grad, dy, block - blocks_x, n, q, stride_yn, stride_yq,
                1, MASKED, DESCRIBED, UNBIASED, PRECISION, BLOCK, STEP,
            )  # fmt: skip


@triton.jit
def _gram_backward(
    x, mean, mask, own, other, norms, coefficients, grad, dx, block, n, p, stride_n, stride_d, side,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, UNBIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of dX [n, p] (``side`` 0) or dY (1, all roles exchanged).

    M = a L + b K is formed in fp32, where it cancels as CKA -> 1, and brought to the size of sqrt(n) L/|L| before it is
    rounded: its entries lie below fp16's normal range at n = 128 already. The unbiased estimator's diagonal and the
    centring of the columns go into M as well.
    """
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    features = block * BLOCK + tl.arange(0, BLOCK)
    dtype = dx.dtype.element_ty
    d_cross = 2.0 * tl.load(coefficients + 0)
    d_own = 4.0 * tl.load(coefficients + 1 + side)
    count = tl.load(coefficients + 10)
    root = tl.sqrt(count)
    norm = tl.sqrt(tl.load(coefficients + 5 - side))
    outer = d_cross * norm / root
    dead = outer == 0.0
    inner_other = tl.where(dead, 0.0, root / norm).to(tl.float32)
    inner_own = tl.where(dead, 0.0, d_own / outer).to(tl.float32)
    scale = tl.load(coefficients + 8 + side)

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if UNBIASED:
        sums = tl.load(coefficients + 7 - side) * inner_other + tl.load(coefficients + 6 + side) * inner_own
        constant = (sums / ((count - 1.0) * (count - 2.0))).to(tl.float32)
        share = (1.0 / (count - 2.0)).to(tl.float32)
        weights = _row_weights(norms, rows, n, inner_other, inner_own, side)
    for start in range(0, n, STEP):
        inner = start + tl.arange(0, STEP)
        if DESCRIBED:
            first = tl.program_id(1) * BLOCK
            m = other.load([first, start]) * inner_other
            m += own.load([first, start]) * inner_own
        else:
            inside = (rows < n)[:, None] & (inner < n)[None, :]
            offsets = rows.to(tl.int64)[:, None] * n + inner[None, :]
            m = tl.load(other + offsets, mask=inside, other=0.0) * inner_other
            m += tl.load(own + offsets, mask=inside, other=0.0) * inner_own
        if UNBIASED:
            diagonal = rows[:, None] == inner[None, :]
            m += tl.where(diagonal, (constant - 2.0 * share * weights)[:, None], 0.0)
            m += (_row_weights(norms, inner, n, inner_other, inner_own, side) * share)[None, :]
        tile = centred_block(
            x, mean, scale.to(tl.float32), mask, start, block * BLOCK, n, p, stride_n, stride_d,
            MASKED, DESCRIBED, STEP, BLOCK,
        )  # fmt: skip
        acc = tl.dot(m.to(dtype), tile.to(dtype), acc, input_precision=PRECISION)

    acc *= (outer * scale * tl.load(grad)).to(tl.float32)
    keep = rows < n
    if MASKED:
        acc = tl.where((tl.load(mask + rows, mask=keep, other=0) != 0)[:, None], acc, 0.0)
    out = rows.to(tl.int64)[:, None] * p + features[None, :]
    tl.store(dx + out, acc.to(dtype), mask=keep[:, None] & (features < p)[None, :])


@triton.jit
def _row_weights(norms, rows, n, inner_other, inner_own, side):
    """inner_other * (the other side's squared row norms) + inner_own * (one's own)."""
    own = tl.load(norms + side * n + rows, mask=rows < n, other=0.0)
    other = tl.load(norms + (1 - side) * n + rows, mask=rows < n, other=0.0)
    return other * inner_other + own * inner_own
