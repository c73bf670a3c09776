"""The gate of the loss: the call to judge and to time, the truth in fp64, and how far from it is still right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Judge, Verdict
from benchmarks.kernels import estimates
from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import FORMS, Loss, better_form

# The largest error of the value, and of the gradient relative to its norm, that still counts as right.
TOLERANCE = {
    "float32 ieee": (2e-5, 2e-4),
    "float32 tf32": (3e-3, 1e-2),
    "float16": (3e-3, 1e-2),
    "bfloat16": (2e-2, 5e-2),
}


class Result(NamedTuple):
    """A loss and, where the backward ran, its gradient for ``x``."""

    value: Tensor
    gradient: Tensor | None


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


def true_result(case: Case, x: Tensor, y: Tensor) -> Result:
    """The loss and its gradient from the same features in float64: a hand-written form under autograd."""
    loss = partial(FORMS[better_form(case)], **case.options)
    result = call(loss, x.double(), y.double(), backward=True)()
    return Result(result.value.detach(), result.gradient)


def judge(case: Case, x: Tensor, y: Tensor) -> Judge:
    """Errors of value and gradient against the truth, which is computed when it is first needed; NaN is wrong too."""
    true = cache(lambda: true_result(case, x, y))
    value_limit, gradient_limit = TOLERANCE[estimates.number(case)]

    def judged(result: Result) -> Verdict:
        value = Verdict.within(abs(result.value.item() - true().value.item()), value_limit, "value ")
        if value.red or result.gradient is None:
            return value
        distance = (result.gradient.double() - true().gradient).norm()
        gradient = Verdict.within(float(distance / true().gradient.norm()), gradient_limit, "gradient ")
        return Verdict(gradient.red, value.value_error, gradient.value_error)

    return judged
