"""Backend 2: fused Triton kernels, in the files beside this one. Same interface as `bird_kernels.eager`.

Launches: column statistics (one; two above 2048 rows), moments (one; two where tiles are few), one backward for each
side that needs a gradient. The unbiased estimator adds the row norms and column sums on the cross route.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, knobs

from ..estimators import Coefficients
from ..plan import Tiling, row_splits, tile_count, tiling
from ..types import Problem, Route, Shapes, Stash
from . import centre, cross, gram

STATS_ROWS, STATS_COLUMNS = 64, 64  # a program's block in the column statistics; 64 x 32 spills in one variant on sm_90
REDUCE_ROWS = 16  # rows of a tile that one program of a split reduction adds up


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None if these kernels can run products of ``dtype`` on ``device``, else the reason."""
    if dtype == torch.float64:
        return "has no fp64 kernels"
    if device.type == "cpu":
        return None if knobs.runtime.interpret else "needs CUDA tensors, these are on the CPU"
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, these tensors are on {device}"
    if capability(device) < (8, 0):
        return f"needs compute capability 8.0 or newer, this GPU has {'.'.join(map(str, capability(device)))}"
    return None


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash."""
    n, p, q = problem.n, problem.p, problem.q
    gram_route = route == "gram"
    unbiased = problem.estimator == "unbiased"
    sums = 2 * row_splits(n) if unbiased and not gram_route else 0
    return dict(
        coefficients=((len(Coefficients._fields),), torch.float64),
        xs=((2 + sums * problem.x_grad, p), torch.float32),  # the mean, then X^T kappa and X^T lambda by parts
        ys=((2 + sums * problem.y_grad, q), torch.float32),
        xx=((n, n) if gram_route else (p, p), torch.float32),
        yy=((n, n) if gram_route else ((q, q) if problem.y_grad else (0,)), torch.float32),
        xy=((0, 0) if gram_route else (q, p), torch.float32),
        rows=((2, n) if unbiased else (0,), torch.float32),
    )


class _Workspace(NamedTuple):
    """What the kernels of one forward share and nobody keeps."""

    mask: Tensor
    rows: Tensor  # how many count
    peaks_x: Tensor
    peaks_y: Tensor
    counter: Tensor
    value: Tensor


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    with _device_of(x):
        shapes = stash_shapes(problem, route).items()
        stash = Stash(**{name: x.new_empty(shape, dtype=dtype) for name, (shape, dtype) in shapes})
        ws = _Workspace(
            mask=_bytes(mask, x),
            rows=x if mask is None else mask.sum(dtype=torch.float32),
            peaks_x=x.new_empty(cdiv(problem.p, STATS_COLUMNS), dtype=torch.float32),
            peaks_y=x.new_empty(cdiv(problem.q, STATS_COLUMNS), dtype=torch.float32),
            counter=x.new_empty(1, dtype=torch.int32),
            value=x.new_empty((), dtype=torch.float32),
        )
        _column_stats(x, y, stash, ws, problem)
        (_gram_moments if route == "gram" else _cross_moments)(x, y, stash, ws, problem)
        return ws.value, stash


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    with _device_of(x):
        mask = _bytes(mask, x)
        launch = _gram_backward if route == "gram" else _cross_backward
        sides = (
            _Side(x, y, stash.xs, stash.ys, stash.xx, stash.yy, stash.xy),
            _Side(y, x, stash.ys, stash.xs, stash.yy, stash.xx, stash.xy.mT),
        )
        gradients = []
        for index, (side, wanted) in enumerate(zip(sides, (problem.x_grad, problem.y_grad), strict=True)):
            # new_empty of the shape, not empty_like: dense rows, whatever the input's strides are.
            gradients.append(side.own.new_empty(side.own.shape if wanted else (0,)))
            if wanted:
                launch(index, side, stash, mask, grad, gradients[-1], problem)
        return gradients[0], gradients[1]


class _Side(NamedTuple):
    """The stash as seen from the side whose gradient is wanted; ``cross`` is other^T own."""

    own: Tensor
    other: Tensor
    own_stats: Tensor
    other_stats: Tensor
    own_product: Tensor
    other_product: Tensor
    cross: Tensor


def _column_stats(x: Tensor, y: Tensor, stash: Stash, ws: _Workspace, problem: Problem) -> None:
    n, p, q = problem.n, problem.p, problem.q
    splits = row_splits(n)
    partials_x, partials_y = (x.new_empty(3 * splits * d if splits > 1 else 0, dtype=torch.float64) for d in (p, q))
    blocks_x, blocks_y = cdiv(p, STATS_COLUMNS), cdiv(q, STATS_COLUMNS)
    centre.column_stats_kernel[(blocks_x + blocks_y, splits)](
        x, y, ws.mask, stash.xs, stash.ys, ws.peaks_x, ws.peaks_y, partials_x, partials_y, ws.rows, ws.counter,
        n, p, q, *x.stride(), *y.stride(), blocks_x, splits,
        MASKED=problem.masked, SPLIT=splits > 1, BLOCK_N=STATS_ROWS, BLOCK_D=STATS_COLUMNS,
    )  # fmt: skip
    if splits > 1:
        centre.finish_stats_kernel[(blocks_x + blocks_y,)](
            stash.xs, stash.ys, ws.peaks_x, ws.peaks_y, partials_x, partials_y, ws.rows, n, p, q, blocks_x, splits,
            MASKED=problem.masked, BLOCK_D=STATS_COLUMNS,
        )  # fmt: skip


def _gram_moments(x: Tensor, y: Tensor, stash: Stash, ws: _Workspace, problem: Problem) -> None:
    n, p, q = problem.n, problem.p, problem.q
    t = tiling(problem, "gram")
    upper, split = tile_count(problem, "gram", t.block), t.splits > 1
    partials, slots, norm_slots = _slots(x, t, upper, 2, problem.estimator == "unbiased")
    options = dict(
        MASKED=problem.masked, STATISTIC=problem.statistic, UNBIASED=problem.estimator == "unbiased", BLOCK=t.block
    )  # fmt: skip
    gram.gram_moments_kernel[(upper, t.splits)](
        x, y, stash.xs, stash.ys, ws.peaks_x, ws.peaks_y, ws.mask, ws.rows, stash.xx, stash.yy, stash.rows, partials,
        slots, norm_slots, ws.counter, ws.value, stash.coefficients, n, p, q, *x.stride(), *y.stride(),
        len(ws.peaks_x), len(ws.peaks_y), cdiv(n, t.block), t.splits,
        SPLIT=split, **_products(problem, "gram"), STEP=t.step, **options,
    )  # fmt: skip
    if split:
        gram.gram_reduce_kernel[(upper, t.block // REDUCE_ROWS)](
            ws.peaks_x, ws.peaks_y, ws.rows, stash.xx, stash.yy, stash.rows, partials, slots, norm_slots, ws.counter,
            ws.value, stash.coefficients, n, len(ws.peaks_x), len(ws.peaks_y), cdiv(n, t.block), upper, t.splits,
            ROWS=REDUCE_ROWS, **options,
        )  # fmt: skip


def _cross_moments(x: Tensor, y: Tensor, stash: Stash, ws: _Workspace, problem: Problem) -> None:
    n, p, q = problem.n, problem.p, problem.q
    t = tiling(problem, "cross")
    tiles, split, unbiased = tile_count(problem, "cross", t.block), t.splits > 1, problem.estimator == "unbiased"
    partials, slots, _ = _slots(x, t, tiles, 1, False)
    blocks = cdiv(n, STATS_ROWS) if unbiased else 0
    norm_slots = x.new_empty(5 * blocks, dtype=torch.float64)
    if unbiased:
        centre_block = dict(MASKED=problem.masked, BLOCK_N=STATS_ROWS, BLOCK_D=STATS_COLUMNS)
        cross.row_norms_kernel[(blocks,)](
            x, y, stash.xs, stash.ys, ws.peaks_x, ws.peaks_y, ws.mask, stash.rows, norm_slots,
            n, p, q, *x.stride(), *y.stride(), len(ws.peaks_x), len(ws.peaks_y), **centre_block,
        )  # fmt: skip
        splits = row_splits(n)
        for wanted, side, stats, peaks in (
            (problem.x_grad, x, stash.xs, ws.peaks_x),
            (problem.y_grad, y, stash.ys, ws.peaks_y),
        ):
            if wanted:
                d = side.shape[1]
                cross.column_sums_kernel[(cdiv(d, STATS_COLUMNS), splits)](
                    side, stats, peaks, ws.mask, stash.rows, stats[2:], n, d, *side.stride(), len(peaks), splits,
                    **centre_block,
                )  # fmt: skip
    options = dict(
        MASKED=problem.masked, STATISTIC=problem.statistic, UNBIASED=unbiased, STORE_B=problem.y_grad, BLOCK=t.block
    )  # fmt: skip
    grid_shape = cdiv(p, t.block), cdiv(q, t.block), blocks, t.splits
    cross.cross_moments_kernel[(tiles, t.splits)](
        x, y, stash.xs, stash.ys, ws.peaks_x, ws.peaks_y, ws.mask, ws.rows, stash.xx, stash.yy, stash.xy, partials,
        slots, norm_slots, ws.counter, ws.value, stash.coefficients, n, p, q, *x.stride(), *y.stride(),
        len(ws.peaks_x), len(ws.peaks_y), *grid_shape,
        SPLIT=split, **_products(problem, "cross"), STEP=t.step, **options,
    )  # fmt: skip
    if split:
        cross.cross_reduce_kernel[(tiles, t.block // REDUCE_ROWS)](
            ws.peaks_x, ws.peaks_y, ws.rows, stash.xx, stash.yy, stash.xy, partials, slots, norm_slots, ws.counter,
            ws.value, stash.coefficients, n, p, q, len(ws.peaks_x), len(ws.peaks_y), *grid_shape,
            ROWS=REDUCE_ROWS, **options,
        )  # fmt: skip


def _gram_backward(
    index: int, side: _Side, stash: Stash, mask: Tensor, grad: Tensor, out: Tensor, problem: Problem
) -> None:
    n, d = out.shape
    t = tiling(problem, "gram")
    gram.gram_backward_kernel[(cdiv(n, t.block), cdiv(d, t.block))](
        side.own, side.own_stats, mask, side.own_product, side.other_product, stash.rows, stash.coefficients, grad, out,
        n, d, *side.own.stride(),
        SIDE=index, MASKED=problem.masked, UNBIASED=problem.estimator == "unbiased", **_products(problem, "gram"),
        BLOCK=t.block, STEP=t.step,
    )  # fmt: skip


def _cross_backward(
    index: int, side: _Side, stash: Stash, mask: Tensor, grad: Tensor, out: Tensor, problem: Problem
) -> None:
    n, d = out.shape
    t = tiling(problem, "cross")
    cross.cross_backward_kernel[(cdiv(n, t.block), cdiv(d, t.block))](
        side.own, side.other, side.own_stats, side.other_stats, mask, side.own_product, side.cross, stash.rows,
        side.own_stats[2:], stash.coefficients, grad, out, n, d, side.other.shape[1],
        *side.own.stride(), *side.other.stride(), *side.cross.stride(), row_splits(n),
        SIDE=index, MASKED=problem.masked, UNBIASED=problem.estimator == "unbiased", **_products(problem, "cross"),
        BLOCK=t.block, STEP=t.step,
    )  # fmt: skip


def _slots(x: Tensor, t: Tiling, tiles: int, products: int, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Partial tiles of the splits, and fp64 slots [3, programs] and [5, programs] of the kernel that finishes."""
    split = t.splits > 1
    programs = tiles * (t.block // REDUCE_ROWS) if split else tiles
    partials = x.new_empty(t.splits * tiles * products * t.block**2 if split else 0, dtype=torch.float32)
    slots = x.new_empty(3 * programs, dtype=torch.float64)
    return partials, slots, x.new_empty(5 * programs if unbiased else 0, dtype=torch.float64)


def _bytes(mask: Tensor | None, x: Tensor) -> Tensor:
    """The mask as bytes, or any pointer where there is none."""
    return x if mask is None else mask.contiguous().view(torch.uint8)


def _products(problem: Problem, route: Route) -> dict[str, Any]:
    """How the tiles are multiplied: in fp32 by PyTorch's own switch, where the call does not say.

    Warps and stages are those without spills (tests/kernels/aot.py). Exact fp32 products run on the ordinary cores:
    their operands spill up to 216 bytes on sm_80 with 4 warps and 3 stages, up to 16 on sm_100 with 8 and 2. With
    tf32x3 on sm_100 the Gram route spills 8 bytes with 3 stages, the cross route with 2.
    """
    precision: str | None = problem.precision
    if precision is None:
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    exact = problem.dtype == torch.float32 and precision == "ieee"
    many = exact and capability(problem.device) < (9, 0)
    few = many or (problem.dtype == torch.float32 and precision == "tf32x3" and route == "gram")
    return dict(PRECISION=precision, num_warps=8 if many else 4, num_stages=2 if few else 3)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
