"""Whether a backend's kernels work on this machine: a small problem at their first use, and what became of others.

Compilers, drivers and cards differ, and few of them were tried. Under ``backend="auto"`` a kernel that does
not compile or computes wrong numbers is left out from then on, with one warning; training goes on by another backend.
``BIRD_STRICT=1`` raises instead, and so does a backend that was asked for by name.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import RBF, Problem, Route

# Of the small problem, multiples of 16, as compilers specialise on; more rows on the cross route.
ROWS, MANY_ROWS, WIDTHS = 48, 208, (64, 32)


class Use(NamedTuple):
    """What is trusted or not as one: the kernels of a backend for a dtype on a device.

    ``kind`` is "linear", "rbf" or, several pairs in common launches, "pairs"; of the library "shifted", with the route
    where one is tried.
    """

    backend: str
    kind: str
    dtype: torch.dtype
    device: torch.device


_works: set[tuple[Use, Problem]] = set()  # problems without their sizes: other options are other kernels
_broken: dict[Use, str] = {}


def use_of(backend: str, problem: Problem, kind: str = "") -> Use:
    """The use that a problem makes of a backend."""
    return Use(backend, kind or ("rbf" if problem.kernel else "linear"), problem.dtype, problem.device)


def why_not(backend: str, kind: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why ``auto`` must not take a backend, None without one."""
    return _broken.get(Use(backend, kind, dtype, device))


def leave_out(use: Use, error: Exception) -> bool:
    """Remember that the kernels of a use failed; whether that is news.

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
    """Say once what was left out, why, and what runs instead."""
    warnings.warn(
        f"bird_kernels: the {use.backend} backend's {use.kind} kernels of {use.dtype} on {use.device} are left out, "
        f'{instead} runs instead ({_broken[use]}). backend="{use.backend}" or BIRD_STRICT=1 raises the error',
        RuntimeWarning,
        stacklevel=3,
    )


def forget_trials() -> None:
    """Forget what was tried, as at the start."""
    _works.clear()
    _broken.clear()


def is_known(use: Use, problem: Problem) -> bool:
    """Whether the kernels of a use have been tried with a problem's options, and work."""
    return (use, _options_of(problem)) in _works


def _options_of(problem: Problem) -> Problem:
    """Without sizes and a kernel's numbers, which are no part of what is compiled."""
    return problem._replace(n=0, p=0, q=0, kernel=problem.kernel and RBF())


def failure_of(backend: ModuleType, library: ModuleType, problem: Problem, use: Use) -> Exception | None:
    """What went wrong with a small problem of the same options; None if nothing did, which is remembered.

    A CUDA graph that is being captured and a dispatch mode must not see it: then None, and a later call tries.
    """
    if torch._C._len_torch_dispatch_stack() > 0:
        return None
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    try:
        with _undisturbed(problem.device):
            _try(backend, library, problem, use.kind)
    except torch.OutOfMemoryError:
        return None  # says nothing of the kernels
    except Exception as error:
        return error
    _works.add((use, _options_of(problem)))
    return None


def _try(backend: ModuleType, library: ModuleType, problem: Problem, kind: str) -> None:
    """Raises an ArithmeticError if value or gradients are not those of fp64 on the CPU."""
    (p, q), cpu = WIDTHS, torch.device("cpu")
    route: Route = "cross" if kind.endswith("cross") else "gram"
    n = MANY_ROWS if route == "cross" else ROWS
    small = problem._replace(n=n, p=p, q=q)
    generator = torch.Generator(cpu).manual_seed(0)
    x, y = (torch.randn(n, width, generator=generator, device=cpu).to(small.dtype) for width in WIDTHS)
    y[:, :p] += x[:, :q]
    mask = torch.arange(n, device=cpu) % 5 != 1 if small.masked else None
    wide = small._replace(dtype=torch.float64, device=cpu, precision=None)
    true = _evaluate(library, x.double(), y.double(), mask, wide, route)
    device = small.device
    here = x.to(device), y.to(device), None if mask is None else mask.to(device)
    found = _evaluate_pairs(backend, *here, small) if kind == "pairs" else _evaluate(backend, *here, small, route)
    exact = small.dtype == torch.float32 and small.precision in ("ieee", "tf32x3")
    bound = 1e-3 if exact else 3e-2  # wrong numbers are wrong by more
    for name, one, other in zip(("value", "dx", "dy"), found, true, strict=True):
        error = float((one.cpu().double() - other).norm() / other.norm().clamp(min=1e-30)) if other.numel() else 0.0
        if not error <= bound:
            raise ArithmeticError(f"its first result is wrong: {name} is off by {error:.2g} of its size")


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


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No autograd, transform or autocast; the comparison waits for the device, which a debugging mode may forbid."""
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
