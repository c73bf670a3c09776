"""Pictures: of a comparison (accuracy per corruption and method, training curves, CKA before and after), and of
teachers (what their features promise, against what came of it)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ...files import atomic
from ..figures import BASELINE, GAP, GRID, INK, PALETTE
from ..tables import spread
from .comparison import PROPERTY_NAMES, Comparison, Outcome
from .selection import PREDICTORS, Regression, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def picture(comparison: Comparison, path: Path, *, title: str) -> None:
    """Draw ``comparison`` into the PNG ``path``, written atomically.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(13, 8.6, title)
    mosaic = figure.subplot_mosaic(
        [["corruptions"] * 4, ["severities", "task", "batch", "cka"]], height_ratios=(1.25, 1)
    )
    _draw_corruptions(mosaic["corruptions"], comparison)
    _draw_severities(mosaic["severities"], comparison)
    _draw_task_loss(mosaic["task"], comparison)
    _draw_batch_cka(mosaic["batch"], comparison)
    _draw_cka(mosaic["cka"], comparison)
    _finish(figure, path)


def scatter(
    rows: Sequence[Row],
    path: Path,
    *,
    title: str,
    baseline: float | None = None,
    regression: Regression | None = None,
    kinds: Sequence[str] | None = None,
) -> None:
    """Draw teachers into the PNG ``path``, written atomically, one panel for each of the three properties.

    Robust accuracy after the transfer against the property, for the teachers whose accuracy is known; where none is,
    the properties alone, as bars.

    Args:
        rows: at least one.
        path: the file.
        title: of the picture.
        baseline: the untouched student's robust accuracy, a share of 1, as a line.
        regression: of these rows: its R² go into the panels' titles.
        kinds: of each row: points are told apart by it, in a legend; None to write every row's name beside its point.

    Raises:
        ValueError: no rows.
        ImportError: matplotlib is missing.
    """
    if not rows:
        raise ValueError("there are no teachers to draw")
    tried = [row for row in rows if row.accuracy is not None]
    marked = None if kinds is None else {row.name: kind for row, kind in zip(rows, kinds, strict=True)}
    figure = _figure(13, 4.4 if tried else 1.6 + 0.35 * len(rows), title)
    for axes, name in zip(figure.subplots(1, len(PREDICTORS), sharey=True), PREDICTORS, strict=True):
        if tried:
            _draw_promise(axes, name, tried, baseline, marked)
        else:
            _draw_property(axes, name, rows)
        axes.locator_params(axis="x", nbins=5)
        if regression is not None and name in regression.alone:
            alone = regression.alone[name]
            text = f"R² alone {alone.r2:.2f}, left out {alone.r2_loo:.2f}"
            axes.set_title(f"{axes.get_title(loc='left')}\n{text}", fontsize=10.5, color=INK, loc="left")
    if tried:
        figure.axes[0].set_ylabel("robust accuracy after transfer, %", color=INK)
        if marked is not None:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _finish(figure, path)


def _draw_promise(
    axes: Axes, name: str, rows: Sequence[Row], baseline: float | None, kinds: Mapping[str, str] | None
) -> None:
    points = {row.name: (getattr(row.properties, name), 100 * row.accuracy) for row in rows if row.accuracy is not None}
    if kinds is None:
        axes.plot(*zip(*points.values(), strict=True), "o", color=PALETTE[0], markersize=7)
        for label, point in points.items():
            axes.annotate(label, point, (0, 7), textcoords="offset points", ha="center", fontsize=8, color=INK)
    else:
        for number, kind in enumerate(dict.fromkeys(kinds.values())):
            of = [point for label, point in points.items() if kinds[label] == kind]
            marker, colour = "osD^v"[number // len(PALETTE) % 5], PALETTE[number % len(PALETTE)]
            axes.plot(*zip(*of, strict=True), marker, color=colour, markersize=7, label=kind)
    if baseline is not None:
        axes.axhline(100 * baseline, color=BASELINE, linewidth=1.6, linestyle="--", zorder=0)
    axes.margins(0.15)
    _label(axes, PROPERTY_NAMES[name], "")
    axes.grid(color=GRID)


def _draw_property(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    """Bars, the first teacher on top."""
    axes.barh(range(len(rows)), [getattr(row.properties, name) for row in rows], color=PALETTE[0], height=0.6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _label(axes, PROPERTY_NAMES[name], "")
    axes.grid(axis="x", color=GRID)
    axes.grid(visible=False, axis="y")


def _figure(width: float, height: float, title: str) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, x=0.012, ha="left")
    return figure


def _finish(figure: Figure, path: Path) -> None:
    """The house's look, and the file."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(BASELINE)
        axes.tick_params(colors=INK, length=0)
        axes.set_axisbelow(True)
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def _colours(comparison: Comparison) -> dict[str, str]:
    contenders = dict(zip(comparison.contenders, PALETTE, strict=False))
    return {comparison.baseline: BASELINE} | contenders | {comparison.ceiling: INK}


def _label(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.set_xlabel(x, color=INK)
    axes.grid(axis="y", color=GRID)


def _points(comparison: Comparison, method: str, of: Callable[[Outcome], float]) -> tuple[float, float]:
    """Mean and spread over the seeds."""
    values = [of(outcome) for outcome in comparison.of(method)]
    return fmean(values), spread(values)


def _draw_corruptions(axes: Axes, comparison: Comparison) -> None:
    """For each corruption, the gap between the untouched student and the ceiling, and the methods in it."""
    first, colours = comparison.outcomes[0], _colours(comparison)
    held_out, own = list(first.held_out.corrupted), list(first.seen.corrupted)
    groups: list[tuple[str, float, Callable[[Outcome], float]]] = [
        ("clean", 0.0, lambda o: 100 * o.held_out.clean),
        *(
            (name, 1.5 + i, lambda o, name=name: 100 * fmean(o.held_out.corrupted[name]))
            for i, name in enumerate(held_out)
        ),
        ("mean of\nthese", 1.5 + len(held_out), lambda o: 100 * o.held_out.robust),
        *(
            (name, 3.0 + len(held_out) + i, lambda o, name=name: 100 * fmean(o.seen.corrupted[name]))
            for i, name in enumerate(own)
        ),
    ]
    lowest = 100.0
    for _, x, of in groups:
        (low, _), (high, _) = (_points(comparison, m, of) for m in (comparison.baseline, comparison.ceiling))
        lowest = min(lowest, low, high)
        axes.bar(x, high - low, 0.8, low, color=GAP, zorder=1)
        axes.hlines(high, x - 0.4, x + 0.4, color=INK, linewidth=2.2, zorder=2)
        axes.hlines(low, x - 0.4, x + 0.4, color=BASELINE, linewidth=2.2, zorder=2)
        for turn, method in enumerate(comparison.contenders):
            mean, deviation = _points(comparison, method, of)
            lowest = min(lowest, mean)
            at = x + 0.22 * (turn - (len(comparison.contenders) - 1) / 2)
            axes.errorbar(at, mean, deviation, fmt="o", color=colours[method], markersize=7, zorder=3)
    axes.set_xticks([x for _, x, _ in groups], [name.replace("_", "\n") for name, _, _ in groups])
    axes.set_xlim(-0.7, groups[-1][1] + 0.7)
    axes.set_ylim(max(0.0, lowest - 6), 101)
    axes.set_ylabel("test accuracy, %", color=INK)
    axes.grid(axis="y", color=GRID)
    for text, left, right in (
        ("corruptions that the teacher never saw, severities 1 to 5", 1.5, 1.5 + len(held_out)),
        ("the teacher's own corruptions, severity 3", 3.0 + len(held_out), groups[-1][1]),
    ):
        middle = (left + right) / 2
        axes.text(middle, 1.03, text, transform=axes.get_xaxis_transform(), ha="center", color=INK)
    ends = (comparison.ceiling, comparison.baseline)
    handles = [axes.plot([], [], color=colours[name], linewidth=2.2, label=name)[0] for name in ends]
    handles[1:1] = [
        axes.plot([], [], "o", color=colours[name], markersize=7, label=name)[0]
        for name in reversed(comparison.contenders)
    ]
    axes.legend(handles=handles, loc="lower left", frameon=False, labelcolor=INK)


def _draw_severities(axes: Axes, comparison: Comparison) -> None:
    """Held-out accuracy by severity; 0 is clean."""
    for method, colour in _colours(comparison).items():
        scores = [outcome.held_out for outcome in comparison.of(method)]
        by_severity = zip(*(values for score in scores for values in score.corrupted.values()), strict=True)
        means = [fmean(score.clean for score in scores), *map(fmean, by_severity)]
        axes.plot([100 * mean for mean in means], "o-", color=colour, markersize=4, linewidth=1.6)
    _label(axes, "held-out accuracy, %", "severity (0: clean)")


def _curve(comparison: Comparison, method: str, of: Callable[[dict[str, float]], float]) -> list[list[float]]:
    """Steps, and the mean over the seeds of a figure from the training reports."""
    reports = list(zip(*(outcome.history.train for outcome in comparison.of(method)), strict=True))
    return [[rows[0]["step"] for rows in reports], [fmean(map(of, rows)) for rows in reports]]


def _draw_task_loss(axes: Axes, comparison: Comparison) -> None:
    colours = _colours(comparison)
    for method in (*comparison.contenders, comparison.ceiling):
        curve = _curve(comparison, method, lambda row: row.get("task", row["loss"]))
        axes.plot(*curve, color=colours[method], linewidth=1.6)
    axes.set_yscale("log")
    _label(axes, "task loss in training", "step")


def _draw_batch_cka(axes: Axes, comparison: Comparison) -> None:
    """Only for the methods that train on it; the mean over the layer pairs."""
    colours = _colours(comparison)
    for method in comparison.contenders:
        terms = [t for t in comparison.of(method)[0].history.train[0] if t.startswith("cka/")]
        if terms:
            curve = _curve(comparison, method, partial(_mean_of, terms))
            axes.plot(*curve, color=colours[method], linewidth=1.6)
    _label(axes, "CKA of a batch in training", "step")


def _mean_of(terms: Sequence[str], row: dict[str, float]) -> float:
    return fmean(row[term] for term in terms)


def _draw_cka(axes: Axes, comparison: Comparison) -> None:
    """From the untouched student's CKA (dashed) to every method's."""
    colours = _colours(comparison)
    before, _ = _points(comparison, comparison.baseline, lambda o: o.cka)
    methods = [comparison.ceiling, *reversed(comparison.contenders)]
    for y, method in enumerate(methods):
        after, deviation = _points(comparison, method, lambda o: o.cka)
        axes.plot([before, after], [y, y], color=GAP, linewidth=6, solid_capstyle="butt", zorder=1)
        axes.errorbar(after, y, xerr=deviation, fmt="o", color=colours[method], markersize=8)
        label = axes.annotate(f"{after:.2f}", (after, y), (0, 9), textcoords="offset points", ha="center")
        label.set(color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.axvline(before, color=BASELINE, linewidth=1.6, linestyle="--", zorder=0)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.set_xlim(0, 1.05)
    _label(axes, f"CKA to the teacher, from {before:.2f} to", "unbiased, clean test images")
    axes.grid(visible=False)
