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
from ..tables import percent, write_csv, write_report
from .comparison import regression_table, teachers_table
from .evaluation import Robustness
from .experiment import VisionExperiment
from .figures import scatter
from .methods import METHODS
from .recipe import as_plain
from .regression import PREDICTORS, Properties, Regression, TeacherRow, regress

METHOD = "bird"  # whose outcome the properties are to predict
BY = "usefulness_min"  # what tables are ordered by: the paper's strongest single predictor
# The three predictors with the one or the other aggregation of usefulness.
MODELS = {"worst corruption": PREDICTORS, "mean corruption": (*PREDICTORS[:2], "usefulness_mean")}
# What the paper says of 432 pairs; of which data sets its ends are is not published.
PAPER = "Paper, 432 pairs: 73.6 to 85.5 % by all three, over 50 % by behavioural relevance alone."


@dataclass(frozen=True)
class Tried:
    """A candidate whose properties are known.

    Args:
        candidate: teacher and student.
        row: its properties, and the student's robust accuracy after the transfer, if that is done.
        untouched: the student's robust accuracy as it was, if that is known.
        student_probe_accuracy: of the student's own features.
    """

    candidate: Cell
    row: TeacherRow
    untouched: float | None
    student_probe_accuracy: float


def tried_teachers(experiment: VisionExperiment, candidates: Sequence[Cell]) -> list[Tried]:
    """What is known of the candidates; those without properties are left out."""
    found = []
    for candidate in candidates:
        result = candidate.scores["properties"].result(experiment.root)
        if result is None:
            continue
        about = {"networks": [candidate.networks], "variants": [candidate.variant]}
        score = {
            cell.method: _robust(experiment, cell.scores["score"].result(experiment.root))
            for cell in experiment.cells(**about, methods=["none", METHOD], seeds=candidate.seed + 1)
            if cell.seed == candidate.seed
        }
        seed = f"seed {candidate.seed}" if any(c.seed for c in candidates) else ""
        name = named(candidate.networks, candidate.variant, seed)
        row = TeacherRow(name, Properties(**result["properties"]), score.get(METHOD))
        found.append(Tried(candidate, row, score.get("none"), result["student_probe_accuracy"]))
    return found


def _robust(experiment: VisionExperiment, score: Mapping[str, Any] | None) -> float | None:
    """The paper's robust accuracy, clean images pooled with the held-out corruptions."""
    if score is None:
        return None
    held_out = {name: score["corrupted"][name] for name in experiment.recipe.held_out}
    return Robustness(score["clean"], held_out).pooled


def _of_students(experiment: VisionExperiment, found: Sequence[Tried]) -> dict[str, list[Tried]]:
    """By student network."""
    groups: dict[str, list[Tried]] = {}
    for one in found:
        groups.setdefault(experiment.recipe.networks[one.candidate.networks].student, []).append(one)
    return groups


def _regressions(found: Sequence[Tried]) -> dict[str, Regression | str]:
    """Of those that were tried, by the aggregation of usefulness; or why there is none. Empty if none was tried."""
    rows = [one.row for one in found if one.row.accuracy is not None]
    regressions: dict[str, Regression | str] = {}
    for name, predictors in MODELS.items() if rows else ():
        try:
            regressions[name] = regress(rows, predictors=predictors)
        except ValueError as error:
            regressions[name] = str(error)
    return regressions


def _section(title: str, found: Sequence[Tried]) -> str:
    rows = sorted((one.row for one in found), key=lambda row: getattr(row.properties, BY), reverse=True)
    probe = fmean(one.student_probe_accuracy for one in found)
    about = f"A probe on the student's own features: {percent([probe])} %."
    if untouched := [one.untouched for one in found if one.untouched is not None]:
        about += f" Robust accuracy of the untouched student: {percent(untouched)} %."
    return f"## {title}\n\n{about}\n\n{teachers_table(rows)}\n"


def _explained(title: str, found: Sequence[Tried]) -> str:
    parts = [f"### {title}: variance of the robust accuracy after {METHODS[METHOD].title} explained, in %\n"]
    regressions = _regressions(found)
    for name, regression in regressions.items():
        text = f" not fitted: {regression}" if isinstance(regression, str) else f"\n\n{regression_table(regression)}"
        parts.append(f"Usefulness under the {name}:{text}\n")
    return "\n".join([*parts, f"{PAPER}\n"]) if regressions else ""


def teachers_page(experiment: VisionExperiment, found: Sequence[Tried]) -> str:
    """Markdown: for each student network its teachers, the most promising first, and what explains the outcomes.

    Raises:
        ValueError: no properties are known.
    """
    if not found:
        raise ValueError(
            f"no teacher of {experiment.recipe.name} was measured in {experiment.root}: bird select it first"
        )
    parts = [f"# {experiment.recipe.title}\n"]
    students = _of_students(experiment, found)
    for student, own in students.items():
        parts += [_section(f"Teachers for {student}", own), _explained(student, own)]
    if len(students) > 1:
        parts.append(_explained("all students", found))
    return "\n".join(filter(None, parts))


def write_teachers(experiment: VisionExperiment, candidates: Sequence[Cell], folder: Path) -> str:
    """Write ``README.md``, ``teachers.csv``, ``results.json`` and a picture for each student; returns the page.

    Raises:
        ValueError: no properties are known.
    """
    found = tried_teachers(experiment, candidates)
    text = teachers_page(experiment, found)
    students = _of_students(experiment, found)
    explained = {name: _regressions(own) for name, own in students.items()} | {"all students": _regressions(found)}
    numbers = {
        name: {kind: r if isinstance(r, str) else asdict(r) for kind, r in of.items()} for name, of in explained.items()
    }
    write_report(folder, text, {"recipe": as_plain(experiment.recipe), "regressions": numbers})
    head = ["networks", "variant", "seed", *Properties.__dataclass_fields__, "robust_accuracy", "untouched"]
    write_csv(folder / "teachers.csv", [head, *map(_cells, found)])
    for student, own in students.items():
        untouched = [one.untouched for one in own if one.untouched is not None]
        regression = explained[student].get("worst corruption")
        scatter(
            [one.row for one in own],
            folder / f"{student}.png",
            title=f"Teachers for {student}",
            baseline=fmean(untouched) if untouched else None,
            regression=None if isinstance(regression, str) else regression,
            kinds=[_kind(experiment, one.candidate) for one in own],
        )
    return text


def _cells(one: Tried) -> list[Any]:
    about = one.candidate.networks, one.candidate.variant, one.candidate.seed
    return [*about, *asdict(one.row.properties).values(), one.row.accuracy, one.untouched]


def _kind(experiment: VisionExperiment, candidate: Cell) -> str:
    """What the teacher has seen, to tell points apart by."""
    recipe, change = experiment.recipe, experiment.recipe.variants[candidate.variant]
    source = change.teacher or recipe.teacher
    seen = recipe.corruptions if change.teacher_corruptions is None else change.teacher_corruptions
    classes = "" if source.classes is None else f" {source.classes[0]}-{source.classes[-1]}"
    return f"{source.data}{classes}, {len(seen)} corruptions"
