"""The pictures of a recipe (accuracy by corruption and severity, gap recovered, training curves) and of teachers (what
their features promise, against what came of it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..figures import AXIS, COLOURS, GRID, INK, PALETTE, canvas, title_panel
from ..tables import spread
from .comparison import BASELINE, Comparison
from .regression import PREDICTORS, PROPERTY_NAMES, Regression, TeacherRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heat_map(comparison: Comparison, path: Path, *, title: str) -> None:
    """Accuracy for each corruption (rows) and severity (columns), a panel for each method; the held-out ones on top."""
    methods = comparison.methods
    first = comparison.outcomes[0]
    names = [*first.held_out.corrupted, *first.seen.corrupted]
    with canvas(path, title, (2.2 + 1.35 * len(methods), 1.5 + 0.27 * len(names))) as figure:
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            grid = [[100 * share for share in comparison.mean(method, name)] for name in names]
            image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
            for row, values in enumerate(grid):
                for column, value in enumerate(values):
                    colour = "black" if value > 60 else "white"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
            axes.set_title(method, fontsize=9, color=INK)
            axes.set_xticks(range(len(grid[0])), [str(s + 1) for s in range(len(grid[0]))])
            axes.axhline(len(first.held_out.corrupted) - 0.5, color="white", linewidth=2.5)
        panels[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        panels[0].set_xlabel("severity", color=INK)
        figure.colorbar(image, ax=panels, label="test accuracy, %", fraction=0.02)


def recovered(
    comparisons: Mapping[str, Comparison], path: Path, *, title: str, paper: Mapping[str, Mapping[str, float]]
) -> None:
    """Bars of the share of the gap recovered, a group for each comparison; seeds as dots, the paper's as diamonds."""
    labelled: set[str] = set()
    methods = list(dict.fromkeys(m for comparison in comparisons.values() for m in comparison.contenders))
    with canvas(path, title, (3.0 + max(0.32 * len(methods), 1.3) * len(comparisons), 4.2)) as figure:
        axes: Any = figure.subplots()
        for turn, method in enumerate(methods):
            for group, (name, comparison) in enumerate(comparisons.items()):
                if method not in comparison.contenders:
                    continue
                values = [100 * share for share in comparison.recovered(method)]
                x = group + 0.85 * ((turn + 0.5) / len(methods) - 0.5)
                width = 0.8 / len(methods)
                new = None if method in labelled else method
                labelled.add(method)
                axes.bar(x, fmean(values), width, yerr=spread(values), color=COLOURS.get(method), label=new)
                axes.plot([x] * len(values), values, ".", color=INK, markersize=4, zorder=3)
                if method in paper.get(name, {}):
                    axes.plot(x, paper[name][method], "D", color="white", markeredgecolor=INK, markersize=6, zorder=4)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_xticks(range(len(comparisons)), [name.replace(", ", ",\n") for name in comparisons], fontsize=9)
        axes.set_ylabel("gap recovered, %", color=INK)
        axes.grid(axis="y", color=GRID)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def curves(comparison: Comparison, path: Path, *, title: str) -> None:
    """Over the steps: training loss of the task, and validation accuracy on clean images; means over the seeds."""
    with canvas(path, title, (10, 4)) as figure:
        left, right = figure.subplots(1, 2)
        for method in comparison.methods:
            if method == BASELINE:
                continue  # has not been trained on
            histories = [outcome.history for outcome in comparison.of(method)]
            for axes, rows, value in (
                (left, [h.train for h in histories], lambda row: row.get("task", row["loss"])),
                (right, [h.validation for h in histories], lambda row: 100 * row["score"]),
            ):
                points = list(zip(*rows, strict=True))
                means = [fmean(map(value, each)) for each in points]
                axes.plot([each[0]["step"] for each in points], means, color=COLOURS.get(method), label=method)
        left.set_yscale("log")
        for axes, text in ((left, "task loss in training"), (right, "validation accuracy, clean, %")):
            title_panel(axes, text)
            axes.set_xlabel("step", color=INK)
            axes.grid(color=GRID)
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def scatter(
    rows: Sequence[TeacherRow],
    path: Path,
    *,
    title: str,
    baseline: float | None = None,
    regression: Regression | None = None,
) -> None:
    """Draw teachers into the PNG ``path``, written atomically, one panel for each of the three properties.

    Robust accuracy after the transfer against the property, for the teachers whose accuracy is known; where none is,
    the properties alone, as bars.

    Args:
        rows: at least one; points are told apart by their kind, in a legend.
        path: the file.
        title: of the picture.
        baseline: the untouched student's robust accuracy, a share of 1, as a line.
        regression: of these rows: its R² go into the panels' titles.
    """
    tried = [row for row in rows if row.accuracy is not None]
    with canvas(path, title, (13, 4.4 if tried else 1.6 + 0.35 * len(rows))) as figure:
        for axes, name in zip(figure.subplots(1, len(PREDICTORS), sharey=True), PREDICTORS, strict=True):
            if tried:
                _draw_promise(axes, name, tried, baseline)
            else:
                _draw_property(axes, name, rows)
            axes.locator_params(axis="x", nbins=5)
            alone = None if regression is None else regression.alone.get(name)
            known = "" if alone is None else f"\nR² alone {alone.r2:.2f}, left out {alone.r2_loo:.2f}"
            title_panel(axes, f"{PROPERTY_NAMES[name]}{known}")
        if tried:
            figure.axes[0].set_ylabel("robust accuracy after transfer, %", color=INK)
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)


def _draw_promise(axes: Axes, name: str, rows: Sequence[TeacherRow], baseline: float | None) -> None:
    for number, kind in enumerate(dict.fromkeys(row.kind for row in rows)):
        of = [(getattr(row.properties, name), 100 * (row.accuracy or 0.0)) for row in rows if row.kind == kind]
        marker, colour = "osD^v"[number // len(PALETTE) % 5], PALETTE[number % len(PALETTE)]
        axes.plot(*zip(*of, strict=True), marker, color=colour, markersize=7, label=kind)
    if baseline is not None:
        axes.axhline(100 * baseline, color=AXIS, linewidth=1.6, linestyle="--", zorder=0)
    axes.margins(0.15)
    axes.grid(color=GRID)


def _draw_property(axes: Axes, name: str, rows: Sequence[TeacherRow]) -> None:
    """Bars, the first teacher on top."""
    axes.barh(range(len(rows)), [getattr(row.properties, name) for row in rows], color=PALETTE[0], height=0.6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID)
