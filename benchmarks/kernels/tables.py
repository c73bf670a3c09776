"""Rows as a page for people: for each kind of number and mode a line per problem and a column per provider."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.kernels.providers import HAND_WRITTEN, OURS, PROVIDERS
from benchmarks.kernels.results import KernelsRow
from benchmarks.rows import beside, duration, heading, table_text

BASE = "auto"  # what a user of the package gets; everything is compared with it
Line = dict[str, KernelsRow]  # rows of one question, by provider


def kernels_page(rows: Sequence[KernelsRow]) -> str:
    """Markdown: the origin, then the tables."""
    sections: dict[tuple[str, str, str, str], dict[object, Line]] = {}
    for row in rows:
        title = row.mode, row.dtype, row.precision, row.estimator
        sections.setdefault(title, {}).setdefault(row.question, {})[row.provider] = row
    parts = [heading("Kernel benchmarks", rows) + EXPLANATION]
    parts += [_section(*title, list(lines.values())) for title, lines in sections.items()]
    return "\n".join(parts)


EXPLANATION = f"""\
Median of a call, and how many times that of `{BASE}` it is. *Hand-written* is the faster of the two forms that a user
would write, *floor* what no call can beat: the cheaper route's products at the rate of a big product on this device, or
the bytes that must move at the rate of a copy of as many. A call's memory includes the gradient.
"""


def _section(mode: str, dtype: str, precision: str, estimator: str, lines: list[Line]) -> str:
    names = [p.name for p in PROVIDERS if any(p.name in line for line in lines)]
    title = f"## {mode}, {' '.join(filter(None, (dtype, precision)))}, {estimator}: time of a call\n"
    columns: list[tuple[str, Callable[[Line], str]]] = [(name, _cell(name)) for name in names]
    if set(HAND_WRITTEN) <= set(names):
        columns.append(("hand-written", _best_by_hand))
    columns.append(("floor", lambda line: duration(_any(line).floor)))
    memory = _table(lines, [(name, _memory(name)) for name in names])
    return f"{title}\n{_table(lines, columns)}\nPeak memory beyond the inputs, MiB.\n\n{memory}"


def _cell(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        if name not in line:
            return "–"
        row = line[name]
        return row.red if row.p50 is None else _compared(row.p50, line)

    return cell


def hand_written(line: Line) -> float | None:
    """Seconds of the faster of the two hand-written forms."""
    return min((row.p50 for name, row in line.items() if name in HAND_WRITTEN and row.p50 is not None), default=None)


def best_rival(line: Line) -> float | None:
    """Seconds of the fastest of all that is not ours."""
    return min((row.p50 for name, row in line.items() if name not in OURS and row.p50 is not None), default=None)


def _best_by_hand(line: Line) -> str:
    seconds = hand_written(line)
    return "–" if seconds is None else _compared(seconds, line)


def _compared(seconds: float, line: Line) -> str:
    return beside(seconds, line[BASE].p50 if BASE in line else None)


def _memory(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        size = line[name].peak_memory if name in line else None
        return "–" if size is None else f"{size / 2**20:.3g}"

    return cell


def _any(line: Line) -> KernelsRow:
    return next(iter(line.values()))


def _table(lines: list[Line], columns: Sequence[tuple[str, Callable[[Line], str]]]) -> str:
    cells = [["problem", "n", "p", "q", *(title for title, _ in columns)]]
    for line in lines:
        row = _any(line)
        cells.append([row.problem, str(row.n), str(row.p), str(row.q), *(cell(line) for _, cell in columns)])
    return table_text(cells)
