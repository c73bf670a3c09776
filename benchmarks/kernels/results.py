"""What was measured of `cka_loss` and its rivals: a row for each case, timer and provider."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.harness import Entry
from benchmarks.kernels import estimates
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case
from benchmarks.rows import Origin

RESULTS = Path(__file__).parent / "results"
Key = tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Times and floor in seconds, memory in bytes, ceilings in bytes/s and flop/s; None is unknown.

    With a red gate there is the reason and no time. ``launches`` is a GPU's: ``./dev gpu`` counts them.
    """

    timer: str
    provider: str
    red: str
    value_error: float | None
    gradient_error: float | None
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int | None
    launches: int | None
    peak_memory: int | None
    floor: float | None
    copy_ceiling: float | None
    product_ceiling: float | None


@dataclass(frozen=True, kw_only=True)
class KernelsRow(Measures, Case, Origin):
    """One measurement."""

    @property
    def question(self) -> Key:
        """Case and timer: rows of one question compete."""
        return (*(getattr(self, name) for name in rows.columns_of(Case)), self.timer)

    @property
    def key(self) -> Key:
        """What tells the rows of one file apart."""
        return (*self.question, self.provider)


def row(about: dict[str, str], case: Case, entry: Entry, limits: Ceilings) -> KernelsRow:
    """A contest's entry as a row; ``about`` is its origin."""
    moved = estimates.traffic(case)
    return KernelsRow(
        **about, **{name: getattr(case, name) for name in rows.columns_of(Case)}, timer="wall", provider=entry.name,
        red=entry.why, value_error=entry.verdict.value_error, gradient_error=entry.verdict.gradient_error,
        **entry.timing("wall"), launches=None, peak_memory=entry.peak_memory,
        floor=estimates.floor(case, limits), copy_ceiling=limits.copy(moved), product_ceiling=limits.rate(case),
    )  # fmt: skip


def path_for(device: torch.device) -> Path:
    """The CSV file of a device, by its name."""
    return RESULTS / f"{rows.slug(rows.device_name(device))}.csv"


def read_kernels(path: Path) -> list[KernelsRow]:
    """The rows of a file."""
    return rows.load_rows(path, KernelsRow)


def updated(old: Iterable[KernelsRow], new: Iterable[KernelsRow]) -> list[KernelsRow]:
    """Old rows, each replaced where there is a new one with the same key, and the new ones that have no old one."""
    return list(({row.key: row for row in old} | {row.key: row for row in new}).values())
