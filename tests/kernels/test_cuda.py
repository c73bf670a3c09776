"""What only a GPU can show: no call waits for the device, CUDA graphs and streams may hold it, tf32 is obeyed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bird_kernels import cka_loss
from tests.accuracy import Result, assert_no_worse, errors, evaluate, features, operator, plain, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, P, Q = 128, 96, 130
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=[False, True], ids=["all rows", "masked"])
def mask(request: pytest.FixtureRequest, device: torch.device) -> Tensor | None:
    return torch.arange(N, device=device) % 5 != 1 if request.param else None


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_waits(
    dtype: torch.dtype, mask: Tensor | None, estimator: str, route: str, backend: str,
    device: torch.device, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    x, y = features(N, P, Q, dtype, device)
    function = operator(route, backend, estimator, mask=mask)
    evaluate(function, x, y)  # compiles, loads and sets up libraries
    torch.cuda.synchronize()
    request.getfixturevalue("waiting_is_an_error")
    evaluate(function, x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(
    dtype: torch.dtype, mask: Tensor | None, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Captured once with its backward, replayed on other features: nothing of the first call is left in it."""
    function = operator(route, backend, estimator, mask=mask)
    pairs = [features(N, P, Q, dtype, device, seed=seed) for seed in range(3)]
    expected = [evaluate(function, *pair) for pair in pairs]
    x, y = (a.clone() for a in pairs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(function, x, y)
    for (new_x, new_y), true in list(zip(pairs, expected, strict=True))[::-1]:
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        torch.testing.assert_close(Result(*(a.clone() for a in captured)), true, rtol=0, atol=0)


def test_lists_of_pairs(mask: Tensor | None, estimator: str, backend: str, device: torch.device) -> None:
    """Nothing waits for the device, and a graph holds the call with its weights and its backward."""

    def call(tensors: list[Tensor]) -> list[Tensor]:
        xs, ys = [x.detach().requires_grad_() for x in tensors[::2]], tensors[1::2]
        value = cka_loss(xs, ys, weights=[0.5, 2.0], mask=mask, estimator=estimator, backend=backend)
        return [value.detach(), *torch.autograd.grad(value, xs)]

    batches = [
        [*features(N, P, Q, device=device, seed=seed), *features(N, 40, 700, device=device, seed=9 + seed)]
        for seed in range(3)
    ]
    expected = [call(batch) for batch in batches]
    torch.cuda.set_sync_debug_mode("error")
    call(batches[0])
    torch.cuda.set_sync_debug_mode("default")
    tensors = [t.clone() for t in batches[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(tensors)
    for batch, true in list(zip(batches, expected, strict=True))[::-1]:
        for tensor, new in zip(tensors, batch, strict=True):
            tensor.copy_(new)
        graph.replay()
        torch.testing.assert_close([t.clone() for t in captured], true, rtol=0, atol=0)


def test_streams_do_not_share(estimator: str, route: str, backend: str, device: torch.device) -> None:
    """Calls that overlap on many streams give what they give alone."""
    function = operator(route, backend, estimator)
    pairs = [features(N, P, Q, device=device, seed=seed) for seed in range(8)]
    alone = [evaluate(function, *pair) for pair in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pairs]
    together = []
    for stream, pair in zip(streams, pairs, strict=True):
        with torch.cuda.stream(stream):
            together.append(evaluate(function, *pair))
    torch.cuda.synchronize()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_hundred_runs_are_one(
    mask: Tensor | None, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Bitwise: sums across blocks have one order, whoever arrives first."""
    x, y = features(N, 700, Q, device=device)
    function = operator(route, backend, estimator, mask=mask)
    first = evaluate(function, x, y)
    for _ in range(100):
        torch.testing.assert_close(evaluate(function, x, y), first, rtol=0, atol=0)


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
