"""One case, all its providers: the gate for each, then their times, taken in turns.

The order of things matters. What is judged is a call after the warm-up, because a compiler's own CUDA graph is made in
the second or third; a graph of ours is judged by a replay. Nobody keeps a result, which may lie in a graph's memory.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.kernels import estimates, measure, timers
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.measure import Errors
from benchmarks.kernels.problems import Case, fp32_products
from benchmarks.kernels.providers import Provider

# What is timed together: on CUDA the call as PyTorch makes it, and then its graph.
PHASES: dict[str, tuple[tuple[str, ...], ...]] = {"cpu": (("wall",),), "cuda": (("host", "device"), ("graph",))}
SHARE = {"cpu": 0.25, "cuda": 0.04}  # seconds of measuring for one provider and one timer
PATIENCE = {"cpu": 1.5, "cuda": 1.0}  # seconds of few rounds, and of the slowest call of a lost cause
WARM_UP = 3  # calls before the gate, where something may compile


@dataclass
class Verdict:
    """What the gate says of a provider: ``red`` is why it gets no time; ``broken``, that it is wrong or fails."""

    errors: Errors | None = None
    red: str | None = None
    broken: bool = False
    launches: int | None = None
    peak_memory: int | None = None


@dataclass
class Entry:
    """What came out for one provider under one timer; no seconds where the verdict is red or nothing was timed."""

    provider: Provider
    verdict: Verdict
    seconds: list[float] = field(default_factory=list)


@dataclass
class _Ready:
    run: Callable[[], object]
    once: float


class Contest:
    """A case with its features and its truth on a device."""

    def __init__(self, case: Case, device: torch.device, ceilings: Ceilings) -> None:
        self.case, self.device, self.ceilings = case, device, ceilings
        self.available = measure.available_memory(device)

    def run(self, providers: Sequence[Provider], timed: bool = True) -> dict[tuple[str, str], Entry]:
        """Entries by provider and timer; ``timed`` False runs the gates alone."""
        entries: dict[tuple[str, str], Entry] = {}
        if all(self._why_not_run(provider) for provider in providers):  # the truth would not fit either
            return {
                (provider.name, timer): Entry(provider, Verdict(red=self._why_not_run(provider)))
                for provider in providers
                for phase in PHASES[self.device.type]
                for timer in phase
            }
        with fp32_products(self.case.precision):
            self.x, self.y = self.case.features(self.device)
            self.true = measure.truth(self.case, self.x, self.y)
            for phase in PHASES[self.device.type]:
                entries |= self._phase(phase, providers, timed)
        if any(provider.own_graphs for provider in providers):
            torch.compiler.reset()  # which lets go of the memory of a compiler's graphs
        return entries

    def _phase(self, names: Sequence[str], providers: Sequence[Provider], timed: bool) -> dict[tuple[str, str], Entry]:
        pool = torch.cuda.graph_pool_handle() if "graph" in names else None
        ready: dict[str, _Ready] = {}
        entries: dict[tuple[str, str], Entry] = {}
        for provider in providers:
            verdict = self._prepare(provider, pool, ready)
            entries |= {(provider.name, timer): Entry(provider, verdict) for timer in names}
        kind = self.device.type
        for timer in names if timed else ():
            takes = {name: timers.TIMERS[timer](one.run, one.once) for name, one in ready.items()}
            rounds = {name: timers.rounds(one.once, SHARE[kind], PATIENCE[kind]) for name, one in ready.items()}
            for name, seconds in timers.in_turns(takes, rounds).items():
                entries[name, timer].seconds = seconds
                if timer == "host":
                    ready[name].once = statistics.median(seconds)  # how long the device has to sleep
        return entries

    def _prepare(self, provider: Provider, pool: timers.Pool | None, ready: dict[str, _Ready]) -> Verdict:
        """The verdict on a provider, which is ``ready`` if it is green; what it raises makes it red."""
        red = self._why_not_run(provider)
        if red:
            return Verdict(red=red)
        try:
            return self._judge(provider, pool, ready)
        except torch.OutOfMemoryError:
            expected = estimates.needed(provider.name, self.case) / estimates.GIB
            verdict = Verdict(red=f"out of memory (needs more than the {expected:.1f} GiB expected)")
        except Exception as error:  # a rival that cannot do a case must not end the run; ours fail their test by it
            first = (str(error).strip().splitlines() or [""])[0]
            verdict = Verdict(red=f"{type(error).__name__}: {first}"[:200], broken=True)
        release(self.device)
        return verdict

    def _judge(self, provider: Provider, pool: timers.Pool | None, ready: dict[str, _Ready]) -> Verdict:
        eager = measure.call(provider.build(self.case, pool is not None), self.x, self.y, self.case.backward)
        once = self._warm_up(eager, provider)
        run: Callable[[], object] = eager
        if pool is None:
            result, memory = measure.watched(eager, self.device)
        else:
            _, memory = measure.watched(eager, self.device)
            graph, result = timers.capture(eager, pool)
            run = graph.replay
            once = self._seconds(run)
        errors = measure.errors(result, self.true)
        del result
        red = errors.red(estimates.number(self.case))
        if red:
            return Verdict(errors, red, broken=True)
        ready[provider.name] = _Ready(run, once)
        # A compiler's own graphs keep their memory out of the allocator's sight: the row of its captured form has it.
        hidden = provider.own_graphs and self.device.type == "cuda" and pool is None
        launches = measure.launches(run, self.device)
        return Verdict(errors, launches=launches, peak_memory=None if hidden else memory)

    def _warm_up(self, run: Callable[[], object], provider: Provider) -> float:
        """Seconds of the last of a few calls; of the only one where nothing compiles."""
        compiles = provider.own_graphs or self.device.type == "cuda"
        return [self._seconds(run) for _ in range(WARM_UP if compiles else 1)][-1]

    def _seconds(self, run: Callable[[], object]) -> float:
        start = measure.clock(self.device)
        run()
        return measure.clock(self.device) - start

    def _why_not_run(self, provider: Provider) -> str | None:
        patience = PATIENCE[self.device.type]
        if provider.name == "naive" and self.device.type == "cpu":
            patience *= 20  # what the README compares with
        return estimates.why_not_run(provider.name, self.case, self.ceilings, self.available, patience)


def release(device: torch.device) -> None:
    """Give back what earlier calls left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
