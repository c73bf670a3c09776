"""The one harness of the benchmarks: candidates pass a gate and are timed in turns; `benchmarks.rows` keeps the rest.

A benchmark brings its questions, the candidates that answer them, and the truth, with which `gate_of` compares their
answers. It gets from here the order of things (`compete`), and the median and the quantiles.

What is judged is a call after the warm-up, because a compiler's own CUDA graph is made in the second or third; a graph
of ours is judged by a replay. Nobody keeps a result, which may lie in a graph's memory. Only torch is needed.
"""

from __future__ import annotations

import math
import random
import statistics
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.machine import Machine
from benchmarks.rows import message
from bird_kernels.clocks import Take

FEWEST_ROUNDS, FEWEST_SLOW_ROUNDS, MOST_ROUNDS = 5, 3, 200
WARM_UP = 3  # calls before the gate, where something may compile

K = TypeVar("K", bound=Hashable)


class GateResult(NamedTuple):
    """``red`` says what is wrong with an answer, None if nothing is; the errors against fp64, where there are such."""

    red: str | None = None
    value_error: float | None = None
    gradient_error: float | None = None

    @classmethod
    def within(cls, error: float, limit: float, what: str = "") -> GateResult:
        """Of one error; NaN is beyond every limit."""
        return cls(None if error <= limit else f"{what}off by {error:.1e}", error)


class Evaluated(NamedTuple):
    """A loss [], or a matrix of values, and where the backward ran the gradients of all students."""

    value: Tensor
    gradients: Sequence[Tensor] = ()


class Contestant(NamedTuple):
    """A call that returns an answer. ``captured``: a CUDA graph can hold it; ``compiles``: its first calls do.

    ``refusal`` says why it is not even called.
    """

    name: str
    run: Callable[[], Any]
    captured: bool = True
    compiles: bool = False
    refusal: str = ""


def calling(loss: Callable[..., Tensor], *students: Tensor, backward: bool = True) -> Callable[[], Evaluated]:
    """The call to check and to time: ``loss(*students)`` without a graph, or with the gradients of all students."""
    leaves = [student.detach().requires_grad_(backward) for student in students]

    def forward() -> Evaluated:
        with torch.no_grad():
            return Evaluated(loss(*leaves))

    def forward_backward() -> Evaluated:
        value = loss(*leaves)
        return Evaluated(value, torch.autograd.grad(value, leaves))

    return forward_backward if backward else forward


def gate_of(
    truth: Callable[[], Evaluated], value_limit: float, gradient_limit: float
) -> Callable[[Evaluated], GateResult]:
    """By the largest error of a value, and the largest of a gradient relative to its norm; NaN is wrong.

    The truth, in fp64, is computed when it is first needed.
    """
    true = cache(truth)

    def gate(answer: Evaluated) -> GateResult:
        off = (answer.value.detach().double() - true().value.detach()).abs().max().nan_to_num(torch.inf)
        value = GateResult.within(float(off), value_limit, "value ")
        if value.red or not answer.gradients:
            return value
        pairs = zip(answer.gradients, true().gradients, strict=True)
        far = torch.stack([(got.double() - right).norm() / right.norm() for got, right in pairs])
        gradient = GateResult.within(float(far.max().nan_to_num(torch.inf)), gradient_limit, "gradient ")
        return GateResult(gradient.red, value.value_error, gradient.value_error)

    return gate


@dataclass
class Entry:
    """What came out for a candidate: "ok" with seconds by clock, or "red", "failed", "refused", "left out" and why."""

    name: str
    status: str = "ok"
    why: str = ""
    checked: GateResult = field(default_factory=GateResult)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_memory: int | None = None
    no_graph: str = ""

    def row(self, clock: str) -> dict[str, Any]:
        """What a row has of it: who, why not, errors, quantiles and memory."""
        about = {"provider": self.name} | self.checked._asdict() | {"red": self.why, "peak_memory": self.peak_memory}
        return about | quantiles(self.seconds.get(clock, ()))


class _Ready(NamedTuple):
    entry: Entry
    takes: dict[str, Take]
    once: float


Gate = Callable[[Any], GateResult]
RoundBudget = Callable[[float, int], int]  # rounds, from the seconds of a call and how many takes share the time


def compete(
    machine: Machine,
    candidates: Iterable[Contestant],
    gate: Gate,
    clocks: Sequence[str],
    budget: RoundBudget,
    *,
    watch: bool = False,
    begin: Callable[[str], None] = lambda name: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Entry]:
    """Every candidate past the gate, then those that are right timed in turns, under all ``clocks``.

    Entries come as soon as they are known: first those that get no time, in the end the others. A candidate that
    raises stops nobody. A "graph" is the replay of one; where no graph can hold a call, "device" stands for it.

    Args:
        watch: memory is counted too.
        begin: is told which candidate is tried now, and "" when all have been.
        stop: once it says so, no candidate and no turn begins.
    """
    ready: list[_Ready] = []
    for candidate in candidates:
        begin(candidate.name)
        if stop():
            yield Entry(candidate.name, "left out", "the time is over")
            continue
        if candidate.refusal:
            yield Entry(candidate.name, "refused", candidate.refusal)
            continue
        try:
            outcome = _prepare(machine, candidate, gate, clocks, watch)
        except Exception as error:  # of any kind: the others go on
            yield _failed(candidate.name, error)
            machine.release()
            continue
        if isinstance(outcome, Entry):
            yield outcome
        else:
            ready.append(outcome)
    begin("")
    takes = {(i, clock): take for i, one in enumerate(ready) for clock, take in one.takes.items()}
    rounds = {key: budget(ready[key[0]].once, len(takes)) for key in takes}
    for (i, clock), seconds in in_turns(takes, rounds, stop).items():
        ready[i].entry.seconds[clock] = seconds
    yield from (one.entry for one in ready)


def _prepare(machine: Machine, candidate: Contestant, gate: Gate, clocks: Sequence[str], watch: bool) -> _Ready | Entry:
    """The entry of a wrong candidate, or what to time of a right one."""
    entry, run = Entry(candidate.name), candidate.run
    warm_up = WARM_UP if candidate.compiles or machine.is_cuda else 1
    once = [machine.seconds(run) for _ in range(warm_up)][-1]
    calls = {clock: run for clock in clocks if clock != "graph"}
    result = None
    if watch:
        result, entry.peak_memory = machine.watched(run)
    if "graph" in clocks and candidate.captured:
        try:
            replay, result = machine.captured(run)
            replay()
            calls = {"graph": replay} | calls
        except Exception as error:  # it is timed without
            traceback.print_exc()
            entry.no_graph = message(error)
            machine.wait()
    if "graph" in clocks and "graph" not in calls:
        calls = {"device": run} | calls
    if "graph" not in calls and not watch:
        result = run()
    machine.wait()
    entry.checked = gate(result)
    del result
    if entry.checked.red:
        entry.status, entry.why = "red", entry.checked.red
        return entry
    takes = {clock: machine.take("device" if clock == "graph" else clock, call) for clock, call in calls.items()}
    return _Ready(entry, takes, once)


def _failed(name: str, error: Exception) -> Entry:
    """A backend that says in words that it cannot is no failure, nor is a device without the memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return Entry(name, "refused", "out of memory")
    if isinstance(error, ValueError) and "cannot run here" in str(error):
        return Entry(name, "refused", message(error))
    traceback.print_exc()
    return Entry(name, "failed", message(error))


def rounds(once: float, share: float, patience: float) -> int:
    """How often to make a call of ``once`` seconds: to fill ``share`` seconds, within bounds and ``patience``."""
    wanted = min(max(math.ceil(share / once), FEWEST_ROUNDS), MOST_ROUNDS)
    return wanted if wanted * once <= patience else max(FEWEST_SLOW_ROUNDS, int(patience / once))


def in_turns(
    takes: Mapping[K, Take], rounds: Mapping[K, int], stop: Callable[[], bool] = lambda: False
) -> dict[K, list[float]]:
    """Seconds of every call, mixed in a changing order, so that a noisy minute and a warm cache treat all alike.

    Who has fewer rounds than the others has them spread over the whole time. After ``stop`` says so no turn begins.
    """
    times: dict[K, list[float]] = {name: [] for name in takes}
    order = random.Random(0)
    most = max((rounds[name] for name in takes), default=0)
    for turn in range(most):
        if stop():
            break
        due = [name for name in takes if (turn + 1) * rounds[name] // most > turn * rounds[name] // most]
        for name in order.sample(due, len(due)):
            times[name].append(takes[name]())
    return times


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """The median, the fastest and the slowest fifth of the rounds' times, as a row has them; None of none."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else 4 * list(seconds)
    middle = statistics.median(seconds) if seconds else None
    found = (fifths[0], middle, fifths[3], len(seconds)) if seconds else (None,) * 4
    return dict(zip(("p20", "p50", "p80", "rounds"), found, strict=True))
