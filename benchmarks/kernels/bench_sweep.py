"""Is a hand-written form ever faster? A sweep of shapes, forward and backward; the ratios in the table answer.

The calls are interleaved in a changing order, so that a noisy machine and a cold cache treat all alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from benchmarks.kernels import measure
from benchmarks.kernels.problems import SWEEP, Problem
from benchmarks.kernels.providers import PROVIDERS
from benchmarks.kernels.results import OURS, Row

COMPARED = ("gram", "feature", OURS)
SECONDS = 1.5  # of measuring for one shape
FAR = 3.0  # a form this many times slower than the other is no rival for this shape, and is left out


@pytest.mark.parametrize("problem", SWEEP, ids=lambda problem: problem.name)
def test_beside_hand_written_forms(rows: list[Row], device: torch.device, problem: Problem) -> None:
    x, y = problem.features(torch.float32, device)
    true = measure.truth(problem, x, y)
    calls = {
        provider.name: measure.call(provider.build(problem, device), x, y, backward=True)
        for provider in PROVIDERS
        if provider.name in COMPARED
    }
    errors = {name: measure.errors(run(), true) for name, run in calls.items()}
    for name, found in errors.items():
        assert found.red(x.dtype) is None, f"{name}: {found.red(x.dtype)}"

    probe = {name: min(_seconds(run) for _ in range(3)) for name, run in calls.items()}
    rival = min(seconds for name, seconds in probe.items() if name != OURS)
    close = [name for name in calls if name == OURS or probe[name] < FAR * rival]
    times: dict[str, list[float]] = {name: [] for name in close}
    order = random.Random(0)
    end = measure.clock() + SECONDS
    while measure.clock() < end or len(times[OURS]) < 5:
        for name in order.sample(close, len(close)):
            times[name].append(_seconds(calls[name]))
    timings = {name: measure.Timing.of(seconds) for name, seconds in times.items()}
    described = (problem.name, problem.n, problem.p, problem.q, "float32", "forward+backward, interleaved")
    for name, timing in timings.items():
        rows.append(Row(*described, name, errors[name].value, errors[name].gradient, timing=timing))


def _seconds(run: Callable[[], measure.Result]) -> float:
    start = measure.clock()
    run()
    return measure.clock() - start
