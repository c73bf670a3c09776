r"""The Gram route: K = X X^T and L = Y Y^T by upper tiles, their moments, and dX = (a L + b K) X in one launch.

A program owns one tile of both K and L, so <K,L> never leaves its registers. Where tiles are few the features are split
over programs; their partial tiles meet in a second kernel, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import centred_tile, power_of_two, row_count
from .reduce import WIDTH, arrive, finish, upper_tile


@triton.jit
def _gram_tile(
    x, mean, scale, mask, rows, columns, begin, end, n, d, stride_n, stride_d,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Centred x[rows] @ x[columns].T over the features begin..end, fp32 [BLOCK, BLOCK]."""
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(begin, end, STEP):
        features = start + tl.arange(0, STEP)
        left = centred_tile(x, mean, scale, mask, rows, features, n, d, stride_n, stride_d, MASKED)
        right = centred_tile(x, mean, scale, mask, columns, features, n, d, stride_n, stride_d, MASKED)
        dtype = x.dtype.element_ty
        tile = tl.dot(left.to(dtype), tl.trans(right.to(dtype)), tile, input_precision=PRECISION)
    return tile


@triton.jit
def share_of(split, splits, d, STEP: tl.constexpr):
    """Begin and end of the ``split``-th of ``splits`` parts of ``d``, in whole steps; the last may be empty."""
    chunk = tl.cdiv(d, splits * STEP) * STEP
    return split * chunk, tl.minimum((split + 1) * chunk, d)


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
    k_tile, l_tile, row_tile, column_tile, rows, columns, k, l, norms, slots, norm_slots, program, programs, n,
    UNBIASED: tl.constexpr,
):  # fmt: skip
    """Stores a tile of K and L, both halves, and its share of the moments."""
    if UNBIASED:
        diagonal = rows[:, None] == columns[None, :]
        kappa = tl.sum(tl.where(diagonal, k_tile, 0.0), 1)
        lam = tl.sum(tl.where(diagonal, l_tile, 0.0), 1)
        k_tile = tl.where(diagonal, 0.0, k_tile)
        l_tile = tl.where(diagonal, 0.0, l_tile)
        if row_tile == column_tile:
            tl.store(norms + rows, kappa, mask=rows < n)
            tl.store(norms + n + rows, lam, mask=rows < n)
        tl.store(norm_slots + 0 * programs + program, tl.sum(kappa * lam, 0).to(tl.float64))
        tl.store(norm_slots + 1 * programs + program, tl.sum(kappa * kappa, 0).to(tl.float64))
        tl.store(norm_slots + 2 * programs + program, tl.sum(lam * lam, 0).to(tl.float64))
        tl.store(norm_slots + 3 * programs + program, tl.sum(kappa, 0).to(tl.float64))
        tl.store(norm_slots + 4 * programs + program, tl.sum(lam, 0).to(tl.float64))
    store_symmetric(k, k_tile, rows, columns, n, row_tile, column_tile)
    store_symmetric(l, l_tile, rows, columns, n, row_tile, column_tile)
    weight = tl.where(row_tile == column_tile, 1.0, 2.0).to(tl.float64)
    tl.store(slots + 0 * programs + program, weighted_sum(k_tile, l_tile, weight))
    tl.store(slots + 1 * programs + program, weighted_sum(k_tile, k_tile, weight))
    tl.store(slots + 2 * programs + program, weighted_sum(l_tile, l_tile, weight))


@triton.jit
def gram_moments_kernel(
    x, y, mean_x, mean_y, peaks_x, peaks_y, mask, count, k, l, norms, partials, slots, norm_slots, counter, value,
    coefficients, n, p, q, stride_xn, stride_xp, stride_yn, stride_yq, n_peaks_x, n_peaks_y, tiles, splits,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, feature splits)."""
    program, split = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    row_tile, column_tile = upper_tile(program, tiles)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    scale_x = power_of_two(peaks_x, n_peaks_x, WIDTH)
    scale_y = power_of_two(peaks_y, n_peaks_y, WIDTH)

    begin, end = share_of(split, splits, p, STEP)
    k_tile = _gram_tile(
        x, mean_x, scale_x, mask, rows, columns, begin, end, n, p, stride_xn, stride_xp, MASKED, PRECISION, BLOCK, STEP
    )
    begin, end = share_of(split, splits, q, STEP)
    l_tile = _gram_tile(
        y, mean_y, scale_y, mask, rows, columns, begin, end, n, q, stride_yn, stride_yq, MASKED, PRECISION, BLOCK, STEP
    )
    if SPLIT:
        inner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        base = partials + (split * programs + program).to(tl.int64) * (2 * BLOCK * BLOCK)
        tl.store(base + inner, k_tile)
        tl.store(base + BLOCK * BLOCK + inner, l_tile)
    else:
        _gram_epilogue(
            k_tile, l_tile, row_tile, column_tile, rows, columns, k, l, norms, slots, norm_slots, program, programs, n,
            UNBIASED,
        )  # fmt: skip
        if arrive(counter, programs):
            finish(
                slots, programs, norm_slots, programs, value, coefficients, row_count(count, n, MASKED), scale_x,
                scale_y, STATISTIC, UNBIASED, False,
            )  # fmt: skip


@triton.jit
def gram_reduce_kernel(
    peaks_x, peaks_y, count, k, l, norms, partials, slots, norm_slots, counter, value, coefficients,
    n, n_peaks_x, n_peaks_y, tiles, upper_tiles, splits,
    MASKED: tl.constexpr, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, BLOCK / ROWS): adds the feature splits of ROWS rows of a tile in order."""
    tile, strip = tl.program_id(0), tl.program_id(1)
    strips = tl.num_programs(1)
    program, programs = tile * strips + strip, tl.num_programs(0) * strips
    row_tile, column_tile = upper_tile(tile, tiles)
    local = strip * ROWS + tl.arange(0, ROWS)
    inner = local[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    k_tile = tl.zeros([ROWS, BLOCK], tl.float32)
    l_tile = tl.zeros([ROWS, BLOCK], tl.float32)
    for split in range(0, splits):
        base = partials + (split * upper_tiles + tile).to(tl.int64) * (2 * BLOCK * BLOCK)
        k_tile += tl.load(base + inner)
        l_tile += tl.load(base + BLOCK * BLOCK + inner)
    rows = row_tile * BLOCK + local
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    _gram_epilogue(
        k_tile, l_tile, row_tile, column_tile, rows, columns, k, l, norms, slots, norm_slots, program, programs, n,
        UNBIASED,
    )  # fmt: skip
    if arrive(counter, programs):
        scale_x = power_of_two(peaks_x, n_peaks_x, WIDTH)
        scale_y = power_of_two(peaks_y, n_peaks_y, WIDTH)
        finish(
            slots, programs, norm_slots, programs, value, coefficients, row_count(count, n, MASKED), scale_x, scale_y,
            STATISTIC, UNBIASED, False,
        )  # fmt: skip


@triton.jit
def gram_backward_kernel(
    x, mean, mask, own, other, norms, coefficients, grad, dx, n, p, stride_n, stride_d,
    SIDE: tl.constexpr, MASKED: tl.constexpr, UNBIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, feature tiles) of dX [n, p] (SIDE 0) or dY (SIDE 1, all roles exchanged).

    M = a L + b K is formed in fp32, where it cancels as CKA -> 1, and brought to the size of sqrt(n) L/|L| before it is
    rounded: its entries lie below fp16's normal range at n = 128 already. The unbiased estimator's diagonal and the
    centring of the columns go into M as well.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = x.dtype.element_ty
    d_cross = 2.0 * tl.load(coefficients + 0)
    d_own = 4.0 * tl.load(coefficients + 1 + SIDE)
    count = tl.load(coefficients + 10)
    root = tl.sqrt(count)
    norm = tl.sqrt(tl.load(coefficients + 5 - SIDE))
    outer = d_cross * norm / root
    dead = outer == 0.0
    inner_other = tl.where(dead, 0.0, root / norm).to(tl.float32)
    inner_own = tl.where(dead, 0.0, d_own / outer).to(tl.float32)
    scale = tl.load(coefficients + 8 + SIDE)

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if UNBIASED:
        sums = tl.load(coefficients + 7 - SIDE) * inner_other + tl.load(coefficients + 6 + SIDE) * inner_own
        constant = (sums / ((count - 1.0) * (count - 2.0))).to(tl.float32)
        share = (1.0 / (count - 2.0)).to(tl.float32)
        weights = _row_weights(norms, rows, n, inner_other, inner_own, SIDE)
    for start in range(0, n, STEP):
        inner = start + tl.arange(0, STEP)
        inside = (rows < n)[:, None] & (inner < n)[None, :]
        offsets = rows.to(tl.int64)[:, None] * n + inner[None, :]
        m = tl.load(other + offsets, mask=inside, other=0.0) * inner_other
        m += tl.load(own + offsets, mask=inside, other=0.0) * inner_own
        if UNBIASED:
            diagonal = rows[:, None] == inner[None, :]
            m += tl.where(diagonal, (constant - 2.0 * share * weights)[:, None], 0.0)
            m += (_row_weights(norms, inner, n, inner_other, inner_own, SIDE) * share)[None, :]
        tile = centred_tile(x, mean, scale.to(tl.float32), mask, inner, features, n, p, stride_n, stride_d, MASKED)
        acc = tl.dot(m.to(dtype), tile.to(dtype), acc, input_precision=PRECISION)

    acc *= (outer * scale * tl.load(grad)).to(tl.float32)
    keep = rows < n
    if MASKED:
        acc = tl.where((tl.load(mask + rows, mask=keep, other=0) != 0)[:, None], acc, 0.0)
    out = rows.to(tl.int64)[:, None] * p + features[None, :]
    tl.store(dx + out, acc.to(dtype), mask=keep[:, None] & (features < p)[None, :])


@triton.jit
def _row_weights(norms, rows, n, inner_other, inner_own, SIDE: tl.constexpr):
    """inner_other * (the other side's squared row norms) + inner_own * (one's own)."""
    own = tl.load(norms + SIDE * n + rows, mask=rows < n, other=0.0)
    other = tl.load(norms + (1 - SIDE) * n + rows, mask=rows < n, other=0.0)
    return other * inner_other + own * inner_own
