r"""The library backend's linear kernels on CUDA: shifted operands, library products, one finishing launch.

Launches of a forward: two that shift both sides (`triton.shift`), the library's two products, on the Gram route one for
row sums, and one that centres, sums and combines (`triton.finish`). A gradient is a launch that forms the matrix to
multiply by, rounded to the features' dtype, and one product with z; fp16 scales its result in a third.

    cross   z = [Zy | Zx | 1 1 0 ..],  P = [Zy | Zx]^T Zx and Zy^T Zy,  dX = z [2 d_kl C; 4 d_kk A; bias]
    gram    K = Zx Zx^T, L = Zy Zy^T,  dX = [2 d_kl L + 4 d_kk K | row sums] [Zx; -mean]

The bias and the row sums centre z in the gradient; they are taken of the rounded matrix. Widths are padded to multiples
of 8, which keeps every row of z aligned. Other problems (`takes`; the unbiased cross route) are `library`'s.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import tuning
from ..moments import Coefficients
from ..types import Problem, Route, Shapes, Stash
from . import library
from .linalg import PART, fp32_products, mm, padded
from .rows import Rows, described, rounded_product
from .triton import finish, shift
from .triton.launch import Launch, aligned, device_of, precision_of
from .triton.symmetric import Configuration, multiply

BLOCK, ROWS, MOST_SHARES = 64, 64, 64  # columns and rows of a tile; programs that share the rows of a column
LOCATED = 32  # columns of a program that judges location and spread


def takes(problem: Problem) -> bool:
    """Whether a problem on a device that Triton compiles for is computed here, on one of its routes at least."""
    linear = problem.kernel is None and problem.center and problem.statistic != "gram_mse"
    return linear and problem.dtype != torch.float64


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash; ``rows`` holds means of z (cross) or row sums of K and L (gram)."""
    if not _is_here(problem, route):
        return library.stash_shapes(problem, route)
    n, pa, qa, rows = problem.n, padded(problem.p), padded(problem.q), _geometry(problem, route)[0]
    cross = route == "cross"
    keep_y = problem.y_grad and not cross
    return dict(
        coefficients=((len(Coefficients._fields),), torch.float64),
        xs=((rows, qa + pa + 8) if cross else (rows, pa), problem.dtype),
        ys=((rows, qa) if keep_y else (0,), problem.dtype),
        xx=((qa + pa, pa) if cross else (n, n), torch.float32),
        yy=(((qa, qa) if problem.y_grad else (0,)) if cross else (n, n), torch.float32),
        xy=((0,), torch.float32),
        rows=((qa + pa,) if cross else (2, n), torch.float32),
    )


def forward(
    x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route, symmetric: Configuration | None = None
) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None.

    ``symmetric``: how our own kernel multiplies a side with itself (halves and tf32); None: the library does, unless
    that kernel was measured to be faster on this device (`tuning`).
    """
    if not _is_here(problem, route):
        return library.forward(x, y, mask, problem, route)
    symmetric = symmetric or _measured(problem)
    with device_of(x), fp32_products(problem):
        return _launches_of(problem, route, precision_of(problem)).forward(x, y, mask, symmetric)


def _measured(problem: Problem) -> Configuration | None:
    if not (problem.device.type == "cuda" and torch.cuda.is_available()):
        return None
    known = tuning.product_kernel(problem._replace(precision=precision_of(problem)))  # type: ignore[arg-type]
    return None if known is None else Configuration(*known)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    if not _is_here(problem, route):
        return library.backward(grad, x, y, mask, stash, problem, route=route)
    with device_of(x), fp32_products(problem):
        launches = _launches_of(problem, route, precision_of(problem))
        bytes_ = stash.rows if mask is None else _as_bytes(mask)  # without a mask, any pointer
        dx = launches.gradient(0, grad, bytes_, stash) if problem.x_grad else x.new_empty(0)
        return dx, launches.gradient(1, grad, bytes_, stash) if problem.y_grad else y.new_empty(0)


def rows_of(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> Rows:
    """`rows.shifted` in two launches; ``problem`` is one of these rows that the cross route takes."""
    with device_of(x):
        launches = _launches_of(problem, "cross", precision_of(problem))
        z, qa, both = x.new_empty((launches.rows, launches.width)), launches.qa, launches.width - 8
        _, _, sums, scales, _, shifts = launches.shifted(x, y, mask, z[:, qa:], z, z[:, both:])
    totals = sums.view(-1, launches.width).sum(0, dtype=torch.float64)
    return described(z, shifts, scales, totals, problem.p, problem.q)


class _Launches:
    """All that a problem decides of its launches: found once, kept for the next call."""

    def __init__(self, problem: Problem, route: Route, precision: str) -> None:
        n, p, q = problem.n, problem.p, problem.q
        self.problem, self.pa, self.qa = problem, padded(p), padded(q)
        self.rows, self.parts = _geometry(problem, route)
        self.shapes = tuple(stash_shapes(problem, route).values())
        self.width = self.qa + self.pa + 8
        self.near = problem.dtype == torch.float16  # its range is short: results are scaled in fp32
        self.masked, self.tf32 = dict(MASKED=problem.masked), dict(TF32=precision == "tf32")
        self.unbiased = dict(UNBIASED=problem.estimator == "unbiased")
        located = _blocks(q, LOCATED), _blocks(p, LOCATED)
        self.peaks = sum(located)
        every = _blocks(n, shift.SAMPLE)
        self.locate = Launch(
            shift.locate_kernel, (self.peaks,), (n, p, q, self.qa, located[0], every, _blocks(n, every)),
            self.masked | dict(ALWAYS=problem.dtype == torch.float32, BLOCK=LOCATED), num_warps=8,
        )  # fmt: skip
        share = ROWS * _blocks(self.rows, ROWS * MOST_SHARES)
        self.shares = _blocks(self.rows, share)
        blocks = _blocks(self.qa, BLOCK), _blocks(self.pa, BLOCK)
        pitches = (self.width // 8, self.width // 8) if route == "cross" else (self.pa // 8, self.qa // 8)
        self.shift = Launch(
            shift.shift_kernel, (sum(blocks) + 1, self.shares),
            (n, p, q, self.pa, self.qa, self.rows, share, *pitches, *blocks, *located),
            self.masked | dict(CROSS=route == "cross") | self.tf32 | dict(ROWS=ROWS, BLOCK=BLOCK, WIDTH=256),
            num_warps=8,
        )  # fmt: skip

    def shifted(
        self, x: Tensor, y: Tensor, mask: Tensor | None, zx: Tensor, zy: Tensor, ones: Tensor
    ) -> tuple[object, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Writes z; what launches may know of a call, the mask as bytes, column sums, scales, counters and shifts."""
        shifts, peaks = (x.new_empty(size, dtype=torch.float32) for size in (self.qa + self.pa, self.peaks))
        sums, scales = (x.new_empty(size, dtype=torch.float32) for size in (self.shares * self.width, 2))
        counters = x.new_empty(2, dtype=torch.int32)
        bytes_ = counters if mask is None else _as_bytes(mask)  # without a mask, any pointer
        known = (x.stride(), y.stride()) if aligned(x, y, bytes_) else None
        strides = *x.stride(), *y.stride()
        self.locate(known, x, y, bytes_, shifts, peaks, counters, *strides)
        self.shift(known, x, y, bytes_, shifts, peaks, zx, zy, ones, sums, scales, *strides)
        return known, bytes_, sums, scales, counters, shifts

    def self_product(self, z: Tensor, own: Configuration, transposed: bool) -> Tensor:
        """Z^T Z by parts, or Z Z^T, by our own kernel."""
        return multiply(z, transposed, self.parts, own, self.tf32["TF32"])


class _Cross(_Launches):
    def __init__(self, problem: Problem, precision: str) -> None:
        super().__init__(problem, "cross", precision)
        pa, qa = self.pa, self.qa
        tiles_x, tiles_y = _blocks(pa, BLOCK), _blocks(qa, BLOCK)
        tiles = _blocks(qa + pa, BLOCK) * tiles_x
        self.slots = 5 * (tiles + tiles_y**2)
        self.finish = Launch(
            finish.cross_finish_kernel, (tiles + tiles_y**2,),
            (pa, qa, self.parts, self.shares, tiles_x, tiles_y, tiles),
            dict(STATISTIC=problem.statistic, STORE_B=problem.y_grad, BLOCK=BLOCK),
        )  # fmt: skip
        constants = self.tf32 | dict(NEAR=self.near, ROWS=128, BLOCK=16)
        self.mix = tuple(
            Launch(finish.cross_mix_kernel, (_blocks(width, 16),), (pa, qa), dict(SIDE=side) | constants)
            for side, width in enumerate((pa, qa))
        )

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None, own: Configuration | None) -> tuple[Tensor, Stash]:
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.shapes))
        qa, both = self.qa, self.qa + self.pa
        z = stash.xs
        known, _, sums, scales, counters, _ = self.shifted(x, y, mask, z[:, qa:], z, z[:, both:])
        parts = z.view(self.parts, -1, self.width)
        left = parts[:, :, :both].transpose(1, 2)
        if own is None:
            products, products_y = _batched(left, parts[:, :, qa:both]), _batched(left[:, :qa], parts[:, :, :qa])
        else:
            a, products_y = (self.self_product(side, own, True) for side in (z[:, qa:both], z[:, :qa]))
            products = torch.cat([_batched(left[:, :qa], parts[:, :, qa:both]), a], 1)
        slots, value = x.new_empty(self.slots, dtype=torch.float64), x.new_empty((), dtype=torch.float32)
        self.finish(
            known, products, products_y, sums, scales, stash.xx, stash.yy, stash.rows, slots, counters, value,
            stash.coefficients,
        )  # fmt: skip
        return value, stash

    def gradient(self, side: int, grad: Tensor, mask: Tensor, stash: Stash) -> Tensor:
        z = stash.xs
        w = z.new_empty((self.width, (self.pa, self.qa)[side]))
        factor = stash.xx.new_empty(())
        known = (grad.dtype,) if aligned(grad) else None
        self.mix[side](known, stash.xx, stash.yy, stash.rows, stash.coefficients, grad, w, factor)
        return rounded_product(z, w, factor, self.problem.n, (self.problem.p, self.problem.q)[side])


class _Gram(_Launches):
    def __init__(self, problem: Problem, precision: str) -> None:
        super().__init__(problem, "gram", precision)
        n, rows, step = problem.n, 16, 128
        self.blocks, tiles = _blocks(n, rows), _blocks(n, BLOCK)
        columns = _blocks(self.qa + self.pa, step)
        self.sum_rows = Launch(
            finish.gram_rows_kernel, (2 * self.blocks + columns,), (n, self.pa, self.qa, self.shares, self.blocks),
            self.unbiased | self.tf32 | dict(ROWS=rows, STEP=step),
        )  # fmt: skip
        self.slots = 3 * tiles * (tiles + 1) // 2
        self.finish = Launch(
            finish.gram_finish_kernel, (tiles * (tiles + 1) // 2,), (n, self.width, self.shares, self.blocks, tiles),
            dict(STATISTIC=problem.statistic) | self.unbiased | self.masked | dict(BLOCK=BLOCK), num_warps=8,
        )  # fmt: skip
        constants = self.unbiased | self.masked | self.tf32 | dict(NEAR=self.near, ROWS=rows, STEP=step)
        self.mix = tuple(
            Launch(
                finish.gram_mix_kernel, (self.blocks,), (n, self.rows // 8), dict(SIDE=side) | constants, num_warps=8
            )
            for side in (0, 1)
        )

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None, own: Configuration | None) -> tuple[Tensor, Stash]:
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.shapes))
        zx, zy = stash.xs, stash.ys if self.problem.y_grad else x.new_empty((self.rows, self.qa))
        known, bytes_, sums, scales, counters, _ = self.shifted(x, y, mask, zx, zy, zx)
        n = self.problem.n
        k, l = (mm(z, z.T) if own is None else self.self_product(z, own, False)[0] for z in (zx[:n], zy[:n]))
        stash = stash._replace(xx=k, yy=l)
        totals, slots = (x.new_empty(size, dtype=torch.float64) for size in (6 * self.blocks, self.slots))
        value = x.new_empty((), dtype=torch.float32)
        self.sum_rows(known, stash.xx, stash.yy, zx, zy, sums, stash.rows, totals)
        self.finish(
            known, stash.xx, stash.yy, bytes_, stash.rows, totals, sums, scales, slots, counters, value,
            stash.coefficients,
        )  # fmt: skip
        return value, stash

    def gradient(self, side: int, grad: Tensor, mask: Tensor, stash: Stash) -> Tensor:
        z, (own, other) = (stash.xs, stash.ys)[side], (stash.yy, stash.xx) if side else (stash.xx, stash.yy)
        m = z.new_empty((self.problem.n, self.rows))
        factor = own.new_empty(())
        known = (grad.dtype,) if aligned(grad, mask) else None
        self.mix[side](known, own, other, mask, stash.rows, stash.coefficients, grad, m, factor)
        return rounded_product(m, z, factor, self.problem.n, (self.problem.p, self.problem.q)[side])


@lru_cache(maxsize=1024)
def _launches_of(problem: Problem, route: Route, precision: str) -> _Cross | _Gram:
    return _Cross(problem, precision) if route == "cross" else _Gram(problem, precision)


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """`mm` of batches; the library splits long sums of one product, not of a batch of one."""
    return mm(a[0], b[0])[None] if len(a) == 1 else mm(a, b)


def _is_here(problem: Problem, route: Route) -> bool:
    """Not the unbiased cross route, which takes rows that dominate apart."""
    return takes(problem) and not (route == "cross" and problem.estimator == "unbiased")


def _geometry(problem: Problem, route: Route) -> tuple[int, int]:
    """Rows of z, and the parts of equal length that products are taken of."""
    if route == "gram":
        return padded(problem.n + 1), 1
    parts = _blocks(problem.n, PART)
    return parts * padded(_blocks(problem.n, parts), 8 if parts == 1 else 128), parts


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _as_bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)
