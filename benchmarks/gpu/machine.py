"""What a phase asks of the device: to wait, to capture a call and replay it, to time it.

At a rehearsal a CPU stands in. There are no graphs: a captured call is the call itself, and its times are the wall's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from benchmarks.kernels import results, timers

T = TypeVar("T")
Run = Callable[[], object]


class Machine:
    """The device of this process, CUDA or, at a rehearsal, the CPU."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")

    @property
    def is_cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def origin(self) -> dict[str, str]:
        """Device, driver, versions and commit, as every row names them."""
        found = results.origin(self.device)
        names = ("device", "driver", "torch", "triton", "commit", "date")
        return {name: getattr(found, name) for name in names} | {"cuda_driver": self._cuda_driver()}

    def _cuda_driver(self) -> str:
        """The driver as `bird_kernels.tuning` names it, which is not nvidia-smi's way; empty without either."""
        if not self.is_cuda or importlib.util.find_spec("bird_kernels.tuning") is None:
            return ""
        driver: str = importlib.import_module("bird_kernels.tuning").key_of(self.device).driver
        return driver

    def wait(self) -> None:
        """Until the device has done what it was given; raises what went wrong there."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def captured(self, run: Callable[[], T]) -> tuple[Run, T]:
        """A replay of the call, and the result that each replay writes anew (on a CPU: that of this first call).

        Raises:
            RuntimeError: the call cannot be captured; the current stream is the one it was.
        """
        if not self.is_cuda:
            return run, run()
        stream = torch.cuda.current_stream()
        try:
            graph, result = timers.capture(run, None)
        except Exception:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
            torch.cuda.synchronize()
            raise
        return graph.replay, result

    def cold(self, run: Run, once: float) -> timers.Take:
        """Seconds of the device for one call, its caches cold."""
        return (timers.device if self.is_cuda else timers.wall)(run, once)

    def host(self, run: Run, once: float) -> timers.Take:
        """Seconds of the host for one call."""
        return (timers.host if self.is_cuda else timers.wall)(run, once)

    def seconds(self, run: Run) -> float:
        """The second of two calls, the device's work included."""
        run()
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    @contextlib.contextmanager
    def waiting_is_an_error(self) -> Iterator[None]:
        """A call that waits for the device raises."""
        if not self.is_cuda:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def on_two_streams(self, run: Callable[[], T]) -> list[T]:
        """The results of two calls that overlap."""
        if not self.is_cuda:
            return [run(), run()]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        found = []
        self.wait()
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run())
        self.wait()
        return found

    def release(self) -> None:
        """Give back the memory that earlier calls left behind."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
