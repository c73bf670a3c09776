"""The benchmarks that ask questions of several candidates, beside each other on this CPU: ``./dev bench [NAME]``.

    loss      `cka_loss` beside what its users could write instead (the default; 8 minutes)
    layers    many layers at once: `cka_matrix`, and `cka_loss` of a list of pairs
    statistics  `Statistics` of batches beside pytorch-cka's loop
    tokens    `token_cka_loss` beside what users could write with a mask
    ranks     ``group=`` on two and four processes beside a differentiable all-gather

Every candidate passes the gate first: its value and gradient against a float64 truth of the same features. Where it is
red no time is taken: of a rival the page says why, and where ours is wrong the run fails. The rows of a question are
kept as soon as they are known. A GPU has a run of its own, ``./dev gpu``.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks import harness
from benchmarks.harness import Contestant, Gate
from benchmarks.machine import Machine
from benchmarks.rows import (
    Row,
    beside,
    cell,
    heading,
    load_rows,
    message,
    origin_of,
    parser,
    slug,
    table_text,
    write_rows,
    write_text,
)  # fmt: skip

CPU = torch.device("cpu")
KERNELS = ("loss", "layers", "statistics", "tokens")
HOMES = {name: f"kernels.{name}" for name in KERNELS} | {"ranks": "scale.ranks"}
MINUTES = 8.0
THRESHOLD = 1.1  # a ratio up to it is no regression
Line = dict[str, Row]  # the rows of one question, by provider


class Contest(NamedTuple):
    """Who answers a question ``within`` what, their gate, and in the end what else a provider's row says."""

    candidates: Sequence[Contestant]
    gate: Gate
    more: Callable[[str], Row] = lambda provider: {}
    within: AbstractContextManager[Any] = nullcontext()


class Question(Protocol):
    """A dataclass whose fields are columns; its text is its name."""

    def contest(self) -> Contest:
        """Everybody who answers it on this CPU."""


def any_row(line: Line) -> Row:
    """The row of the first provider."""
    return next(iter(line.values()))


@dataclass(frozen=True)
class Benchmark:
    """``questions`` of one type, and how a page shows what came out.

    ``file`` names the results beside the device, in ``folder``. A page has a section for each value of the columns
    ``sections``, with a line a question and a column a provider, times beside that of ``base``; then the ``columns``.
    Where one of ``ours`` is wrong, the run fails. A candidate is timed for ``share`` seconds, and a slow one for
    ``patience``.
    """

    title: str
    file: str
    folder: Path
    questions: Sequence[Any]
    explanation: str
    ours: Set[str]
    sections: tuple[str, ...] = ()
    base: Callable[[Line], Row | None] = any_row
    columns: dict[str, Callable[[Line], str]] = field(default_factory=dict)
    order: Sequence[str] = ()
    draw: Callable[[Sequence[Row], Path], object] = lambda rows, path: None
    share: float = 3.0
    patience: float = 12.0
    machine: Machine = Machine(CPU)  # noqa: RUF009 - it has no state

    @property
    def asked(self) -> list[str]:
        """The columns of a question."""
        return list(vars(self.questions[0]))

    def path(self, device: str) -> Path:
        """The CSV file of a device's results."""
        return self.folder / f"{slug(f'{device} {self.file}')}.csv"

    def ask(self, question: Question, pattern: str = "*", timed: bool = True) -> list[Row]:
        """Everybody past the gate, then those that are right timed in turns; a row each."""
        everybody, gate, more, within = question.contest()
        candidates = [candidate for candidate in everybody if fnmatch(candidate.name, pattern)]
        about = origin_of(CPU) | vars(question)

        def budget(once: float, takes: int) -> int:
            return harness.rounds(once, self.share, self.patience) if timed else 0

        with within:
            entries = list(harness.compete(self.machine, candidates, gate, ["wall"], budget, watch=True))
        if any(candidate.compiles for candidate in candidates):
            torch.compiler.reset()  # which lets go of its memory
        found = {entry.name: about | entry.row("wall") | more(entry.name) for entry in entries}
        return [found[candidate.name] for candidate in candidates]

    def key(self, row: Row) -> tuple[str, ...]:
        """What tells the rows of one file apart."""
        return tuple(cell(row.get(name)) for name in (*self.asked, "provider"))

    def updated(self, old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
        """Old rows, each replaced where there is a new one of its key, and the new ones that have no old one."""
        return list(({self.key(row): row for row in old} | {self.key(row): row for row in new}).values())

    # ------------------------------------------------------------------------------------------ the page

    def page(self, rows: Sequence[Row]) -> str:
        """Markdown: the origin, then the sections."""
        sections: dict[tuple[str, ...], dict[tuple[str, ...], Line]] = {}
        for row in rows:
            section = sections.setdefault(tuple(cell(row[name]) for name in self.sections), {})
            section.setdefault(self.key(row)[:-1], {})[row["provider"]] = row
        texts = [self._section(title, list(lines.values())) for title, lines in sections.items()]
        return "\n".join([heading(self.title, rows) + self.explanation, *texts])

    def _section(self, title: Sequence[str], lines: list[Line]) -> str:
        names = list(dict.fromkeys(name for line in lines for name in line))
        names.sort(key=lambda name: self.order.index(name) if name in self.order else 0)
        asked = [name for name in self.asked if name not in self.sections]

        def table(columns: dict[str, Callable[[Line], str]]) -> str:
            shown = {name: lambda line, name=name: cell(any_row(line).get(name)) for name in asked} | columns
            return table_text([list(shown), *([column(line) for column in shown.values()] for line in lines)])

        def of_each(show: Callable[[Row, Line], str]) -> dict[str, Callable[[Line], str]]:
            return {name: lambda line, name=name: show(line[name], line) if name in line else "–" for name in names}

        text = table(of_each(self._time) | self.columns)
        for what, show in (("Largest error against fp64", _error), ("Peak memory beyond the inputs, MiB", _memory)):
            if any(show(row, line) != "–" for line in lines for row in line.values()):
                text += f"\n{what}.\n\n{table(of_each(show))}"
        return (f"## {', '.join(filter(None, title))}\n\n" if title else "") + text

    def _time(self, row: Row, line: Line) -> str:
        base = self.base(line)
        return row["red"] or beside(row["p50"], base and base["p50"])


def _error(row: Row, line: Line) -> str:
    errors = [row[name] for name in ("error", "value_error", "gradient_error") if row.get(name) is not None]
    return f"{max(errors):.1e}" if errors else "–"


def _memory(row: Row, line: Line) -> str:
    return "–" if row.get("peak_memory") is None else f"{row['peak_memory'] / 2**20:.3g}"


# ---------------------------------------------------------------------------------------------- a run


def ask_all(
    benchmark: Benchmark, questions: Sequence[Question], given: argparse.Namespace
) -> tuple[list[Row], list[str], int]:
    """Question after question: the rows, what is wrong, and how many were not begun in time.

    Saved rows of an earlier run stay where this one was not asked for theirs. One that was asked for everything leaves
    none.
    """
    end = time.monotonic() + 60 * given.minutes
    rows: list[Row] = []
    wrong: list[str] = []
    before: list[Row] | None = None
    left_out = 0
    for question in questions:
        if time.monotonic() > end:
            left_out += 1
            continue
        try:
            found = benchmark.ask(question, given.provider, not given.gates)
        except Exception as error:  # the other questions go on
            wrong.append(f"{question}: {message(error)}")
            continue
        rows += found
        bad = [row for row in found if row["red"] and row["provider"] in benchmark.ours]
        wrong += [f"{question}: {row['provider']}: {row['red']}" for row in bad]
        print(f"{question}: {len(found)} rows", flush=True)
        if given.save and rows:  # now and not at the end only: a machine may be taken away in the middle
            path = benchmark.path(rows[0]["device"])
            before = before if before is not None else load_rows(path) if path.exists() else []
            write_rows(path, benchmark.updated(before, rows))
    if before is not None:
        whole = given.provider == "*" and len({benchmark.key(row)[:-1] for row in rows}) == len(benchmark.questions)
        kept = rows if whole else benchmark.updated(before, rows)
        write_rows(path, kept)
        write_text(path.with_suffix(".md"), benchmark.page(kept))
        benchmark.draw(kept, path.with_suffix(".png"))
    return rows, wrong, left_out


def comparison(benchmark: Benchmark, before: Sequence[Row], after: Sequence[Row], threshold: float) -> tuple[str, int]:
    """Two results side by side, and how many regressions there are.

    A regression is a row of ours that takes longer than before by more than the threshold and whose fastest fifth is
    slower than the slowest fifth was, or that has no time any more. Rivals are shown too: where they moved, the machine
    did.
    """
    old, new = ({benchmark.key(row): row for row in rows} for rows in (before, after))
    cells, count, ratios = [["case", "before", "after", "ratio", ""]], 0, {}
    for key in (key for key in old if key in new):
        one, other = old[key], new[key]
        ratio = other["p50"] / one["p50"] if one["p50"] and other["p50"] else math.inf
        lost = one["p50"] and not other["p50"]
        slower = lost or (ratio < math.inf and ratio > threshold and other["p20"] > one["p80"])
        regressed = bool(slower) and key[-1] in benchmark.ours
        count += regressed
        if ratio < math.inf:
            ratios.setdefault(key[-1], []).append(ratio)
        times = [row["red"] or beside(row["p50"], None) for row in (one, other)]
        cells.append([" ".join(filter(None, key)), *times, f"{ratio:.2f}", "REGRESSION" * regressed])
    cells[1:] = sorted(cells[1:], key=lambda line: -float(line[3]))
    means = [["provider", "ratio, geometric mean"], *([name, f"{geometric_mean(r):.3f}"] for name, r in ratios.items())]
    only = [f"{what}: {' '.join(filter(None, key))}" for what, one, other in (("gone", old, new), ("new", new, old))
            for key in one if key not in other]  # fmt: skip
    end = f"{count} regressions of ours in {len(cells) - 1} rows that both have"
    return "\n".join([table_text(cells), table_text(means), *only, end]), count


def rows_of_benchmark(benchmark: Benchmark, path: Path) -> list[Row]:
    """The rows of a CSV file of this benchmark.

    Raises:
        ValueError: it is no such file, or one of another benchmark, whose rows would be taken for one another.
    """
    rows = load_rows(path)
    needed = {*benchmark.asked, "provider", "p20", "p50", "p80", "red"}
    if not rows or not needed <= rows[0].keys() or len({benchmark.key(row) for row in rows}) < len(rows):
        raise ValueError(f"{path} is not of this benchmark: name the one it is of, {' or '.join(HOMES)}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the questions, or compare two results; the exit status is 1 where ours is wrong, or slower than before."""
    options = parser(__doc__)
    options.prog = "./dev bench"
    options.add_argument("name", nargs="?", default="loss", choices=HOMES)
    options.add_argument("--problem", default="", help="questions whose name holds this or matches it: llm, 'llm*bf*'")
    options.add_argument("--provider", default="*", help="only these providers, as a glob")
    options.add_argument(
        "--minutes", type=float, default=MINUTES, help="begin no question after this long (%(default)s)"
    )
    options.add_argument("--gates", action="store_true", help="the gates alone: nothing is timed or kept")
    options.add_argument("--threads", type=int, help="of PyTorch (default: its own)")
    options.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two CSV files, side by side"
    )
    options.add_argument("--threshold", type=float, default=THRESHOLD, help="a ratio up to it is no regression")
    given = options.parse_args(arguments)
    benchmark: Benchmark = importlib.import_module(f"benchmarks.{HOMES[given.name]}").BENCHMARK
    if math.isnan(given.minutes) or (given.threads is not None and given.threads < 1):
        options.error("--minutes must be a number, and --threads at least 1")
    if given.compare:
        try:
            before, after = (rows_of_benchmark(benchmark, path) for path in given.compare)
        except (OSError, ValueError) as error:
            options.error(str(error))
        text, count = comparison(benchmark, before, after, given.threshold)
        print(text)
        return min(count, 1)
    chosen = [q for q in benchmark.questions if given.problem in str(q) or fnmatch(str(q), given.problem)]
    if not chosen:
        options.error(f"no question has {given.problem!r} in its name")
    if given.threads:
        torch.set_num_threads(given.threads)
    given.save &= not given.gates
    rows, wrong, left_out = ask_all(benchmark, chosen, given)
    if not rows and not left_out:
        options.error(f"no provider of these questions matches {given.provider!r}")
    print(benchmark.page(rows) if rows else "")
    if left_out:
        print(f"{left_out} questions were not begun for want of --minutes; ask for them with --problem")
    print("\n".join(f"WRONG: {text}" for text in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
