"""``cka_loss`` beside what its users could write instead, on named problems: ``./dev bench``.

Every provider passes the gate first: its value and gradient against a float64 truth of the same features. Where it is
red no number is printed: a rival is skipped with the reason, a provider of ours fails if it is wrong. The first test of
a case measures all of its providers in turns; each test then shows pytest-benchmark the times of one.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernels import contest, problems, providers, timers
from benchmarks.kernels.problems import Case
from benchmarks.kernels.session import Session

RECORDED = timers.Recorded()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device = torch.device(option("device"))
    metafunc.parametrize(
        ("case", "timer", "provider"),
        [
            pytest.param(case, timer, provider.name, id=f"{case}-{timer}-{provider.name}")
            for case in problems.cases(device, option("problem"))
            for phase in contest.PHASES[device.type]
            for timer in phase
            for provider in providers.taking_part(case, device, option("provider"))
        ],
    )


@pytest.mark.benchmark(timer=RECORDED)
def test_cka_loss(benchmark: BenchmarkFixture, session: Session, case: Case, timer: str, provider: str) -> None:
    entry = session.entries(case, benchmark.enabled)[provider, timer]
    verdict = entry.verdict
    if verdict.red:
        report = pytest.fail if entry.provider.ours and verdict.broken else pytest.skip
        report(f"not timed: {verdict.red}")
    benchmark.group = f"{case} {timer}"
    benchmark.extra_info.update(launches=verdict.launches, peak_memory=verdict.peak_memory)
    seconds = entry.seconds or [0.0]  # under --benchmark-disable the gate alone was run
    benchmark.pedantic(RECORDED.play(seconds), rounds=len(seconds))
