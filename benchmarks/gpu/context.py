"""What phases, items and the process that runs them share: rows, the time that is left, and how failures are told."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.rows import message

if TYPE_CHECKING:
    from benchmarks.machine import Machine

LOST = 75  # the exit status of a process whose device no longer answers; the failure has its row

REHEARSED = 0.2  # seconds of timing for an item of a rehearsal

Row = dict[str, Any]


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
    """What an item is given: the ``machine``, the time, and what it must leave out because a process died of it."""

    def __init__(self, machine: Machine, report: Callable[[Row], None]) -> None:
        self.machine, self._report = machine, report
        self.rehearse = not machine.is_cuda
        self.until = float("inf")
        self.items_left = 1
        self.warms = False
        self.without: set[str] = set()

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

    def step(self, name: str) -> None:
        """What is tried now: if the process dies of it, the item is done again ``without`` it."""
        self._report({"step": name})


def failure(candidate: str, error: BaseException) -> Row:
    """The row of a candidate that raised."""
    return {"candidate": candidate, "status": "failed", "message": message(error)}


def healthy_or_exit(machine: Machine) -> None:
    """Free memory and see that the device still answers."""
    try:
        machine.release()
        machine.wait()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(LOST)
