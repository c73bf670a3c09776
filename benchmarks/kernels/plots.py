"""Rows as pictures: time against n and against d with the floor drawn in, and a map of the speed-up over both."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row
from benchmarks.run import Line, any_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sizes = tuple[int, int]  # n and d
AXES = "n", "d"
BASE = "auto"


def draw_plots(rows: Iterable[Row], path: Path, ours: Set[str], order: Sequence[str]) -> None:
    """One picture: three panels for each kind of row that there is enough of. None without matplotlib.

    ``order``: of the providers, whose colours are the same in every panel.
    """
    panels = {
        alike: lines for alike, lines in _panels(rows).items() if min(len(_swept(lines, axis)) for axis in (0, 1)) > 2
    }
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure  # and not pyplot: no window, no state

    figure = Figure(figsize=(15, 4.4 * len(panels)), layout="constrained")
    for (alike, lines), axes in zip(panels.items(), figure.subplots(len(panels), 3, squeeze=False), strict=True):
        for axis in (0, 1):
            swept = _swept(lines, axis)
            (other,) = {sizes[1 - axis] for sizes in swept}
            title = f"{('batch', 'width')[axis]}, {AXES[1 - axis]} = {other}\n{', '.join(filter(None, alike[1:]))}"
            _curves(axes[axis], {sizes[axis]: line for sizes, line in swept.items()}, ours, order)
            axes[axis].set_xlabel(AXES[axis])
            axes[axis].set_title(title, fontsize=10)  # or it meets the next panel's
        _speed_up(axes[2], lines, ours)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=80)
    os.replace(part, path)


def _panels(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[Sizes, Line]]:
    """Rows that agree in everything that is no axis, by n and d; equal widths, since the axes show one.

    Where two problems have a case of the same sizes, the first one's rows are shown: they were measured in turns.
    """
    found: dict[tuple[str, ...], dict[Sizes, Line]] = {}
    for row in rows:
        kernel = "Gaussian" if row["problem"] == "rbf" else "linear"
        alike = (row["device"], kernel, *(row[name] or "" for name in ("estimator", "mode", "dtype", "precision")))
        if row["p"] == row["q"]:
            line = found.setdefault(alike, {}).setdefault((row["n"], row["p"]), {})
            if all(other["problem"] == row["problem"] for other in line.values()):
                line[row["provider"]] = row
    return found


def _swept(lines: dict[Sizes, Line], axis: int) -> dict[Sizes, Line]:
    """The lines along one axis at the value of the other that has most of them, in order."""
    others = [sizes[1 - axis] for sizes in lines]
    most = max(others, key=others.count)
    return {sizes: lines[sizes] for sizes in sorted(lines) if sizes[1 - axis] == most}


def _curves(axes: Axes, lines: dict[int, Line], ours: Set[str], order: Sequence[str]) -> None:
    def curve(label: str, time: Callable[[Line], float | None], **style: Any) -> None:
        known = [(x, seconds) for x, line in lines.items() if (seconds := time(line)) is not None]
        axes.plot(*zip(*known, strict=True) if known else ((), ()), label=label, **style)

    for name in dict.fromkeys(name for line in lines.values() for name in line):
        style = {"color": f"C{order.index(name)}", "linestyle": "-" if name in ours else "--"}
        style |= {"linewidth": 2.4 if name == BASE else 1.2, "marker": "o", "markersize": 3}
        curve(name, lambda line, name=name: line.get(name, {}).get("p50"), **style)
    curve("floor", lambda line: any_row(line)["floor"], color="black", linestyle=":")
    axes.set(xscale="log", yscale="log", ylabel="median of a call, s")
    axes.set_xticks(list(lines), [f"{x:,}" for x in lines], rotation=45, fontsize=7)
    axes.minorticks_off()
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _speed_up(axes: Axes, lines: dict[Sizes, Line], ours: Set[str]) -> None:
    """How many times as fast as the best of the rivals, over (n, d)."""
    ratios = {}
    for sizes, line in lines.items():
        rivals = [row["p50"] for name, row in line.items() if name not in ours and row["p50"]]
        if rivals and line.get(BASE, {}).get("p50"):
            ratios[sizes] = min(rivals) / line[BASE]["p50"]
    ns, ds = (sorted({sizes[axis] for sizes in ratios}) for axis in (0, 1))
    colours = [[math.log2(ratios.get((n, d), math.nan)) for n in ns] for d in ds]
    axes.imshow(colours, cmap="RdYlGn", vmin=-2, vmax=2, origin="lower", aspect="auto")
    for (n, d), ratio in ratios.items():
        axes.text(ns.index(n), ds.index(d), f"{ratio:.2g}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(ns)), [f"{n:,}" for n in ns], rotation=45, fontsize=7)
    axes.set_yticks(range(len(ds)), [f"{d:,}" for d in ds], fontsize=7)
    axes.set(xlabel="n", ylabel="d", title=f"{BASE}: times as fast as the best rival")
