"""What a recipe has come to, beside what the paper reports: a page, a table of every accuracy, JSON, and pictures.

Robust accuracy is the paper's: the held-out corruptions at severities 1 to 5 and the clean images, as severity 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..claims import claims_section, json_rows, judge
from ..experiment import Cell, Group, Results, collect, named, repetitions, report_page
from ..figures import claims as draw_claims
from ..statistics import difference
from ..tables import markdown_table, percent, report_origin, second_half, without_empty_columns, write_csv, write_report
from . import figures
from .checkpoints import History
from .comparison import BASELINE, Comparison, Outcome
from .evaluation import Robustness
from .experiment import VisionExperiment
from .methods import METHODS
from .recipe import Networks, VisionRecipe, as_plain

LEGEND = (
    "*Robust* is the paper's figure: the held-out corruptions at severities 1 to 5, and the clean images as one more.\n"
    "*Gap recovered* is where a method lies between None, the student as it was, and Ceiling, a student trained under\n"
    "the teacher's corruptions. *Continued* trains on by itself, *alpha* at the weight that BIRD gives its task.\n"
)
MEASURED = "task_grad", "guide_grad", "guide_beta"  # of the guidance in training, see `bird.BirdLoss`


def comparisons(experiment: VisionExperiment, groups: Mapping[Group, Results]) -> dict[Group, Comparison]:
    """Of what `bird.lab.experiment.collect` has found."""
    return {
        group: Comparison(
            [
                _outcome(experiment.recipe, method, seed, found)
                for method, of in results.items()
                for seed, found in of.items()
            ]
        )
        for group, results in groups.items()
    }


def _outcome(recipe: VisionRecipe, method: str, seed: int, results: Mapping[str, dict[str, Any]]) -> Outcome:
    clean, accuracies = results["score"]["clean"], results["score"]["corrupted"]
    return Outcome(
        method=METHODS[method].title,
        seed=seed,
        held_out=Robustness(clean, {name: accuracies[name] for name in recipe.held_out}),
        seen=Robustness(clean, {name: of for name, of in accuracies.items() if name in recipe.corruptions}),
        cka=results["alignment"]["cka"],
        history=_one_after_another(results["training"]["histories"]),
    )


def _one_after_another(phases: Sequence[Mapping[str, Any]]) -> History:
    """The histories of a method's phases as one, the steps counted on."""
    history = History()
    for phase in phases:
        before = history.train[-1]["step"] if history.train else 0
        history.train += [row | {"step": before + row["step"]} for row in phase["train"]]
        history.validation += [row | {"step": before + row["step"]} for row in phase["validation"]]
    return history


def _confounded(pair: Networks, comparison: Comparison) -> str:
    """Which methods are another network than the others, where teacher and student are two."""
    theirs = [m.title for m in METHODS.values() if m.start == "teacher" and m.title in comparison.methods]
    if pair.teacher == pair.student or not theirs:
        return ""
    listed = ", ".join(theirs)
    return f"\nAnother network than the others, {pair.teacher}, because they start from the teacher: {listed}.\n"


def _table(pair: Networks, comparison: Comparison) -> str:
    titles = {method.title: name for name, method in METHODS.items()}
    told = comparison.contenders if comparison.gap else []
    rows = [
        [
            "method", "robust (paper)", "robust", "clean", "held-out corruptions", "teacher's corruptions",
            "all corruptions", "gap recovered (paper)", "gap recovered", "CKA to teacher",
        ]
    ]  # fmt: skip
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
                percent([Robustness(o.held_out.clean, o.corrupted).robust for o in outcomes]),
                f"{pair.paper_pgr[name]:.1f}" if name in pair.paper_pgr else "",
                percent(comparison.recovered(title)) if title in told else "",
                f"{fmean(o.cka for o in outcomes):.2f}",
            ]
        )
    return markdown_table(without_empty_columns(rows)) + "\n"


def _differences(comparison: Comparison) -> str:
    """Every form of BIRD against every other method: a paired t-test over the seeds."""
    ours = [title for title in comparison.methods if title.startswith("BIRD")]
    others = [title for title in comparison.contenders if title not in ours]
    if not ours or not others or len(comparison.of(ours[0])) < 2:
        return ""
    rows = [["robust accuracy", *(f"minus {other}" for other in others)]]
    for title in ours:
        robust = [[o.held_out.pooled for o in comparison.of(method)] for method in (title, *others)]
        rows.append(
            [title, *(difference([a - b for a, b in zip(robust[0], theirs, strict=True)]) for theirs in robust[1:])]
        )
    return markdown_table(rows) + "\n\nPoints, and p of a paired t-test, two-sided, uncorrected.\n"


def measured(comparison: Comparison, title: str, name: str) -> dict[int, float]:
    """By seed, what claims compare: "robust" (as published, with clean images), "clean", "net" (robust accuracy plus
    clean accuracy: of a difference, what is left of a gain when the clean price is taken off), "all" (every corruption
    that was scored, without clean images), or the mean over the severities of the corruption of that name."""
    found = {}
    for outcome in comparison.of(title):
        every = Robustness(outcome.held_out.clean, outcome.corrupted)
        known = {"robust": outcome.held_out.pooled, "clean": every.clean, "all": every.robust}
        known["net"] = known["robust"] + known["clean"]
        found[outcome.seed] = known[name] if name in known else fmean(outcome.corrupted[name])
    return found


def _claims(recipe: VisionRecipe, found: Mapping[Group, Comparison]) -> tuple[list[str], list[dict[str, Any]]]:
    """The section of a page, and rows of JSON, for every pair of networks."""
    sections, rows = list[str](), list[dict[str, Any]]()
    for networks in recipe.networks:

        def measure(method: str, variant: str, name: str, networks: str = networks) -> dict[int, float] | None:
            comparison = found.get((networks, variant))
            return measured(comparison, METHODS[method].title, name) or None if comparison else None

        judgements = judge(recipe.claims, measure, recipe.seeds) if recipe.claims else []
        sections += ([f"{networks}:\n"] if judgements and len(recipe.networks) > 1 else []) + claims_section(
            recipe.claims, judgements
        )
        rows += [{"networks": networks} | row for row in json_rows(judgements)]
    return sections, rows


def _costs(experiment: VisionExperiment, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Of every cell that was trained: steps per second, and seconds of a guided step and of its parts."""
    rows = []
    for cell in cells:
        result = cell.training.result(experiment.root) if cell.training is not None and cell.method != "none" else None
        speeds = [speed for speed in (result or {}).get("steps_per_second", ()) if speed]
        if result is not None and speeds:
            rows.append(_key(cell) | {"steps_per_second": fmean(speeds), "times": result.get("times")})
    return rows


def _costs_table(costs: Sequence[Mapping[str, Any]]) -> str:
    """How fast methods train, and what guidance costs of a step, timed after the training: medians over the seeds."""
    rows = [["method", "steps per second", "teacher's forward, % of a step", "loss, %"]]
    for method in dict.fromkeys(cost["method"] for cost in costs):
        own = [cost for cost in costs if cost["method"] == method]
        times = [cost["times"] for cost in own if cost["times"]]
        parts = [[t[part] / t["step"] for t in times] for part in ("teacher", "loss")]
        shares = [f"{100 * median(part):.1f}" if part else "" for part in parts]
        rows.append([METHODS[method].title, f"{median(cost['steps_per_second'] for cost in own):.0f}", *shares])
    return markdown_table(without_empty_columns(rows)) + "\n" if costs else ""


def _key(cell: Cell) -> dict[str, Any]:
    return {"networks": cell.networks, "variant": cell.variant, "method": cell.method, "seed": cell.seed}


def write_vision_report(experiment: VisionExperiment, cells: Sequence[Cell], folder: Path) -> str:
    """Write ``README.md``, ``results.json``, ``accuracies.csv`` and pictures, each atomically; returns the page.

    Raises:
        ValueError: nothing is done yet.
    """
    recipe = experiment.recipe
    groups, missing = collect(experiment, cells)
    found, costs = comparisons(experiment, groups), _costs(experiment, cells)
    sections = {}
    for group, comparison in found.items():
        pair = recipe.networks[group[0]]
        sections[group] = [
            f"{pair.teacher} on {recipe.teacher.data} teaches {pair.student} on {recipe.student.data}; "
            f"{repetitions(groups[group])}, accuracies in %"
            + (", mean ± standard deviation.\n" if len(comparison.outcomes) > len(comparison.methods) else ".\n")
            + _confounded(pair, comparison),
            _table(pair, comparison),
            _differences(comparison),
            _costs_table([cost for cost in costs if (cost["networks"], cost["variant"]) == group]),
        ]
    told = ", ".join(f"{METHODS[name].title} {share:.1f} %" for name, share in recipe.paper_pgr.items())
    closing = [f"Gap recovered in the paper, which does not say by which networks: {told}.\n"] if told else []
    judged, claims = _claims(recipe, found)
    text = report_page(recipe, sections, missing, closing=[*judged, *closing, LEGEND])
    about = {"recipe": as_plain(recipe), "origin": report_origin()}
    numbers = {"claims": claims} if claims else {}
    write_report(folder, text, about | numbers | {"cells": [*_numbers(found)], "costs": costs})
    write_csv(folder / "accuracies.csv", _accuracies(cells, experiment.root))
    if claims:
        paper = {name: claim.paper for name, claim in recipe.claims.items()}
        draw_claims(claims, paper, folder / "claims.png", title=recipe.title)
    _draw(recipe, found, folder)
    return text


def _accuracies(cells: Sequence[Cell], root: Path) -> Iterator[list[Any]]:
    """Every one there is, a row for each corruption and severity."""
    yield ["networks", "variant", "method", "seed", "corruption", "severity", "accuracy"]
    for cell in cells:
        score, key = cell.scores["score"].result(root), _key(cell).values()
        if score is not None:
            yield [*key, "none", 0, score["clean"]]
            for name, accuracies in score["corrupted"].items():
                yield from ([*key, name, s, a] for s, a in enumerate(accuracies, start=1))


def _draw(recipe: VisionRecipe, comparisons: Mapping[Group, Comparison], folder: Path) -> None:
    labels = {group: named(*group) for group in comparisons}
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
        if comparison.methods != [BASELINE]:  # which was not trained on
            figures.curves(comparison, folder / f"{name}-training.png", title=title)


def _numbers(comparisons: Mapping[Group, Comparison]) -> Iterator[dict[str, Any]]:
    """A row a cell, accuracies as shares of 1."""
    for (networks, variant), comparison in comparisons.items():
        for title in comparison.methods:
            for outcome, recovered in zip(comparison.of(title), comparison.recovered(title), strict=True):
                yield {
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
                } | ({"second_half": late} if (late := _guidance(outcome)) else {})


def _guidance(outcome: Outcome) -> dict[str, float]:
    """What was measured of the guidance in the second half of training; nothing where nothing was."""
    return {name: mean for name, mean in second_half(outcome.history.train).items() if name in MEASURED}
