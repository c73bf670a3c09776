"""One case, all its providers: who need not try, then the gate for each, then their times, taken in turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import harness
from benchmarks.harness import Contestant, Entry
from benchmarks.kernels import estimates, gate
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case, fp32_switched
from benchmarks.kernels.providers import Provider
from benchmarks.machine import Machine

SHARE = 0.25  # seconds of measuring for one provider
PATIENCE = 1.5  # seconds of few rounds, and of the slowest call of a lost cause


def case_contest(
    case: Case, ceilings: Ceilings, taking_part: Sequence[Provider], timed: bool = True
) -> dict[str, Entry]:
    """Entries by provider; ``timed`` False runs the gates alone."""
    machine = Machine(torch.device("cpu"))
    entries, able = {}, []
    for provider in taking_part:
        patience = PATIENCE * (20 if provider.name == "naive" else 1)  # the README's comparison
        why = estimates.too_slow(provider.name, case, ceilings, patience)
        if why is None:
            able.append(provider)
        else:
            entries[provider.name] = Entry(provider.name, "refused", why)
    with fp32_switched(case.precision):
        x, y = case.features(machine.device)
        candidates = [
            Contestant(one.name, gate.call(one.build(case), x, y, case.backward), compiles=one.compiles) for one in able
        ]

        judge = gate.judge(case, x, y)
        entries |= harness.contest(machine, candidates, judge, "wall", SHARE, PATIENCE, watch=True, timed=timed)
    if any(provider.compiles for provider in taking_part):
        torch.compiler.reset()  # which lets go of its memory
    return {provider.name: entries[provider.name] for provider in taking_part}
