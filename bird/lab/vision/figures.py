"""The pictures of a reproduction: accuracy by corruption and severity, gap recovered, training curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..figures import COLOURS, GRID, INK, canvas
from ..tables import spread
from .comparison import Comparison, Outcome

if TYPE_CHECKING:
    pass


def heat_map(comparison: Comparison, path: Path, *, title: str) -> None:
    """Accuracy for each corruption (rows) and severity (columns), a panel for each method; the held-out ones on top."""
    methods = comparison.methods
    first = comparison.outcomes[0]
    names = [*first.held_out.corrupted, *first.seen.corrupted]
    with canvas(path, title, (2.2 + 1.35 * len(methods), 1.5 + 0.27 * len(names))) as figure:
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            grid = [_by_severity(comparison.of(method), name) for name in names]
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


def _by_severity(outcomes: list[Outcome], name: str) -> list[float]:
    """In %, the mean over the seeds."""
    seeds = [{**outcome.seen.corrupted, **outcome.held_out.corrupted}[name] for outcome in outcomes]
    return [100 * fmean(values) for values in zip(*seeds, strict=True)]


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
                values = [100 * share for share in comparison.recovered(method, pooled=True)]
                x = group + 0.85 * ((turn + 0.5) / len(methods) - 0.5)
                width = 0.8 / len(methods)
                label = None if method in labelled else method
                labelled.add(method)
                axes.bar(x, fmean(values), width, yerr=spread(values), color=COLOURS.get(method), label=label)
                axes.plot([x] * len(values), values, ".", color=INK, markersize=4, zorder=3)
                if method in paper.get(name, {}):
                    axes.plot(x, paper[name][method], "D", color="white", markeredgecolor=INK, markersize=6, zorder=4)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_xticks(range(len(comparisons)), [name.replace(", ", ",\n") for name in comparisons], fontsize=9)
        axes.set_ylabel("gap recovered, %", color=INK)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def curves(comparison: Comparison, path: Path, *, title: str) -> None:
    """Over the steps: training loss of the task, and validation accuracy on clean images; means over the seeds."""
    with canvas(path, title, (10, 4)) as figure:
        left, right = figure.subplots(1, 2)
        for method in comparison.methods:
            if method == comparison.baseline:
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
        for axes, label in ((left, "task loss in training"), (right, "validation accuracy, clean, %")):
            axes.set_title(label, fontsize=10, color=INK, loc="left")
            axes.set_xlabel("step", color=INK)
            axes.grid(color=GRID)
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
