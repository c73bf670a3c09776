"""Timers for `bird tune` and the benchmarks: each turns a call into a function that makes it and returns its seconds.

On a CPU `wall` times a call. On CUDA `host` times what the host does until the call returns, and `device` the device's
work on it with cold caches; `capture` makes a CUDA graph of the call, whose replays `device` can time without launches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Run = Callable[[], object]
Take = Callable[[], float]
GraphPool = Any  # a memory pool of CUDA graphs; where PyTorch has its type differs between versions
T = TypeVar("T")

CYCLES = 2.0e9  # per second, at the most, of a GPU's clock, in whose cycles torch.cuda._sleep counts
LONGEST_SLEEP = 0.05  # seconds; if the host takes longer for a call, gaps between its launches are timed as well


def wall(run: Run, once: float) -> Take:
    """Seconds until the call returns; for a CPU, where the work is done by then. ``once`` is not used."""

    def take() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return take


def host(run: Run, once: float) -> Take:
    """Seconds until the call returns, from an empty queue, without the device's work. ``once`` is not used."""
    timed = wall(run, once)

    def take() -> float:
        torch.cuda.synchronize()
        return timed()

    return take


def device(run: Run, once: float) -> Take:
    """Seconds from the start of the call's first to the end of its last operation on the device, with cold caches.

    The device sleeps while the host, in ``once`` seconds, queues the call: gaps between operations are its own.
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


def capture(run: Callable[[], T], pool: GraphPool) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of one call, and the call's result, whose memory each replay overwrites.

    The call runs three times on a side stream first, as capture requires. Graphs of one ``pool`` share memory: drop the
    result of one before the next is captured.
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
