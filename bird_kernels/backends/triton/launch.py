"""A kernel launch whose cost to the host is the launch.

Triton finds the compiled kernel by everything that it specialises on, argument by argument, at every launch: 17 to 28
us of Python for these kernels, where a launch of what was found takes 4 (on a CPU at 2 GHz, with a driver that does
nothing). All of that is decided by the problem and by a few facts of the tensors, so it is found once and kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan import CROWD, PROGRAMS, tile_count, tiling
from ...types import Problem, Route

Known: TypeAlias = Hashable  # None: nothing is known


class Launch:
    """A kernel with what a problem decides of its launch: grid, last arguments, constants, warps and stages."""

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], sizes: tuple[int, ...], constants: dict[str, Any], **options: int
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._sizes = sizes
        self._named = constants | options
        self._values = (*sizes, *(constants[name] for name in kernel.arg_names[-len(constants) :]))
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, known: Known, *args: Any) -> None:
        """Launches with ``args``, then the sizes.

        ``known`` stands for what the compiler may know of ``args`` beyond the problem: two launches with one ``known``
        must agree in dtypes, strides and alignment. None: nothing is known, Triton has to look.
        """
        launch = self._compiled.get(known)
        if launch is not None:
            launch(*args, *self._values)
            return
        compiled = self._kernel[self._grid](*args, *self._sizes, **self._named)
        if known is not None and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[known] = compiled[self._grid]


def both(
    kernel: Any, grid: tuple[int, int], sizes: tuple[int, ...], constants: dict[str, Any], **options: int
) -> tuple[Launch, Launch]:
    """The launch of a kernel that loads by pointers, and of the same kernel that loads by descriptors."""
    plain, described = (
        Launch(kernel, grid, sizes, constants | dict(DESCRIBED=flag), **options) for flag in (False, True)
    )
    return plain, described


def aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin at a multiple of 16 bytes, as Triton asks."""
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % 16 == 0


def describes(problem: Problem, route: Route, precision: str) -> bool:
    """Whether the kernels that multiply read by tensor descriptors, if the tensors allow it (`describable`).

    From sm_90 on, which has the unit that copies by them. A descriptor is 128 bytes that the host fills at every
    launch, 2 us of Python each: so only where whole tiles give every multiprocessor several programs. And only for the
    matrix units: exact fp32 waits for its own products, and with Triton 3.8 spills up to 400 bytes by descriptors on
    sm_90. Not yet measured.
    """
    t = tiling(problem, route)
    many = not t.splits and tile_count(problem, route, t.block) >= CROWD * PROGRAMS
    exact = problem.dtype == torch.float32 and precision == "ieee"
    return many and not exact and capability(problem.device) >= (9, 0)


def describable(*tensors: Tensor) -> bool:
    """Whether all of these matrices begin, and their rows too, at multiples of 16 bytes; dense rows, apart."""
    return aligned(*tensors) and all(
        t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) * t.itemsize % 16 == 0 for t in tensors
    )


def describe(block: tuple[int, int], *tensors: Tensor) -> tuple[TensorDescriptor, ...]:
    """What a kernel loads blocks of these matrices by; zero outside of them."""
    return tuple(TensorDescriptor(t, list(t.shape), list(t.stride()), list(block)) for t in tensors)


def precision_of(problem: Problem) -> str:
    """How fp32 tiles are multiplied: by PyTorch's own switch, where the call does not say; "ieee" of half precision."""
    if problem.dtype.itemsize == 2:
        return "ieee"
    if problem.precision is not None:
        return problem.precision
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def products(problem: Problem, route: Route, precision: str) -> dict[str, int]:
    """Warps and stages of the kernels that multiply: those without spills (tests/kernels/aot.py).

    Exact fp32 products run on the ordinary cores: their operands spill up to 216 bytes on sm_80 with 4 warps and 3
    stages, up to 16 on sm_100 with 8 and 2. With tf32x3 on sm_100 the Gram route spills 8 bytes with 3 stages, the
    cross route with 2.
    """
    exact = problem.dtype == torch.float32 and precision == "ieee"
    many = exact and capability(problem.device) < (9, 0)
    few = many or (problem.dtype == torch.float32 and precision == "tf32x3" and route == "gram")
    return dict(num_warps=8 if many else 4, num_stages=2 if few else 3)


def distances(problem: Problem, precision: str) -> dict[str, int]:
    """`products` for distances: with 4 warps exact ones spill 16 to 32 bytes on sm_90 and sm_100."""
    exact = problem.dtype == torch.float32 and precision == "ieee"
    return dict(num_warps=8, num_stages=2) if exact else products(problem, "gram", precision)


def few_steps(problem: Problem) -> dict[str, int]:
    """The same for programs that multiply few steps of features, which are not worth pipelining.

    Four fit on a multiprocessor of sm_90: 128 registers and at most 32 KB of shared memory (masked bf16: 168, three).
    With one stage, masked bf16 spills 24 bytes on sm_80.
    """
    half = problem.dtype.itemsize == 2
    return dict(num_warps=4, num_stages=2 if half and capability(problem.device) < (9, 0) else 1)


def any_side(problem: Problem, precision: str) -> dict[str, int]:
    """`products` for a program that learns its side as it runs: with 3 stages halves spill 8 bytes on sm_80."""
    options = products(problem, "gram", precision)
    if problem.dtype.itemsize == 2 and capability(problem.device) < (9, 0):
        options["num_stages"] = 2
    return options


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
