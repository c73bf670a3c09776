r"""Products of a matrix with itself, Z^T Z or Z Z^T: only upper tiles are computed, and stored in both halves.

Shifted operands are loaded without conversion: by tensor descriptors from sm_90 on, by pointers before. It is used only
where tuning measured it to be faster.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan import ceil_div
from .launch import Launch, aligned, capability, device_of

GROUP = 8  # rows of tiles that are processed together, for reuse in L2


class Configuration(NamedTuple):
    """A tile of ``rows`` x ``columns``, the bytes per row or column that a ``step`` reads, warps, pipeline stages, and
    1 if copies, products and stores are the work of different warps, else 0."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    specialised: int = 0


CONFIGURATIONS = (
    Configuration(64, 64, 128, 4, 3),
    Configuration(128, 128, 64, 8, 3),
    Configuration(128, 128, 128, 8, 3),
    Configuration(128, 128, 128, 8, 4),
    Configuration(128, 256, 128, 8, 3),
    Configuration(128, 128, 128, 8, 3, 1),
)
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # shared memory per block, KB; else 99


def fitting(device: tuple[int, int]) -> tuple[Configuration, ...]:
    """The configurations whose operands fit into the shared memory of a device of this compute capability.

    A tile of 128 x 256 spills except on 9.x: up to 80 bytes a thread on 8.x, whose matrix units read registers, and 8
    on 10.x. Warps are specialised on 10.x: on 9.x Triton 3.6 to 3.8 compile the same code with and without."""
    room = SHARED.get(device, 99) * 1024
    widest = 256 if device[0] == 9 else 128
    return tuple(
        c
        for c in CONFIGURATIONS
        if c.columns <= widest and c.stages * c.step * (c.rows + c.columns) + 1024 <= room
        if device[0] == 10 or not c.specialised
    )


@triton.jit
def _block(z, row, column, rows, columns, pitch, DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """HEIGHT x WIDTH entries of z [rows, columns], zero outside."""
    if DESCRIBED:
        return z.load([row, column])
    else:
        i, j = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        return tl.load(z + i.to(tl.int64)[:, None] * pitch + j[None, :], mask=inside, other=0.0)


@triton.jit
def symmetric_kernel(
    left,  # z [rows, columns], or a descriptor of blocks for the left operand
    right,  # the same for the right operand
    out,  # fp32 [parts, size, size]
    rows,  # the number of rows of z
    columns,  # the number of columns of z
    pitch,  # elements between the beginnings of two rows of z
    size,  # columns (TRANSPOSED) or rows
    length,  # terms of the sums of a part
    TRANSPOSED: tl.constexpr,  # Z^T Z, in parts over the rows; else Z Z^T
    DESCRIBED: tl.constexpr,  # whether ``left`` and ``right`` are descriptors
    TF32: tl.constexpr,  # whether fp32 is multiplied as tf32
    SPECIALISED: tl.constexpr,  # whether warps have different work
    GROUP: tl.constexpr,  # rows of tiles that are processed together
    M: tl.constexpr,  # rows of a tile
    N: tl.constexpr,  # columns of a tile
    K: tl.constexpr,  # terms of the sum that are multiplied at a time
):
    """Grid (tiles, ordered by groups of GROUP rows of tiles; parts). Programs below the diagonal do nothing."""
    program, part, tiles = tl.program_id(0), tl.program_id(1), tl.cdiv(size, N)
    row = (program // (GROUP * tiles) * GROUP + program % GROUP) * M
    column = program % (GROUP * tiles) // GROUP * N
    if (row < size) & (column + N > row):
        tile = tl.zeros([M, N], tl.float32)
        precision: tl.constexpr = "tf32" if TF32 else "ieee"
        for start in tl.range(part * length, (part + 1) * length, K, warp_specialize=SPECIALISED):
            if TRANSPOSED:
                a = tl.trans(_block(left, start, row, rows, columns, pitch, DESCRIBED, K, M))
                b = _block(right, start, column, rows, columns, pitch, DESCRIBED, K, N)
            else:
                a = _block(left, row, start, rows, columns, pitch, DESCRIBED, M, K)
                b = tl.trans(_block(right, column, start, rows, columns, pitch, DESCRIBED, N, K))
            tile = tl.dot(a, b, tile, input_precision=precision)
        out += part.to(tl.int64) * size * size
        i, j = (row + tl.arange(0, M))[:, None], (column + tl.arange(0, N))[None, :]
        inside = (i < size) & (j < size)
        tl.store(out + i.to(tl.int64) * size + j, tile, mask=inside & (i <= j))
        tl.store(out + j.to(tl.int64) * size + i, tile, mask=inside & (i < j))


@lru_cache(maxsize=1024)
def _launch(size: int, parts: int, c: Configuration, **decided: Any) -> Launch:
    grid = ceil_div(size, c.columns) * GROUP * ceil_div(size, c.rows * GROUP), parts
    return Launch(
        symmetric_kernel,
        grid,
        decided | dict(size=size, GROUP=GROUP, M=c.rows, N=c.columns, SPECIALISED=c.specialised > 0),
        num_warps=c.warps,
        num_stages=c.stages,
    )


def multiply(
    z: Tensor, transposed: bool, parts: int, c: Configuration, tf32: bool, out: Tensor | None = None
) -> Tensor:
    """Z^T Z over each of ``parts`` equal parts of the rows, [parts, m, m], or Z Z^T, [1, n, n]; fp32, in ``out``.

    Rows of ``z`` must begin at multiples of 16 bytes, and several parts must have multiples of 128 rows.
    """
    rows, columns = z.shape
    size, step = z.shape[transposed], c.step // z.itemsize
    if out is None:
        out = torch.empty(parts, size, size, dtype=torch.float32, device=z.device)
    described = capability(z.device) >= (9, 0)
    launch = _launch(
        size, parts, c, rows=rows, columns=columns, pitch=z.stride(0), length=rows // parts if transposed else columns,
        TRANSPOSED=transposed, DESCRIBED=described, TF32=tf32, K=step,
    )  # fmt: skip
    sides: tuple[Any, Any] = z, z
    if described:
        blocks = ([step, c.rows], [step, c.columns]) if transposed else ([c.rows, step], [c.columns, step])
        sides = tuple(TensorDescriptor(z, list(z.shape), list(z.stride()), block) for block in blocks)
    with device_of(z):
        launch((z.dtype,) if aligned(z, out) else None, dict(left=sides[0], right=sides[1], out=out))
    return out
