r"""Registers the operators with PyTorch: schemas, fake kernels, autograd, vmap. The only file that names torch.library.

``bird::alignment`` computes a statistic and the stash, that is the tensors which its backward needs;
``bird::alignment_backward`` computes the gradients. Both are opaque to torch.compile. Autograd is attached by
`torch.autograd.Function`: `torch.library.register_autograd` is no cheaper and generates one without ``setup_context``,
which torch.func.grad refuses (torch 2.15). Plain tensors under plain autograd, the case of training loops, bypass the
dispatcher, which takes two thirds of the host time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from . import backends, reference
from .backends.linalg import has_fp64
from .plan import route_of
from .types import PLAIN, RBF, Options, Problem, Route, Stash, Statistic


class Call(NamedTuple):
    """How a problem is computed.

    ``auto``: the backend was chosen automatically; if its kernels fail, another one is used (`backends.replace`).
    ``module``: the module of the backend that computed the value and the stash.
    """

    problem: Problem
    route: Route
    backend: str
    auto: bool = False
    module: Any = None


_STASH = ", ".join(f"Tensor {name}" for name in Stash._fields)
_CALL = "str statistic, str estimator, str route, str backend, str? precision, bool x_grad, bool y_grad, "
_CALL += "str kernel, float[] sigma, float? threshold, bool flow, str median, bool center"

torch.library.define(
    "bird::alignment",
    f"(Tensor x, Tensor y, Tensor? mask, {_CALL}) -> (Tensor value, {_STASH})",
)
torch.library.define(
    "bird::alignment_backward",
    f"(Tensor grad, Tensor x, Tensor y, Tensor? mask, {_STASH}, {_CALL}) -> (Tensor dx, Tensor dy)",
)


def flattened(call: Call) -> tuple[Any, ...]:
    """A call as both operators take it behind their tensors, in the order of their schema."""
    p, k = call.problem, call.problem.kernel
    linear = p.statistic, p.estimator, call.route, call.backend, p.precision, p.x_grad, p.y_grad
    if k is None:
        return *linear, "linear", (), None, False, "lower", p.center
    return *linear, "rbf", k.sigmas or (), k.threshold, k.flow, k.median, p.center


def _call(x: Tensor, y: Tensor, mask: Tensor | None, given: Sequence[Any]) -> Call:
    """The call that `flattened` made ``given`` of."""
    statistic, estimator, route, backend, precision, x_grad, y_grad, kernel, sigma, *rule, center = given
    rbf = None if kernel == "linear" else RBF((sigma[0], sigma[1]) if sigma else None, *rule)
    sizes, asked = (x.shape[0], x.shape[1], y.shape[1]), (statistic, estimator, precision)
    problem = Problem(*sizes, x.dtype, x.device, *asked, mask is not None, x_grad, y_grad, rbf, center)
    return Call(problem, route, backend)


def _split(stash_and_call: Sequence[Any]) -> tuple[Stash, Sequence[Any]]:
    """The last arguments of the backward: the stash, and those that `flattened` makes."""
    return Stash(*stash_and_call[: len(Stash._fields)]), stash_and_call[len(Stash._fields) :]


def _wanted(given: Sequence[Any]) -> tuple[bool, bool]:
    """Of the arguments that `flattened` makes: whether gradients of x and of y are wanted."""
    return given[5], given[6]


def literal(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> Tensor:
    """The statistic by its published formula (`reference`), 0-d, fp64."""
    value: Tensor = getattr(reference, problem.statistic)(x, y, mask, problem.estimator, problem.kernel, problem.center)
    return value


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast, which would otherwise round an operator's fp32 products; some devices have no autocast."""
    kind = device.type
    if (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _alignment(x: Tensor, y: Tensor, mask: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    value, stash, _ = run_forward(x, y, mask, _call(x, y, mask, given))
    # An operator must not return its inputs, but the stash of uncentred features is the features themselves; and it has
    # the strides of its fake kernel, also where features that lie column by column were centred as they lie.
    copies = (kept.clone() if kept is x or kept is y else kept for kept in stash)
    return value, *(kept.contiguous() for kept in copies)


def _alignment_backward(grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    stash, given = _split(rest)
    problem, route, backend, *_ = _call(x, y, mask, given)
    with without_autocast(x.device):
        dx, dy = backends.of(problem, backend).backward(grad, x, y, mask, stash, problem, route=route)
    return dx.contiguous(), dy.contiguous()


# Registered for every device; `backends` decides what runs on it.
torch.library.impl("bird::alignment", "CompositeExplicitAutograd", _alignment)
torch.library.impl("bird::alignment_backward", "CompositeExplicitAutograd", _alignment_backward)


@torch.library.register_fake("bird::alignment")
def _alignment_fake(x: Tensor, y: Tensor, mask: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    problem, route, backend, *_ = _call(x, y, mask, given)
    shapes = backends.of(problem, backend).stash_shapes(problem, route)
    value = x.new_empty((), dtype=value_dtype(x.dtype))
    # The one fp64 tensor of a stash stays on the host where a device has no fp64.
    places = {"coefficients": x.device if has_fp64(x.device) else torch.device("cpu")}
    stash = ((*shapes[name], places.get(name, x.device)) for name in Stash._fields)
    return value, *(x.new_empty(shape, dtype=dtype, device=device) for shape, dtype, device in stash)


@torch.library.register_fake("bird::alignment_backward")
def _alignment_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    x_grad, y_grad = _wanted(_split(rest)[1])
    return x.new_empty(x.shape if x_grad else (0,)), y.new_empty(y.shape if y_grad else (0,))


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results for inputs of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def alignment(x: Tensor, y: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    """The statistic of x [n, p], y [n, q] (one dtype, one device), mask bool [n] or None; 0-d, differentiable."""
    problem = call.problem
    wanted = problem.x_grad or problem.y_grad
    if watched(x, y):
        if torch.compiler.is_compiling() and not wanted:
            # Without gradients torch.compile of 2.11 fails on any torch.autograd.Function with a setup_context.
            value: Tensor = torch.ops.bird.alignment(x, y, mask, *flattened(call))[0]
            return value
        value = _TransformableAlignment.apply(x, y, mask, *flattened(call))[0]
        return value
    if call.backend == "native":
        try:
            return native_backend().statistic_of(x, y, mask, problem)
        except Exception as error:
            call = _instead(call, error)
    if not wanted:
        return run_forward(x, y, mask, call)[0]
    value = _Alignment.apply(x, y, mask, call)
    return value


def run_forward(x: Tensor, y: Tensor, mask: Tensor | None, call: Call) -> tuple[Tensor, Stash, Call]:
    """Value, stash, and the call that made them; under ``auto`` by another backend if the first one's kernels fail."""
    while True:
        problem, route, backend, auto, _ = call
        module = backends.of(problem, backend)
        try:
            with without_autocast(x.device):
                value, stash = module.forward(x, y, mask, problem, route)
            return value, stash, Call(problem, route, backend, auto, module)
        except Exception as error:
            call = _instead(call, error)


def run_backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, call: Call
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dy, None where not wanted: by the backend that made the stash, or by the operator if `is_visible`. Under
    ``auto``, if its kernels fail, another backend repeats the forward and runs the backward."""
    problem = call.problem
    if is_visible(grad, x):
        return _visible_backward(grad, x, y, mask, flattened(call), stash)
    while True:
        try:
            with without_autocast(x.device):
                dx, dy = call.module.backward(grad, x, y, mask, stash, problem, route=call.route)
            return (dx if problem.x_grad else None), (dy if problem.y_grad else None)
        except Exception as error:
            _, stash, call = run_forward(x, y, mask, _instead(call, error))


def _instead(call: Call, error: Exception) -> Call:
    """The call with another backend; raises ``error`` if the failed one was chosen by name."""
    if not call.auto:
        raise error
    backend = backends.replace(call.backend, call.problem, error)
    return Call(call.problem, route_of(call.problem, backend), backend, True)


def is_visible(grad: Tensor, x: Tensor) -> bool:
    """Whether a backward must call the operator: under create_graph, with batched gradients, or if it is traced."""
    return torch.is_grad_enabled() or watched(grad, x) or is_batched(grad)


# True under ``torch.autograd.grad(is_grads_batched=True)`` and ``jacobian(vectorize=True)``, which use no torch.func.
is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def watched(x: Tensor, y: Tensor) -> bool:
    """Whether torch.compile, torch.func, a dispatch mode or a tensor subclass intercepts the call and must see
    operators; or whether the dispatcher must resolve a lazy negation, such as ``z.conj().imag``."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or not (type(x) in PLAIN and type(y) in PLAIN)
        or x.is_meta
        or x.is_neg()
        or y.is_neg()
    )


# Runs a whole public call in C++, of tensors or of lists, or returns None if that call needs Python. Unset until the
# native backend is loaded.
at_once: Callable[..., Tensor | None] | None = None


@lru_cache
def native_backend() -> Any:
    """The native backend, which has its own autograd in C++, except for backwards that are differentiated or traced."""
    global at_once
    from .backends import native

    def backward(
        grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        *kept, statistic, unbiased, exact, x_grad, y_grad = rest
        problem = Problem(
            x.shape[0], x.shape[1], y.shape[1], x.dtype, x.device, get_args(Statistic)[statistic],
            "unbiased" if unbiased else "biased", "ieee" if exact else "tf32", mask is not None, x_grad, y_grad,
        )  # fmt: skip
        given = flattened(Call(problem, "gram", "native"))
        return _visible_backward(grad, x, y, mask, given, native.stash_of(*kept))

    def shares(xs: list[Tensor], ys: list[Tensor], mask: Tensor | None, options: Options) -> bool:
        named = dict(statistic=options.statistic, estimator=options.estimator, precision=options.precision)
        problems, wants = [], torch.is_grad_enabled()
        for x, y in zip(xs, ys, strict=True):
            own = Problem(len(x), x.shape[1], y.shape[1], x.dtype, x.device, masked=mask is not None, **named)  # type: ignore[arg-type]
            problems.append(own._replace(x_grad=wants and x.requires_grad, y_grad=wants and y.requires_grad))
        return backends.sharing(problems, options.backend) == "native"

    native.differentiate_backward_with(backward)
    at_once = native.at_once_where(backends.most_at_once, shares)
    return native


class _Alignment(torch.autograd.Function):
    """A backend under plain autograd, without the dispatcher; the stash is saved without being returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        value, stash, ctx.call = run_forward(x, y, mask, call)
        ctx.save_for_backward(x, y, mask, *stash)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mask, *tensors = ctx.saved_tensors
        return *run_backward(grad, x, y, mask, Stash(*tensors), ctx.call), None, None


def _visible_backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, given: Sequence[Any], stash: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dy by the operator, None where not wanted; differentiable under create_graph and torch.func."""
    batched = not torch.compiler.is_compiling() and is_batched(grad)  # then with 1 for it: dx and dy are linear in grad
    tensors = x.new_ones((), dtype=grad.dtype) if batched else grad, x, y, mask, *stash
    if torch.is_grad_enabled():
        dx, dy = _AlignmentBackward.apply(*tensors, *given)
    else:  # without grad mode the operator itself: torch.compile of 2.11 cannot trace a Function inside another
        dx, dy = torch.ops.bird.alignment_backward(*tensors, *given)
    if batched:
        dx, dy = (dx * grad).to(dx.dtype), (dy * grad).to(dy.dtype)
    x_grad, y_grad = _wanted(given)
    return (dx if x_grad else None), (dy if y_grad else None)


class _TransformableAlignment(torch.autograd.Function):
    """The same in the form that torch.func and torch.compile can transform: all saved tensors are inputs or
    outputs."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, mask: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
        return torch.ops.bird.alignment(x, y, mask, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, mask, *ctx.given = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, y, mask, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, y, mask, *stash = ctx.saved_tensors
        return *_visible_backward(grad, x, y, mask, ctx.given, stash), None, *(None for _ in ctx.given)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        return _loop(_TransformableAlignment, info, in_dims, args)


class _AlignmentBackward(torch.autograd.Function):
    """The backward as a Function of its own, so that it can be differentiated again."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.bird.alignment_backward(grad, x, y, mask, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad, x, y, mask, *rest = inputs
        _, ctx.given = _split(rest)  # not the stash: tensors must be saved, and these are not needed
        ctx.save_for_backward(grad, x, y, mask)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddy: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, y, mask = ctx.saved_tensors
        problem, wanted = _call(x, y, mask, ctx.given).problem, _wanted(ctx.given)

        def first(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            value, pull = torch.func.vjp(lambda x, y: literal(x, y, mask, problem), x, y)  # type: ignore[misc]
            gradients: tuple[Tensor, ...] = pull(grad.to(value.dtype))
            return tuple(compress(gradients, wanted))

        # Not torch.autograd.grad, which refuses to run inside of torch.func's transforms.
        _, pull = torch.func.vjp(first, grad, x, y)  # type: ignore[misc]
        return *pull(tuple(compress((ddx, ddy), wanted))), None, *(None for _ in (*Stash._fields, *ctx.given))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        return _loop(_AlignmentBackward, info, in_dims, args)


def _loop(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """vmap as a loop over the batch: each member is a separate problem."""
    members = [
        function.apply(*(a.movedim(d, 0)[i] if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*members, strict=True)), (0,) * len(members[0])
