"""The phases of a run by name, in order of their value, with their deadlines."""

from __future__ import annotations

from benchmarks.gpu import ceilings, correctness, lines, prototypes, sweeps, times
from benchmarks.gpu.context import Phase

PHASES = {
    "warm": Phase(times.warm_items, lines.EVENTS),
    "ceilings": Phase(ceilings.items, lines.ROWS),
    "correctness": Phase(correctness.items, lines.CHECKS),
    "times": Phase(times.items, lines.ROWS),
    "prototypes": Phase(prototypes.items, lines.ROWS),
    "profiles": Phase(times.profile_items, lines.KERNELS),
    "rivals": Phase(times.rival_items, lines.ROWS),
    # Of `benchmarks.gpu.sweep`:
    "precompile": Phase(sweeps.warm_items, lines.SWEEP),
    "sweep": Phase(sweeps.items, lines.SWEEP),
}
