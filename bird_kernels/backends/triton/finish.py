r"""What follows the library's products of shifted operands: centring of the small results, moments, weights.

The programs of a finishing launch centre their tiles, leave their shares of the moments in fp64 slots, and the last one
to arrive combines them (`reduce`). Products of features are centred in fp64 (cross); Gram matrices are centred in fp32,
by shifts that fp64 made of their row sums. Tiles are squared in fp64 all the same: rows that dominate have products
whose squares leave fp32's range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import counts
from .reduce import D_KK, D_KL, KL, LL, SCALE_X, SUM_K, SUM_L, arrive, finish, sizes_of, sum_slots, upper_tile
from .shift import round_tf32


@triton.jit
def _column_sums(sums, columns, width, shares):
    """Sums of these columns over all rows, fp64; ``sums`` [shares, width], at most 64 shares."""
    share = tl.arange(0, 64)
    inside = (share < shares)[:, None] & (columns < width)[None, :]
    return tl.sum(tl.load(sums + share[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float64), 0)


@triton.jit
def _row_count(sums, width, shares):
    """How many rows count: the sum of the ones in the last eight columns, fp64."""
    return tl.sum(_column_sums(sums, width - 8 + tl.arange(0, 1), width, shares), 0)


@triton.jit
def _centred(
    products, sums, rows, columns, right, height, width, shares, total, n, parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the sum of products [parts, height, width], raw and minus (column sums of z)^2 / n; fp64.

    ``right``: which columns of z the tile's columns are.
    """
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
    raw = tl.zeros([BLOCK, BLOCK], tl.float64)
    for _ in range(0, parts):
        raw += tl.load(products + offsets, mask=inside, other=0.0).to(tl.float64)
        products += height.to(tl.int64) * width
    left = _column_sums(sums, rows, total, shares)
    mean = _column_sums(sums, right, total, shares) / n
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
    counter,  # 0 before and after
    value,  # out, fp32, 0-d
    coefficients,  # out, fp64 [11]
    pa, qa, parts, shares,
    tiles_x, tiles_y,  # tiles in a row of [C; A], and of B
    tiles,  # of [C; A]
    STATISTIC: tl.constexpr,
    STORE_B: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of [C; A], then of B)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    width = qa + pa + 8
    n = _row_count(sums, width, shares)
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
    if arrive(counter, programs):
        trace_x, trace_y = sum_slots(slots, 3, programs), sum_slots(slots, 4, programs)
        finish(
            slots=slots,
            programs=programs,
            room_k=trace_x * trace_x,
            room_l=trace_y * trace_y,
            sum_k=0.0,
            sum_l=0.0,
            scale_x=tl.load(scales),
            scale_y=tl.load(scales + 1),
            n=n,
            value=value,
            coefficients=coefficients,
            STATISTIC=STATISTIC,
            UNBIASED=False,
        )


@triton.jit
def _weights(coefficients, grad, side, size, goal, NEAR: tl.constexpr):
    """What the other side's matrix is multiplied by, what one's own, and the whole result afterwards; fp64.

    NEAR (fp16): the matrix that is rounded is brought to the size ``goal``, from ``size`` of the other side's.
    """
    cross = 2.0 * tl.load(coefficients + D_KL)
    own = 4.0 * tl.load(coefficients + D_KK + side)
    factor = tl.load(coefficients + SCALE_X + side) * tl.load(grad).to(tl.float64)
    if NEAR:
        size *= tl.abs(cross)
        near = tl.where(size == 0.0, 0.0, goal / tl.where(size == 0.0, 1.0, size))
        return cross * near, own * near, factor * size / goal
    else:
        return cross * factor, own * factor, 0.0 * factor


@triton.jit
def _rounded(x, like, TF32: tl.constexpr):
    """fp32 as a product will see it: in the dtype of ``like``, or with tf32's ten bits."""
    if TF32:
        return round_tf32(x)
    else:
        return x.to(like.dtype.element_ty)


@triton.jit
def cross_mix_kernel(
    ca,  # fp32 [qa + pa, pa]
    b,  # fp32 [qa, qa]
    means,  # fp32 [qa + pa]
    coefficients,  # fp64 [11]
    grad,  # 0-d
    w,  # out, [qa + pa + 8, pa] for dX, [.., qa] for dY: d = [z | 1 1 0 ..] w
    factor,  # out (NEAR), fp32, 0-d: what d is still to be multiplied by
    pa, qa,
    SIDE: tl.constexpr,  # 0: of x, [2 d_kl C; 4 d_kk A; bias]; 1: of y, [4 d_ll B; 2 d_kl C^T; bias]
    TF32: tl.constexpr,
    NEAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of columns of w). The bias is minus the means times w, in two numbers of w's dtype."""
    cross, own, after = _weights(coefficients, grad, SIDE, tl.sqrt(tl.load(coefficients + KL)), 16.0, NEAR)
    if NEAR:
        tl.store(factor, after.to(tl.float32), mask=tl.program_id(0) == 0)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = qa if SIDE else pa
    bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, qa + pa, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < qa + pa)[:, None] & (columns < width)[None, :]
        offsets, of_y = rows[:, None].to(tl.int64) * width + columns[None, :], (rows < qa)[:, None]
        if SIDE:
            tile = (
                tl.load(b + rows[:, None] * qa + columns[None, :], mask=inside & of_y, other=0.0).to(tl.float64) * own
            )
            turned = columns[None, :] * pa + (rows - qa)[:, None]
            tile += tl.load(ca + turned, mask=inside & (rows >= qa)[:, None], other=0.0).to(tl.float64) * cross
        else:
            tile = tl.load(ca + offsets, mask=inside, other=0.0).to(tl.float64) * tl.where(of_y, cross, own)
        tile = _rounded(tile.to(tl.float32), w, TF32)
        tl.store(w + offsets, tile, mask=inside)
        mean = tl.load(means + rows, mask=rows < qa + pa, other=0.0)
        bias -= tile.to(tl.float32) * mean[:, None]
    total = tl.sum(bias, 0)
    high = _rounded(total, w, TF32)
    low = _rounded(total - high.to(tl.float32), w, TF32)
    eight = tl.arange(0, 8)[:, None]
    tile = tl.where(eight == 0, high[None, :], tl.where(eight == 1, low[None, :], 0.0))
    tl.store(w + (qa + pa + eight).to(tl.int64) * width + columns[None, :], tile, mask=(columns < width)[None, :])


@triton.jit
def _offsets(rows, index, side, n, count, total, UNBIASED: tl.constexpr):
    """a of a centred Gram matrix K_ij - a_i - a_j, from its row sums and their total; fp32."""
    sums = tl.load(rows + side * n + index, mask=index < n, other=0.0).to(tl.float64)
    if UNBIASED:
        return ((sums - 0.5 * total / (count - 1.0)) / (count - 2.0)).to(tl.float32)
    else:
        return ((sums - 0.5 * total / count) / count).to(tl.float32)


@triton.jit
def _pairs(mask, i, j, n, MASKED: tl.constexpr, UNBIASED: tl.constexpr):
    """Which entries of a Gram matrix there are, and which of them count."""
    inside = (i < n)[:, None] & (j < n)[None, :]
    keep = counts(mask, i, n, MASKED)[:, None] & counts(mask, j, n, MASKED)[None, :]
    if UNBIASED:
        keep = keep & (i[:, None] != j[None, :])
    return inside, keep


@triton.jit
def _sum_rows(
    gram, rows, slots, block, blocks, n, UNBIASED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Row sums of a Gram matrix; their total, the trace and the diagonal's sum of squares into slots [3, blocks]."""
    i = block * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, STEP], tl.float32)
    for start in range(0, n, STEP):
        j = start + tl.arange(0, STEP)
        _, keep = _pairs(gram, i, j, n, False, UNBIASED)
        total += tl.load(gram + i[:, None].to(tl.int64) * n + j[None, :], mask=keep, other=0.0)
    sums = tl.sum(total, 1)
    tl.store(rows + i, sums, mask=i < n)
    diagonal = tl.load(gram + i.to(tl.int64) * (n + 1), mask=i < n, other=0.0).to(tl.float64)
    tl.store(slots + block, tl.sum(sums.to(tl.float64), 0))
    tl.store(slots + blocks + block, tl.sum(diagonal, 0))
    tl.store(slots + 2 * blocks + block, tl.sum(diagonal * diagonal, 0))


@triton.jit
def gram_rows_kernel(
    k,  # fp32 [n, n]
    l,  # fp32 [n, n]
    zx,  # [n + 1 or more, pa]; out: row n
    zy,  # [n + 1 or more, qa]; out: row n
    sums,  # fp32 [shares, qa + pa + 8]
    rows,  # out, fp32 [2, n]: row sums of K and L, UNBIASED without the diagonals
    slots,  # out, fp64 [2, 3, blocks]
    n, pa, qa, shares, blocks,
    UNBIASED: tl.constexpr,
    TF32: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows of K, of L; blocks of columns of z, whose means with a minus become row n)."""
    program = tl.program_id(0)
    if program < blocks:
        _sum_rows(k, rows, slots, program, blocks, n, UNBIASED, ROWS, STEP)
    elif program < 2 * blocks:
        _sum_rows(l, rows + n, slots + 3 * blocks, program - blocks, blocks, n, UNBIASED, ROWS, STEP)
    else:
        columns = (program - 2 * blocks) * STEP + tl.arange(0, STEP)
        width = qa + pa + 8
        mean = _column_sums(sums, columns, width, shares) / _row_count(sums, width, shares)
        mean = _rounded(-mean.to(tl.float32), zx, TF32)
        start = tl.cast(n, tl.int64)
        tl.store(zy + start * qa + columns, mean, mask=columns < qa)
        tl.store(zx + start * pa + columns - qa, mean, mask=(columns >= qa) & (columns < qa + pa))


@triton.jit
def gram_finish_kernel(
    k, l,  # fp32 [n, n]
    mask,  # bytes [n]
    rows,  # fp32 [2, n]
    totals,  # fp64 [2, 3, blocks], of `gram_rows_kernel`
    sums, scales,
    slots,  # fp64 [3, programs]
    counter, value, coefficients,
    n, width, shares, blocks,
    tiles,  # in a row
    STATISTIC: tl.constexpr,
    UNBIASED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles): moments of the centred Gram matrices, which nobody stores."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    row, column = upper_tile(program, tiles)
    i, j = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    count = _row_count(sums, width, shares)
    total_k, total_l = sum_slots(totals, 0, blocks), sum_slots(totals, 3, blocks)
    inside, keep = _pairs(mask, i, j, n, MASKED, UNBIASED)
    offsets = i[:, None].to(tl.int64) * n + j[None, :]
    a = tl.load(k + offsets, mask=inside, other=0.0)
    a -= _offsets(rows, i, 0, n, count, total_k, UNBIASED)[:, None]
    a -= _offsets(rows, j, 0, n, count, total_k, UNBIASED)[None, :]
    b = tl.load(l + offsets, mask=inside, other=0.0)
    b -= _offsets(rows, i, 1, n, count, total_l, UNBIASED)[:, None]
    b -= _offsets(rows, j, 1, n, count, total_l, UNBIASED)[None, :]
    twice = tl.where(row == column, 1.0, 2.0).to(tl.float64)
    a, b = tl.where(keep, a, 0.0).to(tl.float64), tl.where(keep, b, 0.0).to(tl.float64)
    tl.store(slots + program, twice * tl.sum(tl.sum(a * b, 1), 0))
    tl.store(slots + programs + program, twice * tl.sum(tl.sum(a * a, 1), 0))
    tl.store(slots + 2 * programs + program, twice * tl.sum(tl.sum(b * b, 1), 0))
    if arrive(counter, programs):
        trace_k, trace_l = sum_slots(totals, 1, blocks), sum_slots(totals, 4, blocks)
        room_k, room_l = trace_k * trace_k, trace_l * trace_l
        if UNBIASED:
            room_k -= sum_slots(totals, 2, blocks)
            room_l -= sum_slots(totals, 5, blocks)
        finish(
            slots=slots,
            programs=programs,
            room_k=room_k,
            room_l=room_l,
            sum_k=total_k,
            sum_l=total_l,
            scale_x=tl.load(scales),
            scale_y=tl.load(scales + 1),
            n=count,
            value=value,
            coefficients=coefficients,
            STATISTIC=STATISTIC,
            UNBIASED=UNBIASED,
        )


@triton.jit
def gram_mix_kernel(
    own, other,  # fp32 [n, n]: K and L for dX, L and K for dY
    mask,  # bytes [n]
    rows,  # fp32 [2, n]
    coefficients,  # fp64 [11]
    grad,  # 0-d
    m,  # out, [n, 8 eighths]: column n is the sum of a row, the last ones are zero: d = m z
    factor,  # out (NEAR), fp32, 0-d
    n, eighths,
    SIDE: tl.constexpr,
    UNBIASED: tl.constexpr,
    MASKED: tl.constexpr,
    TF32: tl.constexpr,
    NEAR: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows)."""
    na = eighths * 8  # the compiler sees that rows are aligned
    _, _, count = sizes_of(coefficients)
    own_total, other_total = tl.load(coefficients + SUM_K + SIDE), tl.load(coefficients + SUM_L - SIDE)
    size = tl.sqrt(tl.load(coefficients + LL - SIDE))
    cross, self, after = _weights(coefficients, grad, SIDE, size, tl.sqrt(count), NEAR)
    if NEAR:
        tl.store(factor, after.to(tl.float32), mask=tl.program_id(0) == 0)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own_i = _offsets(rows, i, SIDE, n, count, own_total, UNBIASED)[:, None]
    other_i = _offsets(rows, i, 1 - SIDE, n, count, other_total, UNBIASED)[:, None]
    total = tl.zeros([ROWS, STEP], tl.float32)
    for start in range(0, n, STEP):
        j = start + tl.arange(0, STEP)
        inside, keep = _pairs(mask, i, j, n, MASKED, UNBIASED)
        offsets = i[:, None].to(tl.int64) * n + j[None, :]
        a = tl.load(own + offsets, mask=inside, other=0.0) - own_i
        a -= _offsets(rows, j, SIDE, n, count, own_total, UNBIASED)[None, :]
        b = tl.load(other + offsets, mask=inside, other=0.0) - other_i
        b -= _offsets(rows, j, 1 - SIDE, n, count, other_total, UNBIASED)[None, :]
        tile = (b.to(tl.float64) * cross + a.to(tl.float64) * self).to(tl.float32)
        tile = _rounded(tl.where(keep, tile, 0.0), m, TF32)
        tl.store(m + i[:, None].to(tl.int64) * na + j[None, :], tile, mask=inside)
        total += tile.to(tl.float32)
    sums = _rounded(tl.sum(total, 1), m, TF32)
    last = n + tl.arange(0, 8)[None, :]
    tile = tl.where(last == n, sums[:, None], 0.0)
    tl.store(m + i[:, None].to(tl.int64) * na + last, tile, mask=(i < n)[:, None] & (last < na))
