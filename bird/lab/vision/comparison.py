"""What a comparison of methods or of teachers has shown: figures, tables, a JSON file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from ..statistics import pgr
from ..tables import markdown_table, percent
from .checkpoints import History
from .evaluation import Robustness
from .regression import Regression, TeacherRow


@dataclass(frozen=True)
class Outcome:
    """What one method came to with one seed.

    Args:
        method: its name in tables and pictures.
        seed: the seed.
        held_out: accuracy on clean images, and on corruptions that the teacher never saw.
        seen: the same for the teacher's own corruptions.
        cka: between the teacher's and the student's layer, over clean images, unbiased.
        history: of its training.
    """

    method: str
    seed: int
    held_out: Robustness
    seen: Robustness
    cka: float
    history: History

    @property
    def all_corruptions(self) -> float:
        """Mean accuracy over the held-out corruptions and the teacher's, each once."""
        accuracies = {**self.seen.corrupted, **self.held_out.corrupted}
        return fmean(fmean(severities) for severities in accuracies.values())


@dataclass(frozen=True)
class Comparison:
    """The outcomes of several methods, with the same seeds for each.

    Args:
        outcomes: in any order; methods are shown in the order of their first outcome.
        baseline: the method that has recovered nothing of the gap.
        ceiling: the method that has recovered all of it.
    """

    outcomes: Sequence[Outcome]
    baseline: str
    ceiling: str

    @property
    def methods(self) -> list[str]:
        """Their names, each once, in order."""
        return list(dict.fromkeys(outcome.method for outcome in self.outcomes))

    @property
    def contenders(self) -> list[str]:
        """The methods between baseline and ceiling."""
        return [method for method in self.methods if method not in (self.baseline, self.ceiling)]

    @property
    def seeds(self) -> list[int]:
        """Those of every method."""
        return [outcome.seed for outcome in self.of(self.methods[0])]

    @property
    def gap(self) -> bool:
        """Whether baseline and ceiling are among the methods: without them no share of a gap can be told."""
        return {self.baseline, self.ceiling} <= {*self.methods}

    def of(self, method: str) -> list[Outcome]:
        """The outcomes of a method, seed by seed."""
        return [outcome for outcome in self.outcomes if outcome.method == method]

    def recovered(self, method: str) -> list[float]:
        """Share of the gap in pooled accuracy that a method recovers, seed by seed; NaN where there is none."""
        if not self.gap:
            return [math.nan] * len(self.seeds)
        three = zip(self.of(method), self.of(self.baseline), self.of(self.ceiling), strict=True)
        return [pgr(*(outcome.held_out.pooled for outcome in outcomes)) for outcomes in three]


PROPERTY_NAMES = {
    "probe_accuracy": "probe accuracy",
    "complementary_knowledge": "complementary knowledge",
    "usefulness_min": "usefulness, worst corruption",
    "usefulness_mean": "usefulness, mean corruption",
}


def teachers_table(rows: Sequence[TeacherRow]) -> str:
    """A Markdown table of teachers: shares in percent, usefulness in standard deviations.

    Robust accuracies after the transfer stand at the end where any is known.
    """
    columns: dict[str, Callable[[TeacherRow], str]] = {"teacher": lambda row: row.name}
    for name, title in PROPERTY_NAMES.items():
        columns[title] = partial(_property, name)
    if any(row.accuracy is not None for row in rows):
        columns["accuracy after transfer"] = lambda row: "" if row.accuracy is None else percent([row.accuracy])
    return markdown_table([list(columns), *([cell(row) for cell in columns.values()] for row in rows)])


def _property(name: str, row: TeacherRow) -> str:
    value: float = getattr(row.properties, name)
    return f"{value:.2f}" if name.startswith("usefulness") else percent([value])


def regression_table(regression: Regression) -> str:
    """A Markdown table of how much of the accuracies' variance is explained, in percent: each property, then all."""
    rows = [["property", "coefficient", "R² alone", "R² alone, left out"]]
    for name, coefficient in regression.coefficients.items():
        alone = regression.alone[name]
        rows.append([PROPERTY_NAMES[name], f"{coefficient:+.2f}", percent([alone.r2]), percent([alone.r2_loo])])
    fit = regression.fit
    rows.append([f"all, {regression.n} rows", "", percent([fit.r2]), percent([fit.r2_loo])])
    return markdown_table(rows)
