"""Many calls of several contestants taken in turns; the clocks are the package's own (`bird_kernels.clocks`)."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bird_kernels.clocks import Pool, Run, Take, capture, device, host, wall

__all__ = ["TIMERS", "Pool", "Recorded", "Run", "Take", "Timing", "capture", "in_turns", "rounds"]

MOST_ROUNDS = 200
FEWEST_ROUNDS, FEWEST_SLOW_ROUNDS = 5, 3
TIMERS: dict[str, Callable[[Run, float], Take]] = {"wall": wall, "host": host, "device": device, "graph": device}


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
