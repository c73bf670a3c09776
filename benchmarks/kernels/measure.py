"""Running a provider, judging its result, counting its launches and its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import Loss, better_form

# The gate: the largest error of the value, and of the gradient relative to its norm, that still counts as right.
TOLERANCE = {
    "float32 ieee": (2e-5, 2e-4),
    "float32 tf32x3": (2e-5, 2e-4),
    "float32 tf32": (3e-3, 1e-2),
    "float16": (3e-3, 1e-2),
    "bfloat16": (2e-2, 5e-2),
}


class Result(NamedTuple):
    """A loss and, where the backward ran, its gradient for ``x``."""

    value: Tensor
    gradient: Tensor | None


class Errors(NamedTuple):
    """Distances from the truth: of the value, and of the gradient relative to the norm of the true one."""

    value: float
    gradient: float | None

    def red(self, number: str) -> str | None:
        """What is wrong with a result in this number ("dtype precision"), or None: NaN is wrong too."""
        value, gradient = TOLERANCE[number]
        if not self.value <= value:
            return f"value off by {self.value:.1e}"
        if self.gradient is not None and not self.gradient <= gradient:
            return f"gradient off by {self.gradient:.1e}"
        return None


def call(loss: Loss, x: Tensor, y: Tensor, backward: bool) -> Callable[[], Result]:
    """The call to time: forward without a graph, or forward and the gradient for ``x``; ``y`` is frozen."""
    student = x.detach().requires_grad_(backward)

    def forward() -> Result:
        with torch.no_grad():
            return Result(loss(student, y), None)

    def forward_backward() -> Result:
        value = loss(student, y)
        (gradient,) = torch.autograd.grad(value, student)
        return Result(value, gradient)

    return forward_backward if backward else forward


def truth(case: Case, x: Tensor, y: Tensor) -> Result:
    """The loss and its gradient from the same features in float64: a hand-written form under autograd."""
    loss = partial(better_form(case), **case.options)
    result = call(loss, x.double(), y.double(), backward=True)()
    return Result(result.value.detach(), result.gradient)


def errors(result: Result, true: Result) -> Errors:
    """How far a result is from the truth."""
    value = abs(result.value.item() - true.value.item())
    if result.gradient is None or true.gradient is None:
        return Errors(value, None)
    distance = (result.gradient.double() - true.gradient).norm()
    return Errors(value, float(distance / true.gradient.norm()))


def clock(device: torch.device) -> float:
    """Seconds, read once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def watched(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """The result of a call, and the bytes it held at its worst moment beyond its inputs, gradient included.

    Counted by PyTorch's allocators: what a matrix library takes for itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """What one call makes the GPU do: kernels, copies and fills. None on a CPU, or where the profiler sees nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    done = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in done) or None


def available_memory(device: torch.device) -> int:
    """Bytes that a measurement may take: nine tenths of what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(0.9 * torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30  # not Linux: what any machine of today has
    return int(0.9 * free)
