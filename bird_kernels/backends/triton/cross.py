r"""The cross route: A = X^T X, C = Y^T X and |Y^T Y| by tiles, their moments, and dX = Y (a C) + X (b A) in one launch.

The tiles of the three products form one grid: upper tiles of A, all tiles of C, upper tiles of Y^T Y (kept only when y
needs a gradient). Where tiles are few the rows are split over programs; partial tiles meet in a second kernel, in a
fixed order.

The unbiased estimator needs the squared row norms kappa and lambda beforehand, and for the centring of its gradient the
column sums X^T kappa and X^T lambda: two small kernels, launched for it alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import block_of, centred_block, centred_tile, power_of_two
from .gram import store_symmetric, weighted_sum
from .reduce import WIDTH, finish, store_norm_sums, upper_tile


@triton.jit
def _share_of(split, splits, d, STEP: tl.constexpr):
    """Begin and end of the ``split``-th of ``splits`` parts of ``d``, in whole steps; the last may be empty."""
    chunk = tl.cdiv(d, splits * STEP) * STEP
    return split * chunk, tl.minimum((split + 1) * chunk, d)


@triton.jit
def _squared_norms(
    x, mean, scale, mask, rows, n, d, stride_n, stride_d,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    norms = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        tile = centred_tile(x, mean, scale, mask, rows, columns, n, d, stride_n, stride_d, MASKED)
        tile = tile.to(x.dtype.element_ty).to(tl.float32)  # as the products see it: their diagonals are subtracted
        norms += tl.sum(tile * tile, 1)
    return norms


@triton.jit
def row_norms_kernel(
    x, y, mask, mean_x, mean_y, peaks, norms, norm_slots,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, n_peaks_x, n_peaks_y,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks): kappa and lambda into norms [2, n], their five sums into norm_slots [5, programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_x = power_of_two(peaks, n_peaks_x, WIDTH)
    scale_y = power_of_two(peaks + n_peaks_x, n_peaks_y, WIDTH)
    kappa = _squared_norms(x, mean_x, scale_x, mask, rows, n, p, stride_xn, stride_xp, MASKED, BLOCK_N, BLOCK_D)
    lam = _squared_norms(y, mean_y, scale_y, mask, rows, n, q, stride_yn, stride_yq, MASKED, BLOCK_N, BLOCK_D)
    tl.store(norms + rows, kappa, mask=rows < n)
    tl.store(norms + n + rows, lam, mask=rows < n)
    store_norm_sums(norm_slots, program, programs, kappa, lam)


@triton.jit
def column_sums_kernel(
    x, mask, mean, peaks, norms, stride_n, stride_d, n, d, first_peak, n_peaks, splits,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, row splits): X^T kappa and X^T lambda by parts, [splits, 2, d], behind the mean."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    scale = power_of_two(peaks + first_peak, n_peaks, WIDTH)
    begin, end = _share_of(split, splits, n, BLOCK_N)
    kappa_sum = tl.zeros([BLOCK_D], tl.float32)
    lam_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        tile = centred_tile(x, mean, scale, mask, rows, columns, n, d, stride_n, stride_d, MASKED)
        kappa = tl.load(norms + rows, mask=rows < n, other=0.0)
        lam = tl.load(norms + n + rows, mask=rows < n, other=0.0)
        kappa_sum += tl.sum(tile * kappa[:, None], 0)
        lam_sum += tl.sum(tile * lam[:, None], 0)
    tl.store(mean + (2 + split * 2) * d + columns, kappa_sum, mask=columns < d)
    tl.store(mean + (3 + split * 2) * d + columns, lam_sum, mask=columns < d)


@triton.jit
def _cross_tile(
    a, mean_a, scale_a, d_a, stride_an, stride_ad, b, mean_b, scale_b, d_b, stride_bn, stride_bd,
    mask, row_tile, column_tile, begin, end, n,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Centred a[:, row_tile].T @ b[:, column_tile] over the rows begin..end, fp32 [BLOCK, BLOCK]."""
    row, column = row_tile * BLOCK, column_tile * BLOCK
    dtype = a.dtype if DESCRIBED else a.dtype.element_ty
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(begin, end, STEP):
        left = centred_block(
            a, mean_a, scale_a, mask, start, row, n, d_a, stride_an, stride_ad, MASKED, DESCRIBED, STEP, BLOCK
        )
        right = centred_block(
            b, mean_b, scale_b, mask, start, column, n, d_b, stride_bn, stride_bd, MASKED, DESCRIBED, STEP, BLOCK
        )
        tile = tl.dot(tl.trans(left.to(dtype)), right.to(dtype), tile, input_precision=PRECISION)
    return tile


@triton.jit
def _place(index, tiles_p, tiles_q):
    """Which product the ``index``-th tile belongs to (0: A, 1: C, 2: Y^T Y) and where in it."""
    upper_p = tiles_p * (tiles_p + 1) // 2
    local_c = index - upper_p
    local_b = local_c - tiles_p * tiles_q
    kind = (local_c >= 0).to(tl.int32) + (local_b >= 0).to(tl.int32)
    row_a, column_a = upper_tile(tl.minimum(index, upper_p - 1), tiles_p)
    row_b, column_b = upper_tile(tl.maximum(local_b, 0), tiles_q)
    row = tl.where(kind == 0, row_a, tl.where(kind == 1, local_c // tiles_p, row_b))
    column = tl.where(kind == 0, column_a, tl.where(kind == 1, local_c % tiles_p, column_b))
    return kind, row, column


@triton.jit
def _cross_epilogue(
    tile, kind, row_tile, column_tile, rows, columns, a, b, c, slots, program, programs, p, q,
    STORE_B: tl.constexpr,
):  # fmt: skip
    """Stores a tile of A, C or (if wanted) Y^T Y, and its share of <K,L>, <K,K> or <L,L>."""
    weight = tl.where((kind == 1) | (row_tile == column_tile), 1.0, 2.0).to(tl.float64)
    share = weighted_sum(tile, tile, weight)
    zero = 0.0 * share  # NaN where the share is
    if kind == 0:
        store_symmetric(a, tile, rows, columns, p, row_tile, column_tile)
    elif kind == 1:
        offsets = rows.to(tl.int64)[:, None] * p + columns[None, :]
        tl.store(c + offsets, tile, mask=(rows < q)[:, None] & (columns < p)[None, :])
    else:
        if STORE_B:
            store_symmetric(b, tile, rows, columns, q, row_tile, column_tile)
    tl.store(slots + 0 * programs + program, tl.where(kind == 1, share, zero))
    tl.store(slots + 1 * programs + program, tl.where(kind == 0, share, zero))
    tl.store(slots + 2 * programs + program, tl.where(kind == 2, share, zero))


@triton.jit
def cross_moments_kernel(
    x, y, mask, mean_x, mean_y, peaks, count, a, b, c, partials, slots, norm_slots, counter, value, coefficients,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, n_peaks_x, n_peaks_y, tiles_p, tiles_q, norm_programs, splits,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, SPLIT: tl.constexpr, STATISTIC: tl.constexpr,
    UNBIASED: tl.constexpr, STORE_B: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of A, C and Y^T Y; row splits). If DESCRIBED, x and y are descriptors of [STEP, BLOCK]."""
    program, split = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    kind, row_tile, column_tile = _place(program, tiles_p, tiles_q)
    scale_x = power_of_two(peaks, n_peaks_x, WIDTH)
    scale_y = power_of_two(peaks + n_peaks_x, n_peaks_y, WIDTH)
    begin, end = _share_of(split, splits, n, STEP)
    # Three calls and not one with chosen pointers: each keeps what is known of its strides' alignment.
    if kind == 0:
        tile = _cross_tile(
            x, mean_x, scale_x, p, stride_xn, stride_xp, x, mean_x, scale_x, p, stride_xn, stride_xp,
            mask, row_tile, column_tile, begin, end, n, MASKED, DESCRIBED, PRECISION, BLOCK, STEP,
        )  # fmt: skip
    elif kind == 1:
        tile = _cross_tile(
            y, mean_y, scale_y, q, stride_yn, stride_yq, x, mean_x, scale_x, p, stride_xn, stride_xp,
            mask, row_tile, column_tile, begin, end, n, MASKED, DESCRIBED, PRECISION, BLOCK, STEP,
        )  # fmt: skip
    else:
        tile = _cross_tile(
            y, mean_y, scale_y, q, stride_yn, stride_yq, y, mean_y, scale_y, q, stride_yn, stride_yq,
            mask, row_tile, column_tile, begin, end, n, MASKED, DESCRIBED, PRECISION, BLOCK, STEP,
        )  # fmt: skip
    if SPLIT:
        inner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(partials + (split * programs + program).to(tl.int64) * (BLOCK * BLOCK) + inner, tile)
    else:
        rows = row_tile * BLOCK + tl.arange(0, BLOCK)
        columns = column_tile * BLOCK + tl.arange(0, BLOCK)
        _cross_epilogue(
            tile, kind, row_tile, column_tile, rows, columns, a, b, c, slots, program, programs, p, q, STORE_B
        )
        finish(
            counter, programs, slots, norm_slots, norm_programs, scale_x, scale_y, count, n, value,
            coefficients, MASKED, STATISTIC, UNBIASED, True,
        )  # fmt: skip


@triton.jit
def cross_reduce_kernel(
    peaks, count, a, b, c, partials, slots, norm_slots, counter, value, coefficients,
    n, p, q, n_peaks_x, n_peaks_y, tiles_p, tiles_q, norm_programs, splits,
    MASKED: tl.constexpr, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr, STORE_B: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, BLOCK / ROWS): adds the row splits of ROWS rows of a tile in order."""
    index, strip = tl.program_id(0), tl.program_id(1)
    tiles, strips = tl.num_programs(0), tl.num_programs(1)
    program, programs = index * strips + strip, tiles * strips
    kind, row_tile, column_tile = _place(index, tiles_p, tiles_q)
    local = strip * ROWS + tl.arange(0, ROWS)
    inner = local[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tile = tl.zeros([ROWS, BLOCK], tl.float32)
    for split in range(0, splits):
        tile += tl.load(partials + (split * tiles + index).to(tl.int64) * (BLOCK * BLOCK) + inner)
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    _cross_epilogue(
        tile, kind, row_tile, column_tile, row_tile * BLOCK + local, columns, a, b, c, slots, program, programs, p, q,
        STORE_B,
    )  # fmt: skip
    scale_x = power_of_two(peaks, n_peaks_x, WIDTH)
    scale_y = power_of_two(peaks + n_peaks_x, n_peaks_y, WIDTH)
    finish(
        counter, programs, slots, norm_slots, norm_programs, scale_x, scale_y, count, n, value,
        coefficients, MASKED, STATISTIC, UNBIASED, True,
    )  # fmt: skip


@triton.jit
def cross_backward_kernel(
    own_features, own, other, mask, mean_own, mean_other, own_product, cross, norms, coefficients, grad, d_x,
    stride_on, stride_od, stride_tn, stride_td, n, p, q, splits,
    SIDE: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr, UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, feature tiles) of dX [n, p] (SIDE 0) or dY (SIDE 1: own is y, ``cross`` is read transposed).

    If DESCRIBED, ``own``, ``other`` and the transposed ``cross`` are descriptors of [BLOCK, STEP], ``own_product`` and
    ``cross`` as it stands of [STEP, BLOCK]; ``own_features`` is a pointer always. The products are
    brought near unit size before they are rounded to the features' dtype.
    """
    row, feature = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    rows, features = row + tl.arange(0, BLOCK), feature + tl.arange(0, BLOCK)
    dtype = d_x.dtype.element_ty
    d_cross = 2.0 * tl.load(coefficients + 0)
    d_own = 4.0 * tl.load(coefficients + 1 + SIDE)
    count = tl.load(coefficients + 10)
    # |C|, but not so small that the other term's factor overflows where C vanishes.
    size = tl.sqrt(tl.load(coefficients + 4)) * tl.sqrt(tl.load(coefficients + 5))
    norm = tl.sqrt(tl.maximum(tl.load(coefficients + 3), 1e-6 * size))
    outer = d_cross * norm
    dead = outer == 0.0
    inner_cross = tl.where(dead, 0.0, 1.0 / norm).to(tl.float32)
    inner_own = tl.where(dead, 0.0, d_own / outer).to(tl.float32)
    scale_own = tl.load(coefficients + 8 + SIDE)
    scale_other = tl.load(coefficients + 9 - SIDE).to(tl.float32)

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    # Rounded as soon as loaded: later, fp16 spills 16 bytes on sm_100.
    for start in range(0, q, STEP):
        left = centred_block(
            other, mean_other, scale_other, mask, row, start, n, q, stride_tn, stride_td,
            MASKED, DESCRIBED, BLOCK, STEP,
        ).to(dtype)  # fmt: skip
        if SIDE == 0:
            right = block_of(cross, start, feature, q, p, DESCRIBED, STEP, BLOCK)
        else:
            right = tl.trans(block_of(cross, feature, start, p, q, DESCRIBED, BLOCK, STEP))
        acc = tl.dot(left, (right * inner_cross).to(dtype), acc, input_precision=PRECISION)
    for start in range(0, p, STEP):
        left = centred_block(
            own, mean_own, scale_own.to(tl.float32), mask, row, start, n, p, stride_on, stride_od,
            MASKED, DESCRIBED, BLOCK, STEP,
        ).to(dtype)  # fmt: skip
        right = block_of(own_product, start, feature, p, p, DESCRIBED, STEP, BLOCK)
        acc = tl.dot(left, (right * inner_own).to(dtype), acc, input_precision=PRECISION)

    if UNBIASED:
        totals = tl.load(coefficients + 7 - SIDE) * inner_cross + tl.load(coefficients + 6 + SIDE) * inner_own
        constant = (totals / ((count - 1.0) * (count - 2.0))).to(tl.float32)
        share = (1.0 / (count - 2.0)).to(tl.float32)
        own_norms = tl.load(norms + SIDE * n + rows, mask=rows < n, other=0.0)
        other_norms = tl.load(norms + (1 - SIDE) * n + rows, mask=rows < n, other=0.0)
        weights = constant - (count.to(tl.float32) * share) * (other_norms * inner_cross + own_norms * inner_own)
        tile = centred_tile(
            own_features, mean_own, scale_own.to(tl.float32), mask, rows, features, n, p, stride_on, stride_od, MASKED
        )
        column = tl.zeros([BLOCK], tl.float32)
        for split in range(0, splits):
            base = mean_own + (2 + split * 2) * p + features
            kappa_sum = tl.load(base + SIDE * p, mask=features < p, other=0.0)
            lam_sum = tl.load(base + (1 - SIDE) * p, mask=features < p, other=0.0)
            column += lam_sum * inner_cross + kappa_sum * inner_own
        acc += weights[:, None] * tile + (column * share)[None, :]

    acc *= (outer * scale_own * tl.load(grad)).to(tl.float32)
    keep = rows < n
    if MASKED:
        acc = tl.where((tl.load(mask + rows, mask=keep, other=0) != 0)[:, None], acc, 0.0)
    out = rows.to(tl.int64)[:, None] * p + features[None, :]
    tl.store(d_x + out, acc.to(dtype), mask=keep[:, None] & (features < p)[None, :])
