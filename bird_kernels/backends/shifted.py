r"""The library backend's linear kernels on CUDA: shifted operands (`rows`), library products, one finishing launch.

Launches of a forward: two that shift both sides (`triton.shift`), the library's two products, on the Gram route one for
row sums, and one that centres and combines (`triton.finish`, `triton.double`). A gradient is a launch that forms the
matrix of weights, rounded to the features' dtype, and one product with z; fp16 scales the result in a third launch.

    cross   z = [Zy | Zx | 1 1 0 ..],  P = [Zy | Zx]^T Zx and Zy^T Zy,  dX = z [2 d_kl C; 4 d_kk A; bias]
    gram    K = Zx Zx^T, L = Zy Zy^T,  dX = [2 d_kl L + 4 d_kk K | row sums] [Zx; -mean]

The bias and the row sums centre z in the gradient; they are computed from the rounded matrix. Widths are padded to
multiples of 8, which keeps every row of z aligned. `library` computes all problems that `takes` excludes.

The unbiased cross route takes the few rows that may dominate out of z (`triton.apart`): a `topk` and two launches more,
and two more for a gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..plan import ceil_div
from ..types import Problem, Route, Shapes, Stash
from . import library
from .dominating import how_many
from .linalg import PART, fp32_products, mm, padded
from .rows import ShiftedRows, described, rounded_product
from .triton import apart, double, finish
from .triton.gradient import memory_of
from .triton.launch import Known, Launch, aligned, as_bytes, device_of, precision_of
from .triton.reduce import COEFFICIENTS
from .triton.shift import SHARES, Shift
from .triton.symmetric import Configuration, multiply

ONE_STAGE = dict(num_warps=4, num_stages=1)  # of kernels whose products are thin: with more they would spill
BLOCK = 64  # columns of z per program, and side of a program's tile of the cross route's products


def takes(problem: Problem) -> bool:
    """Whether a problem on a device that Triton supports is computed here, on at least one of its routes."""
    linear = problem.kernel is None and problem.center and problem.statistic != "gram_mse"
    return linear and problem.dtype != torch.float64


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash; ``rows``: means of z (cross) or shifts of K and L (gram).

    The unbiased cross route has the rows that may dominate and the means in ``ys``, their products with all rows in
    ``xy``, and in ``rows`` what `apart.rows_kernel` stores of each row.
    """
    n, pa, qa, rows = problem.n, padded(problem.p), padded(problem.q), _geometry(problem, route)[0]
    cross = route == "cross"
    keep_y = problem.y_grad and not cross
    separate, few = cross and problem.estimator == "unbiased", _few(n)
    return dict(
        coefficients=((COEFFICIENTS.value,), torch.float64),
        xs=((rows, qa + pa + 8) if cross else (rows, pa), problem.dtype),
        ys=((few + 1, qa + pa), torch.float32) if separate else ((rows, qa) if keep_y else (0,), problem.dtype),
        xx=((qa + pa, pa) if cross else (2, n, n), torch.float32),
        yy=((qa, qa) if cross and problem.y_grad else (0,), torch.float32),
        xy=((2, n, few) if separate else (0,), torch.float32),
        rows=((5, n) if separate else (qa + pa,), torch.float32) if cross else ((2, n), torch.float64),
    )


def forward(
    x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route, symmetric: Configuration | None = None
) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None.

    ``symmetric``: the configuration of `triton.symmetric` for products of a side with itself (half precision and
    tf32); None: the library computes them, unless that kernel was measured to be faster on this device (`tuning`).
    """
    if not takes(problem):
        return library.forward(x, y, mask, problem, route)
    symmetric = symmetric or _measured(problem)
    with device_of(x), fp32_products(problem):
        return _launches_of(problem, route, precision_of(problem)).forward(x, y, mask, symmetric)


def _measured(problem: Problem) -> Configuration | None:
    if not (problem.device.type == "cuda" and torch.cuda.is_available()):
        return None
    known = tuning.product_kernel(problem._replace(precision=precision_of(problem)))
    return None if known is None else Configuration(*known)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    if not takes(problem):
        return library.backward(grad, x, y, mask, stash, problem, route=route)
    with device_of(x), fp32_products(problem):
        launches = _launches_of(problem, route, precision_of(problem))
        bytes_ = stash.rows if mask is None else as_bytes(mask)  # without a mask any valid pointer will do
        dx = launches.gradient(0, grad, bytes_, stash) if problem.x_grad else x.new_empty(0)
        return dx, launches.gradient(1, grad, bytes_, stash) if problem.y_grad else y.new_empty(0)


def shift_rows(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> ShiftedRows:
    """`rows.shifted` in two launches, for a ``problem`` of the cross route."""
    with device_of(x):
        launches = _launches_of(problem._replace(estimator="biased"), "cross", precision_of(problem))
        z = x.new_empty((launches.rows, launches.width))
        _, memory = launches.shifted(x, y, mask, zx=z[:, launches.qa :], zy=z, ones=z[:, -8:])
    totals = memory["sums"].view(-1, launches.width).sum(0, dtype=torch.float64)
    scale_x, scale_y = memory["scales"].double()
    return described(z, totals[-8], memory["shifts"], (scale_x, scale_y), totals, p=problem.p, q=problem.q)


class _Launches:
    """The part of the launches that a problem determines; built once and cached for later calls."""

    def __init__(self, problem: Problem, route: Route, precision: str) -> None:
        self.problem, self.pa, self.qa = problem, padded(problem.p), padded(problem.q)
        self.rows, self.parts = _geometry(problem, route)
        self.shapes = tuple(stash_shapes(problem, route).values())
        self.width = self.qa + self.pa + 8
        self.tf32 = precision == "tf32"
        always, cross = problem.dtype == torch.float32, route == "cross"
        scored = cross and problem.estimator == "unbiased"
        self.shifted = Shift(problem, self.rows, precision, always=always, cross=cross, scored=scored)
        self.decided: dict[str, Any] = dict(
            n=problem.n, p=problem.p, q=problem.q, parts=self.parts, shares=self.shifted.shares, PARTS=1,
            MASKED=problem.masked, STATISTIC=problem.statistic, UNBIASED=problem.estimator == "unbiased",
            GAUSSIAN=False, TF32=self.tf32,
            NEAR=problem.dtype == torch.float16 or scored,  # fp16's range is small: fp32 is scaled
        )  # fmt: skip


class _Cross(_Launches):
    def __init__(self, problem: Problem, precision: str) -> None:
        super().__init__(problem, "cross", precision)
        pa, qa = self.pa, self.qa
        tiles = ceil_div(qa + pa, BLOCK) * ceil_div(pa, BLOCK) + ceil_div(qa, BLOCK) ** 2
        self.slots = 5 * tiles
        self.decided |= self.of_rows(precision)
        decided = self.decided | dict(STORE_B=problem.y_grad, BLOCK=BLOCK)
        self.finish = Launch(finish.cross_finish_kernel, (tiles,), decided)
        separate = problem.estimator == "unbiased"
        decided = self.decided | dict(HEIGHT=64 if separate else 128, BLOCK=16)
        steps = ONE_STAGE if separate else {}
        self.mix = tuple(
            Launch(finish.cross_mix_kernel, (ceil_div(width, 16),), decided | dict(SIDE=side), **steps)
            for side, width in enumerate((pa, qa))
        )

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None, own: Configuration | None) -> tuple[Tensor, Stash]:
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.shapes))
        qa, both = self.qa, self.qa + self.pa
        z = stash.xs
        known, memory = self.shifted(x, y, mask, zx=z[:, qa:], zy=z, ones=z[:, both:])
        memory |= self.stashed(stash)
        self.before_products(known, memory, stash)
        parts = z.view(self.parts, -1, self.width)
        left = parts[:, :, :both].transpose(1, 2)
        if own is None:
            products, products_y = _batched(left, parts[:, :, qa:both]), _batched(left[:, :qa], parts[:, :, :qa])
        else:
            a, products_y = (multiply(side, True, self.parts, own, self.tf32) for side in (z[:, qa:both], z[:, :qa]))
            products = torch.cat([_batched(left[:, :qa], parts[:, :, qa:both]), a], 1)
        slots, value = x.new_empty(self.slots, dtype=torch.float64), x.new_empty((), dtype=torch.float32)
        memory = dict(row_slots=slots) | memory
        self.finish(known, memory | dict(products=products, products_y=products_y, slots=slots, value=value))
        return value, stash

    def of_rows(self, precision: str) -> dict[str, Any]:
        """What is decided of the rows that may dominate; the biased estimator does not take them out of z."""
        return dict(blocks=0, pull_shares=0, FEW=0, TAKEN=0, PRECISION="")

    def before_products(self, known: Known, memory: dict[str, Any], stash: Stash) -> None:
        """What is launched between the shift pass and the products."""

    def stashed(self, stash: Stash) -> dict[str, Tensor]:
        """The tensors of a stash by the kernels' parameter names."""
        return dict(ca=stash.xx, b=stash.yy, means=stash.rows, coefficients=stash.coefficients)

    def gradient(self, side: int, grad: Tensor, mask: Tensor, stash: Stash) -> Tensor:
        z = stash.xs
        w = z.new_empty((self.width, (self.pa, self.qa)[side]))
        factor = stash.xx.new_empty(())
        unused = dict.fromkeys(("beside", "pulls", "taken_product", "pull"), factor)
        known = (grad.dtype,) if aligned(grad) else None
        self.mix[side](known, self.stashed(stash) | dict(grad=grad, w=w, factor=factor) | unused)
        return rounded_product(z, w, factor, self.problem.n, (self.problem.p, self.problem.q)[side])


class _CrossApart(_Cross):
    """The unbiased estimator's cross route: rows that may dominate are taken out of z (`triton.apart`)."""

    def __init__(self, problem: Problem, precision: str) -> None:
        super().__init__(problem, precision)
        self.few = _few(problem.n)
        columns = ceil_div(self.qa, BLOCK) + ceil_div(self.pa, BLOCK)
        decided = self.decided | dict(HEIGHT=BLOCK, BLOCK=32)
        square = decided | dict(BLOCK=BLOCK)
        self.take = Launch(apart.take_kernel, (columns,), square | dict(shares=self.shifted.shares))
        self.of_each = Launch(apart.rows_kernel, (self.blocks + 2,), decided, **ONE_STAGE)
        self.pull, self.add = [], []
        for side, width in enumerate((self.pa, self.qa)):
            grid = ceil_div(width, BLOCK), decided["pull_shares"]
            self.pull.append(Launch(apart.pull_kernel, grid, square | dict(SIDE=side)))
            self.add.append(Launch(apart.add_kernel, (self.blocks,), decided | dict(SIDE=side), **ONE_STAGE))

    def of_rows(self, precision: str) -> dict[str, Any]:
        n = self.problem.n
        self.blocks = ceil_div(n, BLOCK)
        few, share = _few(n), BLOCK * ceil_div(n, BLOCK * SHARES)
        exact = self.problem.dtype == torch.float32 and precision == "ieee"
        return dict(
            blocks=self.blocks, share=share, pull_shares=ceil_div(n, share), shares=1,  # of the sums without the rows
            FEW=few, TAKEN=max(16, 1 << (few - 1).bit_length()), PRECISION="ieee" if exact else "tf32x3",
        )  # fmt: skip

    def before_products(self, known: Known, memory: dict[str, Any], stash: Stash) -> None:
        new, z = stash.xx.new_empty, stash.xs
        few = memory["scores"][: self.problem.n].topk(self.few, sorted=False).indices
        totals, row_slots = (new(size, dtype=torch.float64) for size in (self.width, 9 * self.blocks + 4))
        memory |= dict(few=few, z=z, totals=totals, row_slots=row_slots)
        self.take(known, memory)
        self.of_each(known, memory)
        memory["sums"] = totals

    def stashed(self, stash: Stash) -> dict[str, Tensor]:
        named = dict(ca=stash.xx, b=stash.yy, means=stash.ys[-1], coefficients=stash.coefficients)
        return named | dict(z=stash.xs, beside=stash.ys, rows=stash.rows, e=stash.xy)

    def gradient(self, side: int, grad: Tensor, mask: Tensor, stash: Stash) -> Tensor:
        z, new, width = stash.xs, stash.xx.new_empty, (self.pa, self.qa)[side]
        w, out = z.new_empty((self.width, width)), z.new_empty((self.problem.n, (self.problem.p, self.problem.q)[side]))
        memory = self.stashed(stash) | dict(grad=grad, mask=mask, w=w, out=out, factor=stash.coefficients)
        memory |= dict(pulls=new((self.decided["pull_shares"], width)), pull=new(width))
        memory |= dict(taken_product=new((self.few, width)), own=z[:, (self.qa, 0)[side] :][:, :width])
        known = (grad.dtype,) if aligned(grad, mask) else None
        self.pull[side](known, memory)
        self.mix[side](known, memory)
        memory["product"] = mm(z, w)
        self.add[side](known, memory)
        return out


class _Gram(_Launches):
    def __init__(self, problem: Problem, precision: str) -> None:
        super().__init__(problem, "gram", precision)
        self.blocks = ceil_div(problem.n, double.HEIGHT)
        decided = self.decided | dict(HEIGHT=double.HEIGHT, LENGTH=double.LENGTH, BLOCK=BLOCK)
        programs = 2 * self.blocks + ceil_div(self.qa + self.pa, BLOCK)
        self.sum_rows = Launch(finish.gram_rows_kernel, (programs,), decided)
        self.moments = Launch(double.moments_kernel, (self.blocks, 1), decided)
        self.mix = tuple(Launch(finish.gram_mix_kernel, (self.blocks,), decided | dict(SIDE=side)) for side in (0, 1))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None, own: Configuration | None) -> tuple[Tensor, Stash]:
        stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in self.shapes))
        n, zx, zy = self.problem.n, stash.xs, stash.ys if self.problem.y_grad else x.new_empty((self.rows, self.qa))
        known, memory = self.shifted(x, y, mask, zx=zx, zy=zy, ones=zx)
        for gram, z in ((stash.xx[0], zx[:n]), (stash.xx[1], zy[:n])):  # faster than iterating over a tensor
            if own is not None:
                multiply(z, False, 1, own, self.tf32, gram)
            elif z.is_cuda and z.dtype != torch.float32:
                torch.mm(z, z.T, out_dtype=torch.float32, out=gram)
            else:
                torch.mm(z.float(), z.T.float(), out=gram)
        slots, value = x.new_empty(6 * self.blocks, dtype=torch.float64), x.new_empty((), dtype=torch.float32)
        memory |= dict(slots=slots, values=value, rows=torch.empty_like(stash.rows)) | memory_of(stash)
        self.sum_rows(known, memory)
        self.moments(known, memory)
        return value, stash

    def gradient(self, side: int, grad: Tensor, mask: Tensor, stash: Stash) -> Tensor:
        z = (stash.xs, stash.ys)[side]
        m = z.new_empty((self.problem.n, self.rows))
        factor = stash.xx.new_empty(())
        known = (grad.dtype,) if aligned(grad, mask) else None
        self.mix[side](known, memory_of(stash) | dict(mask=mask, grad=grad, m=m, factor=factor))
        return rounded_product(m, z, factor, self.problem.n, (self.problem.p, self.problem.q)[side])


@lru_cache(maxsize=1024)
def _launches_of(problem: Problem, route: Route, precision: str) -> _Cross | _Gram:
    if route == "gram":
        return _Gram(problem, precision)
    return _Cross(problem, precision) if problem.estimator == "biased" else _CrossApart(problem, precision)


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """`mm` of batches; one product is no batch, since the library splits long sums of single products only."""
    return mm(a[0], b[0])[None] if len(a) == 1 else mm(a, b)


def _few(n: int) -> int:
    """The number of n rows that are taken out of z, on any device."""
    return how_many(n, torch.device("cuda"))


def _geometry(problem: Problem, route: Route) -> tuple[int, int]:
    """The number of rows of z, and of the equal parts over which products are summed."""
    if route == "gram":
        return padded(problem.n + 1), 1
    parts = ceil_div(problem.n, PART)
    return parts * padded(ceil_div(problem.n, parts), 8 if parts == 1 else 128), parts
