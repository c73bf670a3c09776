r"""The backward of Gram matrices in memory: one launch for the gradients of all sides of some pairs.

With linear kernels dX = M X, M = a Lc + b Kc. With Gaussian ones row i of dX is 2 f sum_j W_ij (x_j - x_i), with W the
elementwise product of M and K off the diagonal. M and W are computed in fp32, since they cancel as CKA -> 1, and scaled
near 1 before they are rounded: Lc to n Lc/|L|, K to at most 1.

The sides are tuples of arguments and their widths constants, so a program selects its side (x and y of the first pair,
of the second, ...) by a chain of selects, nothing is copied to the device, and CUDA graphs can capture the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...plan import Tiling, ceil_div, gradient_tiling
from ...types import Problem, Shapes, Stash
from . import double
from .centre import counts, largest_of, shifted_tile
from .launch import Launch, aligned, as_bytes, many_steps, multiprocessors
from .reduce import COEFFICIENTS, KK, ROWS, SCALE_X, WIDTH, weights_of
from .shift import padded_width


@triton.jit
def entry(values, index, COUNT: tl.constexpr):
    """values[index] of a tuple of COUNT numbers or pointers."""
    found = values[0]
    for i in tl.static_range(COUNT):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def side_of(block, BEGINS: tl.constexpr, COUNT: tl.constexpr):
    """The index of the side to which a block belongs: the last one of COUNT that begins at or before it."""
    side = 0
    for i in tl.static_range(COUNT):
        side = tl.where(block >= BEGINS[i], i, side)
    return side


@triton.jit
def _weights(
    grams,  # fp32 [n, n] each: the side's own matrix and the other
    i,  # rows of the tile
    j,  # columns
    counted_i,  # which of the rows count
    counted_j,  # which of the columns count
    shifts,  # fp64 [2, n]
    side,
    a,
    b,
    n,
    levels,  # (GAUSSIAN) c, and the number by which K is multiplied
    GAUSSIAN: tl.constexpr,
    UNBIASED: tl.constexpr,
):
    """A tile of M = a Lc + b Kc, with Gaussian kernels of W; fp32."""
    inside = counted_i[:, None] & counted_j[None, :]
    if GAUSSIAN:
        inside = inside & (i[:, None] != j[None, :])
    offsets = i[:, None] * n + j[None, :]
    k = tl.load(grams[0] + offsets, mask=inside, other=0.0)
    m = tl.load(grams[1] + offsets, mask=inside, other=0.0) * a + k * b
    if GAUSSIAN or UNBIASED:
        shifts_i = double.mixed_shifts(shifts, i, side, a, b, n)
        m -= shifts_i[:, None] + double.mixed_shifts(shifts, j, side, a, b, n)[None, :]
    if GAUSSIAN:
        return tl.where(inside, m * ((k + levels[0]) * levels[1]), 0.0)
    elif UNBIASED:
        return tl.where(i[:, None] == j[None, :], 0.0, m)
    else:
        return m


@triton.jit
def backward_kernel(
    wanted,  # the sides of which the gradient is wanted: [n, d] each, dense; GAUSSIAN: z [n, d padded], shifted
    gradients,  # out, their gradients [n, d]
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    locations,  # fp32 [2, d] of each side (linear)
    grams,  # fp32 [pairs, 2, n, n]: K and L; GAUSSIAN: K - c and L - c
    shifts,  # fp64 [pairs, 2, n] (unbiased or GAUSSIAN): of their rows
    bandwidths,  # fp64 [2, 4] (GAUSSIAN): f, t, c and the features' scale
    tops,  # fp32 [2, blocks] (GAUSSIAN): the largest off-diagonal entries of K
    coefficients,  # fp64 [pairs, COEFFICIENTS]
    grad,  # upstream gradient of the values
    stride_grad,  # between the elements of ``grad``, one per pair; 0 if 0-d
    n,  # rows of the features
    blocks,  # (GAUSSIAN) the number of blocks in ``tops``, per side
    BEGINS: tl.constexpr,  # the first share of each side in ``wanted``
    WIDTHS: tl.constexpr,  # the width d of each side in ``wanted``
    WANTED: tl.constexpr,  # the index of each side in ``wanted`` among all sides
    STARTS: tl.constexpr,  # the offset in ``locations`` of each side in ``wanted``
    COUNT: tl.constexpr,  # the number of sides in ``wanted``
    GAUSSIAN: tl.constexpr,  # whether the kernels are Gaussian; else linear
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    UNBIASED: tl.constexpr,  # whether the estimator is the unbiased one; else the biased
    PRECISION: tl.constexpr,  # of fp32 products: "ieee", "tf32" or "tf32x3"
    TALL: tl.constexpr,  # rows of a tile of a gradient
    WIDE: tl.constexpr,  # columns of a tile of a gradient
    TERMS: tl.constexpr,  # terms of the sum that are multiplied at a time; ALL: at least n
    ALL: tl.constexpr,  # (linear) M stays on the chip for all tiles of a share
    SHARE: tl.constexpr,  # (ALL) column tiles of a side per program; else 1
):
    """Grid (shares of the columns of all wanted gradients, row tiles): tiles of dX or dY.

    The row sums of W are those of the rounded entries, so that equal rows contribute exactly zero.
    """
    share = tl.program_id(0)
    index = side_of(share, BEGINS, COUNT)
    x, dx, d = entry(wanted, index, COUNT), entry(gradients, index, COUNT), entry(WIDTHS, index, COUNT)
    number, location = entry(WANTED, index, COUNT), locations + entry(STARTS, index, COUNT)
    pair, side = number // 2, number % 2
    both = grams + (2 * pair + side).to(tl.int64) * n * n, grams + (2 * pair + 1 - side).to(tl.int64) * n * n
    shifts += 2 * pair * n
    coefficients += pair * COEFFICIENTS
    i = tl.program_id(1) * TALL + tl.arange(0, TALL)
    first = (share - entry(BEGINS, index, COUNT)) * SHARE * WIDE
    dtype = dx.dtype.element_ty
    size = tl.sqrt(tl.load(coefficients + KK + 1 - side)) / tl.load(coefficients + ROWS)
    outer, a, b = weights_of(coefficients, side, size, grad + pair * stride_grad)
    levels = 0.0, 0.0
    if GAUSSIAN:
        top = tl.maximum(largest_of(tops, side * blocks, (side + 1) * blocks, WIDTH), 1e-37)
        levels = tl.load(bandwidths + 4 * side + 2).to(tl.float32), 1.0 / top
        outer *= 2.0 * top * tl.load(bandwidths + 4 * side) * tl.load(bandwidths + 4 * side + 3)
    else:
        scale = tl.load(coefficients + SCALE_X + side).to(tl.float32)
    counted_i = counts(mask, i, n, MASKED)
    rows = i.to(tl.int64)[:, None]

    if ALL:
        j = tl.arange(0, TERMS)
        counted = counts(mask, j, n, MASKED)
        m = _weights(both, i, j, counted_i, counted, shifts, side, a, b, n, levels, False, UNBIASED).to(dtype)
        for start in range(first, first + SHARE * WIDE, WIDE):
            columns = start + tl.arange(0, WIDE)
            tile = shifted_tile(x, location, scale, counted, j, columns, d).to(dtype)
            acc = tl.dot(m, tile, input_precision=PRECISION)
            acc = tl.where(counted_i[:, None], acc * outer.to(tl.float32), 0.0)
            tl.store(dx + rows * d + columns[None, :], acc.to(dtype), mask=(i < n)[:, None] & (columns < d)[None, :])
    else:
        columns = first + tl.arange(0, WIDE)
        acc = tl.zeros([TALL, WIDE], tl.float32)
        if GAUSSIAN:
            sums = tl.zeros([TALL], tl.float32)
            width = padded_width(d)
            there = (columns < width)[None, :]
        for start in range(0, n, TERMS):
            j = start + tl.arange(0, TERMS)
            counted = counts(mask, j, n, MASKED)
            w = _weights(both, i, j, counted_i, counted, shifts, side, a, b, n, levels, GAUSSIAN, UNBIASED).to(dtype)
            if GAUSSIAN:
                sums += tl.sum(w.to(tl.float32), 1)
                places = j.to(tl.int64)[:, None] * width + columns[None, :]
                tile = tl.load(x + places, mask=(j < n)[:, None] & there, other=0.0)
            else:
                tile = shifted_tile(x, location, scale, counted, j, columns, d).to(dtype)
            acc = tl.dot(w, tile, acc, input_precision=PRECISION)
        if GAUSSIAN:
            z = tl.load(x + rows * width + columns[None, :], mask=(i < n)[:, None] & there, other=0.0)
            acc -= sums[:, None] * z.to(tl.float32)
        acc = tl.where(counted_i[:, None], acc * outer.to(tl.float32), 0.0)
        tl.store(dx + rows * d + columns[None, :], acc.to(dtype), mask=(i < n)[:, None] & (columns < d)[None, :])


class Pairs:
    """The launches that few rows and Gaussian kernels have in common: the moments, and the backward."""

    def __init__(self, problems: tuple[Problem, ...], precision: str, tiling: Tiling, stash: Shapes) -> None:
        first, pairs = problems[0], len(problems)
        n, block, self.unbiased = first.n, tiling.block, first.estimator == "unbiased"
        self.stash = tuple(stash.values())
        self.shapes = [(n, d) for problem in problems for d in (problem.p, problem.q)]
        self.widths = tuple(d for _, d in self.shapes)
        self.starts = tuple(2 * before for before in accumulate(self.widths[:-1], initial=0))
        wants = [wanted for problem in problems for wanted in (problem.x_grad, problem.y_grad)]
        self.wanted = tuple(side for side, wanted in enumerate(wants) if wanted)
        self.blocks = ceil_div(n, double.HEIGHT)
        self.decided = dict(
            n=n, MASKED=first.masked, STATISTIC=first.statistic, UNBIASED=self.unbiased, PRECISION=precision,
            GAUSSIAN=first.kernel is not None, BLOCK=block, STEP=tiling.step, HEIGHT=double.HEIGHT,
            LENGTH=double.LENGTH, blocks=self.blocks, PARTS=1 if first.kernel else ceil_div(n, block),
        )  # fmt: skip
        self.moments = Launch(double.moments_kernel, (self.blocks, pairs), self.decided)
        t = gradient_tiling(problems, multiprocessors(first.device))
        columns = t.wide * max(t.share, 1)
        *begins, shares = accumulate((ceil_div(self.widths[side], columns) for side in self.wanted), initial=0)
        of_wanted = dict(
            BEGINS=tuple(begins),
            WIDTHS=tuple(self.widths[side] for side in self.wanted),
            WANTED=self.wanted,
            STARTS=tuple(self.starts[side] for side in self.wanted),
            COUNT=len(self.wanted), TALL=t.tall, WIDE=t.wide, TERMS=t.terms, ALL=t.share > 0, SHARE=max(t.share, 1),
        )  # fmt: skip
        grid = shares, ceil_div(n, t.tall)
        options = many_steps(first, precision)
        if t.share:  # more stages of tf32 would not fit into 99 KB of shared memory
            options = dict(num_warps=8 if t.tall > 64 else 4, num_stages=3 if first.dtype.itemsize == 2 else 2)
        self.gradients = Launch(backward_kernel, grid, self.decided | of_wanted, **options)

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: Stash
    ) -> list[Tensor | None]:
        """The gradients of all sides times ``grad`` [pairs], in the order of ``tensors``; None where not wanted."""
        found: list[Tensor | None] = [None] * len(tensors)
        if self.wanted:
            operands = (stash.xs, stash.ys) if self.decided["GAUSSIAN"] else tensors
            wanted = tuple(operands[side].contiguous() for side in self.wanted)
            new = tuple(grad.new_empty(self.shapes[side], dtype=wanted[0].dtype) for side in self.wanted)
            bytes_ = wanted[0] if mask is None else as_bytes(mask)
            stride = grad.stride(0) if grad.dim() else 0
            memory = dict(wanted=wanted, gradients=new, mask=bytes_, grad=grad, stride_grad=stride)
            known = (stride, grad.dtype) if aligned(*wanted, *new, bytes_, grad, *stash) else None
            self.gradients(known, memory | memory_of(stash))
            for side, gradient in zip(self.wanted, new, strict=True):
                found[side] = gradient
        return found


def memory_of(stash: Stash) -> dict[str, Any]:
    """The tensors of a stash by the kernels' parameter names, but for the shifted features of Gaussian kernels."""
    names = dict(locations=stash.xs, tops=stash.yy, bandwidths=stash.xy)
    return names | dict(grams=stash.xx, shifts=stash.rows, coefficients=stash.coefficients)
