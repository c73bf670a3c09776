r"""The bandwidths of Gaussian kernels: the exact median of squared distances by radix select, and what follows from it.

Non-negative floats are ordered as their bit patterns. A launch finds one digit of both medians, the highest first: each
program counts the digits of its tiles, among distances that begin with the digits found so far, and the last program
of a side adds the counts. No sort, no atomics on counts, no synchronisation.
"""

from __future__ import annotations

import struct
import sys

import torch
import triton
import triton.language as tl

from ...types import RBF
from ..library_rbf import LIMIT, STEEPEST
from .centre import counts
from .finish import shifted_sizes
from .reduce import arrive, sum_slots, upper_tile
from .shift import padded_width

# With Triton 3.6 `tl.histogram` counts a warp's bins 32 at a time: 16 distances of a thread take 128 population counts,
# for digits of 11 bits 1,024.
BITS, BINS = tl.constexpr(8), tl.constexpr(256)
PLACES = (24, 16, 8, 0)  # of the digits' lowest bits in a pattern
TOP = tl.constexpr(PLACES[0])
TOGETHER = tl.constexpr(16)  # rows of slots that are loaded at a time
STEEP, FAR = tl.constexpr(STEEPEST[torch.float32]), tl.constexpr(LIMIT[torch.float32])


@triton.jit
def blocks_of(side, p, q, SHIFTED: tl.constexpr):
    """The first block of columns of this side in ``norms`` of `shift.shift_kernel`, and the one after its last."""
    blocks_y = tl.cdiv(q, SHIFTED)
    return tl.where(side == 0, blocks_y, 0), blocks_y + tl.where(side == 0, tl.cdiv(p, SHIFTED), 0)


@triton.jit(do_not_specialize=["place", "rule_x", "rule_y"])  # one binary for all of them
def select_kernel(
    grams,  # fp32 [2, n, n]: squared distances; their upper halves are read, once
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    norms,  # (FIXED) fp32 [blocks of SHIFTED columns of y, then of x, n]: squares of rows
    sums,  # fp32 [shares, qa + pa + 8]
    scales,  # fp32 [2]
    histograms,  # int32 [2, programs, BINS]
    found,  # int32 [2, 2]: of each side the median's digits so far, and its rank among the distances that have them
    counters,  # int32 [2], 0 before and after
    bandwidths,  # out, fp64 [2, 4]: f, t, c and the features' scale of each side, from the digits so far
    n,  # rows and columns of the distances; at most 2^15
    p,  # columns of x
    q,  # columns of y
    shares,  # the number of shares in ``sums``
    place,  # of the digit's lowest bit: 24, 16, 8, then 0
    rule_x,  # of x, from `rules`: FIXED sigma, else the factor by which the median's root is multiplied
    rule_y,  # of y
    FIXED: tl.constexpr,  # sigma is given
    NONZERO: tl.constexpr,  # the median is that of the distances that are not zero; else of the whole matrix
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    SHIFTED: tl.constexpr,  # columns of a block in ``norms``
    BLOCK: tl.constexpr,  # rows and columns of a tile
):
    """Grid (programs, sides): the next digit of the medians, with the last one the bandwidths.

    A distance stands twice in the matrix: the lower middle one of 2m is the one of rank (m - 1) // 2 above the
    diagonal; with the diagonal's n zeros before them it has rank ((n^2 - 1) // 2 - n) // 2, below 0 on the diagonal.
    """
    program, programs, side = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    bins = tl.arange(0, BINS)
    histograms += side * programs * BINS
    found += 2 * side
    if not FIXED:
        digits = tl.load(found, mask=place < TOP, other=0)
        grams += side.to(tl.int64) * n * n
        count = tl.zeros([BINS], tl.int32)
        tiles = tl.cdiv(n, BLOCK)
        entry = tl.arange(0, BLOCK * BLOCK)
        for tile in range(program, tiles * (tiles + 1) // 2, programs):
            row_tile, column_tile = upper_tile(tile, tiles)
            i, j = row_tile * BLOCK + entry // BLOCK, column_tile * BLOCK + entry % BLOCK
            inside = (i < j) & counts(mask, i, n, MASKED) & counts(mask, j, n, MASKED)
            distance = tl.load(grams + i.to(tl.int64) * n + j, mask=inside, other=0.0)
            pattern = distance.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # without the sign, which a NaN may have
            if NONZERO:
                inside = inside & (pattern > 0)
            inside = inside & (pattern >> place >> BITS == digits)
            count += tl.histogram((pattern >> place) & (BINS - 1), BINS, mask=inside)
        tl.store(histograms + program * BINS + bins, count)
    if arrive(counters + side, programs):
        tl.store(counters + side, 0)
        width = padded_width(q) + padded_width(p) + 8
        scale_x, scale_y, rows = shifted_sizes(sums, scales, width, shares)
        scale = tl.where(side == 0, scale_x, scale_y)
        rule = tl.where(side == 0, rule_x, rule_y).to(tl.float64, bitcast=True)
        if FIXED:
            begin, end = blocks_of(side, p, q, SHIFTED)
            typical = 2.0 * sum_slots(norms + begin * n, 0, (end - begin) * n) / tl.maximum(rows, 1.0)  # their mean
            square = scale * rule * (scale * rule)
        else:
            count = tl.zeros([BINS], tl.int32)
            for first in range(0, programs, TOGETHER):
                slot = first + tl.arange(0, TOGETHER)[:, None]
                # .cg bypasses L1, which is not coherent: other programs wrote these slots in this launch.
                slots = histograms + slot * BINS + bins[None, :]
                count += tl.sum(tl.load(slots, mask=slot < programs, other=0, cache_modifier=".cg"), 0)
            rank = tl.load(found + 1, mask=place < TOP, other=0)
            if place == TOP:
                if NONZERO:
                    rank = (tl.sum(count, 0) - 1) >> 1
                else:
                    whole = rows.to(tl.int32)
                    rank = (((whole * whole - 1) >> 1) - whole) >> 1
            digit = tl.sum((tl.cumsum(count, 0) <= rank).to(tl.int32), 0)  # 0 for rank -1, that of no distances
            digits = digits * BINS + digit
            tl.store(found, digits)
            tl.store(found + 1, rank - tl.sum(tl.where(bins < digit, count, 0), 0))
            typical = digits.to(tl.float32, bitcast=True).to(tl.float64)  # the median once all digits are there
            square = typical * (rule * rule)
        none = square == 0.0
        factor = tl.where(none, 0.0, 0.5 / tl.where(none, 1.0, square))
        factor = tl.where(factor > STEEP, STEEP, factor)  # NaN stays
        typical *= factor
        typical = tl.where(typical > FAR, FAR, typical).to(tl.float32).to(tl.float64)  # rounded as K's distances are
        bandwidths += 4 * side
        tl.store(bandwidths, factor)
        tl.store(bandwidths + 1, typical)
        tl.store(bandwidths + 2, tl.exp(-typical))
        tl.store(bandwidths + 3, scale)


def rules(kernel: RBF) -> dict[str, int]:
    """The arguments ``rule_x`` and ``rule_y``: the bits of fp64 numbers, which Triton would round to fp32."""
    # Bits below those of fp64's normal numbers could be those of a 32-bit integer; such numbers have the square 0, too.
    x, y = (max(number, sys.float_info.min) for number in kernel.sigmas or (kernel.threshold or 1.0,) * 2)
    return dict(zip(("rule_x", "rule_y"), struct.unpack("qq", struct.pack("dd", x, y)), strict=True))
