"""Several pairs of layers in one call through one autograd node, whatever their number and widths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops, plan
from .ops import Call
from .types import Problem, Stash


class _Calls(NamedTuple):
    """How pairs are computed: one by one, or all ``together`` in common launches of their backend."""

    each: list[Call]
    together: bool


def numbers(weights: Sequence[float | Tensor] | Tensor | None, x: object) -> Sequence[float] | Tensor | None:
    """The weights in the form that `weighted_loss` expects; ``x`` is the list of one side's tensors, or invalid.

    Raises:
        TypeError, ValueError: ``weights`` is not one number for each pair.
    """
    if weights is None or not isinstance(x, (list, tuple)):
        return None  # `inputs.require_lists` raises if x is invalid
    if isinstance(weights, Tensor) and weights.dim() != 1:
        raise ValueError(f"weights must be a vector, [pairs], got shape {tuple(weights.shape)}")
    if len(weights) != len(x):
        raise ValueError(f"weights must have one number for each pair, got {len(weights)} for {len(x)}")
    if isinstance(weights, Tensor):
        return weights
    learned = [weight.device for weight in weights if isinstance(weight, Tensor) and weight.requires_grad]
    if learned:
        return stack([torch.as_tensor(weight, device=learned[0]) for weight in weights])
    return weights if torch.compiler.is_compiling() else tuple(map(float, weights))  # type: ignore[return-value]


def weighted_loss(losses: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """The sum of weight * loss over the pairs, 0-d; ``weights`` are from `numbers`, None means 1 each.

    Weights that are a tensor may be learned: they receive a gradient.
    """
    if weights is None:
        return losses.sum() if len(losses) > 1 else losses.squeeze(0)  # one pair needs no kernel launch
    if isinstance(weights, Tensor):
        return (losses * weights.to(losses)).sum()
    if torch.compiler.is_compiling():
        return sum((w * loss for w, loss in zip(weights, losses.unbind(), strict=True)), losses.new_zeros(()))
    values, dtype, device = tuple(weights), losses.dtype, losses.device
    vector = _kept(values, dtype) if device.type == "cpu" else _filled(values, dtype, device)
    return torch.dot(losses, vector)  # not losses @ vector, which autocast would round to bf16


@lru_cache(maxsize=64)
def _kept(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The numbers as a vector on the CPU, cached: 4 us at first, 0.2 us from then on."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device="cpu")


def _filled(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a vector on a GPU by two launches, which take them as arguments.

    A copy from the host would synchronise with the GPU in each step whose numbers are new. A cached copy would have to
    outlive every captured CUDA graph that reads it.
    """
    vector = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(vector.unbind(), values)
    return vector


def in_one_node(pairs: list[tuple[Tensor, Tensor, Tensor | None, Problem]], requested: str) -> Tensor:
    """The statistics of L >= 2 pairs, [L], fp32 (fp64 if any pair has it), by the ``requested`` backend.

    ``pairs`` are results of `inputs.prepare`; all have the same mask.
    """
    tensors, mask, problems = [side for x, y, *_ in pairs for side in (x, y)], pairs[0][2], [pair[3] for pair in pairs]
    calls = _calls(problems, requested)
    if not any(problem.x_grad or problem.y_grad for problem in problems):
        return _forward(calls, mask, tensors)[0]
    value: Tensor = _Pairs.apply(calls, mask, *tensors)
    return value


def _calls(problems: list[Problem], requested: str) -> _Calls:
    """Together in three launches of a fused backend if one can, instead of three per pair; else one by one."""
    auto, shared = requested == "auto", backends.sharing(problems, requested)
    if shared == "native":
        ops.native_backend()  # the next call of this kind is made at once
    if shared is not None:
        return _Calls([Call(problem, "gram", shared, auto) for problem in problems], True)
    names = [backends.resolve(problem, requested) for problem in problems]
    return _Calls([Call(p, plan.route_of(p, name), name, auto) for p, name in zip(problems, names, strict=True)], False)


def _forward(calls: _Calls, mask: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], _Calls]:
    """Values [L], the tensors of the common stash or of all stashes in turn, and how the pairs were computed."""
    if calls.together:
        problems = tuple(call.problem for call in calls.each)
        try:
            value, common = backends.module_of(calls.each[0].backend).forward_together(tensors, mask, problems)
            return value, list(common), calls
        except Exception as error:
            calls = _apart(calls, error)
    each: list[Call] = []
    values: list[Tensor] = []
    saved: list[Tensor] = []
    for call, x, y in zip(calls.each, tensors[::2], tensors[1::2], strict=True):
        value, stash, done = ops.run_forward(x, y, mask, call)
        each.append(done)
        values.append(value)
        saved += stash
    return stack(values), saved, _Calls(each, False)


def _apart(calls: _Calls, error: Exception) -> _Calls:
    """The same pairs one by one, after the common launches failed; raises ``error`` unless ``auto`` chose them."""
    problems = [call.problem for call in calls.each]
    if not calls.each[0].auto:
        raise error
    backends.replace(calls.each[0].backend, problems[0], error, "pairs")
    return _calls(problems, "auto")


class _Pairs(torch.autograd.Function):
    """All pairs as one autograd node; ``tensors`` are x and y of the first pair, of the second, ..."""

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
        if calls.together and not ops.is_visible(grad, tensors[0]):
            problems = tuple(call.problem for call in calls.each)
            try:
                module = backends.module_of(calls.each[0].backend)
                return None, None, *module.backward_together(grad, tensors, mask, Stash(*saved), problems)
            except Exception as error:
                _, saved, calls = _forward(_apart(calls, error), mask, tensors)
        elif calls.together:  # a differentiable backward runs pair by pair, so each pair's stash is computed again
            _, saved, calls = _forward(_Calls(calls.each, False), mask, [tensor.detach() for tensor in tensors])
        fields = len(Stash._fields)
        gradients: list[Tensor | None] = []
        for i, (call, upstream) in enumerate(zip(calls.each, grad.unbind(), strict=True)):
            own = Stash(*saved[fields * i : fields * (i + 1)])
            upstream = upstream.to(ops.value_dtype(call.problem.dtype))
            gradients += ops.run_backward(upstream, tensors[2 * i], tensors[2 * i + 1], mask, own, call)
        return None, None, *gradients


def stack(values: list[Tensor]) -> Tensor:
    """0-d values as a vector, in the dtype that they promote to."""
    dtype = reduce(torch.promote_types, (value.dtype for value in values))
    return torch.stack([value.to(dtype) for value in values])
