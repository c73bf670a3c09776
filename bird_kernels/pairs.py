"""Several pairs of layers in one call: one node for autograd, whatever their number and widths.

Under torch.compile and torch.func, and with the options that have no common form (see `losses`), the pairs are single
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from types import ModuleType
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
    module: ModuleType | None = None  # of the backend, that computed it


class _Calls(NamedTuple):
    """How pairs are computed: each, or all ``together`` by Triton's common launches; ``auto``: ours to choose."""

    each: list[_Call]
    together: bool
    auto: bool


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


def _vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on ``device``."""
    return _kept(values, dtype) if device.type == "cpu" else _filled(values, dtype, device)


@lru_cache(maxsize=64)
def _kept(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU; 4 us, the second time 0.2."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype)


def _filled(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on a GPU in two launches, of which they are arguments.

    A copy from the host would wait for the GPU, in each step whose numbers are new. A copy that is kept would have to
    live as long as any captured CUDA graph that reads it.
    """
    vector = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(vector.unbind(), values)
    return vector


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
    problems: list[Problem] = []
    mask: Tensor | None = None
    for pair in zip(xs, ys, strict=True):
        *two, mask, problem = inputs.prepare("cka_loss", *pair, *(options[name] for name in names))
        problems.append(problem)
        tensors += two
    calls = _calls(problems, options["backend"])
    if not any(problem.x_grad or problem.y_grad for problem in problems):
        return _forward(calls, mask, tensors)[0]
    value: Tensor = _Pairs.apply(calls, mask, *tensors)
    return value


def _calls(problems: list[Problem], requested: str) -> _Calls:
    """In common launches of the Triton backend, three in all instead of three each; else each by its own backend."""
    auto, first = requested == "auto", problems[0]
    asked = requested == "triton" or (auto and backends.compares(first.device))
    asked = asked and plan.together(problems)
    if asked and (backends.shares_launches(problems) if auto else backends.resolve(first, requested)):
        return _Calls([_Call(problem, "gram", "triton") for problem in problems], True, auto)
    names = [backends.resolve(problem, requested) for problem in problems]
    each = [_Call(problem, plan.route_of(problem, name), name) for problem, name in zip(problems, names, strict=True)]
    return _Calls(each, False, auto)


def _forward(calls: _Calls, mask: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], _Calls]:
    """Values [L], the tensors of the stash of all, or of each, and how they were computed."""
    if calls.together:
        problems = tuple(call.problem for call in calls.each)
        try:
            value, common = backends.load("triton").forward_together(tensors, mask, problems)
            return value, list(common), calls
        except Exception as error:
            calls = _apart(calls, error)
    each: list[_Call] = []
    values: list[Tensor] = []
    saved: list[Tensor] = []
    for call, x, y in zip(calls.each, tensors[::2], tensors[1::2], strict=True):
        value, stash, route, name, module = ops.forward(
            x, y, mask, call.problem, call.route, call.backend, calls.auto
        )  # fmt: skip
        each.append(_Call(call.problem, route, name, module))
        values.append(value)
        saved += stash
    return _stack(values), saved, calls._replace(each=each)


def _apart(calls: _Calls, error: Exception) -> _Calls:
    """The same pairs each for itself, after the common launches that ``auto`` chose have failed."""
    if not calls.auto:
        raise error
    problems = [call.problem for call in calls.each]
    backends.replace("triton", problems[0], error, "pairs")
    return _calls(problems, "auto")


class _Pairs(torch.autograd.Function):
    """All pairs as one node; ``tensors`` are x and y of the first pair, of the second, ..."""

    @staticmethod
    def forward(ctx: Any, calls: _Calls, mask: Tensor | None, *tensors: Tensor) -> Tensor:
        values, saved, ctx.calls = _forward(calls, mask, tensors)
        ctx.save_for_backward(mask, *tensors, *saved)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        calls: _Calls = ctx.calls
        mask, *saved = ctx.saved_tensors
        tensors, saved = saved[: 2 * len(calls.each)], saved[2 * len(calls.each) :]
        visible = torch.is_grad_enabled() or ops._watched(grad, tensors[0])  # as in `ops`
        if calls.together:
            problems = tuple(call.problem for call in calls.each)
            triton = backends.load("triton")
            if not visible:
                try:
                    return None, None, *triton.backward_together(grad, tensors, mask, Stash(*saved), problems)
                except Exception as error:
                    _, saved, calls = _forward(_apart(calls, error), mask, tensors)
            else:  # to be differentiated again, each pair by itself: what it left is found once more
                each = zip(calls.each, tensors[::2], tensors[1::2], strict=True)
                saved = [
                    a
                    for call, x, y in each
                    for a in ops._run(triton.forward, x.detach(), y.detach(), mask, *call[:2])[1]
                ]
        fields = len(Stash._fields)
        gradients: list[Tensor | None] = []
        for i, (call, upstream) in enumerate(zip(calls.each, grad.unbind(), strict=True)):
            problem, route, name, module = call
            x, y = tensors[2 * i : 2 * i + 2]
            own = Stash(*saved[fields * i : fields * (i + 1)])
            upstream = upstream.to(ops.value_dtype(problem.dtype))
            if visible:
                dx, dy = ops._visible_backward(upstream, x, y, mask, ops._spec(problem, route, name), own)
            else:
                assert module is not None
                dx, dy = ops.backward(upstream, x, y, mask, own, problem, route, name, module, calls.auto)
            gradients += dx if problem.x_grad else None, dy if problem.y_grad else None
        return None, None, *gradients


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
