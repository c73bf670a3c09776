"""The device of a run on a lent machine; at a rehearsal a CPU stands in for it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from benchmarks import machine, rows

T = TypeVar("T")


class Machine(machine.Machine):
    """The device of this process, CUDA or, at a rehearsal, the CPU."""

    def __init__(self, rehearse: bool) -> None:
        super().__init__(torch.device("cpu" if rehearse else "cuda"))
        self.rehearse = rehearse

    def origin(self) -> dict[str, str]:
        """Device, driver, versions and commit, as every row names them."""
        found = rows.origin(self.device)
        names = ("device", "driver", "torch", "triton", "commit", "date")
        return {name: found[name] for name in names} | {"cuda_driver": self._cuda_driver()}

    def _cuda_driver(self) -> str:
        """The driver as `bird_kernels.tuning` names it, which is not nvidia-smi's way; empty without either."""
        if not self.is_cuda or importlib.util.find_spec("bird_kernels.tuning") is None:
            return ""
        driver: str = importlib.import_module("bird_kernels.tuning").key_of(self.device).driver
        return driver

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
