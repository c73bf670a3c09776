r"""The inner products ``<K_i, K_j>`` of the Gram matrices of many layers on the same rows, for `matrix`.

One launch finds the locations of the columns of all layers (`centre`), whatever their widths. Then one launch computes
the same upper tiles of all Gram matrices, and one batched product of the library, a batch for each tile, adds them to
the inner products; as many tiles at a time as `LayerTiles` is given room for. No n x n matrix is stored.

Biased, the columns are centred by their means, so the matrices are centred. Unbiased, they are shifted by a location
that dominating rows do not move, the diagonals are zero, and the tiles' row sums are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import ceil_div
from ...types import Problem
from ..linalg import PART
from .centre import largest_of, scale_of, store_location
from .gradient import entry, side_of
from .launch import Launch, aligned, as_bytes, many_steps
from .reduce import WIDTH, upper_tile
from .small import part_of_tile

BLOCK = 64  # rows and columns of a tile


@triton.jit
def locate_layers_kernel(
    layers,  # [n, d] each, dense
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    locations,  # out, fp32 [2, d] of each layer, concatenated
    peaks,  # out, fp32 [programs]: the largest shifted entry of each block of columns
    n,  # rows of all layers
    WIDTHS: tl.constexpr,  # d of each layer
    STARTS: tl.constexpr,  # the offset of each layer's locations
    BLOCKS: tl.constexpr,  # the first block of columns of each layer, and the number of blocks
    COUNT: tl.constexpr,  # the number of layers
    UNBIASED: tl.constexpr,  # columns are shifted by a robust location; else by their mean
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    STEP: tl.constexpr,  # columns per program
):
    """Grid (blocks of columns of all layers): their locations."""
    block = tl.program_id(0)
    layer = side_of(block, BLOCKS, COUNT)
    columns = (block - entry(BLOCKS, layer, COUNT)) * STEP + tl.arange(0, STEP)
    x, d, location = entry(layers, layer, COUNT), entry(WIDTHS, layer, COUNT), locations + entry(STARTS, layer, COUNT)
    tl.store(peaks + block, store_location(x, mask, location, columns, n, d, UNBIASED, MASKED, STEP))


@triton.jit
def layer_tiles_kernel(
    layers,  # [n, d] each, dense
    mask,  # bytes [n] (MASKED): 0 for rows that do not count
    locations,  # fp32 [2, d] of each layer, concatenated
    peaks,  # fp32 [blocks of columns]
    tiles,  # out, fp32 [programs along 0, COUNT, BLOCK, BLOCK]; those right of the diagonal times sqrt(2)
    sums,  # out (UNBIASED), fp32 [COUNT, tiles of a row, n]: row sums of each column of tiles
    scales,  # out, fp32 [COUNT]: powers of two by which the layers are multiplied
    n,  # rows of all layers
    first,  # the index of the first of these tiles among the upper ones
    WIDTHS: tl.constexpr,  # d of each layer
    STARTS: tl.constexpr,  # the offset of each layer's locations
    BLOCKS: tl.constexpr,  # the first block of columns of each layer, and the number of blocks
    COUNT: tl.constexpr,  # the number of layers
    PART: tl.constexpr,  # columns whose products are added up before they are added to those of others
    UNBIASED: tl.constexpr,  # whether the diagonal is zero and row sums are stored
    MASKED: tl.constexpr,  # whether there is a mask; else all rows count
    PRECISION: tl.constexpr,  # of fp32 products: "ieee", "tf32" or "tf32x3"
    BLOCK: tl.constexpr,  # rows and columns of a tile
    STEP: tl.constexpr,  # columns of a layer that are multiplied at a time
):
    """Grid (upper tiles from ``first`` on, layers): a tile of a layer's Gram matrix."""
    layer = tl.program_id(1)
    x, d, location = entry(layers, layer, COUNT), entry(WIDTHS, layer, COUNT), locations + entry(STARTS, layer, COUNT)
    begin, end = entry(BLOCKS, layer, COUNT), entry(BLOCKS, layer + 1, COUNT + 1)
    scale = scale_of(largest_of(peaks, begin, end, WIDTH))
    tl.store(scales + layer, scale, mask=tl.program_id(0) == 0)
    along = tl.cdiv(n, BLOCK)
    row_tile, column_tile = upper_tile(first + tl.program_id(0), along)
    own = x, d, location, scale, mask
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, d, PART):
        stop = tl.minimum(start + PART, d)
        tile += part_of_tile(own, (row_tile, column_tile), start, stop, n, MASKED, PRECISION, BLOCK, STEP)
    if UNBIASED:
        rows, others = row_tile * BLOCK + tl.arange(0, BLOCK), column_tile * BLOCK + tl.arange(0, BLOCK)
        tile = tl.where(rows[:, None] == others[None, :], 0.0, tile)
        sums += layer.to(tl.int64) * along * n
        tl.store(sums + column_tile * n + rows, tl.sum(tile, 1), mask=rows < n)
        tl.store(sums + row_tile * n + others, tl.sum(tile, 0), mask=(others < n) & (row_tile != column_tile))
    tile *= tl.where(row_tile == column_tile, 1.0, 1.4142135623730951)  # an entry right of the diagonal occurs twice
    inner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(tiles + (tl.program_id(0) * COUNT + layer).to(tl.int64) * (BLOCK * BLOCK) + inner, tile)


class LayerTiles:
    """The launches for layers of these ``widths``, with the dtype, rows, mask and estimator of ``problem``.

    ``room``: the most numbers in tiles at a time.
    """

    def __init__(self, problem: Problem, widths: tuple[int, ...], room: int, precision: str) -> None:
        n, self.count = problem.n, len(widths)
        self.along, step = ceil_div(n, BLOCK), 64 if problem.dtype.itemsize == 2 else 32
        upper = self.along * (self.along + 1) // 2
        times = ceil_div(upper, max(room // (self.count * BLOCK * BLOCK), 1))
        self.at_once, self.unbiased = ceil_div(upper, times), problem.estimator == "unbiased"
        *starts, self.located = accumulate((2 * width for width in widths), initial=0)
        blocks = tuple(accumulate((ceil_div(width, step) for width in widths), initial=0))
        self.blocks = blocks[-1]
        decided = dict(
            n=n, WIDTHS=widths, STARTS=tuple(starts), BLOCKS=blocks, COUNT=self.count, UNBIASED=self.unbiased,
            MASKED=problem.masked, PRECISION=precision, BLOCK=BLOCK, STEP=step, PART=PART,
        )  # fmt: skip
        self.locate = Launch(locate_layers_kernel, (self.blocks,), decided)
        steps = many_steps(problem, precision) | dict(num_warps=4)  # 8 would spill on sm_80
        self.tiles = [
            (end - first, Launch(layer_tiles_kernel, (end - first, self.count), decided | dict(first=first), **steps))
            for first in range(0, upper, self.at_once)
            for end in [min(first + self.at_once, upper)]
        ]

    def __call__(self, layers: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Inner products [layers, layers] of scaled Gram matrices, their row sums [layers, n] (unbiased), scales; fp64.

        ``layers`` are [n, width] each, of one dtype; ``mask`` bool [n] or None.
        """
        count, n = self.count, len(layers[0])
        dense = tuple(layer.contiguous() for layer in layers)
        bytes_ = dense[0] if mask is None else as_bytes(mask)
        new = dense[0].new_empty
        sizes: dict[str, tuple[int, ...]] = dict(
            locations=(self.located,), peaks=(self.blocks,), scales=(count,), tiles=(self.at_once, count, BLOCK**2),
            sums=(count, self.along * self.unbiased, n),
        )  # fmt: skip
        memory: dict[str, Any] = {name: new(size, dtype=torch.float32) for name, size in sizes.items()}
        tiles, sums = memory["tiles"], memory["sums"]
        inner = torch.zeros((self.at_once, count, count), dtype=torch.float32, device=tiles.device)
        known = "dense" if aligned(*dense, bytes_) else None
        memory |= dict(layers=dense, mask=bytes_)
        self.locate(known, memory)
        for number, launch in self.tiles:
            launch(known, memory)
            own, total = tiles[:number], inner[:number]
            torch.baddbmm(total, own, own.mT, out=total)
        rows = sums.sum(1, dtype=torch.float64) if self.unbiased else None
        return inner.sum(0, dtype=torch.float64), rows, memory["scales"].double()
