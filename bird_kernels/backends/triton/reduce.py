r"""The end of a forward: fixed-order sums of the programs' slots, and `moments.combine` as a device function.

Every program writes its part of the moments to its own fp64 slot and then increments a counter. The last one sums all
slots in order (bitwise repeatable, no float atomics), combines them and stores the value and the
coefficients. That costs one counter instead of a dozen launches of scalar operations.

Moments here are those of centred matrices: <Kc,Lc>, <Kc,Kc> and <Lc,Lc>, of either estimator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...moments import ROUNDING, Coefficients

WIDTH = tl.constexpr(256)
# Indices into a vector of coefficients; the last two are written by a kernel that sums rows and read in `finish`.
NAMES = (*Coefficients._fields, "room_k", "room_l")
D_KL, D_KK, D_LL, KL, KK, LL, SUM_K, SUM_L, SCALE_X, SCALE_Y, ROWS, ROOM_K, ROOM_L = (
    tl.constexpr(NAMES.index(name))
    for name in ("d_kl", "d_kk", "d_ll", "kl", "kk", "ll", "sum_k", "sum_l", "scale_x", "scale_y", "n", *NAMES[-2:])
)
COEFFICIENTS = tl.constexpr(len(NAMES))
NOISE = tl.constexpr((ROUNDING * 2.0**-23) ** 2)  # rounding errors of a self-HSIC relative to its room, see `finish`


@triton.jit
def combine_centred(kl, kk, ll, n, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr):
    """`moments.combine` of centred matrices in fp64; a test holds the two equal. Returns value, d_kl, d_kk, d_ll.

    A side without variance must have kk or ll of exactly zero: callers set values that are rounding errors to zero.
    """
    enough = n >= (4.0 if UNBIASED else 2.0)
    valid = tl.where(enough, 1.0, float("nan")).to(tl.float64)
    if STATISTIC == "hsic":
        n = tl.where(enough, n, 4.0)
        norm = n * (n - 3.0) if UNBIASED else (n - 1.0) * (n - 1.0)
        return valid * kl / norm, valid / norm, 0.0 * kl, 0.0 * kl
    else:
        k_dead, l_dead = kk <= 0.0, ll <= 0.0  # false for NaN
        kk, ll = tl.where(k_dead, 1.0, kk), tl.where(l_dead, 1.0, ll)
        d_kl = valid * tl.where(k_dead | l_dead, 0.0, 1.0) / (tl.sqrt(kk) * tl.sqrt(ll))
        cka = kl * d_kl
        d_kk, d_ll = -0.5 * cka / kk, -0.5 * cka / ll
        if STATISTIC == "cka":
            return cka, d_kl, d_kk, d_ll
        elif STATISTIC == "sqrt_cka_loss":
            none = cka <= 0.0
            root = tl.sqrt(tl.where(none, 1.0, cka))
            slope = tl.where(none, 0.0, -0.5) / root
            return 1.0 - tl.where(none, 0.0, root), slope * d_kl, slope * d_kk, slope * d_ll
        else:
            return 1.0 - cka, -d_kl, -d_kk, -d_ll


@triton.jit
def sum_slots(slots, index, count):
    """The sum of row ``index`` of slots [*, count], in a fixed order; fp64."""
    total = tl.zeros([WIDTH], tl.float64)
    for start in range(0, count, WIDTH):
        places = start + tl.arange(0, WIDTH)
        # .cg bypasses L1, which is not coherent: other programs wrote these slots in this launch.
        total += tl.load(slots + index * count + places, mask=places < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def arrive(counter, programs):
    """True in the last program to call it, in which the stores of all other programs are visible."""
    tl.debug_barrier()  # all threads of this program have stored before one of them increments the counter
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == programs - 1


@triton.jit
def finish(
    slots,  # fp64 [3, programs]: parts of kl, kk and ll
    programs,
    coefficients,  # out, fp64 [COEFFICIENTS]
    value,  # out, fp32, 0-d
    sizes,  # scales of x and of y and the number of rows, as `sizes_of`
    rooms,  # of K and L: the squares before centring; kk or ll within their rounding error is set to zero
    STATISTIC: tl.constexpr,
    UNBIASED: tl.constexpr,
):
    """Sums the moments, and stores what `store_results` does."""
    kl, kk, ll = sum_slots(slots, 0, programs), sum_slots(slots, 1, programs), sum_slots(slots, 2, programs)
    kk = tl.where(kk <= rooms[0] * NOISE, 0.0, kk)
    ll = tl.where(ll <= rooms[1] * NOISE, 0.0, ll)
    store_results(kl, kk, ll, coefficients, value, sizes, STATISTIC, UNBIASED)


@triton.jit
def store_results(kl, kk, ll, coefficients, value, sizes, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr):
    """Stores the value, the moments and the derivatives."""
    result, d_kl, d_kk, d_ll = combine_centred(kl, kk, ll, sizes[2], STATISTIC, UNBIASED)
    if STATISTIC == "hsic":
        unscale = 1.0 / (sizes[0] * sizes[0] * sizes[1] * sizes[1])
        result *= unscale
        d_kl *= unscale
    tl.store(value, result.to(tl.float32))
    tl.store(coefficients + D_KL, d_kl)
    tl.store(coefficients + D_KK, d_kk)
    tl.store(coefficients + D_LL, d_ll)
    tl.store(coefficients + KL, kl)
    tl.store(coefficients + KK, kk)
    tl.store(coefficients + LL, ll)


@triton.jit
def store_sizes(coefficients, sizes):
    """Stores the scales of x and of y and the number of rows, fp64."""
    tl.store(coefficients + SCALE_X, sizes[0])
    tl.store(coefficients + SCALE_Y, sizes[1])
    tl.store(coefficients + ROWS, sizes[2])


@triton.jit
def store_no_totals(coefficients):
    """Zeros where nothing is read: a stash is compared, copied and saved as a whole."""
    tl.store(coefficients + SUM_K, 0.0)
    tl.store(coefficients + SUM_L, 0.0)
    tl.store(coefficients + ROOM_K, 0.0)
    tl.store(coefficients + ROOM_L, 0.0)


@triton.jit
def sizes_of(coefficients):
    """Scales of x and of y and the number of rows, fp64."""
    return tl.load(coefficients + SCALE_X), tl.load(coefficients + SCALE_Y), tl.load(coefficients + ROWS)


@triton.jit
def weights_of(coefficients, side, size, grad):
    """d, a and b of d (a Lc + b Kc), twice ``grad`` times the value's derivative with respect to K (``side`` 1: to L).

    The norm of a Lc is |Lc| / ``size``, so that its entries can be rounded to a dtype of small range; d, fp64, includes
    the features' scale; a and b are fp32.
    """
    inner = tl.load(coefficients + D_KL) * size
    dead = inner == 0.0
    own = tl.where(dead, 0.0, 2.0 * tl.load(coefficients + D_KK + side) / inner)
    outer = 2.0 * inner * tl.load(coefficients + SCALE_X + side) * tl.load(grad).to(tl.float64)
    return outer, tl.where(dead, 0.0, 1.0 / size).to(tl.float32), own.to(tl.float32)


@triton.jit
def upper_tile(index, tiles):
    """(row, column) of the ``index``-th tile on or above the diagonal of tiles x tiles, row by row."""
    width = 2 * tiles + 1
    guess = (width.to(tl.float32) - tl.sqrt((width * width - 8 * index).to(tl.float32))) * 0.5
    row = guess.to(tl.int32)
    # In fp32 the guess is exact up to 2,000 tiles, and beyond off by one at most.
    row = tl.where((row + 1) * tiles - (row + 1) * row // 2 <= index, row + 1, row)
    row = tl.where(row * tiles - row * (row - 1) // 2 > index, row - 1, row)
    return row, row + index - (row * tiles - row * (row - 1) // 2)
