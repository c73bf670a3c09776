"""What only a GPU can show: no call waits for the device, CUDA graphs and streams may hold it, tf32 is obeyed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.machine import Machine
from bird_kernels import backends, plan
from tests.accuracy import assert_no_worse, errors, evaluate, features, operator, plain, truth
from tests.kernels.on_device import Check, every_check, judged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, P, Q = 128, 96, 130
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("check", every_check(), ids=str)
def test_it_is_right_on_this_device(check: Check, device: torch.device) -> None:
    """Accurate, repeated, on streams that overlap, replayed from a graph, and without waiting for the device."""
    variant = 'kernel="rbf"' if check.rbf else "linear"
    reason = backends.why_not(check.backend, check.dtype, device, plan.are_few(check.shape[0]), variant)
    if reason:
        pytest.skip(reason)
    found = judged(check, Machine(device))
    assert [name for name, right in found.items() if right is False] == [], found


def test_memory_is_given_back(estimator: str, route: str, backend: str, device: torch.device) -> None:
    """A second call needs what the first one did, and after it nothing is held but its results."""
    x, y = features(N, P, Q, device=device)
    function = operator(route, backend, estimator)
    evaluate(function, x, y)
    torch.cuda.synchronize()
    before, peaks = torch.cuda.memory_allocated(), []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        evaluate(function, x, y)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.cuda.memory_allocated() == before
    assert peaks[0] == peaks[1]


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs NVIDIA's compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer(tool: str, backend: str) -> None:
    """Small, odd shapes under NVIDIA's own checker; in a process of its own."""
    program = [sys.executable, "-m", "tests.kernels.sanitize", backend]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_follows_pytorch_s_own_switch(estimator: str, route: str, backend: str, device: torch.device) -> None:
    """tf32 where the user switched it on, no worse than plain PyTorch under the same switch; full fp32 otherwise."""
    x, y = features(512, 300, 200, device=device)
    true, function = truth(x, y, estimator), operator(route, backend, estimator)
    exact = errors(evaluate(function, x, y), true)
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        coarse, theirs = (evaluate(f, x, y) for f in (function, plain(route, estimator)))
    finally:
        switch.fp32_precision = before
    assert_no_worse([coarse], [theirs], [true])
    assert exact["dx"] < 2e-6
    assert errors(coarse, true)["dx"] > 10 * exact["dx"]


@pytest.mark.parametrize(("precision", "exact"), [("ieee", True), ("tf32x3", True), ("tf32", False)])
def test_the_call_s_own_precision(
    precision: str, exact: bool, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Whatever PyTorch's switch says."""
    x, y = features(512, 300, 200, device=device)
    true, function = truth(x, y, estimator), operator(route, backend, estimator, precision=precision)
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if exact else "ieee"
    try:
        found = errors(evaluate(function, x, y), true)
    finally:
        switch.fp32_precision = before
    assert found["dx"] < 1e-5 if exact else 3e-5 < found["dx"] < 3e-3
