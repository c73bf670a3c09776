"""Whether a backend's kernels work on this machine: a test on a small problem at their first use, and its results.

Compilers, drivers and GPUs differ, and the kernels were tested with few of them. Under ``backend="auto"``, kernels that
do not compile or compute wrong numbers are not used again in this process; one warning says so, and training continues
with another backend. ``BIRD_STRICT=1`` raises instead, and so does a backend that was requested by name.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import combine_all, norm_of
from ..types import RBF, Problem, Route
from .linalg import row_count, unscaled

# Sizes of the small problem: multiples of 16, since Triton specialises on them; the cross route has MANY_ROWS.
ROWS, MANY_ROWS, WIDTHS = 48, 208, (64, 32)


class Use(NamedTuple):
    """Kernels that are used or left out together: those of one kind of a backend for a dtype on a device.

    ``kind`` is "linear", "rbf", "pairs" (several in shared launches), "layers" (of a `matrix`) or, of the library,
    "shifted", in tests with the route: "shifted gram", "shifted cross".
    """

    backend: str
    kind: str
    dtype: torch.dtype
    device: torch.device


_works: set[tuple[Use, Problem]] = set()  # with the problems' options: others compile other kernels
_broken: dict[Use, str] = {}


def use_of(backend: str, problem: Problem, kind: str = "") -> Use:
    """The kernels of ``backend`` that a problem uses; ``kind`` "" is that of its kernel function."""
    return Use(backend, kind or ("rbf" if problem.kernel else "linear"), problem.dtype, problem.device)


def known_failure(backend: str, kind: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``auto`` must not use these kernels; None if they have not failed."""
    return _broken.get(Use(backend, kind, dtype, device))


def leave_out(use: Use, error: Exception) -> bool:
    """Record that the kernels of a use failed; return whether this is the first time.

    Raises:
        Exception: ``error`` itself, under ``BIRD_STRICT=1``.
    """
    if os.environ.get("BIRD_STRICT") == "1":
        raise error
    is_new = use not in _broken
    first_line = (str(error).strip().splitlines() or [""])[0]
    _broken[use] = f"failed on this machine: {type(error).__name__}: {first_line}"
    return is_new


def warn(use: Use, instead: str) -> None:
    """Warn that the kernels of a use are left out, why, and what runs instead."""
    warnings.warn(
        f"bird_kernels: the {use.backend} backend's {use.kind} kernels of {use.dtype} on {use.device} are left out, "
        f'{instead} runs instead ({_broken[use]}). backend="{use.backend}" or BIRD_STRICT=1 raises the error',
        RuntimeWarning,
        stacklevel=3,
    )


def failure_of(backend: ModuleType, library: ModuleType, problem: Problem, use: Use) -> Exception | None:
    """Test the kernels, once, on a small problem with the same options: return the exception, or None for success.

    None, too, in the capture of a CUDA graph, under a dispatch mode and if memory runs out: then a later call tests.
    """
    # Which kernels are compiled does not depend on sizes and bandwidths.
    tested = use, problem._replace(n=0, p=0, q=0, kernel=problem.kernel and RBF())
    if tested in _works or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    try:
        with _undisturbed(problem.device):
            _try(backend, library, problem, use.kind)
    except torch.OutOfMemoryError:
        return None  # not the kernels' fault
    except Exception as error:
        return error
    _works.add(tested)
    return None


def _try(backend: ModuleType, library: ModuleType, problem: Problem, kind: str) -> None:
    """Raise an ArithmeticError unless value and gradients agree with those of ``library`` in fp64 on the CPU."""
    (p, q), cpu = WIDTHS, torch.device("cpu")
    route: Route = "cross" if kind.endswith("cross") else "gram"
    n = MANY_ROWS if route == "cross" else ROWS
    small = problem._replace(n=n, p=p, q=q)
    x, y = related(n, p, q, small.dtype, cpu)
    mask = torch.arange(n, device=cpu) % 5 != 1 if small.masked else None
    wide = small._replace(dtype=torch.float64, device=cpu, precision=None)
    true = _evaluate(library, x.double(), y.double(), mask, wide, route)
    if kind == "layers":  # HSIC of x with y, with itself, and of y with itself
        xx, yy = (_evaluate(library, a.double(), a.double(), mask, wide, route)[0] for a in (x, y))
        true = true[0], xx, yy
    device = small.device
    here = x.to(device), y.to(device), None if mask is None else mask.to(device)
    evaluate = {"pairs": _evaluate_pairs, "layers": _evaluate_layers}.get(kind, partial(_evaluate, route=route))
    found = evaluate(backend, *here, small)
    exact = small.dtype == torch.float32 and small.precision in ("ieee", "tf32x3")
    bound = 1e-3 if exact else 3e-2  # working kernels are far below, wrong ones above
    for name, one, other in zip(("value", "dx", "dy"), found, true, strict=True):
        error = relative_error(one, other)
        if not error <= bound:
            raise ArithmeticError(f"its first result is wrong: {name} is off by {error:.2g} of its size")


def related(n: int, p: int, q: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random features x [n, p] and y [n, q] that have a part in common; the same in each call."""
    generator, shared = torch.Generator(device).manual_seed(0), min(p, q)
    x, y = (torch.randn(n, width, generator=generator, device=device).to(dtype) for width in (p, q))
    y[:, :shared] += x[:, :shared]
    return x, y


def relative_error(found: Tensor, true: Tensor) -> float:
    """|found - true| / |true|, where ``true`` is fp64; 0 if they have no elements."""
    if true.numel() == 0:
        return 0.0
    return float((found.to(true.device).double() - true).norm() / true.norm().clamp(min=1e-30))


def _evaluate(
    backend: ModuleType, x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route
) -> tuple[Tensor, Tensor, Tensor]:
    value, stash = backend.forward(x, y, mask, problem, route)
    dx, dy = backend.backward(torch.ones_like(value), x, y, mask, stash, problem, route=route)
    return value, dx, dy


def _evaluate_pairs(
    backend: ModuleType, x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    problems = problem, problem
    values, stash = backend.forward_together([x, y, x, y], mask, problems)
    *_, dx, dy = backend.backward_together(torch.ones_like(values), [x, y, x, y], mask, stash, problems)
    empty = x.new_empty(0)
    return values[1], empty if dx is None else dx, empty if dy is None else dy


def _evaluate_layers(
    backend: ModuleType, x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    inner, sums, scales = backend.layer_products([x, y], mask, problem)
    count = row_count(x, mask)
    value, _, n = combine_all(inner, sums, count, problem.estimator, torch.finfo(torch.float32).eps)
    hsic = unscaled(value / norm_of(n, problem.estimator), scales[:, None], scales)
    return hsic[0, 1], hsic[0, 0], hsic[1, 1]


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """A context without autograd, transforms and autocast, and without CUDA's debug mode that forbids to wait."""
    functions = torch._C._DisableFuncTorch()
    with functions, torch.no_grad(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
