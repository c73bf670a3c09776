"""The teachers of a recipe beside each other: what they promise a student, and what came of it where it was tried.

One table, regression and picture for each of the recipe's student networks; a regression over all of them where there
are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..experiment import Cell, named
from ..tables import markdown_table, percent, without_empty_columns, write_csv, write_report
from .evaluation import Robustness
from .experiment import VisionExperiment
from .figures import scatter
from .methods import METHODS
from .recipe import as_plain
from .regression import PREDICTORS, PROPERTY_NAMES, Properties, Regression, TeacherRow, regress

METHOD = "bird"  # whose outcome the properties are to predict
BY = "usefulness_min"  # what tables are ordered by: the paper's strongest single predictor
# The paper's three predictors with the one or the other aggregation of usefulness, and with a fourth of our own.
MODELS = {
    "worst corruption": PREDICTORS,
    "mean corruption": (*PREDICTORS[:2], "usefulness_mean"),
    "worst corruption, and effective rank": (*PREDICTORS, "effective_rank"),
}
ALL = "all students"
# What the paper says of 432 pairs; of which data sets its ends are is not published.
PAPER = "Paper, 432 pairs: 73.6 to 85.5 % by all three, over 50 % by behavioural relevance alone."


@dataclass(frozen=True, kw_only=True)
class Tried(TeacherRow):
    """A candidate whose properties are known.

    Args:
        cell: teacher and student.
        untouched: the student's robust accuracy as it was, if that is known.
        student_probe_accuracy: of the student's own features.
    """

    cell: Cell
    untouched: float | None
    student_probe_accuracy: float


def _tried(experiment: VisionExperiment, cell: Cell, seeded: bool) -> Tried | None:
    """What is known of a candidate; None without properties. Where there are ``seeded`` ones names say the seed."""
    result = cell.scores["properties"].result(experiment.root)
    if result is None:
        return None
    about = {"networks": [cell.networks], "variants": [cell.variant]}
    score = {
        transfer.method: _robust(experiment, transfer.scores["score"].result(experiment.root))
        for transfer in experiment.cells(**about, methods=["none", METHOD], seeds=cell.seed + 1)
        if transfer.seed == cell.seed
    }
    return Tried(
        named(cell.networks, cell.variant, f"seed {cell.seed}" if seeded else ""),
        Properties(**result["properties"]),
        score.get(METHOD),
        _kind(experiment, cell.variant),
        cell=cell,
        untouched=score.get("none"),
        student_probe_accuracy=result["student_probe_accuracy"],
    )


def _robust(experiment: VisionExperiment, score: Mapping[str, Any] | None) -> float | None:
    """The paper's robust accuracy, clean images pooled with the held-out corruptions."""
    if score is None:
        return None
    held_out = {name: score["corrupted"][name] for name in experiment.recipe.held_out}
    return Robustness(score["clean"], held_out).pooled


def _kind(experiment: VisionExperiment, variant: str) -> str:
    """What the teacher has seen, to tell points apart by."""
    recipe, change = experiment.recipe, experiment.recipe.variants[variant]
    source = change.teacher or recipe.teacher
    seen = recipe.corruptions if change.teacher_corruptions is None else change.teacher_corruptions
    classes = "" if source.classes is None else f" {source.classes[0]}-{source.classes[-1]}"
    return f"{source.data}{classes}, {len(seen)} corruptions"


def _regressions(found: Sequence[Tried]) -> dict[str, Regression | str]:
    """Of those that were tried, by the aggregation of usefulness; or why there is none. Empty if none was tried."""
    rows = [row for row in found if row.accuracy is not None]
    regressions: dict[str, Regression | str] = {}
    for name, predictors in MODELS.items() if rows else ():
        try:
            regressions[name] = regress(rows, predictors=predictors)
        except ValueError as error:
            regressions[name] = str(error)
    return regressions


def _untouched(found: Sequence[Tried]) -> list[float]:
    return [one.untouched for one in found if one.untouched is not None]


def _section(student: str, found: Sequence[Tried]) -> str:
    rows = sorted(found, key=lambda row: getattr(row.properties, BY), reverse=True)
    probe = fmean(one.student_probe_accuracy for one in found)
    about = f"A probe on the student's own features: {percent([probe])} %."
    if untouched := _untouched(found):
        about += f" Robust accuracy of the untouched student: {percent(untouched)} %."
    return f"## Teachers for {student}\n\n{about}\n\n{teachers_table(rows)}\n"


def _explained(title: str, regressions: Mapping[str, Regression | str]) -> str:
    parts = [f"### {title}: variance of the robust accuracy after {METHODS[METHOD].title} explained, in %\n"]
    for name, regression in regressions.items():
        text = f" not fitted: {regression}" if isinstance(regression, str) else f"\n\n{regression_table(regression)}"
        parts.append(f"Usefulness under the {name}:{text}\n")
    return "\n".join([*parts, f"{PAPER}\n"]) if regressions else ""


def teachers_table(rows: Sequence[TeacherRow]) -> str:
    """A Markdown table of teachers: shares in percent, usefulness in standard deviations, rank in directions.

    Robust accuracies after the transfer stand at the end where any is known.
    """
    cells = [["teacher", *PROPERTY_NAMES.values(), "accuracy after transfer"]]
    for row in rows:
        known = [
            f"{value:.2f}" if name.startswith(("usefulness", "effective")) else percent([value])
            for name, value in asdict(row.properties).items()
        ]
        cells.append([row.name, *known, "" if row.accuracy is None else percent([row.accuracy])])
    return markdown_table(without_empty_columns(cells))


def regression_table(regression: Regression) -> str:
    """A Markdown table of how much of the accuracies' variance is explained, in percent: each property, then all."""
    rows = [["property", "coefficient", "R² alone", "R² alone, left out"]]
    for name, coefficient in regression.coefficients.items():
        alone = regression.alone[name]
        rows.append([PROPERTY_NAMES[name], f"{coefficient:+.2f}", percent([alone.r2]), percent([alone.r2_loo])])
    fit = regression.fit
    rows.append([f"all, {regression.n} rows", "", percent([fit.r2]), percent([fit.r2_loo])])
    return markdown_table(rows)


def write_teachers(experiment: VisionExperiment, candidates: Sequence[Cell], folder: Path) -> str:
    """Write ``README.md``, ``teachers.csv``, ``results.json`` and a picture for each student; returns the page.

    The page has for each student network its teachers, the most promising first, and what explains the outcomes.

    Raises:
        ValueError: no properties are known.
    """
    recipe, seeded = experiment.recipe, any(cell.seed for cell in candidates)
    found = [one for cell in candidates if (one := _tried(experiment, cell, seeded))]
    if not found:
        raise ValueError(f"no teacher of {recipe.name} was measured in {experiment.root}: bird select it first")
    students: dict[str, list[Tried]] = {}
    for one in found:
        students.setdefault(recipe.networks[one.cell.networks].student, []).append(one)
    explained = {name: _regressions(own) for name, own in (students | {ALL: found}).items()}
    parts = [f"# {recipe.title}\n"]
    for student, own in students.items():
        parts += [_section(student, own), _explained(student, explained[student])]
    if len(students) > 1:
        parts.append(_explained(ALL, explained[ALL]))
    text = "\n".join(filter(None, parts))
    numbers = {
        name: {kind: r if isinstance(r, str) else asdict(r) for kind, r in of.items()} for name, of in explained.items()
    }
    write_report(folder, text, {"recipe": as_plain(recipe), "regressions": numbers})
    head = ["networks", "variant", "seed", *PROPERTY_NAMES, "robust_accuracy", "untouched"]
    write_csv(folder / "teachers.csv", [head, *map(_cells, found)])
    for student, own in students.items():
        regression = explained[student].get("worst corruption")
        scatter(
            own,
            folder / f"{student}.png",
            title=f"Teachers for {student}",
            baseline=fmean(_untouched(own)) if _untouched(own) else None,
            regression=None if isinstance(regression, str) else regression,
        )
    return text


def _cells(one: Tried) -> list[Any]:
    about = one.cell.networks, one.cell.variant, one.cell.seed
    return [*about, *asdict(one.properties).values(), one.accuracy, one.untouched]
