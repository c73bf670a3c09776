"""Implements the public functions: checks a call, chooses a backend, and computes one pair of features or many.

A call consists of x, y, a mask [rows] or None, and its `Options`; functional.py has the public signatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, distributed, global_batch, inputs, ops, pairs, plan, reference
from .backends.linalg import require_fp64
from .moments import MIN_ROWS
from .types import PLAIN, RBF, Choice, Options, Plan, Problem

# The options with which a call of plain matrices on a CPU takes the short way of `_alone`.
USUAL = tuple(Options(name, estimator=estimator) for name in ("cka_loss", "cka", "hsic") for estimator in MIN_ROWS)


def loss(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    mask: Tensor | None,
    options: Options,
    weights: Sequence[float | Tensor] | Tensor | None,
) -> Tensor:
    """The statistic of x and y, 0-d; of two lists, the weighted sum over their pairs.

    Raises:
        TypeError, ValueError, RuntimeError: as `bird_kernels.cka_loss`.
    """
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) and {type(x), type(y)} & {list, tuple}:
        with distributed.Reported(options.group):
            weights = pairs.numbers(weights, x)
        return pairs.weighted_loss(losses(x, y, mask, options), weights)
    if weights is not None:
        with distributed.Reported(options.group):
            raise ValueError("weights are for lists of pairs: cka_loss([x1, ...], [y1, ...], weights=[w1, ...])")
    return evaluate(x, y, mask, options)  # type: ignore[arg-type]


def losses(x: object, y: object, mask: Tensor | None, options: Options) -> Tensor:
    """The statistic of each pair of two lists, [pairs], fp32 (fp64 if any pair has it).

    They are computed together if the options allow it, else and under torch.compile and torch.func one by one. Those of
    a group travel together.

    Raises:
        TypeError, ValueError: not two lists of one length, no pairs, a pair whose rows differ; also as `evaluate`.
    """
    listed = isinstance(x, (list, tuple)) and forward_ad._current_level < 0
    if listed and ops.at_once is not None and not torch.compiler.is_compiling():
        done = _at_once(x, y, mask, options)
        if done is not None:
            return done
    try:
        both = inputs.require_lists(x, y, options.row_dims)
    except Exception as error:
        distributed.report(options.group, error)
        raise
    if len(both) == 1:
        return evaluate(*both[0], mask, options).reshape(1)
    if options.group is not None:
        return pairs.stack(_in_group(both, mask, options))
    common = options.center and (options.statistic, options.kernel) == ("cka_loss", "linear")
    common = common and forward_ad._current_level < 0 and options.backend != "reference"
    if not common or any(ops.watched(*pair) for pair in both):
        return pairs.stack([evaluate(*pair, mask, options) for pair in both])
    return pairs.in_one_node([inputs.prepare(*pair, mask, options) for pair in both], options.backend)


def evaluate(x: Tensor, y: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """The statistic of one pair, 0-d, fp32 (fp64 if either side is).

    Raises:
        TypeError, ValueError, RuntimeError: as `bird_kernels.cka_loss`.
    """
    if options.group is not None:
        return _in_group([(x, y)], mask, options)[0]
    if forward_ad._current_level >= 0:
        options = _in_forward_mode(options)
    if ops.at_once is not None and not torch.compiler.is_compiling():
        done = _at_once(x, y, mask, options)
        if done is not None:
            return done
    if mask is None and options in USUAL and type(x) in PLAIN and type(y) in PLAIN:
        recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        done = None if recorded or ops.watched(x, y) else _alone(x, y, options)
        if done is not None:
            return done
    return _whole(*inputs.prepare(x, y, mask, options), options.backend)


def _at_once(x: object, y: object, mask: Tensor | None, options: Options) -> Tensor | None:
    """What `ops.at_once` returns; None if it fails under "auto", whose next step takes another backend and warns."""
    assert ops.at_once is not None
    try:
        return ops.at_once(x, y, mask, options)
    except Exception:
        if options.backend != "auto":
            raise
        return None


def _alone(x: Tensor, y: Tensor, options: Options) -> Tensor | None:
    """The statistic of plain fp32 matrices on a CPU, of which no gradient is wanted; None for all else.

    Of the steps of other calls it has only those in which such a call can fail.
    """
    for a in (x, y):
        if a.dtype is not torch.float32 or a.dim() != 2 or not a.is_cpu or a.layout is not torch.strided or a.is_nested:
            return None
    (n, p), (rows, q) = x.shape, y.shape
    if rows != n or n < MIN_ROWS[options.estimator] or p * q == 0:
        return None
    if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return None
    library, route = backends.module_of("library"), plan.route_on_cpu(n, p, q)
    if options.estimator == "biased":
        found: Tensor | None = library.forward_alone(x, y, options.statistic, route)
        if found is not None:
            return found
    problem = Problem(n, p, q, x.dtype, x.device, options.statistic, options.estimator, x_grad=False)  # type: ignore[arg-type]
    return library.forward(x, y, None, problem, route)[0]


def _in_forward_mode(options: Options) -> Options:
    """The options in forward mode (`torch.func.jvp`, dual tensors), which only the literal formula supports."""
    if options.backend not in ("auto", "reference"):
        raise RuntimeError(
            f'backend="{options.backend}" has no forward-mode derivative: leave backend="auto", which then takes the '
            "literal formula in fp64, or use reverse mode"
        )
    return options._replace(backend="reference")


@distributed.uncompiled
def _in_group(both: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None, options: Options) -> list[Tensor]:
    if distributed.world_size(options.group) == 1:
        return [_whole(*inputs.prepare(*pair, mask, options), options.backend) for pair in both]
    return across(both, mask, options)


def across(both: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None, options: Options) -> list[Tensor]:
    """The statistic of each pair by communication between the ranks of a group, even if it has only one."""
    values = []
    for part, received in global_batch.exchange(both, mask, options):
        if isinstance(received, Tensor):
            everyone = global_batch.gathered(part, received, options.group)
            values.append(_whole(*everyone, part.problem, options.backend))
        else:
            values.append(global_batch.of_merged_sums(part, received, options.group))
    return values


def _whole(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, backend: str) -> Tensor:
    """The statistic of one batch, 0-d, by the resolved backend or by the literal formula."""
    if backend == "reference":
        require_fp64('backend="reference"', x.device)
        with ops.without_autocast(x.device):
            return ops.literal(x, y, mask, problem).to(ops.value_dtype(x.dtype))
    name = backends.resolve(problem, backend)
    return ops.alignment(x, y, mask, ops.Call(problem, plan.route_of(problem, name), name, backend == "auto"))


def plan_of(x: Tensor, y: Tensor, mask: Tensor | None, options: Options) -> Plan:
    """The plan by which `evaluate` would compute this call; all ranks of a group must call it."""
    transport = None
    if options.group is None or distributed.world_size(options.group) == 1:
        *_, problem = inputs.prepare(x, y, mask, options)
    else:
        part = global_batch.met(x, y, mask, options)
        problem, transport = part.problem, part.transport
        if transport.name == "merged":
            merged = Choice("library", "sums of rows travel, which the library's products are")
            return plan.describe(problem._replace(n=len(part.x)), "cross", merged, transport=transport)
    problem = backends.precise(problem)
    choice = backends.decide(problem, options.backend)
    return plan.describe(problem, plan.route_of(problem, choice.backend), choice, backends.device_sheet(x), transport)


def gram(x: Tensor, kernel: str | RBF) -> Tensor:
    """Implements `bird_kernels.centered_gram`."""
    rbf = inputs.parse_kernel(kernel)
    (x,) = inputs.require_features(1, x=x)
    if rbf is not None:
        require_fp64("a Gaussian kernel", x.device)
        k = reference.rbf_gram(x.flatten(1), None, rbf, 0, center=True)
        return (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()).to(ops.value_dtype(x.dtype))
    with ops.without_autocast(x.device):
        x = x.flatten(1).to(ops.value_dtype(x.dtype))
        x = x - x.mean(0)
        x = x - x.mean(0)
        return x @ x.T
