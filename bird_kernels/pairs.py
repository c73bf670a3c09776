"""Several pairs of layers in one call: one node for autograd, whatever their number and widths.

Whoever looks on (torch.compile, torch.func) sees the single calls instead, and so do the options that have no other
form: see `losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, distributed, inputs, ops, plan
from .types import Problem, Route, Stash

# What the common node computes; other values of these options go pair by pair.
_COMMON = {"kernel": "linear", "group": None, "sqrt": False, "center": True}
_DEFAULTS = _COMMON | {"estimator": "biased", "mask": None, "row_dims": 1, "backend": "auto", "precision": None}


class _Call(NamedTuple):
    problem: Problem
    route: Route
    backend: str


def numbers(weights: Sequence[float] | None, x: object) -> Sequence[float] | None:
    """The weights as `weighted_sum` takes them; ``x`` are the pairs' tensors of one side, if it is a list of them.

    Raises:
        TypeError, ValueError: not one number for each pair.
    """
    if weights is None or not isinstance(x, (list, tuple)):
        return weights  # `losses` says what is wrong with x
    if len(weights) != len(x):
        raise ValueError(f"weights must have one number for each pair, got {len(weights)} for {len(x)}")
    return weights if torch.compiler.is_compiling() else tuple(map(float, weights))


def weighted_sum(losses: Tensor, weights: Sequence[float] | None) -> Tensor:
    """sum of weight * loss over the pairs, 0-d, ``weights`` from `numbers`; every weight is 1 where there are none."""
    if weights is None:
        return losses.sum() if len(losses) > 1 else losses.squeeze(0)  # of one pair: no kernel
    if torch.compiler.is_compiling():
        return sum((w * loss for w, loss in zip(weights, losses.unbind(), strict=True)), losses.new_zeros(()))
    # Not losses @ vector: autocast would round that to bf16.
    return torch.dot(losses, _vector(tuple(weights), losses.dtype, losses.device))


@lru_cache(maxsize=64)
def _vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because a copy from the host would wait for the device, and has no place in a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def losses(x: object, y: object, single: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
    """1 - CKA of each pair, [L], fp32 (fp64 if any pair has it); x and y are lists of L tensors.

    ``single`` takes L, two tensors and the ``options``, which are `cka_loss`'s.

    Raises:
        TypeError, ValueError: not two lists of one length, no pairs, a pair whose rows differ; what ``single`` raises.
    """
    options = _DEFAULTS | options
    with distributed.Reported(options["group"]):
        xs, ys = _require_lists(x, y, options["row_dims"])
    if len(xs) == 1:
        return single(1, xs[0], ys[0], **options).reshape(1)
    apart = options["backend"] == "reference" or any(options[k] != v for k, v in _COMMON.items())
    if apart or any(ops._watched(*pair) for pair in zip(xs, ys, strict=True)):
        return _stack([single(len(xs), *pair, **options) for pair in zip(xs, ys, strict=True)])

    names = "kernel", "estimator", "mask", "row_dims", "backend", "precision"
    tensors: list[Tensor] = []
    calls: list[_Call] = []
    mask: Tensor | None = None
    for pair in zip(xs, ys, strict=True):
        *two, mask, problem = inputs.prepare("cka_loss", *pair, *(options[name] for name in names))
        name = backends.resolve(problem, options["backend"])
        calls.append(_Call(problem, plan.choose_route(problem.n, problem.p, problem.q, name), name))
        tensors += two
    group = _share_launches(calls, tensors, options["backend"])
    if not any(call.problem.x_grad or call.problem.y_grad for call in calls):
        return _forward(calls, group, mask, tensors)[0]
    value: Tensor = _Pairs.apply(calls, group, mask, *tensors)
    return value


def _share_launches(calls: list[_Call], tensors: list[Tensor], requested: str) -> bool:
    """Whether the Triton backend takes all pairs in common launches, three in all instead of three each."""
    first = calls[0].problem
    if requested != "triton" and not (requested == "auto" and first.device.type == "cuda"):
        return False
    if backends.why_not("triton", first.dtype, first.device) is not None:
        return False
    return plan.together([call.problem for call in calls])


def _forward(
    calls: list[_Call], group: bool, mask: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Values [L], and the tensors of the stash of all, or of each."""
    if group:
        values, stash = backends.load("triton").forward_together(tensors, mask, _problems(calls))
        return values, list(stash)
    each, saved = [], []
    for call, x, y in zip(calls, tensors[::2], tensors[1::2], strict=True):
        value, stash = ops._run(backends.load(call.backend).forward, x, y, mask, call.problem, call.route)
        each.append(value)
        saved += stash
    return _stack(each), saved


class _Pairs(torch.autograd.Function):
    """All pairs as one node; ``tensors`` are x and y of the first pair, of the second, ..."""

    @staticmethod
    def forward(ctx: Any, calls: list[_Call], group: bool, mask: Tensor | None, *tensors: Tensor) -> Tensor:
        values, saved = _forward(calls, group, mask, tensors)
        ctx.calls, ctx.group = calls, group
        ctx.save_for_backward(mask, *tensors, *saved)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        calls: list[_Call] = ctx.calls
        mask, *saved = ctx.saved_tensors
        tensors, saved = saved[: 2 * len(calls)], saved[2 * len(calls) :]
        visible = torch.is_grad_enabled() or ops._watched(grad, tensors[0])  # as in `ops`
        if ctx.group:
            triton = backends.load("triton")
            if not visible:
                return None, None, None, *triton.backward_together(
                    grad, tensors, mask, Stash(*saved), _problems(calls)
                )  # fmt: skip
            # To be differentiated again, each pair by itself: what it left is found once more.
            calls = [_Call(call.problem, "gram", "triton") for call in calls]
            stashes = [
                ops._run(triton.forward, x.detach(), y.detach(), mask, call.problem, call.route)[1]
                for call, x, y in zip(calls, tensors[::2], tensors[1::2], strict=True)
            ]
        else:
            fields = len(Stash._fields)
            stashes = [Stash(*saved[fields * i : fields * (i + 1)]) for i in range(len(calls))]
        gradients: list[Tensor | None] = []
        sides = zip(calls, grad.unbind(), tensors[::2], tensors[1::2], stashes, strict=True)
        for (problem, route, name), upstream, x, y, own in sides:
            upstream = upstream.to(ops.value_dtype(problem.dtype))
            if visible:
                dx, dy = ops._visible_backward(upstream, x, y, mask, ops._spec(problem, route, name), own)
            else:
                dx, dy = ops._run(backends.load(name).backward, upstream, x, y, mask, own, problem, route)
            gradients += dx if problem.x_grad else None, dy if problem.y_grad else None
        return None, None, None, *gradients


def _problems(calls: list[_Call]) -> tuple[Problem, ...]:
    return tuple(call.problem for call in calls)


def _stack(values: list[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, (value.dtype for value in values))
    return torch.stack([value.to(dtype) for value in values])


def _require_lists(x: object, y: object, row_dims: int) -> tuple[list[Tensor], list[Tensor]]:
    """Both as lists, if they are lists of as many layers, each pair with the same rows."""
    lists = (list, tuple)
    if not (isinstance(x, lists) and isinstance(y, lists)):
        (name, value), other = (("x", x), "y") if isinstance(x, lists) else (("y", y), "x")
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}, because {other} is no list; "
            "for pairs of layers both must be lists of tensors"
        )
    for name, layers in (("x", x), ("y", y)):
        for index, layer in enumerate(layers):
            inputs.require_features(f"{name}[{index}]", layer, row_dims)
    if len(x) != len(y) or not x:
        raise ValueError(f"x and y must list the two sides of at least one pair, got {len(x)} and {len(y)} layers")
    for index, (one, other) in enumerate(zip(x, y, strict=True)):
        if one.shape[:row_dims] != other.shape[:row_dims]:
            raise ValueError(
                f"x[{index}] and y[{index}] must have the same rows, got {tuple(one.shape[:row_dims])} and "
                f"{tuple(other.shape[:row_dims])} (row_dims={row_dims})"
            )
    return list(x), list(y)
