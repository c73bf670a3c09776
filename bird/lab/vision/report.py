"""What a recipe has come to, beside what the paper reports: a page, a table of every accuracy, JSON, and pictures.

Robust accuracy is the paper's: the held-out corruptions at severities 1 to 5 and the clean images, as severity 0.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ...files import atomic, write_json
from ..statistics import difference
from ..tables import markdown, origin, percent
from . import figures
from .checkpoints import History
from .comparison import Comparison, Outcome
from .evaluation import Robustness
from .experiment import Cell, Experiment
from .methods import METHODS
from .recipe import Networks, Recipe

Group = tuple[str, str]  # networks, variant


def collect(experiment: Experiment, cells: Sequence[Cell]) -> tuple[dict[Group, Comparison], list[Cell]]:
    """The comparison of each pair of networks and variant, of seeds that all its methods have; and what is missing.

    Those with no whole seed are left out.
    """
    done: dict[Group, dict[int, list[Outcome]]] = {}
    wanted: dict[Group, set[str]] = {}
    missing = []
    for cell in cells:
        group = cell.networks, cell.variant
        wanted.setdefault(group, set()).add(METHODS[cell.method].title)
        outcome = _outcome(experiment, cell)
        if outcome is None:
            missing.append(cell)
        else:
            done.setdefault(group, {}).setdefault(cell.seed, []).append(outcome)
    comparisons = {}
    for group, seeds in done.items():
        whole = [outcome for outcomes in seeds.values() if len(outcomes) == len(wanted[group]) for outcome in outcomes]
        if whole:
            comparisons[group] = Comparison(whole, METHODS["none"].title, METHODS["ceiling"].title)
    return comparisons, missing


def _outcome(experiment: Experiment, cell: Cell) -> Outcome | None:
    root, held_out = experiment.root, experiment.recipe.held_out
    score, aligned, training = (stage.result(root) for stage in (cell.score, cell.alignment, cell.training))
    if score is None or aligned is None or training is None:
        return None
    accuracies = score["corrupted"]
    return Outcome(
        method=METHODS[cell.method].title,
        seed=cell.seed,
        held_out=Robustness(score["clean"], {name: accuracies[name] for name in held_out}),
        seen=Robustness(score["clean"], {n: a for n, a in accuracies.items() if n in experiment.recipe.corruptions}),
        cka=aligned["cka"],
        history=_joined(training["histories"]),
    )


def _joined(phases: Sequence[Mapping[str, Any]]) -> History:
    """The histories of a method's phases as one, the steps counted on."""
    history = History()
    for phase in phases:
        before = history.train[-1]["step"] if history.train else 0
        history.train += [row | {"step": before + row["step"]} for row in phase["train"]]
        history.validation += [row | {"step": before + row["step"]} for row in phase["validation"]]
    return history


def page(experiment: Experiment, cells: Sequence[Cell]) -> str:
    """Markdown: a section for each pair of networks and variant.

    Raises:
        ValueError: nothing is done yet.
    """
    recipe, root = experiment.recipe, experiment.root
    comparisons, missing = collect(experiment, cells)
    if not comparisons:
        done = f"{len(cells) - len(missing)} of {len(cells)} cells of {recipe.name} are done in {root}"
        raise ValueError(f"{done}, and no seed of all methods: bird run it, or choose --method")
    parts = [f"# {recipe.title}\n"]
    for (networks, variant), comparison in comparisons.items():
        pair = recipe.networks[networks]
        parts.append(f"## {', '.join(filter(None, (networks, variant)))}\n")
        seeds = len(comparison.seeds)
        parts.append(
            f"{pair.teacher} on {recipe.teacher.data} teaches {pair.student} on {recipe.student.data}; {seeds} "
            f"seed{'s' if seeds > 1 else ''}, accuracies in %, mean ± standard deviation.\n"
        )
        parts.append(_table(recipe, pair, comparison))
        parts.append(_differences(comparison))
        parts.append(_costs([cell for cell in cells if (cell.networks, cell.variant) == (networks, variant)], root))
    if recipe.paper_pgr:
        told = ", ".join(f"{METHODS[name].title} {share:.1f} %" for name, share in recipe.paper_pgr.items())
        parts.append(f"Gap recovered in the paper, which does not say by which networks: {told}.\n")
    if missing:
        parts.append(f"{len(missing)} cells are not done, the first: {_label(missing[0])}.\n")
    return "\n".join(parts)


def _label(cell: Cell) -> str:
    return ", ".join(filter(None, (cell.networks, cell.variant, METHODS[cell.method].title, f"seed {cell.seed}")))


def _table(recipe: Recipe, pair: Networks, comparison: Comparison) -> str:
    titles = {method.title: name for name, method in METHODS.items()}
    shares = pair.paper_pgr
    head = [
        "method", "robust (paper)", "robust", "clean", "held-out corruptions", "teacher's corruptions",
        "all corruptions", "gap recovered (paper)", "gap recovered", "CKA to teacher",
    ]  # fmt: skip
    rows = [head]
    told = comparison.contenders if comparison.gap else []
    for title in comparison.methods:
        outcomes, name = comparison.of(title), titles[title]
        rows.append(
            [
                title,
                f"{pair.paper[name]:.2f}" if name in pair.paper else "",
                percent([o.held_out.pooled for o in outcomes]),
                percent([o.held_out.clean for o in outcomes]),
                percent([o.held_out.robust for o in outcomes]),
                percent([o.seen.robust for o in outcomes]),
                percent([o.all_corruptions for o in outcomes]),
                f"{shares[name]:.1f}" if name in shares else "",
                percent(comparison.recovered(title, pooled=True)) if title in told else "",
                f"{fmean(o.cka for o in outcomes):.2f}",
            ]
        )
    return markdown(rows) + "\n"


def _differences(comparison: Comparison) -> str:
    """Every form of BIRD against every other method: a paired t-test over the seeds."""
    ours = [title for title in comparison.methods if title.startswith("BIRD")]
    others = [title for title in comparison.contenders if title not in ours]
    if not ours or not others or len(comparison.seeds) < 2:
        return ""
    rows = [["robust accuracy", *(f"minus {other}" for other in others)]]
    for title in ours:
        cells = []
        for other in others:
            pairs = zip(comparison.of(title), comparison.of(other), strict=True)
            cells.append(difference([a.held_out.pooled - b.held_out.pooled for a, b in pairs]))
        rows.append([title, *cells])
    return markdown(rows) + "\n\nPoints, and p of a paired t-test, two-sided, uncorrected.\n"


def _costs(cells: Sequence[Cell], root: Path) -> str:
    """How fast methods train, and what guidance costs of a step, timed after the training: medians over the seeds."""
    rows = [["method", "steps per second", "teacher's forward, % of a step", "loss, %"]]
    for method in dict.fromkeys(cell.method for cell in cells):
        costs = [cost for cell in cells if cell.method == method and (cost := _cost(cell, root))]
        if costs:
            times = [cost["times"] for cost in costs if cost["times"]]
            parts = [[t[part] / t["step"] for t in times] for part in ("teacher", "loss")]
            shares = [f"{100 * median(part):.1f}" if part else "" for part in parts]
            speed = median(cost["steps_per_second"] for cost in costs)
            rows.append([METHODS[method].title, f"{speed:.0f}", *shares])
    return markdown(rows) + "\n" if len(rows) > 1 else ""


def _cost(cell: Cell, root: Path) -> dict[str, Any] | None:
    """Steps per second, and seconds of a guided step and of its parts; None where nothing was trained."""
    result = cell.training.result(root)
    if cell.method == "none" or result is None:
        return None
    speeds = [speed for speed in result["steps_per_second"] if speed]
    return {"steps_per_second": fmean(speeds), "times": result.get("times")} if speeds else None


def write(experiment: Experiment, cells: Sequence[Cell], folder: Path) -> str:
    """Write ``README.md``, ``results.json``, ``accuracies.csv`` and pictures, each atomically; returns the page.

    Raises:
        ValueError: nothing is done yet.
    """
    text = page(experiment, cells)
    comparisons, _ = collect(experiment, cells)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")
    costs = [
        {"networks": cell.networks, "variant": cell.variant, "method": cell.method, "seed": cell.seed} | cost
        for cell in cells
        if (cost := _cost(cell, experiment.root))
    ]
    about = {"recipe": asdict(experiment.recipe), "origin": origin()}
    write_json(about | {"cells": list(_numbers(comparisons)), "costs": costs}, folder / "results.json")
    with atomic(folder / "accuracies.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["networks", "variant", "method", "seed", "corruption", "severity", "accuracy"])
        for cell in cells:
            score = cell.score.result(experiment.root)
            if score is not None:
                key = cell.networks, cell.variant, cell.method, cell.seed
                writer.writerow([*key, "none", 0, score["clean"]])
                for name, accuracies in score["corrupted"].items():
                    writer.writerows([*key, name, s, a] for s, a in enumerate(accuracies, start=1))
    _draw(experiment.recipe, comparisons, folder)
    return text


def _draw(recipe: Recipe, comparisons: Mapping[Group, Comparison], folder: Path) -> None:
    labels = {group: ", ".join(filter(None, group)) for group in comparisons}
    groups = {labels[group]: comparison for group, comparison in comparisons.items() if comparison.gap}
    shares = {
        labels[group]: {METHODS[m].title: share for m, share in recipe.networks[group[0]].paper_pgr.items()}
        for group in comparisons
    }
    if groups:
        figures.recovered(groups, folder / "recovered.png", title=f"{recipe.title}: gap recovered", paper=shares)
    for group, comparison in comparisons.items():
        name, title = "-".join(filter(None, group)).replace(" ", "-"), f"{recipe.title} ({labels[group]})"
        figures.heat_map(comparison, folder / f"{name}-corruptions.png", title=title)
        if comparison.methods != [comparison.baseline]:  # which was not trained on
            figures.curves(comparison, folder / f"{name}-training.png", title=title)


def _numbers(comparisons: Mapping[Group, Comparison]) -> list[dict[str, Any]]:
    """A row a cell, accuracies as shares of 1."""
    rows = []
    for (networks, variant), comparison in comparisons.items():
        for title in comparison.methods:
            for outcome, recovered in zip(comparison.of(title), comparison.recovered(title, pooled=True), strict=True):
                rows.append(
                    {
                        "networks": networks,
                        "variant": variant,
                        "method": title,
                        "seed": outcome.seed,
                        "clean": outcome.held_out.clean,
                        "held_out": outcome.held_out.robust,
                        "pooled": outcome.held_out.pooled,
                        "seen": outcome.seen.robust,
                        "gap_recovered": None if math.isnan(recovered) else recovered,
                        "cka": outcome.cka,
                    }
                )
    return rows
