"""Rows as pictures: time against n and against d with the floor drawn in, and a map of the speed-up over both."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kernels.providers import OURS, PROVIDERS
from benchmarks.kernels.results import KernelsRow
from benchmarks.kernels.tables import BASE, Line, best_rival

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {provider.name: f"C{index}" for index, provider in enumerate(PROVIDERS)}  # one in every panel
Alike = tuple[str, ...]  # what the rows of a panel agree in


def draw_plots(rows: Iterable[KernelsRow], path: Path) -> list[Path]:
    """One picture: three panels for each kind of row that there is enough of. None without matplotlib."""
    panels = {
        alike: list(lines.values())
        for alike, lines in _panels(rows).items()
        if all(len(_swept(list(lines.values()), axis)) > 2 for axis in (_n, _d))
    }
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure  # and not pyplot: no window, no state

    figure = Figure(figsize=(15, 4.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 3, squeeze=False)
    for (alike, lines), (over_n, over_d, speed_up) in zip(panels.items(), axes, strict=True):
        name = ", ".join(filter(None, alike[1:]))
        _curves(over_n, _swept(lines, _n), _n, f"batch, d = {_common(_swept(lines, _n), _d)}\n{name}", "n")
        _curves(over_d, _swept(lines, _d), _d, f"width, n = {_common(_swept(lines, _d), _n)}\n{name}", "d")
        _speed_up(speed_up, lines)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=80)
    os.replace(part, path)
    return [path]


def _panels(rows: Iterable[KernelsRow]) -> dict[Alike, dict[tuple[int, int], Line]]:
    """Rows that agree in everything that is no axis, by n and d; equal widths, since the axes show one.

    Where two problems have a case of the same sizes, the first one's rows are shown: they were measured in turns.
    """
    found: dict[Alike, dict[tuple[int, int], Line]] = {}
    for row in rows:
        kernel = "Gaussian" if row.problem == "rbf" else "linear"
        alike = row.device, kernel, row.estimator, row.mode, row.dtype, row.precision, row.timer
        if row.p == row.q:
            line = found.setdefault(alike, {}).setdefault((row.n, row.p), {})
            if all(other.problem == row.problem for other in line.values()):
                line[row.provider] = row
    return found


def _n(row: KernelsRow) -> int:
    return row.n


def _d(row: KernelsRow) -> int:
    return row.p


def _swept(lines: Sequence[Line], axis: Callable[[KernelsRow], int]) -> list[Line]:
    """The lines along one axis at the value of the other that has most of them, in order."""
    other = _d if axis is _n else _n
    by_value: dict[int, dict[int, Line]] = {}
    for line in lines:
        row = next(iter(line.values()))
        by_value.setdefault(other(row), {})[axis(row)] = line
    most = max(by_value.values(), key=len)
    return [most[key] for key in sorted(most)]


def _common(lines: list[Line], axis: Callable[[KernelsRow], int]) -> int:
    return axis(next(iter(lines[0].values())))


def _curves(axes: Axes, lines: list[Line], axis: Callable[[KernelsRow], int], title: str, label: str) -> None:
    for name in dict.fromkeys(name for line in lines for name in line):
        points = [(axis(line[name]), line[name].p50) for line in lines if name in line]
        width, style = 2.4 if name == BASE else 1.2, {"linestyle": "-" if name in OURS else "--"}
        style |= dict(label=name, color=COLOURS[name], linewidth=width, marker="o", markersize=3)
        _curve(axes, points, **style)
    rows = [next(iter(line.values())) for line in lines]
    _curve(axes, [(axis(row), row.floor) for row in rows], label="floor", color="black", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="median of a call, s")
    axes.set_title(title, fontsize=10)  # or it meets the next panel's
    axes.set_xticks([axis(row) for row in rows], [f"{axis(row):,}" for row in rows], rotation=45, fontsize=7)
    axes.minorticks_off()
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _curve(axes: Axes, points: Sequence[tuple[int, float | None]], **style: Any) -> None:
    known = [(x, y) for x, y in points if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], **style)


def _speed_up(axes: Axes, lines: Sequence[Line]) -> None:
    """How many times as fast as the best of the rivals, over (n, d)."""
    ratios = {}
    for line in lines:
        rival, ours = best_rival(line), line[BASE].p50 if BASE in line else None
        if rival is not None and ours is not None:
            ratios[_n(line[BASE]), _d(line[BASE])] = rival / ours
    ns, ds = (sorted({key[i] for key in ratios}) for i in range(2))
    table = [[ratios.get((n, d), math.nan) for n in ns] for d in ds]
    colours = [[math.log2(ratio) for ratio in row] for row in table]
    axes.imshow(colours, cmap="RdYlGn", vmin=-2, vmax=2, origin="lower", aspect="auto")
    for (n, d), ratio in ratios.items():
        axes.text(ns.index(n), ds.index(d), f"{ratio:.2g}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(ns)), [f"{n:,}" for n in ns], rotation=45, fontsize=7)
    axes.set_yticks(range(len(ds)), [f"{d:,}" for d in ds], fontsize=7)
    axes.set(xlabel="n", ylabel="d", title=f"{BASE}: times as fast as the best rival")
