r"""The statistic of the rows of all ranks of a group, and its gradient; see docs/explain/scale.md.

Either sums over each rank's rows are sent and merged, or the rows themselves are gathered and every rank computes the
statistic of all of them (`transport`). The gradient of the value v with respect to a rank's own rows x_r needs nothing
that the forward has not communicated. It is multiplied by the number of ranks R: where parameters theta are shared,

.. math::  \frac{dv}{d\theta} = \sum_r \frac{dv}{dx_r} \frac{dx_r}{d\theta}
           = \frac{1}{R} \sum_r \Big(R \frac{dv}{dx_r}\Big) \frac{dx_r}{d\theta}

so the *average* over ranks that DDP and FSDP take is the gradient of the whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, distributed, from_sums, inputs, ops, plan, sums, transport
from .backends.linalg import scalar
from .moments import MIN_ROWS
from .types import Options, Problem, Transport


class Part(NamedTuple):
    """A rank's x [n, p], y [n, q] and mask [n] or None, the ``problem`` of all rows, the number of ``rows`` by rank."""

    x: Tensor
    y: Tensor
    mask: Tensor | None
    problem: Problem
    rows: list[int]
    transport: Transport
    group: Any


def meet(x: Tensor, y: Tensor, mask: Tensor | None, options: Options, pairs: int = 1) -> Part:
    """Check this rank's arguments, of one of ``pairs`` pairs, and with all ranks that they fit; return its part.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank, if the arguments of any rank are wrong, if they do not fit
            together, or if all ranks together have too few rows.
    """
    group, estimator, backend = options.group, options.estimator, options.backend
    assert group is not None
    error, terms, numbers = None, {}, [0, 0, 0, 0]
    try:
        x, y, mask, problem = inputs.prepare(x, y, mask, options, part=True)
        distributed.require_device(x.device, group)
        backends.choose(problem.dtype, problem.device, True, backend, plan.variant(problem))
        shared = ("statistic", "kernel", "center", "estimator", "backend", "precision")
        terms = {name: getattr(options, name) for name in shared}
        terms |= dict(dtype=problem.dtype, p=problem.p, q=problem.q, pairs=pairs)
        numbers = [problem.n, problem.masked, problem.x_grad, problem.y_grad]
    except Exception as raised:  # of any kind: the other ranks wait for this rank's header
        error = raised
    rows, masked, x_grad, y_grad = zip(*distributed.agree(group, error, terms, numbers), strict=True)
    n = sum(rows)
    if n < MIN_ROWS[estimator]:
        raise ValueError(
            f'estimator="{estimator}" needs at least {MIN_ROWS[estimator]} rows, got {n} in all ({rows} by rank)'
        )
    # All ranks compute what any of them asks for, or their values would differ in the last bit.
    problem = problem._replace(n=n, masked=any(masked), x_grad=any(x_grad), y_grad=any(y_grad))
    return Part(x, y, mask, problem, list(rows), transport.cheaper(problem, rows, backend), group)


def of_merged_sums(part: Part) -> Tensor:
    """The statistic of all ranks' rows from their merged sums; 0-d, fp32 or fp64, differentiable once."""
    with ops.without_autocast(part.x.device):
        value: Tensor = _Merged.apply(part.x, part.y, part.mask, part.problem, part.group)
    return value


def gathered(part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [sum(rows), p], y [sum(rows), q] and mask of all ranks, in the order of ranks; differentiable once."""
    x, y, mask = _Gathered.apply(part.x, part.y, part.mask, part.problem.masked, part.rows, part.group)
    return x, y, mask


def _require_first_order(grad: Tensor) -> None:
    if ops.is_batched(grad):
        raise RuntimeError("group= has no batched backward (is_grads_batched, jacobian(vectorize=True))")
    if torch.is_grad_enabled():  # create_graph=True: a second derivative would have to communicate
        raise RuntimeError("group= has no double backward: call without create_graph=True")


class _Merged(torch.autograd.Function):
    """The value from all-reduced sums, which are saved, so that the backward does not communicate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, group: Any) -> Tensor:
        total = sums.all_reduced(_own_sums(x, y, mask, problem), group)  # no name here, so that they can be freed
        value, coefficients, total = from_sums.value_of(total, problem)
        if not ctx.needs_input_grad[1]:
            total = total._replace(yy=total.yy.new_empty(0))
        norms = total.norms or ()
        ctx.call = problem, group.size(), coefficients
        ctx.save_for_backward(x, y, mask, *total[:-1], *norms)
        return torch.as_tensor(value, dtype=ops.value_dtype(x.dtype), device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _require_first_order(grad)
        x, y, mask, *tensors = ctx.saved_tensors
        problem, world, coefficients = ctx.call
        n, mean_x, mean_y, xx, xy, yy, *norms = tensors
        s = sums.Sums(n, mean_x, mean_y, xx, xy, yy, sums.Norms(*norms) if norms else None)
        upstream = scalar(grad) * world
        dx = dy = None
        with ops.without_autocast(x.device):
            if ctx.needs_input_grad[0]:
                dx = from_sums.gradient(x, y, mask, s, coefficients, upstream, problem=problem)
            if ctx.needs_input_grad[1]:
                dy = from_sums.gradient(y, x, mask, *from_sums.exchanged(s, coefficients), upstream, problem=problem)
        return dx, dy, None, None, None


def _own_sums(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> sums.Sums:
    """This rank's sums in the dtype that they are sent in; `transport.merged_size` says why unbiased ones are fp64."""
    own = sums.sums_of(x, y, mask, problem)
    return own.to(torch.float64) if problem.estimator == "unbiased" else own


class _Gathered(torch.autograd.Function):
    """Forward: the rows of all ranks. Backward: this rank's rows of the gradient, times the number of ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, mask: Tensor | None, masked: bool, rows: list[int], group: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        columns = [x, y]
        if masked:
            columns.append(x.new_ones(len(x), 1) if mask is None else mask[:, None].to(x.dtype))
        everyone = distributed.all_gather_rows(torch.cat(columns, 1), rows, group)
        p, q = x.shape[1], y.shape[1]
        all_x, all_y = everyone[:, :p].contiguous(), everyone[:, p : p + q].contiguous()
        start = sum(rows[: group.rank()])
        ctx.own, ctx.world = slice(start, start + len(x)), len(rows)
        ctx.mark_non_differentiable(*(t for t, side in ((all_x, x), (all_y, y)) if not side.requires_grad))
        return all_x, all_y, everyone[:, -1].bool() if masked else None

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        _require_first_order(dx)
        own, world = ctx.own, ctx.world
        x_grad, y_grad, *_ = ctx.needs_input_grad
        return (dx[own] * world if x_grad else None), (dy[own] * world if y_grad else None), None, None, None, None
