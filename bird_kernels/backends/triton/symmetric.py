r"""Products of a matrix with itself, Z^T Z or Z Z^T: upper tiles alone, stored in both halves.

Shifted operands go to the matrix units as they are: by descriptors from sm_90 on, by pointers before. A candidate for
tuning; nothing chooses it unmeasured.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, capability, device_of

GROUP = 8  # rows of tiles that run side by side, for the sake of L2


class Configuration(NamedTuple):
    """A tile of ``rows`` x ``columns``, the bytes of Z that a step takes of each, and how the program is scheduled."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


CONFIGURATIONS = (
    Configuration(64, 64, 128, 4, 3),
    Configuration(128, 128, 64, 8, 3),
    Configuration(128, 128, 128, 8, 3),
    Configuration(128, 128, 128, 8, 4),
    Configuration(128, 256, 128, 8, 3),
)
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KB a block may use; 99 elsewhere


def fitting(device: tuple[int, int]) -> tuple[Configuration, ...]:
    """The configurations whose operands find room in the shared memory of a device of this compute capability.

    A tile of 128 x 256 spills: up to 80 bytes a thread on 8.x, whose matrix units read registers, and 8 on 10.x.
    """
    room = SHARED.get(device, 99) * 1024
    widest = 256 if device[0] == 9 else 128
    return tuple(
        c for c in CONFIGURATIONS if c.columns <= widest and c.stages * c.step * (c.rows + c.columns) + 1024 <= room
    )


@triton.jit
def _block(
    z, row, column, rows, columns, pitch,
    DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """HEIGHT x WIDTH entries of z [rows, columns], zero outside."""
    if DESCRIBED:
        return z.load([row, column])
    else:
        i, j = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        return tl.load(z + i.to(tl.int64)[:, None] * pitch + j[None, :], mask=inside, other=0.0)


@triton.jit
def symmetric_kernel(
    z,  # [rows, columns], or a descriptor of blocks for the left operand
    right,  # the same for the right operand
    out,  # fp32 [parts, size, size]
    rows, columns, pitch,
    size,  # columns (TRANSPOSED) or rows
    length,  # of the sums of a part
    tiles,  # in a row of tiles
    TRANSPOSED: tl.constexpr,  # Z^T Z, by parts of the rows; else Z Z^T
    DESCRIBED: tl.constexpr,
    TF32: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, by groups of rows of tiles; parts). Programs below the diagonal do nothing."""
    program, part = tl.program_id(0), tl.program_id(1)
    row = (program // (GROUP * tiles) * GROUP + program % GROUP) * M
    column = program % (GROUP * tiles) // GROUP * N
    if (row < size) & (column + N > row):
        tile = tl.zeros([M, N], tl.float32)
        precision: tl.constexpr = "tf32" if TF32 else "ieee"
        for start in range(part * length, (part + 1) * length, K):
            if TRANSPOSED:
                a = tl.trans(_block(z, start, row, rows, columns, pitch, DESCRIBED, K, M))
                b = _block(right, start, column, rows, columns, pitch, DESCRIBED, K, N)
            else:
                a = _block(z, row, start, rows, columns, pitch, DESCRIBED, M, K)
                b = tl.trans(_block(right, column, start, rows, columns, pitch, DESCRIBED, N, K))
            tile = tl.dot(a, b, tile, input_precision=precision)
        out += part.to(tl.int64) * size * size
        i, j = (row + tl.arange(0, M))[:, None], (column + tl.arange(0, N))[None, :]
        inside = (i < size) & (j < size)
        tl.store(out + i.to(tl.int64) * size + j, tile, mask=inside & (i <= j))
        tl.store(out + j.to(tl.int64) * size + i, tile, mask=inside & (i < j))


@lru_cache(maxsize=1024)
def _launch(
    shape: tuple[int, int, int], transposed: bool, parts: int, c: Configuration, itemsize: int, *, tf32: bool,
    described: bool,
) -> Launch:  # fmt: skip
    rows, columns, _ = shape
    size, length = (columns, rows // parts) if transposed else (rows, columns)
    tiles = triton.cdiv(size, c.columns)
    constants = dict(
        TRANSPOSED=transposed, DESCRIBED=described, TF32=tf32, GROUP=GROUP, M=c.rows, N=c.columns, K=c.step // itemsize
    )
    grid = tiles * GROUP * triton.cdiv(size, c.rows * GROUP), parts
    return Launch(
        symmetric_kernel, grid, (*shape, size, length, tiles), constants, num_warps=c.warps, num_stages=c.stages
    )


def multiply(z: Tensor, transposed: bool, parts: int, c: Configuration, tf32: bool) -> Tensor:
    """Z^T Z by ``parts`` equal parts of the rows, [parts, m, m], or Z Z^T, [1, n, n]; fp32.

    ``z`` has rows that begin at multiples of 16 bytes; several parts have a multiple of 128 rows.
    """
    size = z.shape[transposed]
    out = torch.empty(parts, size, size, dtype=torch.float32, device=z.device)
    described = capability(z.device) >= (9, 0)
    launch = _launch((*z.shape, z.stride(0)), transposed, parts, c, z.itemsize, tf32=tf32, described=described)
    sides = (z, z)
    if described:
        step = c.step // z.itemsize
        blocks = ([step, c.rows], [step, c.columns]) if transposed else ([c.rows, step], [c.columns, step])
        sides = tuple(TensorDescriptor(z, list(z.shape), list(z.stride()), block) for block in blocks)
    with device_of(z):
        launch((z.dtype,), *sides, out)
    return out
