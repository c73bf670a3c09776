r"""The statistics of the rows of all ranks of a group, and their gradients; see docs/explain/scale.md.

Either sums over each rank's rows are sent and merged, or the rows themselves are gathered and every rank computes the
statistic of all of them (`transport`); all pairs of a call travel together. The gradient of the value v with respect to
a rank's own rows x_r needs nothing that the forward has not communicated. It is multiplied by the number of ranks R:
where parameters theta are shared,

.. math::  \frac{dv}{d\theta} = \sum_r \frac{dv}{dx_r} \frac{dx_r}{d\theta}
           = \frac{1}{R} \sum_r \Big(R \frac{dv}{dx_r}\Big) \frac{dx_r}{d\theta}

so the *average* over ranks that DDP and FSDP take is the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, distributed, from_sums, inputs, ops, plan, sums, transport
from .backends.linalg import scalar
from .distributed import Ride
from .moments import MIN_ROWS
from .types import Options, Problem, Transport

Prepared = tuple[Tensor, Tensor, Tensor | None, Problem]  # of this rank's rows, see `inputs.prepare`


class Part(NamedTuple):
    """A rank's x [n, p], y [n, q] and mask [n] or None, the ``problem`` of all rows, the number of ``rows`` by rank."""

    x: Tensor
    y: Tensor
    mask: Tensor | None
    problem: Problem
    rows: list[int]
    transport: Transport


class _Room(NamedTuple):
    """So many bytes of a rank take a pair's rows, [longest, p + q]; if ``masked``, the mask is one more column."""

    longest: int
    masked: bool
    size: int


def exchange(
    both: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None, options: Options
) -> list[tuple[Part, sums.Sums | Tensor]]:
    """Check this rank's arguments, and with all ranks that they fit; return of each pair of ``both`` this rank's part
    and what has travelled: merged sums, or the rows of all ranks [ranks, longest, p + q], a mask as one more column.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank, if the arguments of any rank are wrong, if they do not fit
            together, or if all ranks together have too few rows.
    """
    group: Any = options.group
    own, numbers, terms, error = _checked(both, mask, options)
    ride = distributed.expected(group)
    mine: list[sums.Sums]
    for _ in range(3):  # in the call that was expected; in the one agreed on; there again, if that has failed on a rank
        if ride is not None:
            sent, mine = None, []
            if error is None and _fits(own, terms, ride):
                try:
                    sent, mine = _packed(own, ride, group)
                except Exception as raised:  # of any kind: the other ranks wait for this rank's ride
                    error = raised
            found, data = distributed.take(group, ride, numbers, sent)
            del sent  # so that its memory can be used for what comes next
            parts = _of_all(own, found, options.backend) if found else []
            if parts and [part.transport.name for part in parts] == ride.call[1]:
                return list(zip(parts, _received(parts, data, mine, ride, group), strict=True))
        parts = _of_all(own, distributed.agree(group, error, terms, numbers, declined=True), options.backend)
        ride = _remembered(parts, terms, group)
    raise RuntimeError("the ranks of the group are out of step")


def met(x: Tensor, y: Tensor, mask: Tensor | None, options: Options) -> Part:
    """As `exchange` of one pair, but nothing travels; for `explain`."""
    own, numbers, terms, error = _checked([(x, y)], mask, options)
    group: Any = options.group
    found = distributed.agree(group, error, terms | {"explain": True}, numbers)
    return _of_all(own, found, options.backend)[0]


def _checked(
    both: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None, options: Options
) -> tuple[list[Prepared], list[int], dict[str, object], Exception | None]:
    """This rank's pairs, checked, and a number of each for the other ranks; the terms of the call, which must be equal
    on all ranks; this rank's error."""
    own: list[Prepared] = []
    group: Any = options.group
    refused = distributed.refused()
    try:
        for pair in both:
            own.append(inputs.prepare(*pair, mask, options, part=True))
            p = own[-1][3]
            distributed.require_device(p.device, group)
            if p.device != own[0][3].device:
                raise ValueError("the pairs of a call with group= must be on one device")
            backends.choose(p.dtype, p.device, True, options.backend, plan.variant(p))
    except Exception as raised:  # of any kind: the other ranks wait for this rank's header
        return [], [], {}, raised
    shared = ("statistic", "kernel", "center", "estimator", "backend", "precision")
    terms: dict[str, object] = {name: getattr(options, name) for name in shared}
    for name in ("dtype", "p", "q"):
        each = [getattr(problem, name) for *_, problem in own]
        terms[name] = each if len(each) > 1 else each[0]
    numbers = [p.n << 3 | p.masked << 2 | p.x_grad << 1 | p.y_grad for *_, p in own]
    return own, numbers, terms | dict(device=own[0][3].device.type, pairs=len(own)), refused


def _of_all(own: list[Prepared], found: list[list[int]], backend: str) -> list[Part]:
    """The parts of all rows, from the numbers of all ranks.

    Raises:
        ValueError: too few rows.
    """
    parts = []
    for (x, y, mask, problem), column in zip(own, zip(*found, strict=True), strict=True):
        rows, flags = [number >> 3 for number in column], reduce(or_, column)
        n, needed = sum(rows), MIN_ROWS[problem.estimator]
        if n < needed:
            raise ValueError(
                f'estimator="{problem.estimator}" needs at least {needed} rows, got {n} in all ({rows} by rank)'
            )
        # All ranks compute what any of them asks for, or their values would differ in the last bit.
        problem = problem._replace(n=n, masked=flags & 4 > 0, x_grad=flags & 2 > 0, y_grad=flags & 1 > 0)
        parts.append(Part(x, y, mask, problem, rows, transport.cheaper(problem, rows, backend, len(own))))
    return parts


def _remembered(parts: list[Part], terms: dict[str, object], group: Any) -> Ride:
    """The ride of such a call, with n and the means of pairs that are merged, if there are any, else with all rows."""
    names, rooms = [part.transport.name for part in parts], [_room(part) for part in parts]
    merged = [1 + p.p + p.q for *_, p, _, t in parts if t.name == "merged"]
    size = sum(merged or (room.size for room in rooms))
    return distributed.expect(group, len(parts), size, not merged, parts[0].x.device, (terms, names, rooms))


def _fits(own: list[Prepared], terms: dict[str, object], ride: Ride) -> bool:
    """Whether this rank's call is the expected one, and its rows have room if they are what rides."""
    agreed, _, rooms = ride.call
    if agreed != terms or ride.device != own[0][3].device:
        return False
    roomy = (p.n <= room.longest and p.masked <= room.masked for (*_, p), room in zip(own, rooms, strict=True))
    return not ride.gathered or all(roomy)


@torch.no_grad()
def _packed(own: list[Prepared], ride: Ride, group: Any) -> tuple[Tensor, list[sums.Sums]]:
    """What this rank sends in the ride, and of merged pairs the sums themselves, in the dtype that they are sent in;
    `transport.merged_size` says why unbiased ones are fp64."""
    sent, room = distributed.blank(ride, group)
    if ride.gathered:
        _write(own, ride.call[2], room)
        return sent, []
    mine = []
    for (x, y, mask, problem), name in zip(own, ride.call[1], strict=True):
        if name == "merged":
            with ops.without_autocast(x.device):
                s = sums.sums_of(x, y, mask, problem)
            mine.append(s.to(torch.float64) if problem.estimator == "unbiased" else s)
    torch.cat([total for s in mine for total in sums.totals_of(s)], out=room)
    return sent, mine


@torch.no_grad()
def _received(
    parts: list[Part], data: Tensor, mine: list[sums.Sums], ride: Ride, group: Any
) -> list[sums.Sums | Tensor]:
    """What has travelled of each pair, after the other collectives of the call."""
    merged = [] if ride.gathered else sums.merged(mine, data, group)
    rows, rooms = [part for part in parts if part.transport.name == "gathered"], ride.call[2]
    if not rows:
        return [*merged]
    if not ride.gathered:
        rooms = [_room(part) for part in rows]
        data = data.new_empty(sum(room.size for room in rooms), dtype=torch.uint8)
        _write(rows, rooms, data)
        data = distributed.all_gather(data, group)
    gathered = []
    for part, room, share in zip(rows, rooms, data.split([room.size for room in rooms], 1), strict=True):
        width = part.problem.p + part.problem.q + room.masked
        gathered.append(share.view(part.x.dtype)[:, : room.longest * width].unflatten(1, (room.longest, width)))
    return [(merged if part.transport.name == "merged" else gathered).pop(0) for part in parts]


def _room(part: Part) -> _Room:
    """What the rows of such a pair take, on any rank."""
    p, longest = part.problem, max(part.rows)
    return _Room(longest, p.masked, transport.block_size(longest, p.p, p.q, p.dtype.itemsize, p.masked))


def _write(own: Sequence[Prepared | Part], rooms: Sequence[_Room], into: Tensor) -> None:
    """Each pair's rows as bytes: x, y and, if any rank has one, the mask side by side."""
    for (x, y, mask, *_), room, part in zip(own, rooms, into.split([room.size for room in rooms]), strict=True):
        columns, width = [x, y], x.shape[1] + y.shape[1] + room.masked
        if room.masked:
            columns.append(x.new_ones(len(x), 1) if mask is None else mask[:, None].to(x.dtype))
        torch.cat(columns, 1, out=part.view(x.dtype)[: len(x) * width].view(len(x), width))


def of_merged_sums(part: Part, total: sums.Sums, group: Any) -> Tensor:
    """The statistic of all ranks' rows from their merged sums; 0-d, fp32 or fp64, differentiable once."""
    with ops.without_autocast(part.x.device):
        value: Tensor = _Merged.apply(part.x, part.y, part.mask, part.problem, total, group.size())
    return value


def gathered(part: Part, everyone: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [sum(rows), p], y [sum(rows), q] and mask of all ranks, in the order of ranks; differentiable once."""
    x, y, mask = _Gathered.apply(part.x, part.y, everyone, part.rows, part.problem.masked, group.rank())
    return x, y, mask


def _require_first_order(grad: Tensor) -> None:
    if ops.is_batched(grad):
        raise RuntimeError("group= has no batched backward (is_grads_batched, jacobian(vectorize=True))")
    if torch.is_grad_enabled():  # create_graph=True: a second derivative would have to communicate
        raise RuntimeError("group= has no double backward: call without create_graph=True")


class _Merged(torch.autograd.Function):
    """The value from merged sums, which are saved, so that the backward does not communicate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, total: sums.Sums, world: int
    ) -> Tensor:
        value, coefficients, total = from_sums.value_of(total, problem)
        if not ctx.needs_input_grad[1]:
            total = total._replace(yy=total.yy.new_empty(0))
        norms = total.norms or ()
        ctx.call = problem, world, coefficients
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
        return dx, dy, None, None, None, None


class _Gathered(torch.autograd.Function):
    """Forward: the rows of all ranks. Backward: this rank's rows of the gradient, times the number of ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, everyone: Tensor, rows: list[int], masked: bool, rank: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        p, q = x.shape[1], y.shape[1]

        def of_all(columns: slice) -> Tensor:
            chosen = everyone[..., columns]
            if min(rows) == everyone.shape[1]:
                return chosen.flatten(0, 1).contiguous()
            return torch.cat([part[:n] for part, n in zip(chosen, rows, strict=True)])

        all_x, all_y = of_all(slice(p)), of_all(slice(p, p + q))
        start = sum(rows[:rank])
        ctx.own, ctx.world = slice(start, start + len(x)), len(rows)
        ctx.mark_non_differentiable(*(t for t, side in ((all_x, x), (all_y, y)) if not side.requires_grad))
        return all_x, all_y, of_all(slice(-1, None)).bool()[:, 0] if masked else None

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        _require_first_order(dx)
        own, world = ctx.own, ctx.world
        x_grad, y_grad, *_ = ctx.needs_input_grad
        return (dx[own] * world if x_grad else None), (dy[own] * world if y_grad else None), None, None, None, None
