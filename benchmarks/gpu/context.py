"""What phases and the process that runs them share: items, the time that is left, candidates timed as rows.

A candidate is timed under two clocks: the replay of a CUDA graph with a cold cache, and the host's own time for a call.
One that no graph can hold (it waits for the device) has the device's time of the plain call instead, and its row says
so.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from benchmarks import harness
from benchmarks.gpu.run import LOST
from benchmarks.harness import Contestant, Entry, Gate, quantiles
from benchmarks.machine import Machine
from benchmarks.rows import Row

CLOCKS = ("graph", "host")
REHEARSED = 0.2  # seconds of timing for an item of a rehearsal
PATIENCE = 0.3  # of the seconds for a question: what one candidate under one clock may take at the most
SETTLING = 0.35  # of them for gates and captures
OVERHEAD = 2e-4  # seconds that a take costs beyond the call: the cold cache, the sleep, the events


class Item(NamedTuple):
    """A part of a phase that can fail without the others: ``run`` yields rows."""

    name: str
    run: Callable[[Context], Iterator[Row]]


class Phase(NamedTuple):
    """``items`` in order of their value, and the ``file`` that their rows go to; ``warms``: to compile, not to time."""

    items: Callable[[Context], Sequence[Item]]
    file: str
    warms: bool = False


class Context:
    """What an item is given: the ``machine``, the time, and what it must leave out because a process died of it.

    ``step`` is told what is tried: if the process dies of it, the item is done again ``without`` it.
    """

    def __init__(self, machine: Machine, step: Callable[[str], None] = lambda name: None) -> None:
        self.machine, self.step = machine, step
        self.rehearse = not machine.is_cuda
        self.until = float("inf")
        self.items_left = 1
        self.warms = False
        self.without: Set[str] = set()

    def left(self) -> float:
        """Seconds until the end of the phase."""
        return self.until - time.time()

    def share(self) -> float:
        """Seconds that this item may take so that the later ones get as much; at a rehearsal hardly any."""
        fair = max(self.left(), 0.0) / self.items_left
        return min(fair, REHEARSED) if self.rehearse else fair

    def warmed(self, runs: Iterable[Callable[[], object]]) -> Row:
        """Calls are made for what they compile; the event says how long that took. What fails is told when timed."""
        start = time.perf_counter()
        for run in runs:
            with contextlib.suppress(Exception):
                run()
        self.machine.wait()
        return {"event": "compiled", "seconds": round(time.perf_counter() - start, 3)}

    def timed(self, candidates: Sequence[Contestant], gate: Gate, seconds: float) -> Iterator[Row]:
        """The rows of all candidates, two each, or one that says why there is no time; within ``seconds`` if they can.

        Of a phase that warms the event alone.
        """
        if self.warms:
            yield self.warmed([candidate.run for candidate in candidates])
            return

        def budget(once: float, takes: int) -> int:
            left = min(seconds, max(self.left(), 0.0))
            share = (1 - SETTLING) * left / takes
            return harness.rounds(once + OVERHEAD, share, max(share, PATIENCE * left))

        chosen = [candidate for candidate in candidates if candidate.name not in self.without]
        for entry in harness.compete(
            self.machine, chosen, gate, CLOCKS, budget, begin=self.step, stop=lambda: self.left() <= 0
        ):
            yield from _rows(entry)
            if entry.status in ("failed", "refused"):
                self.healthy_or_exit()

    def healthy_or_exit(self) -> None:
        """Free memory and see that the device still answers: a failed call may leave one on which nothing works."""
        try:
            self.machine.release()
            self.machine.wait()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(LOST)


def _rows(entry: Entry) -> Iterator[Row]:
    told = {"gate" if entry.status in ("ok", "red") else "message": entry.why} | entry.checked._asdict()
    about = {"candidate": entry.name, "status": entry.status} | told
    del about["red"]
    if entry.status != "ok":
        yield about
    for clock, seconds in entry.seconds.items():
        if seconds:
            yield about | {"timer": clock, "no_graph": entry.no_graph} | quantiles(seconds)
        else:
            yield about | {"status": "left out", "timer": clock, "message": "the time is over"}
