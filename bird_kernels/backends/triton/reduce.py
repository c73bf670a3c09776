r"""The end of a forward: fixed-order sums of the programs' slots, and `moments.combine` as a device function.

Every program writes its share of the moments to its own fp64 slot and then counts itself in. The one that arrives last
sums all slots in their order (bitwise repeatable, no float atomics), combines them and stores the value and the
coefficients. That costs one counter instead of a dozen launches of scalar operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .centre import row_count

WIDTH = tl.constexpr(256)


@triton.jit
def combine(
    kl, kk, ll, r_kl, r_kk, r_ll, t_k, t_l, n,
    STATISTIC: tl.constexpr, UNBIASED: tl.constexpr,
):  # fmt: skip
    """`moments.combine` in fp64; the two are held equal by a test. Returns value, d_kl, d_kk, d_ll."""
    least = 4.0 if UNBIASED else 2.0
    enough = n >= least
    n = tl.where(enough, n, 4.0)
    if UNBIASED:
        alpha = -2.0 / (n - 2.0)
        beta = 1.0 / ((n - 1.0) * (n - 2.0))
        norm = n * (n - 3.0)
    else:
        alpha = -2.0 / n
        beta = 1.0 / (n * n)
        norm = (n - 1.0) * (n - 1.0)
    valid = tl.where(enough, 1.0, float("nan")).to(tl.float64)
    hkl = kl + alpha * r_kl + beta * t_k * t_l
    if STATISTIC == "hsic":
        return valid * hkl / norm, valid / norm, 0.0 * hkl, 0.0 * hkl
    else:
        rounding = 64.0 * 1.1920928955078125e-07  # estimators.ROUNDING, fp32
        total_k = beta * t_k * t_k
        hkk = kk + alpha * r_kk + total_k
        k_dead = hkk <= rounding * (kk + r_kk + total_k)
        total_l = beta * t_l * t_l
        hll = ll + alpha * r_ll + total_l
        l_dead = hll <= rounding * (ll + r_ll + total_l)
        hkk = tl.where(k_dead, 1.0, hkk)
        hll = tl.where(l_dead, 1.0, hll)
        d_kl = valid * tl.where(k_dead | l_dead, 0.0, 1.0) / (tl.sqrt(hkk) * tl.sqrt(hll))
        cka = hkl * d_kl
        d_kk = -0.5 * cka / hkk
        d_ll = -0.5 * cka / hll
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
        offsets = start + tl.arange(0, WIDTH)
        # .cg: other programs wrote these a moment ago, and L1 is not coherent.
        total += tl.load(slots + index * count + offsets, mask=offsets < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def store_norm_sums(slots, program, programs, kappa, lam):
    """This program's share of <kappa,lambda>, <kappa,kappa>, <lambda,lambda>, sum(kappa), sum(lambda)."""
    tl.store(slots + 0 * programs + program, tl.sum(kappa * lam, 0).to(tl.float64))
    tl.store(slots + 1 * programs + program, tl.sum(kappa * kappa, 0).to(tl.float64))
    tl.store(slots + 2 * programs + program, tl.sum(lam * lam, 0).to(tl.float64))
    tl.store(slots + 3 * programs + program, tl.sum(kappa, 0).to(tl.float64))
    tl.store(slots + 4 * programs + program, tl.sum(lam, 0).to(tl.float64))


@triton.jit
def arrive(counter, programs):
    """True in the one program that comes last, after which every other program's stores are visible."""
    tl.debug_barrier()  # all threads of this program have stored before one of them counts it in
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == programs - 1


@triton.jit
def finish(
    counter, programs, slots, norm_slots, norm_programs, scale_x, scale_y, count, n, value, coefficients,
    MASKED: tl.constexpr, STATISTIC: tl.constexpr, UNBIASED: tl.constexpr, SUBTRACT: tl.constexpr,
):  # fmt: skip
    """Counts this program in; the one that comes last does what `_finish` says."""
    if arrive(counter, programs):
        _finish(
            slots, programs, norm_slots, norm_programs, value, coefficients, row_count(count, n, MASKED), scale_x,
            scale_y, STATISTIC, UNBIASED, SUBTRACT,
        )  # fmt: skip


@triton.jit
def _finish(
    slots, programs, norm_slots, norm_programs, value, coefficients, n, scale_x, scale_y,
    STATISTIC: tl.constexpr, UNBIASED: tl.constexpr, SUBTRACT: tl.constexpr,
):  # fmt: skip
    """Slots [3, programs] of kl, kk, ll and norm slots [5, norm_programs] -> value (0-d) and coefficients [11].

    SUBTRACT: the products include the diagonals (cross route), which the unbiased estimator takes off.
    """
    kl = sum_slots(slots, 0, programs)
    kk = sum_slots(slots, 1, programs)
    ll = sum_slots(slots, 2, programs)
    n = n.to(tl.float64)
    zero = 0.0 * n
    r_kl, r_kk, r_ll, sum_k, sum_l = zero, zero, zero, zero, zero
    hkl, hkk, hll = kl, kk, ll
    if UNBIASED:
        r_kl = sum_slots(norm_slots, 0, norm_programs)
        r_kk = sum_slots(norm_slots, 1, norm_programs)
        r_ll = sum_slots(norm_slots, 2, norm_programs)
        sum_k = sum_slots(norm_slots, 3, norm_programs)
        sum_l = sum_slots(norm_slots, 4, norm_programs)
        if SUBTRACT:
            hkl, hkk, hll = kl - r_kl, kk - r_kk, ll - r_ll
    result, d_kl, d_kk, d_ll = combine(hkl, hkk, hll, r_kl, r_kk, r_ll, -sum_k, -sum_l, n, STATISTIC, UNBIASED)
    scale_x = scale_x.to(tl.float64)
    scale_y = scale_y.to(tl.float64)
    if STATISTIC == "hsic":
        unscale = 1.0 / (scale_x * scale_x * scale_y * scale_y)
        result *= unscale
        d_kl *= unscale
    tl.store(value, result.to(tl.float32))
    tl.store(coefficients + 0, d_kl)
    tl.store(coefficients + 1, d_kk)
    tl.store(coefficients + 2, d_ll)
    tl.store(coefficients + 3, kl)
    tl.store(coefficients + 4, kk)
    tl.store(coefficients + 5, ll)
    tl.store(coefficients + 6, sum_k)
    tl.store(coefficients + 7, sum_l)
    tl.store(coefficients + 8, scale_x)
    tl.store(coefficients + 9, scale_y)
    tl.store(coefficients + 10, n)


@triton.jit
def upper_tile(index, tiles):
    """(row, column) of the ``index``-th tile on or above the diagonal of tiles x tiles, row by row."""
    width = 2 * tiles + 1
    guess = (width.to(tl.float32) - tl.sqrt((width * width - 8 * index).to(tl.float32))) * 0.5
    row = guess.to(tl.int32)
    # fp32 is exact up to 2,000 tiles; the guess is off by one at the most beyond.
    row = tl.where((row + 1) * tiles - (row + 1) * row // 2 <= index, row + 1, row)
    row = tl.where(row * tiles - row * (row - 1) // 2 > index, row - 1, row)
    return row, row + index - (row * tiles - row * (row - 1) // 2)
