"""`cka_loss` beside what its users could write instead, on named problems, on this CPU: ``./dev bench``.

Every provider passes the gate first: its value and gradient against a float64 truth of the same features. Where it is
red no time is taken: of a rival the table says why, and where ours is wrong the run fails. The rows of a case are kept
as soon as they are known. A GPU has a run of its own, ``./dev gpu``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from benchmarks import harness, rows
from benchmarks.harness import Contestant, Entry
from benchmarks.kernels import ceilings, estimates, gate, plots, problems, providers, results, tables
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case, fp32_switched
from benchmarks.kernels.providers import OURS, Provider
from benchmarks.kernels.results import KernelsRow
from benchmarks.machine import Machine

CPU = torch.device("cpu")
MINUTES = 8.0
SHARE = 0.25  # seconds of measuring for one provider
PATIENCE = 1.5  # seconds of few rounds, and of the slowest call of a lost cause


def case_contest(case: Case, limits: Ceilings, taking_part: Sequence[Provider], timed: bool = True) -> dict[str, Entry]:
    """Entries by provider: who need not try, then the gate for each, then the times of those that are right, in turns.

    ``timed`` False runs the gates alone.
    """
    machine = Machine(CPU)
    entries, able = {}, []
    for provider in taking_part:
        patience = PATIENCE * (20 if provider.name == "naive" else 1)  # the README's comparison
        why = estimates.too_slow(provider.name, case, limits, patience)
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


class Session:
    """One run: what was measured, what is wrong, and which cases there was no time for."""

    def __init__(self, provider: str | None, saves: bool) -> None:
        self.provider, self.saves = provider, saves
        self.about, self.path = rows.origin_of(CPU), results.path_for(CPU)
        self.before = results.read_kernels(self.path) if saves and self.path.exists() else []
        self.rows: list[KernelsRow] = []
        self.wrong: list[str] = []
        self.left_out: list[Case] = []

    def run(self, cases: Sequence[Case], minutes: float, timed: bool = True) -> None:
        """Case after case; after ``minutes`` no other is begun."""
        end = time.monotonic() + 60 * minutes
        limits = None
        for case in cases:
            if time.monotonic() > end:
                self.left_out.append(case)
                continue
            limits = limits or ceilings.measured_ceilings({estimates.number(case) for case in cases})
            try:
                found = case_contest(case, limits, providers.taking_part(case, CPU, self.provider), timed)
            except Exception as error:  # the other cases go on
                self.wrong.append(f"{case}: {rows.message(error)}")
                continue
            bad = [one for one in found.values() if one.name in OURS and one.status in ("red", "failed")]
            self.wrong += [f"{case}: {one.name}: {one.why}" for one in bad]
            self.rows += [results.row(self.about, case, one, limits) for one in found.values()]
            print(f"{case}: {len(found)} rows", flush=True)
            if self.saves and timed:  # now and not at the end only: a machine may be taken away in the middle
                rows.write_rows(self.path, results.updated(self.before, self.rows))

    def finish(self) -> str:
        """The page of this run; what is saved has its rows, table and plots.

        Rows of an earlier run stay where this one was not asked for theirs. One that was asked for everything leaves
        none.
        """
        measured = {row.question[:-1] for row in self.rows}
        whole = self.provider is None and len(measured) == len(problems.CASES)
        if self.saves and self.rows:
            kept = self.rows if whole else results.updated(self.before, self.rows)
            rows.write_rows(self.path, kept)
            rows.write_text(self.path.with_suffix(".md"), tables.kernels_page(kept))
            plots.draw_plots(kept, self.path.with_suffix(".png"))
        return tables.kernels_page(self.rows) if self.rows else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; the exit status is 1 where ours is wrong."""
    parser = argparse.ArgumentParser("./dev bench", description=__doc__)
    parser.add_argument("--problem", help="cases whose name holds this or matches it as a glob: llm, 'llm*bfloat16*'")
    parser.add_argument("--provider", help="only these providers, as a glob")
    parser.add_argument("--save", action="store_true", help="keep the results in benchmarks/kernels/results/")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no case after this long (%(default)s)")
    parser.add_argument("--gates", action="store_true", help="the gates alone: nothing is timed or kept")
    options = parser.parse_args(arguments)
    cases = problems.cases(options.problem)
    if not cases:
        parser.error(f"no case has {options.problem!r} in its name")
    for provider in providers.PROVIDERS:
        reason = provider.why_not(Case("", 128, 512, 512), CPU) if provider.ours else None
        if reason:
            print(f"not measured here: {provider.name}, {reason}")
    session = Session(options.provider, options.save and not options.gates)
    session.run(cases, options.minutes, timed=not options.gates)
    print(session.finish())
    if session.left_out:
        print(f"{len(session.left_out)} cases were not begun for want of --minutes; ask for them with --problem")
    print("\n".join(f"WRONG: {text}" for text in session.wrong))
    return 1 if session.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
