"""Clocks: how long one call took, and many calls of several contestants taken in turns.

A timer turns a call into a function that makes it and returns its seconds. On a CPU there is one, the wall. On CUDA
there are three: the host's share of a call, the device's, and the replay of a CUDA graph of it; the latter two with
cold caches.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Run = Callable[[], object]
Take = Callable[[], float]
Pool = Any  # of CUDA graphs: torch's own name for it moved between versions
T = TypeVar("T")

MOST_ROUNDS = 200
FEWEST_ROUNDS, FEWEST_SLOW_ROUNDS = 5, 3
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
    """Seconds until the call returns, the device's queue empty before and nobody waiting for it after."""
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


TIMERS: dict[str, Callable[[Run, float], Take]] = {"wall": wall, "host": host, "device": device, "graph": device}


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


def rounds(once: float, share: float, patience: float) -> int:
    """How often to make a call of ``once`` seconds: to fill ``share`` seconds, within bounds and ``patience``."""
    wanted = min(max(math.ceil(share / once), FEWEST_ROUNDS), MOST_ROUNDS)
    return wanted if wanted * once <= patience else max(FEWEST_SLOW_ROUNDS, int(patience / once))


def in_turns(
    takes: Mapping[str, Take], rounds: Mapping[str, int], stop: Callable[[], bool] = lambda: False
) -> dict[str, list[float]]:
    """Seconds of every call, mixed in a changing order, so that a noisy minute and a warm cache treat all alike.

    Who has fewer rounds than the others has them spread over the whole time. After ``stop`` says so no turn begins.
    """
    times: dict[str, list[float]] = {name: [] for name in takes}
    order = random.Random(0)
    most = max((rounds[name] for name in takes), default=0)
    for turn in range(most):
        if stop():
            break
        due = [name for name in takes if (turn + 1) * rounds[name] // most > turn * rounds[name] // most]
        for name in order.sample(due, len(due)):
            times[name].append(takes[name]())
    return times


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds that were measured."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The quantiles of the rounds' times."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(seconds), fifths[3], len(seconds))


class Recorded:
    """A clock for pytest-benchmark that shows times already taken: it moves by one of them with every call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def play(self, seconds: Sequence[float]) -> Callable[[], None]:
        """A function to benchmark that takes these ``seconds``, one a call."""
        self.now = 0.0  # small, so that the difference of two readings loses nothing
        left = iter(seconds)

        def call() -> None:
            self.now += next(left)

        return call
