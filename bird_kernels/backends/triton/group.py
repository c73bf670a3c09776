r"""Pairs of layers together: the launches of the Gram route's small problems, once for all pairs instead of for each.

The kernels are those of `gram` with one more question before they start: whose tile is this? Addresses come as tuples
of arguments, widths as constants, so a program finds its side (x and y of the first pair, of the second, ...) by a row
of selects, nothing is copied to the device, and a CUDA graph keeps it all. The rows, dtype, mask and estimator are
those of all pairs; the features are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...moments import Coefficients
from ...plan import tile_count, together
from ...types import Problem, Stash
from .centre import count_rows, power_of_two
from .gram import _gram_backward, _gram_epilogue, _partial_tile, _sum_parts
from .launch import Launch, aligned, any_side, few_steps
from .reduce import WIDTH, finish, upper_tile
from .routes import REDUCE_ROWS, as_bytes, ceil_div

COEFFICIENTS = tl.constexpr(len(Coefficients._fields))


@triton.jit
def group_partials_kernel(
    sides, mask, means, peaks, count, partials, counters, n, tiles,
    WIDTHS: tl.constexpr, SIDES: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, splits of all sides): `gram.gram_partials_kernel`, centring, for the side of the split."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = upper_tile(tile, tiles)
    x, d, side, first, mean = sides[0], WIDTHS[0], 0, 0, 0
    begin, before = 0, 0
    for i in tl.static_range(SIDES):
        there = split >= begin
        x = tl.where(there, sides[i], x)
        d = tl.where(there, WIDTHS[i], d)
        side = tl.where(there, i, side)
        first = tl.where(there, begin, first)
        mean = tl.where(there, before, mean)
        begin += (WIDTHS[i] + CHUNK - 1) // CHUNK
        before += 2 * WIDTHS[i]
    kept = count_rows(mask, n, MASKED, WIDTH)
    if (tile == 0) & (split == first):
        tl.store(counters + side // 2, 0)  # either side of a pair
        if MASKED:
            tl.store(count, kept)
    part = _partial_tile(
        x, mask, means + mean, peaks + first, 0, kept, split - first, CHUNK, row_tile, column_tile, n, d, d, 1,
        MASKED, True, PRECISION, BLOCK, STEP,
    )  # fmt: skip
    inner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK * BLOCK) + inner, part)


@triton.jit
def group_reduce_kernel(
    peaks, count, partials, grams, norms, slots, counters, values, coefficients, n, tiles,
    WIDTHS: tl.constexpr, SIDES: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (upper tiles, BLOCK / ROWS, pairs): `gram.gram_reduce_kernel` for the parts of the pair."""
    tile, strip, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    upper, strips = tl.num_programs(0), tl.num_programs(1)
    program, programs = tile * strips + strip, upper * strips
    row_tile, column_tile = upper_tile(tile, tiles)
    first, middle, last = 0, 0, 0
    begin = 0
    for i in tl.static_range(0, SIDES, 2):
        here = pair == i // 2
        first = tl.where(here, begin, first)
        begin += (WIDTHS[i] + CHUNK - 1) // CHUNK
        middle = tl.where(here, begin, middle)
        begin += (WIDTHS[i + 1] + CHUNK - 1) // CHUNK
        last = tl.where(here, begin, last)
    local = strip * ROWS + tl.arange(0, ROWS)
    inner = local[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale_x = power_of_two(peaks + first, middle - first, WIDTH)
    scale_y = power_of_two(peaks + middle, last - middle, WIDTH)
    k_tile = _sum_parts(partials, peaks, scale_x, first, middle, tile, upper, inner, True, BLOCK, ROWS)
    l_tile = _sum_parts(partials, peaks, scale_y, middle, last, tile, upper, inner, True, BLOCK, ROWS)
    rows = row_tile * BLOCK + local
    columns = column_tile * BLOCK + tl.arange(0, BLOCK)
    k = grams + (2 * pair).to(tl.int64) * n * n
    if UNBIASED:
        norms += 2 * pair * n
        slots += 8 * pair * programs
    else:
        slots += 3 * pair * programs
    _gram_epilogue(
        k_tile, l_tile, row_tile, column_tile, rows, columns, k, k + n * n, norms, slots, program, programs, n, UNBIASED
    )
    finish(
        counters + pair, programs, slots, slots + 3 * programs, programs, scale_x, scale_y, count, n, values + pair,
        coefficients + pair * COEFFICIENTS, MASKED, "cka_loss", UNBIASED, False,
    )  # fmt: skip


@triton.jit
def group_backward_kernel(
    wanted, gradients, mask, means, grams, norms, coefficients, grad, stride_grad, n,
    WIDTHS: tl.constexpr, WANTED: tl.constexpr, MEANS: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr,
    UNBIASED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid (feature tiles of all wanted gradients, row tiles): `gram.gram_backward_kernel` for the side of the tile.

    ``wanted`` and ``gradients`` are the tensors of the sides that want a gradient, WANTED their numbers among all,
    MEANS where the means of each begin.
    """
    block = tl.program_id(0)
    x, dx, d, side, first, mean = wanted[0], gradients[0], WIDTHS[WANTED[0]], WANTED[0], 0, MEANS[0]
    begin = 0
    for i in tl.static_range(COUNT):
        there = block >= begin
        x = tl.where(there, wanted[i], x)
        dx = tl.where(there, gradients[i], dx)
        d = tl.where(there, WIDTHS[WANTED[i]], d)
        side = tl.where(there, WANTED[i], side)
        first = tl.where(there, begin, first)
        mean = tl.where(there, MEANS[i], mean)
        begin += (WIDTHS[WANTED[i]] + BLOCK - 1) // BLOCK
    pair = side // 2
    k = grams + (2 * pair).to(tl.int64) * n * n
    l = k + n * n
    coefficients += pair * COEFFICIENTS
    grad += pair * stride_grad
    if UNBIASED:
        norms += 2 * pair * n
    odd = side % 2 == 1
    _gram_backward(
        x, means + mean, mask, tl.where(odd, l, k), tl.where(odd, k, l), norms, coefficients, grad, dx, block - first,
        n, d, d, 1, side % 2, MASKED, False, UNBIASED, PRECISION, BLOCK, STEP,
    )  # fmt: skip


class GroupStash(NamedTuple):
    """What a forward of pairs leaves for its backward; as `Stash`, one after the other.

    ``means`` [sum of 2 d over the sides], ``grams`` [pairs, 2, n, n], ``rows`` [pairs, 2, n] (unbiased only).
    """

    coefficients: Tensor
    means: Tensor
    grams: Tensor
    rows: Tensor

    def of_each(self, problems: Sequence[Problem]) -> list[Stash]:
        """The same as the stashes of single calls, without a copy."""
        widths = [d for problem in problems for d in (problem.p, problem.q)]
        means = [mean.view(2, -1) for mean in self.means.split([2 * d for d in widths])]
        empty = self.means.new_empty(0)
        return [
            Stash(
                self.coefficients[i], means[2 * i], means[2 * i + 1], self.grams[i, 0], self.grams[i, 1], empty,
                self.rows[i] if len(self.rows) else empty,
            )
            for i in range(len(problems))
        ]  # fmt: skip


class Group:
    """The launches of some pairs: two forward, one backward."""

    def __init__(self, problems: tuple[Problem, ...], precision: str) -> None:
        t = together(problems)
        assert t is not None
        first = problems[0]
        n, unbiased = first.n, first.estimator == "unbiased"
        widths = tuple(d for problem in problems for d in (problem.p, problem.q))
        sides = dict(WIDTHS=widths, SIDES=len(widths), CHUNK=t.chunk, MASKED=first.masked)
        tiles, upper, strips = ceil_div(n, t.block), tile_count(first, "gram", t.block), t.block // REDUCE_ROWS
        multiply = dict(PRECISION=precision, BLOCK=t.block, STEP=t.step)
        splits, pairs = sum(t.splits), len(problems)
        self.partials = Launch(
            group_partials_kernel, (upper, splits), (n, tiles), sides | multiply, **few_steps(first)
        )  # fmt: skip
        self.reduce = Launch(
            group_reduce_kernel, (upper, strips, pairs), (n, tiles),
            sides | dict(UNBIASED=unbiased, BLOCK=t.block, ROWS=REDUCE_ROWS),
        )  # fmt: skip
        self.wanted = tuple(
            2 * i + side for i, p in enumerate(problems) for side, wants in enumerate((p.x_grad, p.y_grad)) if wants
        )
        blocks = sum(ceil_div(widths[side], t.block) for side in self.wanted)
        means = tuple(2 * sum(widths[:side]) for side in self.wanted)
        self.gradients = Launch(
            group_backward_kernel, (blocks, tiles), (n,),
            dict(WIDTHS=widths, WANTED=self.wanted, MEANS=means, COUNT=len(self.wanted), MASKED=first.masked, UNBIASED=unbiased)
            | multiply, **any_side(first, precision),
        )  # fmt: skip
        self.shapes = dict(
            coefficients=((pairs, COEFFICIENTS.value), torch.float64), means=((2 * sum(widths),), torch.float32),
            grams=((pairs, 2, n, n), torch.float32), rows=((pairs, 2, n) if unbiased else (0,), torch.float32),
            values=((pairs,), torch.float32), peaks=((splits,), torch.float32), count=((1,), torch.float32),
            partials=((splits * upper * t.block**2,), torch.float32), counters=((pairs,), torch.int32),
            slots=((pairs * (8 if unbiased else 3) * upper * strips,), torch.float64),
        )  # fmt: skip

    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, GroupStash]:
        """Values [pairs], fp32, and stash for x and y of the first pair, of the second, ..., all dense."""
        sides, any_ = tuple(tensors), tensors[0]
        bytes_ = any_ if mask is None else as_bytes(mask)
        new = {name: any_.new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.shapes.items()}
        stash = GroupStash(*(new[name] for name in GroupStash._fields))
        values, peaks, count, partials, counters, slots = (new[name] for name in list(new)[len(stash) :])
        known = "dense" if aligned(*sides, bytes_) else None
        self.partials(known, sides, bytes_, stash.means, peaks, count, partials, counters)
        self.reduce(
            known, peaks, count, partials, stash.grams, stash.rows, slots, counters, values, stash.coefficients
        )  # fmt: skip
        return values, stash

    def backward(
        self, grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: GroupStash
    ) -> list[Tensor | None]:
        """The gradients of all sides times ``grad`` [pairs], in the order of ``tensors``; None where unwanted."""
        wanted = tuple(tensors[side] for side in self.wanted)
        new = tuple(x.new_empty(x.shape) for x in wanted)
        bytes_ = wanted[0] if mask is None else as_bytes(mask)
        stride = grad.stride(0)
        known = (stride, grad.dtype) if aligned(*wanted, *new, bytes_, grad, *stash) else None
        self.gradients(
            known, wanted, new, bytes_, stash.means, stash.grams, stash.rows, stash.coefficients, grad, stride
        )  # fmt: skip
        found = dict(zip(self.wanted, new, strict=True))
        return [found.get(side) for side in range(len(tensors))]


@lru_cache(maxsize=256)
def group_of(problems: tuple[Problem, ...], precision: str) -> Group:
    """The launches of these pairs, found once; ``precision`` is what `launch.precision_of` made of it."""
    return Group(problems, precision)
