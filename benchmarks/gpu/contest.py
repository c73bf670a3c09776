"""Candidates for one question of a run on a GPU, as rows: the gate for each, then their times, taken in turns.

Under two clocks: the replay of a CUDA graph with a cold cache, and the host's own time for a call. A candidate that no
graph can hold (it waits for the device) has the device's time of the plain call instead, and its row says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from benchmarks import harness
from benchmarks.gpu.context import Context, Row, healthy_or_exit
from benchmarks.harness import Contestant, Entry, Judge, Timing

CLOCKS = ("graph", "host")
PATIENCE = 0.3  # of the seconds for a question: what one candidate under one clock may take at the most
SETTLING = 0.35  # of them for gates and captures
OVERHEAD = 2e-4  # seconds that a take costs beyond the call: the cold cache, the sleep, the events


def timed_rows(context: Context, candidates: Sequence[Contestant], judge: Judge, seconds: float) -> Iterator[Row]:
    """The rows of all candidates, two each, or one that says why there is no time; within ``seconds`` if they can.

    Of a phase that warms the event alone.
    """
    if context.warms:
        yield context.warmed([candidate.run for candidate in candidates])
        return

    def budget(once: float, takes: int) -> int:
        left = min(seconds, max(context.left(), 0.0))
        share = (1 - SETTLING) * left / takes
        return harness.rounds(once + OVERHEAD, share, max(share, PATIENCE * left))

    chosen = [candidate for candidate in candidates if candidate.name not in context.without]
    for entry in harness.compete(
        context.machine, chosen, judge, CLOCKS, budget, begin=context.step, stop=lambda: context.left() <= 0
    ):
        yield from _rows(entry)
        if entry.status in ("failed", "refused"):
            healthy_or_exit(context.machine)


def _rows(entry: Entry) -> Iterator[Row]:
    about = {"candidate": entry.name, "status": entry.status}
    errors = {"value_error": entry.verdict.value_error, "gradient_error": entry.verdict.gradient_error}
    if entry.status == "red":
        yield about | {"gate": entry.why} | errors
    elif entry.status != "ok":
        yield about | {"message": entry.why}
    for clock, seconds in entry.seconds.items():
        if not seconds:
            yield about | {"status": "left out", "timer": clock, "message": "the time is over"}
            continue
        timed = asdict(Timing.of(seconds)) | ({"no_graph": entry.no_graph} if entry.no_graph else {})
        yield about | {"gate": "", "timer": clock} | timed | errors
