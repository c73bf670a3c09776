r"""Gaussian kernels: distances by tiles, K and L, their moments, and dX = (2 / sigma^2) (W - diag(W 1)) X.

The mathematics is that of `library_rbf`; K and L stay in memory, both halves of both. A matrix holds squared
distances first and then, in the same place, K - c with c = exp(-t) a typical entry, diagonal 0. The bandwidth, between
the two, is found by library operations. A side's numbers: f, t, c as the library leaves them, fp64 [2, 3]; f, c, scale
and the largest K off the diagonal as the backward reads them, behind the first six of the coefficients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import centred_tile, power_of_two, row_count
from .gram import gram_tile, store_symmetric
from .reduce import WIDTH, arrive, combine, sum_slots, upper_tile

EPS = tl.constexpr(1.1920928955078125e-07)
COMMON = tl.constexpr(6)  # d_kl, d_kk, d_ll, <K,K>, <L,L>, rows; then by side:
FACTOR, LEVEL, SCALE, PEAK, SIDE = (tl.constexpr(i) for i in range(5))


@triton.jit
def expm1(x):
    """exp(x) - 1; near zero, where the difference cancels, x (1 + x/2 (1 + x/3 (1 + ...)))."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(8):
        series = 1.0 + series * x * (1.0 / (9 - i))
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def _counts(mask, rows, n, MASKED: tl.constexpr):
    keep = rows < n
    if MASKED:
        keep = keep & (tl.load(mask + rows, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _store_distances(products, norms, matrix, rows, columns, n, row_tile, column_tile, SAME: tl.constexpr):
    """From <x_i, x_j> to |x_i - x_j|^2; what is rounding of equal rows is zero, as in `rbf.strips`."""
    left = tl.load(norms + rows, mask=rows < n, other=0.0)
    right = tl.load(norms + columns, mask=columns < n, other=0.0)
    pairs = left[:, None] + right[None, :]
    squares = pairs - 2.0 * products
    none = (squares <= pairs * (SAME * EPS)) | (rows[:, None] == columns[None, :])  # NaN stays
    store_symmetric(matrix, tl.where(none, 0.0, squares), rows, columns, n, row_tile, column_tile)


@triton.jit
def rbf_distances_kernel(
    x, y, mask, mean_x, mean_y, peaks, norms, kernels, coefficients,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, tiles, n_peaks_x, n_peaks_y,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, sides): squared distances of the scaled features into kernels [2, n, n]; the scales."""
    tile, side = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = upper_tile(tile, tiles)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    if side == 0:
        scale = power_of_two(peaks, n_peaks_x, WIDTH)
        products = gram_tile(
            x, mean_x, scale, mask, row_tile, column_tile, 0, p, n, p, stride_xn, stride_xp,
            MASKED, False, PRECISION, BLOCK, STEP,
        )  # fmt: skip
    else:
        scale = power_of_two(peaks + n_peaks_x, n_peaks_y, WIDTH)
        products = gram_tile(
            y, mean_y, scale, mask, row_tile, column_tile, 0, q, n, q, stride_yn, stride_yq,
            MASKED, False, PRECISION, BLOCK, STEP,
        )  # fmt: skip
    matrix = kernels + side.to(tl.int64) * n * n
    _store_distances(products, norms + side * n, matrix, rows, columns, n, row_tile, column_tile, SAME)
    if tile == 0:
        tl.store(coefficients + COMMON + side * SIDE + SCALE, scale.to(tl.float64))


@triton.jit
def _largest(slots, index, count):
    """The largest of row ``index`` of slots [*, count]."""
    largest = tl.zeros([WIDTH], tl.float64)
    for start in range(0, count, WIDTH):
        offsets = start + tl.arange(0, WIDTH)
        found = tl.load(slots + index * count + offsets, mask=offsets < count, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, found)
    return tl.max(largest, 0)


@triton.jit
def _store_shifts(sums, shifts, side, count, n, UNBIASED: tl.constexpr):
    """Row sums [2, n] -> what is subtracted from rows and from columns to centre."""
    total = sum_slots(sums, side, n)
    if UNBIASED:
        count = tl.where(count >= 4.0, count, 4.0)  # the value is NaN then
        share = 1.0 / (count - 2.0)
        rest = total / ((count - 1.0) * (count - 2.0))
    else:
        share = 1.0 / count
        rest = total / (count * count)
    for start in range(0, n, WIDTH):
        rows = start + tl.arange(0, WIDTH)
        row_sums = tl.load(sums + side * n + rows, mask=rows < n, other=0.0, cache_modifier=".cg")
        tl.store(shifts + side * n + rows, row_sums * share - 0.5 * rest, mask=rows < n)


@triton.jit
def rbf_kernels_kernel(
    kernels, bandwidths, mask, count, sums, tops, shifts, coefficients, counter, n,
    MASKED: tl.constexpr, UNBIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, sides): K - c in the place of D, its row sums; the last program makes shifts of them."""
    block, side = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_counts = _counts(mask, rows, n, MASKED)
    factor = tl.load(bandwidths + side * 3 + 0).to(tl.float32)
    typical = tl.load(bandwidths + side * 3 + 1).to(tl.float32)
    exact_level = tl.load(bandwidths + side * 3 + 2)
    level = exact_level.to(tl.float32)
    matrix = kernels + side.to(tl.int64) * n * n
    row_sums = tl.zeros([ROWS], tl.float64)
    if not UNBIASED:
        row_sums += tl.where(row_counts, 1.0 - exact_level, 0.0)  # the diagonal, which is not stored
    top = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
        kernel = level * expm1(typical - factor * tl.load(matrix + offsets, mask=inside, other=0.0))
        counted = row_counts[:, None] & _counts(mask, columns, n, MASKED)[None, :] & (rows[:, None] != columns[None, :])
        tl.store(matrix + offsets, tl.where(counted, kernel, 0.0), mask=inside)
        row_sums += tl.sum(tl.where(counted, kernel, 0.0), 1).to(tl.float64)
        top = tl.maximum(top, tl.max(tl.where(counted, kernel + level, 0.0), 1))
    tl.store(sums + side * n + rows, row_sums, mask=rows < n)
    tl.store(tops + side * blocks + block, tl.max(top, 0).to(tl.float64))
    if arrive(counter, 2 * blocks):
        tl.store(counter, 0)  # for the next kernel
        for each in tl.static_range(2):
            _store_shifts(sums, shifts, each, row_count(count, n, MASKED).to(tl.float64), n, UNBIASED)
            own = coefficients + COMMON + each * SIDE
            tl.store(own + FACTOR, tl.load(bandwidths + each * 3 + 0))
            tl.store(own + LEVEL, tl.load(bandwidths + each * 3 + 2))
            tl.store(own + PEAK, _largest(tops, each, blocks))


@triton.jit
def _noise(bandwidths, side, count):
    """What a self-HSIC of entries that differ by no more than their rounding may come to (estimators.ROUNDING)."""
    noise = 64.0 * EPS * tl.load(bandwidths + side * 3 + 2) * tl.load(bandwidths + side * 3 + 1) * count
    return noise * noise


@triton.jit
def rbf_moments_kernel(
    kernels, shifts, bandwidths, mask, count, slots, counter, value, coefficients, n,
    MASKED: tl.constexpr, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks): <K,L>, <K,K>, <L,L> of the centred matrices, twice what is above the diagonal, and the end."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_counts = _counts(mask, rows, n, MASKED)
    own_shift = tl.load(shifts + rows, mask=rows < n, other=0.0)
    other_shift = tl.load(shifts + n + rows, mask=rows < n, other=0.0)
    kl = tl.zeros([ROWS], tl.float64)
    kk = tl.zeros([ROWS], tl.float64)
    ll = tl.zeros([ROWS], tl.float64)
    if not UNBIASED:
        own = tl.where(row_counts, 1.0 - tl.load(bandwidths + 2) - 2.0 * own_shift, 0.0)
        other = tl.where(row_counts, 1.0 - tl.load(bandwidths + 5) - 2.0 * other_shift, 0.0)
        kl += 0.5 * own * other
        kk += 0.5 * own * own
        ll += 0.5 * other * other
    own_row = own_shift.to(tl.float32)
    other_row = other_shift.to(tl.float32)
    for start in range(block * ROWS // COLUMNS * COLUMNS, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        counted = row_counts[:, None] & _counts(mask, columns, n, MASKED)[None, :] & (rows[:, None] < columns[None, :])
        offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
        own_column = tl.load(shifts + columns, mask=columns < n, other=0.0).to(tl.float32)
        other_column = tl.load(shifts + n + columns, mask=columns < n, other=0.0).to(tl.float32)
        k = tl.load(kernels + offsets, mask=counted, other=0.0) - own_row[:, None] - own_column[None, :]
        l = tl.load(kernels + n.to(tl.int64) * n + offsets, mask=counted, other=0.0)
        l = l - other_row[:, None] - other_column[None, :]
        k = tl.where(counted, k, 0.0)
        l = tl.where(counted, l, 0.0)
        kl += tl.sum(k * l, 1).to(tl.float64)
        kk += tl.sum(k * k, 1).to(tl.float64)
        ll += tl.sum(l * l, 1).to(tl.float64)
    tl.store(slots + 0 * blocks + block, 2.0 * tl.sum(kl, 0))
    tl.store(slots + 1 * blocks + block, 2.0 * tl.sum(kk, 0))
    tl.store(slots + 2 * blocks + block, 2.0 * tl.sum(ll, 0))
    if arrive(counter, blocks):
        total = row_count(count, n, MASKED).to(tl.float64)
        kl_sum = sum_slots(slots, 0, blocks)
        kk_sum = sum_slots(slots, 1, blocks)
        ll_sum = sum_slots(slots, 2, blocks)
        kk_sum = tl.where(kk_sum <= _noise(bandwidths, 0, total), 0.0, kk_sum)
        ll_sum = tl.where(ll_sum <= _noise(bandwidths, 1, total), 0.0, ll_sum)
        zero = 0.0 * total
        result, d_kl, d_kk, d_ll = combine(
            kl_sum, kk_sum, ll_sum, zero, zero, zero, zero, zero, total, STATISTIC, UNBIASED
        )
        tl.store(value, result.to(tl.float32))
        tl.store(coefficients + 0, d_kl)
        tl.store(coefficients + 1, d_kk)
        tl.store(coefficients + 2, d_ll)
        tl.store(coefficients + 3, kk_sum)
        tl.store(coefficients + 4, ll_sum)
        tl.store(coefficients + 5, total)


@triton.jit
def rbf_backward_kernel(
    x, y, mask, mean_x, mean_y, kernels, shifts, coefficients, grad, dx, dy,
    stride_xn, stride_xp, stride_yn, stride_yq, n, p, q, blocks_x,
    X_GRAD: tl.constexpr, Y_GRAD: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (feature tiles of dX [n, p], then of dY [n, q], of those that are wanted; row tiles)."""
    block = tl.program_id(0)
    if X_GRAD:  # noqa: SIM102
        if block < blocks_x:
            _rbf_backward(
                x, mean_x, mask, kernels, shifts, coefficients, grad, dx, block, n, p, stride_xn, stride_xp,
                0, MASKED, PRECISION, BLOCK, STEP,
            )  # fmt: skip
    if Y_GRAD:  # noqa: SIM102
        if block >= blocks_x:
            _rbf_backward(
                y, mean_y, mask, kernels, shifts, coefficients, grad, dy, block - blocks_x, n, q, stride_yn, stride_yq,
                1, MASKED, PRECISION, BLOCK, STEP,
            )  # fmt: skip


@triton.jit
def _rbf_backward(
    x, mean, mask, kernels, shifts, coefficients, grad, dx, block, n, p, stride_n, stride_d,
    ONE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of dX (side ONE = 0) or dY (1): sum_j W_ij (x_j - x_i), W = (d_kl Lc + 2 d_kk Kc) o K off the diagonal.

    W is formed in fp32, where it cancels as CKA -> 1, and brought near 1 before it is rounded: Lc to the size of
    n Lc/|L|, K to at most 1. Its row sums are those of the rounded entries, so equal rows pull nowhere.
    """
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    features = block * BLOCK + tl.arange(0, BLOCK)
    dtype = x.dtype.element_ty
    side = coefficients + COMMON + ONE * SIDE
    size = tl.sqrt(tl.load(coefficients + 4 - ONE)) / tl.load(coefficients + 5)
    peak = tl.maximum(tl.load(side + PEAK), 1e-37)
    d_cross = tl.load(coefficients + 0) * size
    dead = d_cross == 0.0
    inner_other = tl.where(dead, 0.0, 1.0 / size).to(tl.float32)
    inner_own = tl.where(dead, 0.0, 2.0 * tl.load(coefficients + 1 + ONE) / d_cross).to(tl.float32)
    inner_kernel = (1.0 / peak).to(tl.float32)
    level = tl.load(side + LEVEL).to(tl.float32)
    scale = tl.load(side + SCALE)
    own = kernels + ONE * n.to(tl.int64) * n
    other = kernels + (1 - ONE) * n.to(tl.int64) * n
    row_counts = _counts(mask, rows, n, MASKED)
    row_shifts = _both_shifts(shifts, rows, n, inner_other, inner_own, ONE)

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, STEP):
        inner = start + tl.arange(0, STEP)
        counted = row_counts[:, None] & _counts(mask, inner, n, MASKED)[None, :] & (rows[:, None] != inner[None, :])
        offsets = rows.to(tl.int64)[:, None] * n + inner[None, :]
        k = tl.load(own + offsets, mask=counted, other=0.0)
        v = tl.load(other + offsets, mask=counted, other=0.0) * inner_other + k * inner_own
        v -= row_shifts[:, None] + _both_shifts(shifts, inner, n, inner_other, inner_own, ONE)[None, :]
        w = tl.where(counted, v * ((k + level) * inner_kernel), 0.0).to(dtype)
        sums += tl.sum(w.to(tl.float32), 1)
        tile = centred_tile(x, mean, scale.to(tl.float32), mask, inner, features, n, p, stride_n, stride_d, MASKED)
        acc = tl.dot(w, tile.to(dtype), acc, input_precision=PRECISION)

    tile = centred_tile(x, mean, scale.to(tl.float32), mask, rows, features, n, p, stride_n, stride_d, MASKED)
    acc -= sums[:, None] * tile.to(dtype).to(tl.float32)
    acc *= (4.0 * d_cross * peak * tl.load(side + FACTOR) * scale * tl.load(grad)).to(tl.float32)
    acc = tl.where(row_counts[:, None], acc, 0.0)
    out = rows.to(tl.int64)[:, None] * p + features[None, :]
    tl.store(dx + out, acc.to(dtype), mask=(rows < n)[:, None] & (features < p)[None, :])


@triton.jit
def _both_shifts(shifts, rows, n, inner_other, inner_own, ONE: tl.constexpr):
    """inner_other * (the other side's shifts) + inner_own * (one's own)."""
    own = tl.load(shifts + ONE * n + rows, mask=rows < n, other=0.0).to(tl.float32)
    other = tl.load(shifts + (1 - ONE) * n + rows, mask=rows < n, other=0.0).to(tl.float32)
    return other * inner_other + own * inner_own
