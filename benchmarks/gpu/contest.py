"""Candidates for one question on one machine: the gate for each, then the times of those that pass, taken in turns.

Under two clocks: the replay of a CUDA graph with a cold cache, and the host's own time for a call. A candidate that no
graph can hold (it waits for the device) has the device's time of the plain call instead, and its row says so.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from benchmarks.gpu.context import Context, Row, failure, healthy_or_exit
from benchmarks.gpu.machine import Machine
from benchmarks.kernels import timers
from benchmarks.kernels.timers import Timing

Answer = tuple[Tensor, ...]


class Verdict(NamedTuple):
    """``red`` says what is wrong, None if nothing is; the errors against fp64, where there are such."""

    red: str | None
    value_error: float | None = None
    gradient_error: float | None = None


class Candidate(NamedTuple):
    """A call that returns a result; ``captured``: a CUDA graph can hold it."""

    name: str
    run: Callable[[], object]
    captured: bool = True


Judge = Callable[[object], Verdict]
PATIENCE = 0.3  # of the seconds for a question: what one candidate under one clock may take at the most
SETTLING = 0.35  # of them for gates and captures


@dataclasses.dataclass
class _Ready:
    """What is timed of a candidate, and what its rows say besides."""

    takes: dict[str, timers.Take]
    once: dict[str, float]
    about: Row


def compete(context: Context, candidates: list[Candidate], judge: Judge, seconds: float) -> Iterator[Row]:
    """The rows of all candidates, two each, or one that says why there is no time; within ``seconds`` if they can."""
    ready: dict[str, _Ready] = {}
    for candidate in candidates:
        name = candidate.name
        if name in context.without:
            continue
        context.step(name)
        if context.left() <= 0:
            yield {"candidate": name, "status": "left out", "message": "the phase has ended"}
            continue
        try:
            outcome = _prepare(context.machine, candidate, judge)
        except Exception as error:
            yield _refusal(name, error)
            healthy_or_exit(context.machine)
            continue
        if isinstance(outcome, _Ready):
            ready[name] = outcome
        else:
            yield {"candidate": name, "status": "red", "gate": outcome.red, **_errors(outcome)}
    context.step("")
    yield from _time(ready, min(seconds, max(context.left(), 0.0)), context.until)


def _time(ready: Mapping[str, _Ready], seconds: float, end: float) -> Iterator[Row]:
    """All clocks of all candidates in turns; after ``end`` what there is must do."""
    takes = {(name, clock): take for name, one in ready.items() for clock, take in one.takes.items()}
    share = (1 - SETTLING) * seconds / max(len(takes), 1)
    rounds = {
        key: timers.rounds(ready[key[0]].once[key[1]] + OVERHEAD, share, max(share, PATIENCE * seconds))
        for key in takes
    }
    labels = {f"{name} {clock}": (name, clock) for name, clock in takes}
    times = timers.in_turns(
        {label: takes[key] for label, key in labels.items()},
        {label: rounds[key] for label, key in labels.items()},
        stop=lambda: time.time() > end,
    )
    for label, (name, clock) in labels.items():
        if not times[label]:
            yield {"candidate": name, "status": "left out", "timer": clock, "message": "the phase has ended"}
            continue
        timing = dataclasses.asdict(Timing.of(times[label]))
        yield {"candidate": name, "status": "ok", "gate": "", "timer": clock, **timing, **ready[name].about}


OVERHEAD = 2e-4  # seconds that a take costs beyond the call: the cold cache, the sleep, the events


def _prepare(machine: Machine, candidate: Candidate, judge: Judge) -> _Ready | Verdict:
    """The verdict of a red candidate, or what to time of a green one: a replay's result is judged, not a call's."""
    candidate.run()
    once = machine.seconds(candidate.run)
    about: Row = {}
    replay, clock = candidate.run, "device"
    if candidate.captured:
        try:
            replay, result = machine.captured(candidate.run)
            replay()
            clock = "graph"
        except Exception as error:  # it is timed without
            traceback.print_exc()
            about["no_graph"] = f"{type(error).__name__}: {error}"[:200]
            machine.wait()
    if clock == "device":
        replay, result = candidate.run, candidate.run()
    machine.wait()
    verdict = judge(result)
    if verdict.red:
        return verdict
    del result
    again = machine.seconds(replay)
    takes = {clock: machine.cold(replay, again), "host": machine.host(candidate.run, once)}
    return _Ready(takes, {clock: again, "host": once}, about | _errors(verdict))


def _refusal(name: str, error: Exception) -> Row:
    """A backend that says in words that it cannot is no failure."""
    if isinstance(error, ValueError) and "cannot run here" in str(error):
        return {"candidate": name, "status": "refused", "message": str(error)[:300]}
    traceback.print_exc()
    return failure(name, error)


def _errors(verdict: Verdict) -> Row:
    return {"value_error": verdict.value_error, "gradient_error": verdict.gradient_error}
