"""Running a provider, judging its result, and measuring its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels.problems import Problem
from benchmarks.kernels.providers import Loss, better_form

# The gate: the largest error of the value, and of the gradient relative to its norm, that still counts as right.
# Products of fp32 are IEEE's here, as PyTorch's own switch has it by default.
TOLERANCE = {
    torch.float32: (2e-5, 2e-4),
    torch.bfloat16: (2e-2, 5e-2),
}


@dataclass(frozen=True)
class Result:
    """A loss and, where the backward ran, its gradient for ``x``."""

    value: Tensor
    gradient: Tensor | None


@dataclass(frozen=True)
class Errors:
    """Distances from the truth: of the value, and of the gradient relative to the norm of the true one."""

    value: float
    gradient: float | None

    def red(self, dtype: torch.dtype) -> str | None:
        """What is wrong with a result of this dtype, or None: NaN is wrong too."""
        value, gradient = TOLERANCE[dtype]
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


def truth(problem: Problem, x: Tensor, y: Tensor) -> Result:
    """The loss and its gradient from the same features in float64: a hand-written form under autograd."""
    return call(better_form(problem), x.double(), y.double(), backward=True)()


def errors(result: Result, true: Result) -> Errors:
    """How far a result is from the truth."""
    value = abs(result.value.item() - true.value.item())
    if result.gradient is None or true.gradient is None:
        return Errors(value, None)
    return Errors(value, float((result.gradient.double() - true.gradient).norm() / true.gradient.norm()))


def clock() -> float:
    """Seconds, read once the device has finished what it was given: pytest-benchmark's timer."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds that were measured."""

    p20: float
    median: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The quantiles of the rounds' times."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(seconds), fifths[3], len(seconds))


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
