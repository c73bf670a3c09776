"""What a benchmark asks of a device: to wait, to capture a call and replay it, to time it, to count what it takes.

It needs nothing but torch, and the clocks are those of `bird_kernels.clocks`. On a CPU there are no graphs: a
captured call is the call itself, and every clock is the wall's.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from bird_kernels import clocks
from bird_kernels.clocks import Run, Take

T = TypeVar("T")


class Machine:
    """The device of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_cuda(self) -> bool:
        """Whether calls return before the device has done them."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given; raises what went wrong there."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Run) -> float:
        """Of one call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def take(self, clock: str, run: Run) -> Take:
        """What makes a call and returns its seconds: of the "wall", the "host", or the "device", whose caches are cold.

        The device's clock sleeps while the host queues the call; how long that takes, a call more tells.
        """
        if not self.is_cuda or clock == "wall":
            return clocks.wall(run, 0.0)
        host = clocks.host(run, 0.0)
        return host if clock == "host" else clocks.device(run, host())

    def captured(self, run: Callable[[], T]) -> tuple[Run, T]:
        """A replay of the call, and the result that each replay writes anew (on a CPU: that of this first call).

        Raises:
            RuntimeError: the call cannot be captured; the current stream is the one it was.
        """
        if not self.is_cuda:
            return run, run()
        stream = torch.cuda.current_stream()
        try:
            graph, result = clocks.capture(run, None)
        except Exception:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
            torch.cuda.synchronize()
            raise
        return graph.replay, result

    def watched(self, run: Callable[[], T]) -> tuple[T, int]:
        """The result of a call, and the bytes it held at its worst moment beyond its inputs, result included.

        Counted by PyTorch's allocators and, from a MiB on and unless it is kept, as modules are that a first call
        imports, by Python's, in which NumPy's arrays lie: what a matrix library takes for itself is not seen.
        """
        if self.is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = run()
            torch.cuda.synchronize()
            return result, torch.cuda.max_memory_allocated() - before
        tracemalloc.start()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = run()
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return result, peak + (most - kept if most - kept >= 1 << 20 else 0)

    def release(self) -> None:
        """Give back the memory that earlier calls left behind."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
