"""The look of all figures: colours, a canvas that becomes a PNG atomically, bars of shares, and intervals of claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ..files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#009E73")
INK, AXIS, GRID = "#333333", "#8C8C8C", "#EEEEEE"
# Forms of BIRD in one hue, what neither transfers nor guides in grey: the rest after Okabe and Ito.
COLOURS = {
    "None": "#8C8C8C", "Continued": "#BBBBBB", "LP": "#F0E442", "FT": "#56B4E9", "LP-FT": "#0072B2",
    "Hints": "#E69F00", "LwF": "#CC79A7", "BIRD": "#D55E00", "BIRD, unbiased": "#A23B00", "BIRD, RBF": "#F4A582",
    "BIRD, RBF, unbiased": "#8C510A", "Ceiling": "#333333",
}  # fmt: skip


@contextmanager
def canvas(path: Path, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that becomes the PNG ``path``, atomically."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(fill(title, int(10 * size[0])), fontsize=12, fontweight="bold", color=INK, x=0.012, ha="left")
    yield figure
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(AXIS)
        axes.tick_params(colors=INK, length=0)
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def title_panel(axes: Axes, title: str) -> None:
    """Head a panel."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")


def shares(
    groups: Mapping[str, Mapping[str, tuple[list[float], float, float]]], path: Path, *, title: str, y_label: str
) -> None:
    """Bars in %, a panel for each group: a method's mean over seeds, the seeds as dots, and an interval as a line.

    Args:
        groups: group to method to (a share of 1 for each seed, lower and upper end of the interval).
        path: of the PNG.
        title: above all.
        y_label: of the axis.
    """
    widest = max(map(len, groups.values()))
    with canvas(path, title, (1.5 + (0.6 + 0.9 * widest) * len(groups), 3.8)) as figure:
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, (name, methods) in zip(panels, groups.items(), strict=True):
            for x, (method, (seeds, low, high)) in enumerate(methods.items()):
                guided = "BIRD" in method
                axes.bar(x, 100 * fmean(seeds), 0.7, color=COLOURS["BIRD" if guided else "None"])
                axes.vlines(x, 100 * low, 100 * high, color=INK, linewidth=1.5)
                axes.plot([x + 0.18] * len(seeds), [100 * share for share in seeds], ".", color=INK, markersize=5)
            lines = [m.replace(" + ", "\n+ ").replace(", ", ",\n").split("\n") for m in methods]
            axes.set_xticks(range(len(methods)), ["\n".join(fill(line, 12) for line in of) for of in lines])
            title_panel(axes, name)
            axes.grid(axis="y", color=GRID)
        panels[0].set_ylabel(y_label, color=INK)


def claims(rows: Sequence[Mapping[str, Any]], paper: Mapping[str, float | None], path: Path, *, title: str) -> None:
    """A line for each claim: the mean difference in points, its 95 % interval, and the seeds as dots.

    Args:
        rows: as `bird.lab.claims.json_rows` gives them.
        paper: the paper's difference in points, by claim, drawn as a diamond.
        path: of the PNG.
        title: above all.
    """
    with canvas(path, title, (8.5, 1.2 + 0.42 * len(rows))) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=AXIS, linewidth=1)
        for y, row in enumerate(rows):
            colour = COLOURS["BIRD" if row["verdict"] else "Continued"]
            dots = [100 * value for value in row["differences"]]
            axes.plot(dots, [y + 0.25] * len(dots), ".", color=AXIS, markersize=4)
            axes.plot(100 * row["mean"], y, "o", color=colour)
            if row["low"] is not None:  # no interval where all seeds differ by the same
                axes.hlines(y, 100 * row["low"], 100 * row["high"], color=colour, linewidth=2)
            if (published := paper.get(row["claim"])) is not None:
                axes.plot(published, y, "D", color=INK, fillstyle="none")
        axes.set_yticks(
            range(len(rows)), [f"{row['claim']}\n{row['verdict'] or 'secondary'}" for row in rows], fontsize=8
        )
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_xlabel(
            "difference in points, 95 % interval; dots: seeds; diamond: the paper's, by the recipe",
            color=INK,
            fontsize=9,
        )
        axes.grid(axis="x", color=GRID)
