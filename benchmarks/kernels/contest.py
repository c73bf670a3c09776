"""One case, all its providers: who need not try, then the gate for each, then their times, taken in turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Candidate, Entry, Judge
from benchmarks.kernels import estimates, gate
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case, fp32_products
from benchmarks.kernels.providers import Provider
from benchmarks.machine import Machine

# What is timed together: on CUDA the call as PyTorch makes it, and then its graph.
PHASES: dict[str, tuple[tuple[str, ...], ...]] = {"cpu": (("wall",),), "cuda": (("host", "device"), ("graph",))}
SHARE = {"cpu": 0.25, "cuda": 0.04}  # seconds of measuring for one provider and one timer
PATIENCE = {"cpu": 1.5, "cuda": 1.0}  # seconds of few rounds, and of the slowest call of a lost cause


class Contest:
    """A case on a device, with what the device reaches; ``available``: bytes that a measurement may take."""

    def __init__(self, case: Case, device: torch.device, ceilings: Ceilings) -> None:
        self.case, self.ceilings, self.machine = case, ceilings, Machine(device)
        self.available = self.machine.free_memory()

    def run(self, providers: Sequence[Provider], timed: bool = True) -> dict[tuple[str, str], Entry]:
        """Entries by provider and timer; ``timed`` False runs the gates alone."""
        phases = PHASES[self.machine.device.type]
        reasons = {provider.name: self._why_not_run(provider) for provider in providers}
        entries = {
            (name, timer): Entry(name, "refused", why)
            for name, why in reasons.items()
            for phase in phases
            for timer in phase
            if why is not None
        }
        able = [provider for provider in providers if reasons[provider.name] is None]
        if able:  # if nobody is, the truth would not fit either
            with fp32_products(self.case.precision):
                x, y = self.case.features(self.machine.device)
                judge = gate.judge(self.case, x, y)
                for timers in phases:
                    entries |= self._phase(timers, self._candidates(able, "graph" in timers, x, y), judge, timed)
        if any(provider.compiles for provider in providers):
            torch.compiler.reset()  # which lets go of the memory of a compiler's graphs
        return {(p.name, timer): entries[p.name, timer] for phase in phases for p in providers for timer in phase}

    def _candidates(self, able: Sequence[Provider], capture: bool, x: Tensor, y: Tensor) -> list[Candidate]:
        losses = [provider.build(self.case, capture) for provider in able]
        calls = [gate.call(loss, x, y, self.case.backward) for loss in losses]
        return [Candidate(one.name, run, compiles=one.compiles) for one, run in zip(able, calls, strict=True)]

    def _phase(
        self, timers: Sequence[str], candidates: Sequence[Candidate], judge: Judge, timed: bool
    ) -> dict[tuple[str, str], Entry]:
        kind, capture = self.machine.device.type, "graph" in timers

        def budget(once: float, takes: int) -> int:
            return harness.rounds(once, SHARE[kind], PATIENCE[kind]) if timed else 0

        entries = {}
        pool = torch.cuda.graph_pool_handle() if capture else None
        for entry in harness.compete(self.machine, candidates, judge, timers, budget, watch=True, pool=pool):
            if entry.no_graph:
                entry.status, entry.why = "failed", entry.no_graph
            if entry.name == "compiled" and kind == "cuda" and not capture:
                entry.peak_memory = None  # the allocator does not see a compiler's own graphs; the captured form has it
            entries |= {(entry.name, timer): entry for timer in timers}
        return entries

    def _why_not_run(self, provider: Provider) -> str | None:
        kind = self.machine.device.type
        patience = PATIENCE[kind] * (20 if (provider.name, kind) == ("naive", "cpu") else 1)  # the README's comparison
        return estimates.why_not_run(provider.name, self.case, self.ceilings, self.available, patience)
