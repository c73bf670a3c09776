"""``cka_loss`` beside what its users could write instead, on named problems: ``pytest benchmarks/kernels``.

Every provider passes the gate first: its value and gradient against a float64 truth of the same features.
Where it is red no number is printed: a rival is skipped with the reason, a provider of ours fails.
"""

from __future__ import annotations

import functools
import math
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernels import measure
from benchmarks.kernels.problems import PROBLEMS, Problem
from benchmarks.kernels.providers import PROVIDERS, Provider
from benchmarks.kernels.results import Row

SECONDS = 0.8  # of measuring for one number
SLOW = 5.0  # seconds; a call that takes longer is timed once

DTYPES = ("float32", "bfloat16") if torch.cuda.is_available() else ("float32",)


@functools.lru_cache(maxsize=1)  # the cases of one problem follow each other
def prepared(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, measure.Result]:
    x, y = problem.features(dtype, device)
    return x, y, measure.truth(problem, x, y)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_cka_loss(
    benchmark: BenchmarkFixture,
    rows: list[Row],
    device: torch.device,
    problem: Problem,
    dtype: str,
    mode: str,
    provider: Provider,
) -> None:
    backward = mode == "forward+backward"
    reason = provider.why_not(problem, device, backward)
    if reason is not None:
        pytest.skip(reason)
    x, y, true = prepared(problem, getattr(torch, dtype), device)
    run = measure.call(provider.build(problem, device), x, y, backward)
    if provider.compiles:
        run()

    start = time.perf_counter()
    result, memory = measure.watched(run, device)
    once = time.perf_counter() - start
    errors = measure.errors(result, true)
    del result  # and with it the graph, which a CUDA graph would wait for
    described = (problem.name, problem.n, problem.p, problem.q, dtype, mode, provider.name)
    red = errors.red(x.dtype)
    if red is not None:
        rows.append(Row(*described, errors.value, errors.gradient, red))
        (pytest.fail if provider.ours else pytest.skip)(f"wrong, so not timed: {red}")

    benchmark.group = f"{problem.name} ({problem.n} x {problem.p}, {problem.q}) {dtype} {mode}"
    benchmark.extra_info.update(value_error=errors.value, gradient_error=errors.gradient, peak_memory=memory)
    rounds = 1 if once > SLOW else min(max(math.ceil(SECONDS / once), 3), 1000)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1 if once < SECONDS else 0)
    if benchmark.stats is not None:  # there are none under --benchmark-disable: the gate alone
        timing = measure.Timing.of(benchmark.stats.stats.data)
        rows.append(Row(*described, errors.value, errors.gradient, timing=timing, peak_memory=memory))
