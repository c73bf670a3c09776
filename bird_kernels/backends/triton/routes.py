"""The launches of the two routes: all that a problem decides of them is found once and kept for the next call."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...moments import Coefficients
from ...plan import row_splits, tile_count, tiling
from ...types import Problem, Route, Shapes, Stash
from . import centre, cross, gram
from .launch import Known, Launch, aligned, both, describable, describe, describes, few_steps, products

STATS_ROWS, STATS_COLUMNS = 64, 64  # a program's block in the column statistics; 64 x 32 spills in one variant on sm_90
NORMS = dict(num_warps=8)  # of the row norms; with 4, exact fp32 spills 8 bytes on sm_100
REDUCE_ROWS = 8  # rows of a tile that one program of a split reduction adds up: 16 bytes of a part for each thread


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


class Workspace:
    """What the kernels of one forward share and nobody keeps, and the value."""

    def __init__(self, x: Tensor, mask: Tensor | None, peaks: int, partials: int, slots: int, counts: bool) -> None:
        self.peaks = x.new_empty(peaks, dtype=torch.float32)
        self.partials = x.new_empty(partials, dtype=torch.float32)
        self.slots = x.new_empty(slots, dtype=torch.float64)
        self.counter = x.new_empty(1, dtype=torch.int32)
        self.value = x.new_empty((), dtype=torch.float32)
        # How many rows count, and the mask as bytes; without a mask, any pointers.
        self.count, self.mask = self.peaks, x
        if mask is not None:
            self.count = x.new_empty(1, dtype=torch.float32) if counts else mask.sum(dtype=torch.float32)
            self.mask = as_bytes(mask)


class Statistics:
    """The column statistics of both sides, for kernels that do not find them themselves."""

    def __init__(self, problem: Problem) -> None:
        n, p, q = problem.n, problem.p, problem.q
        splits = row_splits(n)
        self.peaks = ceil_div(p, STATS_COLUMNS), ceil_div(q, STATS_COLUMNS)
        self.partials = 3 * splits * (p + q) if splits > 1 else 0
        programs, sizes = sum(self.peaks), (n, p, q, self.peaks[0], splits)
        columns = dict(MASKED=problem.masked, BLOCK_D=STATS_COLUMNS)
        split = dict(SPLIT=splits > 1, BLOCK_N=STATS_ROWS)
        self.measure = Launch(centre.column_stats_kernel, (programs, splits), sizes, columns | split)
        self.finish = Launch(centre.finish_stats_kernel, (programs, 1), sizes, columns)

    def launch(self, known: Known, x: Tensor, y: Tensor, stash: Stash, ws: Workspace) -> None:
        """Means into the stash, peaks into the workspace, whose counter is cleared."""
        partials = x.new_empty(self.partials, dtype=torch.float64)
        tensors = stash.xs, stash.ys, ws.peaks, partials, ws.count
        self.measure(known, x, y, ws.mask, *tensors, ws.counter, *x.stride(), *y.stride())
        if self.partials:
            self.finish(known, *tensors)


class Gram:
    """The Gram route: statistics (unless the next kernel centres), moments in one launch or two, one backward."""

    def __init__(self, problem: Problem, precision: str) -> None:
        n, p, q = problem.n, problem.p, problem.q
        t = tiling(problem, "gram")
        tiles, upper = ceil_div(n, t.block), tile_count(problem, "gram", t.block)
        self.stash = tuple(stash_shapes(problem, "gram").values())
        self.wanted = problem.x_grad, problem.y_grad
        self.centres, self.statistics = t.centres, Statistics(problem)
        peaks = t.splits if t.centres else self.statistics.peaks
        programs = upper * (t.block // REDUCE_ROWS) if t.splits else upper

        masked = dict(MASKED=problem.masked)
        unbiased = dict(UNBIASED=problem.estimator == "unbiased")
        statistic = dict(STATISTIC=problem.statistic, **unbiased)
        multiply = dict(PRECISION=precision, BLOCK=t.block, STEP=t.step)
        options = products(problem, "gram", precision)
        self.split = bool(t.splits)
        if self.split:
            centres = dict(CENTRES=t.centres)
            sizes = n, p, q, tiles, t.splits[0], t.chunk, *peaks
            self.partials = Launch(
                gram.gram_partials_kernel, (upper, sum(t.splits)), sizes, masked | centres | multiply,
                **(few_steps(problem) if t.centres else options),
            )  # fmt: skip
            strips = dict(BLOCK=t.block, ROWS=REDUCE_ROWS)
            self.reduce = Launch(
                gram.gram_reduce_kernel, (upper, t.block // REDUCE_ROWS), (n, tiles, *t.splits, *peaks),
                masked | centres | statistic | strips,
            )  # fmt: skip
        else:
            sizes = n, p, q, tiles, *peaks
            self.moments = both(gram.gram_moments_kernel, (upper, 1), sizes, masked | statistic | multiply, **options)
        self.workspace = sum(peaks), sum(t.splits) * upper * t.block**2, (8 if unbiased["UNBIASED"] else 3) * programs
        blocks = tuple(wanted * ceil_div(d, t.block) for wanted, d in zip(self.wanted, (p, q), strict=True))
        sides = dict(X_GRAD=problem.x_grad, Y_GRAD=problem.y_grad)
        if all(self.wanted) and precision == "tf32":
            options["num_stages"] = 2  # both sides in one kernel spill 8 bytes with 3 on sm_100
        self.gradients = both(
            gram.gram_backward_kernel, (sum(blocks), tiles), (n, p, q, blocks[0]),
            sides | masked | unbiased | multiply, **options,
        )  # fmt: skip
        self.describes, self.wide, self.high = (
            describes(problem, "gram", precision),
            (t.step, t.block),
            (t.block, t.step),
        )
        # Unbiased, the gradient's kernel spills up to 32 bytes with descriptors on sm_100.
        self.describes_gradients = self.describes and not unbiased["UNBIASED"]

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Value (0-d, fp32) and stash."""
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        ws = Workspace(x, mask, *self.workspace, self.centres)
        known = known_of(x, y, ws.mask)
        if not self.centres:
            self.statistics.launch(known, x, y, stash, ws)
        results = stash.xx, stash.yy, stash.rows, ws.slots, ws.counter, ws.value, stash.coefficients
        shared = ws.mask, stash.xs, stash.ys, ws.peaks, ws.count
        strides = *x.stride(), *y.stride()
        if self.split:
            self.partials(known, x, y, *shared, ws.partials, ws.counter, *strides)
            self.reduce(known, ws.peaks, ws.count, ws.partials, *results)
        else:
            described = self.describes and describable(x, y)
            sides = describe(self.high, x, y) if described else (x, y)
            self.moments[described](known, *sides, *shared, *results, *strides)
        return ws.value, stash

    def backward(self, grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash) -> tuple[Tensor, Tensor]:
        """dX and dY times ``grad``; an unwanted one is empty."""
        dx, dy = empty_gradients(x, y, self.wanted)
        if any(self.wanted):
            bytes_ = x if mask is None else as_bytes(mask)
            described = self.describes_gradients and describable(x, y, stash.xx, stash.yy)
            sides = describe(self.wide, x, y) if described else (x, y)
            grams = describe(self.high, stash.xx, stash.yy) if described else (stash.xx, stash.yy)
            self.gradients[described](
                known_of(x, y, grad, bytes_, *stash), *sides, bytes_, stash.xs, stash.ys, *grams, stash.rows,
                stash.coefficients, grad, dx, dy, *x.stride(), *y.stride(),
            )  # fmt: skip
        return dx, dy


class Cross:
    """The cross route: statistics, norms and sums (unbiased), moments in one launch or two, backward by side."""

    def __init__(self, problem: Problem, precision: str) -> None:
        n, p, q = problem.n, problem.p, problem.q
        t = tiling(problem, "cross")
        tiles = tile_count(problem, "cross", t.block)
        self.stash = tuple(stash_shapes(problem, "cross").values())
        self.wanted = problem.x_grad, problem.y_grad
        self.statistics = Statistics(problem)
        peaks = self.statistics.peaks
        programs = tiles * (t.block // REDUCE_ROWS) if t.splits else tiles
        splits = sum(t.splits)

        masked = dict(MASKED=problem.masked)
        unbiased = dict(UNBIASED=problem.estimator == "unbiased")
        self.norm_blocks = ceil_div(n, STATS_ROWS) if unbiased["UNBIASED"] else 0
        block = masked | dict(BLOCK_N=STATS_ROWS, BLOCK_D=STATS_COLUMNS)
        self.norms = Launch(cross.row_norms_kernel, (self.norm_blocks, 1), (n, p, q, *peaks), block, **NORMS)
        self.sums = tuple(
            Launch(
                cross.column_sums_kernel, (ceil_div(d, STATS_COLUMNS), row_splits(n)),
                (n, d, first, count, row_splits(n)), block,
            )
            for d, first, count in ((p, 0, peaks[0]), (q, peaks[0], peaks[1]))
        )  # fmt: skip

        statistic = dict(STATISTIC=problem.statistic, STORE_B=problem.y_grad, **unbiased)
        multiply = dict(PRECISION=precision, BLOCK=t.block, STEP=t.step)
        options = products(problem, "cross", precision)
        sizes = n, p, q, *peaks, ceil_div(p, t.block), ceil_div(q, t.block), self.norm_blocks, max(splits, 1)
        self.moments = both(
            cross.cross_moments_kernel, (tiles, max(splits, 1)), sizes,
            masked | dict(SPLIT=splits > 0) | statistic | multiply, **options,
        )  # fmt: skip
        strips = dict(BLOCK=t.block, ROWS=REDUCE_ROWS)
        self.reduce = Launch(
            cross.cross_reduce_kernel, (tiles, t.block // REDUCE_ROWS), sizes, masked | statistic | strips
        )
        self.split = splits > 0
        self.workspace = sum(peaks), splits * tiles * t.block**2, 3 * programs
        self.gradients = tuple(
            both(
                cross.cross_backward_kernel, (ceil_div(n, t.block), ceil_div(own, t.block)),
                (n, own, other, row_splits(n)), dict(SIDE=side) | masked | unbiased | multiply, **options,
            )
            for side, own, other in ((0, p, q), (1, q, p))
        )  # fmt: skip
        self.describes, self.wide, self.high = (
            describes(problem, "cross", precision),
            (t.step, t.block),
            (t.block, t.step),
        )

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Stash]:
        """Value (0-d, fp32) and stash."""
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.stash))
        ws = Workspace(x, mask, *self.workspace, False)
        norm_slots = x.new_empty(5 * self.norm_blocks, dtype=torch.float64)
        known = known_of(x, y, ws.mask)
        strides = *x.stride(), *y.stride()
        self.statistics.launch(known, x, y, stash, ws)
        means = stash.xs, stash.ys, ws.peaks
        if self.norm_blocks:
            self.norms(known, x, y, ws.mask, *means, stash.rows, norm_slots, *strides)
            for launch, wanted, own, stats in zip(self.sums, self.wanted, (x, y), means[:2], strict=True):
                if wanted:
                    launch(known, own, ws.mask, stats, ws.peaks, stash.rows, *own.stride())
        shared = (
            ws.count, stash.xx, stash.yy, stash.xy, ws.partials, ws.slots, norm_slots, ws.counter, ws.value,
            stash.coefficients,
        )  # fmt: skip
        described = self.describes and describable(x, y)
        sides = describe(self.wide, x, y) if described else (x, y)
        self.moments[described](known, *sides, ws.mask, *means, *shared, *strides)
        if self.split:
            self.reduce(known, ws.peaks, *shared)
        return ws.value, stash

    def backward(self, grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash) -> tuple[Tensor, Tensor]:
        """dX and dY times ``grad``; an unwanted one is empty."""
        gradients = empty_gradients(x, y, self.wanted)
        bytes_ = x if mask is None else as_bytes(mask)
        known = known_of(x, y, grad, bytes_, *stash)
        sides = (x, y, stash.xs, stash.ys, stash.xx), (y, x, stash.ys, stash.xs, stash.yy)
        for side, (own, other, own_stats, other_stats, product) in enumerate(sides):
            if not self.wanted[side]:
                continue
            blocks, matrices = (own, other), (product, stash.xy)
            described = self.describes and describable(*blocks, *matrices)
            if described:
                blocks = describe(self.high, own, other)
                matrices = *describe(self.wide, product), *describe(self.high if side else self.wide, stash.xy)
            self.gradients[side][described](
                known, own, *blocks, bytes_, own_stats, other_stats, *matrices, stash.rows, stash.coefficients, grad,
                gradients[side], *own.stride(), *other.stride(),
            )  # fmt: skip
        return gradients


@lru_cache(maxsize=1024)
def launches_of(problem: Problem, route: Route, precision: str) -> Gram | Cross:
    """The launches of a problem; ``precision`` is what `precision_of` made of it."""
    return (Gram if route == "gram" else Cross)(problem, precision)


def known_of(x: Tensor, y: Tensor, *others: Tensor) -> Known:
    """What `Launch` may know of a call beyond its problem; the first of the others is the upstream gradient, if any."""
    return (x.stride(), y.stride(), others[0].dtype) if aligned(x, y, *others) else None


def empty_gradients(x: Tensor, y: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Room for dX and dY. new_empty of the shape, not empty_like: dense rows, whatever the input's strides are."""
    return x.new_empty(x.shape if wanted[0] else (0,)), y.new_empty(y.shape if wanted[1] else (0,))


def as_bytes(mask: Tensor) -> Tensor:
    """The mask as the kernels read it."""
    return mask.contiguous().view(torch.uint8)


def ceil_div(a: int, b: int) -> int:
    """Rounded up. Not `triton.cdiv`: it is for kernels, and costs 4 us outside of them."""
    return -(-a // b)
