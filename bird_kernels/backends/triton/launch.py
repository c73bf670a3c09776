"""Kernel launches with little host overhead: the compiled kernel is cached.

At every launch Triton looks the compiled kernel up by all properties of the arguments that it specialises on: 17 to 28
us of Python for these kernels, where launching a known compiled kernel takes 4 (on a CPU at 2 GHz, with a driver that
does nothing). The problem and a few facts of the tensors determine these properties, so the look-up is cached by them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ...types import Precision, Problem

Known: TypeAlias = Hashable  # None: nothing is known


class Launch:
    """A kernel with the grid, sizes, constants, warps and stages that a problem determines.

    Parameters are given by name: those in ``decided`` must be the last ones of the kernel's signature; the others are
    taken from ``memory`` at the launch. Raises a ValueError if they are not the last ones.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], decided: Mapping[str, Any], **options: int) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._options = options
        names = [name for name in kernel.arg_names if name not in decided]
        if list(kernel.arg_names[: len(names)]) != names:
            raise ValueError(f"of {kernel.arg_names} the problem decides others than the last ones")
        self.arguments = itemgetter(*names)
        self._values = tuple(decided[name] for name in kernel.arg_names[len(names) :])
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, known: Known, memory: Mapping[str, Any]) -> None:
        """Launch with the arguments that the kernel takes from ``memory``.

        ``known`` is the key of the cache for all that the compiler specialises on beyond the problem: launches with
        equal ``known`` must agree in dtypes, strides and alignment. None: not cached, Triton looks the kernel up.
        """
        launch = self._compiled.get(known)
        if launch is not None:
            launch(*self.arguments(memory), *self._values)
            return
        compiled = self._kernel[self._grid](*self.arguments(memory), *self._values, **self._options)
        if known is not None and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[known] = compiled[self._grid]


def aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin at a multiple of 16 bytes, on which Triton specialises."""
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % 16 == 0


def precision_of(problem: Problem) -> Precision:
    """The precision of fp32 products: the call's, else PyTorch's setting; "ieee" for half-precision features."""
    if problem.dtype.itemsize == 2:
        return "ieee"
    if problem.precision is not None:
        return problem.precision
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def many_steps(problem: Problem, precision: str) -> dict[str, int]:
    """Warps and stages of kernels with matrix products; they avoid spills except those in docs/explain/kernels.md."""
    single = problem.dtype == torch.float32
    old = capability(problem.device) < (9, 0)
    exact = single and precision != "tf32"
    return dict(num_warps=8 if exact and old else 4, num_stages=2 if exact or (old and not single) else 3)


def few_steps(problem: Problem) -> dict[str, int]:
    """The same for programs with few steps along the features, too few for pipelining.

    With one stage, masked bf16 would spill 24 bytes on sm_80.
    """
    half = problem.dtype.itemsize == 2
    return dict(num_warps=4, num_stages=2 if half and capability(problem.device) < (9, 0) else 1)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def multiprocessors(device: torch.device) -> int | None:
    """How many a GPU has; None in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which x's device is the current one, on which Triton launches."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def as_bytes(mask: Tensor) -> Tensor:
    """The bool mask as contiguous bytes, as the kernels read it."""
    return mask.contiguous().view(torch.uint8)
