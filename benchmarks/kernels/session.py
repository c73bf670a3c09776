"""One run of the benchmarks: each case is measured when it is first asked for, and its rows are kept as they come."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import ceilings, contest, estimates, plots, problems, providers, results, tables
from benchmarks.kernels.contest import Contest, Entry
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case
from benchmarks.kernels.results import Row


class Session:
    """The run on one device; ``provider`` chooses among the providers as a glob; ``saves``: rows go to the file.

    After ``minutes`` no other case is begun.
    """

    def __init__(self, device: torch.device, provider: str | None, saves: bool, minutes: float) -> None:
        self.device, self.provider, self.saves = device, provider, saves
        self.end = time.monotonic() + 60 * minutes
        self.origin = results.origin(device)
        self.path = results.path_for(self.origin.device)
        self.before = results.read(self.path) if saves and self.path.exists() else []
        self.rows: list[Row] = []
        self.measured: set[Case] = set()
        self.left_out: set[Case] = set()
        self.failed: set[Case] = set()
        self._ceilings: Ceilings | None = None
        self._last: tuple[Case, dict[tuple[str, str], Entry]] | None = None

    def entries(self, case: Case, timed: bool) -> dict[tuple[str, str], Entry]:
        """What came out for a case, by provider and timer; the tests of one case follow each other."""
        if self._last is not None and self._last[0] == case:
            return self._last[1]
        if case in self.failed:
            pytest.skip("the case failed in the test of its first provider")
        if time.monotonic() > self.end:
            self.left_out.add(case)
            pytest.skip("the minutes of this run are used up")
        self._last = None
        contest.release(self.device)
        limits = self.ceilings()
        taking_part = providers.taking_part(case, self.device, self.provider)
        self.failed.add(case)  # unless it comes through
        entries = Contest(case, self.device, limits).run(taking_part, timed)
        self.failed.remove(case)
        self._last = case, entries
        if timed:
            self._keep(case, entries, limits)
        return entries

    def ceilings(self) -> Ceilings:
        """What the device reaches, measured at the first case."""
        if self._ceilings is None:
            numbers = {estimates.number(case) for case in problems.cases(self.device)}
            self._ceilings = ceilings.measured(self.device, numbers)
        return self._ceilings

    def finish(self) -> list[Path]:
        """Write what this run found, with its table and its plots; returns the files.

        Rows of an earlier run stay where this one was not asked for theirs. One that was asked for everything leaves
        none.
        """
        whole = self.provider is None and self.measured == set(problems.cases(self.device))
        rows = self.rows if whole else results.merged(self.before, self.rows)
        results.write(self.path, rows)
        table = self.path.with_suffix(".md")
        results.write_text(table, tables.page(rows))
        return [self.path, table, *plots.draw(rows, self.path.with_suffix(".png"))]

    def _keep(self, case: Case, entries: dict[tuple[str, str], Entry], limits: Ceilings) -> None:
        self.measured.add(case)
        self.rows += [
            results.row(self.origin, case, timer, entry, limits, self.device) for (_, timer), entry in entries.items()
        ]
        if self.saves:  # now and not at the end only: a machine may be taken away in the middle
            results.write(self.path, results.merged(self.before, self.rows))
