"""How long a call took: a timer turns a call into a function that makes it and returns its seconds.

On a CPU there is one, the wall. On CUDA there are the host's share of a call, the device's, and a CUDA graph of it to
replay; the latter two with cold caches. What `bird tune` and the benchmarks share.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Run = Callable[[], object]
Take = Callable[[], float]
Pool = Any  # of CUDA graphs: torch's own name for it moved between versions
T = TypeVar("T")

CYCLES = 2.0e9  # of a GPU's clock in a second, at the most: what torch.cuda._sleep counts
LONGEST_SLEEP = 0.05  # seconds; a call that takes the host longer has gaps of its own


def wall(run: Run, once: float) -> Take:
    """Seconds until the call returns, for a device that works while the call runs: a CPU."""

    def take() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return take


def host(run: Run, once: float) -> Take:
    """Seconds until the call returns, the device's queue empty before; the call is not waited for."""
    timed = wall(run, once)

    def take() -> float:
        torch.cuda.synchronize()
        return timed()

    return take


def device(run: Run, once: float) -> Take:
    """Seconds of the device between the first and the last of what the call gives it, its caches cold.

    It sleeps while the host, which takes ``once`` seconds, queues the call: gaps between launches are the device's own.
    """
    flush = _twice_the_cache()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    asleep = int(CYCLES * min(2 * once, LONGEST_SLEEP))

    def take() -> float:
        torch.cuda._sleep(asleep)
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return take


@functools.cache
def _twice_the_cache() -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def capture(run: Callable[[], T], pool: Pool) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of one call, and the result that each replay writes anew.

    The call is warmed up on a side stream first, as capturing wants it. Graphs of one ``pool`` use the same memory in
    turns: let go of a result before the next capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph, result
