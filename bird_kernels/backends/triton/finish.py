r"""Kernels after the library's products of shifted operands: centring of the results, moments, weights of gradients.

Products of features (cross route) are centred and squared in fp64: programs write their parts of the moments to slots,
and the last one combines them (`reduce`). Of Gram matrices the rows are summed here, and `double` does the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .apart import store_results_apart, taken_rows, weights_apart
from .centre import counts
from .double import mixed_shifts, store_totals
from .reduce import KK, KL, ROOM_K, ROOM_L, ROWS, arrive, finish, store_no_totals, store_sizes, sum_slots, weights_of
from .shift import column_sums, padded_width, rounded


@triton.jit
def shifted_sizes(sums, scales, width, shares):
    """Scales of x and y, and the number of rows that count (the sum of a column of ones), fp64."""
    n = tl.sum(column_sums(sums, width - 8 + tl.arange(0, 1), width, shares), 0)
    return tl.load(scales).to(tl.float64), tl.load(scales + 1).to(tl.float64), n


@triton.jit
def _centred(products, sums, rows, columns, right, height, width, shares, total, n, parts, BLOCK: tl.constexpr):
    """A tile of the sum of products [parts, height, width], raw and minus (products of column sums of z) / n; fp64.

    ``right``: the columns of z that correspond to the tile's columns.
    """
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
    raw = tl.zeros([BLOCK, BLOCK], tl.float64)
    for _ in range(0, parts):
        raw += tl.load(products + offsets, mask=inside, other=0.0).to(tl.float64)
        products += tl.cast(height, tl.int64) * width
    left = column_sums(sums, rows, total, shares)
    mean = column_sums(sums, right, total, shares) / n
    return raw, tl.where(inside, raw - left[:, None] * mean[None, :], 0.0), left, inside, offsets


@triton.jit
def cross_finish_kernel(
    products,  # fp32 [parts, qa + pa, pa]: [Zy | Zx]^T Zx
    products_y,  # fp32 [parts, qa, qa]: Zy^T Zy
    sums,  # fp32 [shares, qa + pa + 8]: column sums of z, and the count
    scales,  # fp32 [2]
    ca,  # out, fp32 [qa + pa, pa]: C above A, centred
    b,  # out (STORE_B), fp32 [qa, qa]
    means,  # out, fp32 [qa + pa]: of the columns of z
    slots,  # fp64 [5, programs]
    row_slots,  # fp64 (UNBIASED), of `apart.rows_kernel`
    counters,  # int32 [1], 0
    value,  # out, fp32, 0-d
    coefficients,  # out, fp64 [COEFFICIENTS]
    p,  # columns of x
    q,  # columns of y
    parts,  # the number of parts of ``products``, which are summed here
    shares,  # the number of shares in ``sums``, which are summed here
    blocks,  # (UNBIASED) the number of blocks of rows in ``row_slots``
    STATISTIC: tl.constexpr,  # "cka_loss", "sqrt_cka_loss", "cka" or "hsic"
    UNBIASED: tl.constexpr,  # z, ``sums`` and the moments are without the rows that were taken out (`apart`)
    STORE_B: tl.constexpr,  # whether ``b`` is written, which dY needs
    BLOCK: tl.constexpr,  # rows and columns of a tile
):
    """Grid (tiles of [C; A], then of B): centres the products, and computes the value and the coefficients."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    pa, qa = padded_width(p), padded_width(q)
    width = qa + pa + 8
    tiles_x, tiles_y = tl.cdiv(pa, BLOCK), tl.cdiv(qa, BLOCK)
    tiles = tl.cdiv(qa + pa, BLOCK) * tiles_x
    sizes = shifted_sizes(sums, scales, width, shares)
    n = sizes[2]
    own = tl.arange(0, BLOCK)
    kl, kk, ll, trace_x, trace_y = 0.0 * n, 0.0 * n, 0.0 * n, 0.0 * n, 0.0 * n
    if program < tiles:
        rows, columns = program // tiles_x * BLOCK + own, program % tiles_x * BLOCK + own
        raw, centred, left, inside, offsets = _centred(
            products, sums, rows, columns, qa + columns, qa + pa, pa, shares, width, n, parts, BLOCK
        )
        tl.store(ca + offsets, centred.to(tl.float32), mask=inside)
        tl.store(means + rows, (left / n).to(tl.float32), mask=(rows < qa + pa) & (program % tiles_x == 0))
        square = tl.sum(centred * centred, 1)
        kl = tl.sum(tl.where(rows < qa, square, 0.0), 0)
        kk = tl.sum(tl.where(rows < qa, 0.0, square), 0)
        trace_x = tl.sum(tl.sum(tl.where(rows[:, None] - qa == columns[None, :], raw, 0.0), 1), 0)
    else:
        rows, columns = (program - tiles) // tiles_y * BLOCK + own, (program - tiles) % tiles_y * BLOCK + own
        raw, centred, left, inside, offsets = _centred(
            products_y, sums, rows, columns, columns, qa, qa, shares, width, n, parts, BLOCK
        )
        if STORE_B:
            tl.store(b + offsets, centred.to(tl.float32), mask=inside)
        ll = tl.sum(tl.sum(centred * centred, 1), 0)
        trace_y = tl.sum(tl.sum(tl.where(rows[:, None] == columns[None, :], raw, 0.0), 1), 0)
    tl.store(slots + 0 * programs + program, kl)
    tl.store(slots + 1 * programs + program, kk)
    tl.store(slots + 2 * programs + program, ll)
    tl.store(slots + 3 * programs + program, trace_x)
    tl.store(slots + 4 * programs + program, trace_y)
    if arrive(counters, programs):
        if UNBIASED:
            count = tl.load(sums + width - 7)
            store_results_apart(
                slots, programs, row_slots, blocks, coefficients, value, sizes[0], sizes[1], count, STATISTIC
            )  # fmt: skip
        else:
            trace_x, trace_y = sum_slots(slots, 3, programs), sum_slots(slots, 4, programs)
            store_sizes(coefficients, sizes)
            store_no_totals(coefficients)
            rooms = trace_x * trace_x, trace_y * trace_y
            finish(slots, programs, coefficients, value, sizes, rooms, STATISTIC, False)


@triton.jit
def cross_mix_kernel(
    ca,  # fp32 [qa + pa, pa]
    b,  # fp32 [qa, qa]
    means,  # fp32 [qa + pa]
    coefficients,  # fp64 [COEFFICIENTS]
    grad,  # 0-d
    beside,  # (UNBIASED) fp32 [FEW + 1, qa + pa]
    pulls,  # (UNBIASED) fp32 [pull_shares, columns of w], of `apart.pull_kernel`
    w,  # out, [qa + pa + 8, pa] for dX, [.., qa] for dY: d = [z | 1 1 0 ..] w
    factor,  # out (NEAR), fp32, 0-d: by which d must still be multiplied
    taken_product,  # out (UNBIASED), fp32 [FEW, columns of w]: ``beside`` times w before it is rounded
    pull,  # out (UNBIASED), fp32 [columns of w]: the sum of ``pulls`` over n - 2
    p,  # columns of x
    q,  # columns of y
    pull_shares,  # (UNBIASED) the number of shares in ``pulls``
    SIDE: tl.constexpr,  # 0: of x, [2 d_kl C; 4 d_kk A; bias]; 1: of y, [4 d_ll B; 2 d_kl C^T; bias]
    UNBIASED: tl.constexpr,  # further terms are added to d, and then it is scaled (`apart.add_kernel`)
    TF32: tl.constexpr,  # whether w is rounded to tf32; else to its dtype
    NEAR: tl.constexpr,  # w is scaled near 1: fp16, UNBIASED
    FEW: tl.constexpr,  # (UNBIASED) how many rows were taken out
    TAKEN: tl.constexpr,  # (UNBIASED) FEW or more, a power of two
    PRECISION: tl.constexpr,  # (UNBIASED) of ``taken_product``: "ieee" or "tf32x3"
    HEIGHT: tl.constexpr,  # rows of w at a time
    BLOCK: tl.constexpr,  # columns of w per program
):
    """Grid (blocks of columns of w). The bias is minus the means times w, as a sum of two numbers of w's dtype."""
    pa, qa = padded_width(p), padded_width(q)
    if UNBIASED:
        outer, cross, own = weights_apart(coefficients, SIDE, grad)
        x_lives, y_lives = tl.load(coefficients + ROOM_K) != 0.0, tl.load(coefficients + ROOM_L) != 0.0
        cross = tl.where(x_lives & y_lives, cross, 0.0)
        own = tl.where(y_lives if SIDE else x_lives, own, 0.0)
    else:
        outer, cross, own = weights_of(coefficients, SIDE, tl.sqrt(tl.load(coefficients + KL)) / 16.0, grad)
        if NEAR:
            tl.store(factor, outer.to(tl.float32), mask=tl.program_id(0) == 0)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = qa if SIDE else pa
    bias = tl.zeros([HEIGHT, BLOCK], tl.float32)
    if UNBIASED:
        taken = tl.arange(0, TAKEN)
        products = tl.zeros([TAKEN, BLOCK], tl.float32)
    for start in range(0, qa + pa, HEIGHT):
        rows = start + tl.arange(0, HEIGHT)
        inside = (rows < qa + pa)[:, None] & (columns < width)[None, :]
        offsets, of_y = rows[:, None].to(tl.int64) * width + columns[None, :], (rows < qa)[:, None]
        if SIDE:
            tile = tl.load(b + rows[:, None] * qa + columns[None, :], mask=inside & of_y, other=0.0) * own
            turned = columns[None, :] * pa + (rows - qa)[:, None]
            tile += tl.load(ca + turned, mask=inside & (rows >= qa)[:, None], other=0.0) * cross
        else:
            tile = tl.load(ca + offsets, mask=inside, other=0.0) * tl.where(of_y, cross, own)
        if UNBIASED:
            heavy = taken_rows(beside, rows, qa + pa, qa + pa, FEW, TAKEN)
            products = tl.dot(heavy, tile, products, input_precision=PRECISION)
        tile = rounded(tile if NEAR else (tile * outer).to(tl.float32), w, TF32)
        tl.store(w + offsets, tile, mask=inside)
        mean = tl.load(means + rows, mask=rows < qa + pa, other=0.0)
        bias -= tile.to(tl.float32) * mean[:, None]
    if UNBIASED:
        inside = (taken < FEW)[:, None] & (columns < width)[None, :]
        tl.store(taken_product + taken[:, None] * width + columns[None, :], products, mask=inside)
        mean = column_sums(pulls, columns, width, pull_shares) / (tl.load(coefficients + ROWS) - 2.0)
        tl.store(pull + columns, mean.to(tl.float32), mask=columns < width)
    total = tl.sum(bias, 0)
    high = rounded(total, w, TF32)
    low = rounded(total - high.to(tl.float32), w, TF32)
    eight = tl.arange(0, 8)[:, None]
    tile = tl.where(eight == 0, high[None, :], tl.where(eight == 1, low[None, :], 0.0))
    tl.store(w + (qa + pa + eight).to(tl.int64) * width + columns[None, :], tile, mask=(columns < width)[None, :])


@triton.jit
def expm1(x):
    """exp(x) - 1; near zero, where the difference cancels, x (1 + x/2 (1 + x/3 (1 + ...)))."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(8):
        series = 1.0 + series * x * (1.0 / (9 - i))
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def gram_rows_kernel(
    grams,  # fp32 [2, n, n]: K and L; GAUSSIAN: in, squared distances; out, K - c and L - c, UNBIASED with diagonal 0
    bandwidths,  # fp64 [2, 4] (GAUSSIAN): f, t, c of each side
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    zx,  # [n + 1 or more, pa]; out (linear): row n
    zy,  # [n + 1 or more, qa]; out (linear): row n
    sums,  # fp32 [shares, qa + pa + 8]
    scales,  # fp32 [2]
    rows,  # out, fp64 [2, n]: row sums of K and L, UNBIASED without the diagonals
    tops,  # out (GAUSSIAN), fp32 [2, blocks]: the largest off-diagonal entries of K
    slots,  # fp64 [2, 3, blocks]: partial sums of the programs
    counters,  # int32 [1], 0 before and after
    coefficients,  # out, fp64 [COEFFICIENTS]: sizes, totals and rooms
    n,  # rows of x and y
    p,  # columns of x
    q,  # columns of y
    shares,  # the number of shares in ``sums``
    GAUSSIAN: tl.constexpr,  # whether the kernels are Gaussian; else linear
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    UNBIASED: tl.constexpr,  # whether the estimator is the unbiased one; else the biased
    TF32: tl.constexpr,  # (linear) whether row n of z is rounded to tf32; else to its dtype
    HEIGHT: tl.constexpr,  # rows of K or L per program
    LENGTH: tl.constexpr,  # columns of K or L that are read at a time
    BLOCK: tl.constexpr,  # (linear) columns of z per program
):
    """Grid (blocks of rows of K, of L; linear: of columns of z): row sums, and minus the means of z as its row n.

    Gaussian kernels are computed from distances on the way, c expm1(t - f d), without loss where K is nearly constant.
    """
    program, blocks = tl.program_id(0), tl.cdiv(n, HEIGHT)
    pa, qa = padded_width(p), padded_width(q)
    if program < 2 * blocks:
        side, block = program // blocks, program % blocks
        gram = grams + side.to(tl.int64) * n * n
        i = block * HEIGHT + tl.arange(0, HEIGHT)
        total = tl.zeros([HEIGHT], tl.float64)
        if GAUSSIAN:
            counted_i = counts(mask, i, n, MASKED)
            own = bandwidths + 4 * side
            factor, typical = tl.load(own).to(tl.float32), tl.load(own + 1).to(tl.float32)
            level = tl.load(own + 2).to(tl.float32)
            edge = 0.0 if UNBIASED else -expm1(-typical)  # 1 - c, which cancels where t is small
            top = tl.zeros([HEIGHT], tl.float32)
            # The error of an entry is c times that of t, so these are the norms whose products bound the errors.
            diagonal = tl.where(counted_i, tl.load(own + 1) * tl.load(own + 2), 0.0)
        else:
            diagonal = tl.load(gram + i.to(tl.int64) * (n + 1), mask=i < n, other=0.0).to(tl.float64)
        for start in range(0, n, LENGTH):
            j = start + tl.arange(0, LENGTH)
            inside = (i < n)[:, None] & (j < n)[None, :]
            other = i[:, None] != j[None, :]
            places = gram + i[:, None].to(tl.int64) * n + j[None, :]
            if GAUSSIAN:
                counted = counted_i[:, None] & counts(mask, j, n, MASKED)[None, :]
                tile = level * expm1(typical - factor * tl.load(places, mask=inside, other=0.0))
                top = tl.maximum(top, tl.max(tl.where(counted & other, tile + level, 0.0), 1))
                tile = tl.where(counted, tl.where(other, tile, edge), 0.0)
                tl.store(places, tile, mask=inside)
            else:
                tile = tl.load(places, mask=inside & other if UNBIASED else inside, other=0.0)
            total += tl.sum(tile, 1).to(tl.float64)
        tl.store(rows + side * n + i, total, mask=i < n)
        parts = slots + 3 * side * blocks + block
        tl.store(parts, tl.sum(total, 0))
        tl.store(parts + blocks, tl.sum(diagonal, 0))
        tl.store(parts + 2 * blocks, tl.sum(diagonal * diagonal, 0))
        if GAUSSIAN:
            tl.store(tops + side * blocks + block, tl.max(top, 0))
    elif not GAUSSIAN:
        columns = (program - 2 * blocks) * BLOCK + tl.arange(0, BLOCK)
        mean = column_sums(sums, columns, qa + pa + 8, shares)
        mean = mean / shifted_sizes(sums, scales, qa + pa + 8, shares)[2]
        mean = rounded(-mean.to(tl.float32), zx, TF32)
        row = tl.cast(n, tl.int64)
        tl.store(zy + row * qa + columns, mean, mask=columns < qa)
        tl.store(zx + row * pa + columns - qa, mean, mask=(columns >= qa) & (columns < qa + pa))
    if arrive(counters, tl.num_programs(0)):
        tl.store(counters, 0)
        scale_x, scale_y, count = shifted_sizes(sums, scales, qa + pa + 8, shares)
        if GAUSSIAN:  # its kernels do not depend on the features' scales
            scale_x, scale_y = 1.0, 1.0
        store_sizes(coefficients, (scale_x, scale_y, count))
        store_totals(coefficients, slots, blocks, UNBIASED)


@triton.jit
def gram_mix_kernel(
    grams,  # fp32 [2, n, n]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    shifts,  # fp64 [2, n]: of their rows
    coefficients,  # fp64 [COEFFICIENTS]
    grad,  # 0-d
    m,  # out, [n, n + 1 or more]: column n is the row sum, further columns are zero: d = m z
    factor,  # out (NEAR), fp32, 0-d: by which d must still be multiplied
    n,  # rows and columns of K and L
    SIDE: tl.constexpr,  # 0: for dX; 1: for dY
    UNBIASED: tl.constexpr,  # whether the estimator is the unbiased one: then the diagonal of m is zero
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    TF32: tl.constexpr,  # whether m is rounded to tf32; else to its dtype
    NEAR: tl.constexpr,  # fp16: m is scaled near 1
    HEIGHT: tl.constexpr,  # rows per program
    LENGTH: tl.constexpr,  # columns that are read at a time
):
    """Grid (blocks of rows): the matrix m by which z is multiplied for a gradient."""
    pitch = padded_width(n + 1)
    size = tl.sqrt(tl.load(coefficients + KK + 1 - SIDE) / tl.load(coefficients + ROWS))
    outer, a, b = weights_of(coefficients, SIDE, size, grad)
    if NEAR:
        tl.store(factor, outer.to(tl.float32), mask=tl.program_id(0) == 0)
    i = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    counted_i, shifts_i = counts(mask, i, n, MASKED)[:, None], mixed_shifts(shifts, i, SIDE, a, b, n)[:, None]
    own, other = grams + tl.cast(n, tl.int64) * n * SIDE, grams + tl.cast(n, tl.int64) * n * (1 - SIDE)
    total = tl.zeros([HEIGHT, LENGTH], tl.float32)
    for start in range(0, n, LENGTH):
        j = start + tl.arange(0, LENGTH)
        inside = (i < n)[:, None] & (j < n)[None, :]
        offsets = i[:, None].to(tl.int64) * n + j[None, :]
        tile = tl.load(other + offsets, mask=inside, other=0.0) * a + tl.load(own + offsets, mask=inside, other=0.0) * b
        tile -= shifts_i + mixed_shifts(shifts, j, SIDE, a, b, n)[None, :]
        keep = counted_i & counts(mask, j, n, MASKED)[None, :]
        if UNBIASED:
            keep = keep & (i[:, None] != j[None, :])
        tile = tl.where(keep, tile if NEAR else (tile * outer).to(tl.float32), 0.0)
        tile = rounded(tile, m, TF32)
        tl.store(m + i[:, None].to(tl.int64) * pitch + j[None, :], tile, mask=inside)
        total += tile.to(tl.float32)
    sums = rounded(tl.sum(total, 1), m, TF32)
    last = n + tl.arange(0, 8)[None, :]
    tile = tl.where(last == n, sums[:, None], 0.0)
    tl.store(m + i[:, None].to(tl.int64) * pitch + last, tile, mask=(i < n)[:, None] & (last < pitch))
