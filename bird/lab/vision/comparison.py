"""What methods have come to beside each other, and how much of the gap between two of them each recovers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..statistics import pgr
from .checkpoints import History
from .evaluation import Robustness
from .methods import METHODS

BASELINE, CEILING = METHODS["none"].title, METHODS["ceiling"].title  # have recovered nothing of the gap, and all of it


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
    def corrupted(self) -> dict[str, list[float]]:
        """By corruption, the teacher's and the held-out ones, each once: accuracies by severity."""
        return {**self.seen.corrupted, **self.held_out.corrupted}


@dataclass(frozen=True)
class Comparison:
    """The outcomes of several methods, with the same seeds for each.

    Args:
        outcomes: in any order; methods are shown in the order of their first outcome.
    """

    outcomes: Sequence[Outcome]

    @property
    def methods(self) -> list[str]:
        """Their names, each once, in order."""
        return list(dict.fromkeys(outcome.method for outcome in self.outcomes))

    @property
    def contenders(self) -> list[str]:
        """The methods between baseline and ceiling."""
        return [method for method in self.methods if method not in (BASELINE, CEILING)]

    @property
    def gap(self) -> bool:
        """Whether baseline and ceiling are among the methods: without them no share of a gap can be told."""
        return {BASELINE, CEILING} <= {*self.methods}

    def of(self, method: str) -> list[Outcome]:
        """The outcomes of a method, seed by seed."""
        return [outcome for outcome in self.outcomes if outcome.method == method]

    def mean(self, method: str, corruption: str) -> list[float]:
        """Accuracy by severity, a share of 1: the mean over the seeds."""
        seeds = [outcome.corrupted[corruption] for outcome in self.of(method)]
        return [fmean(values) for values in zip(*seeds, strict=True)]

    def recovered(self, method: str) -> list[float]:
        """Share of the gap in pooled accuracy that a method recovers, seed by seed; NaN where there is none."""
        if not self.gap:
            return [math.nan] * len(self.of(method))
        three = zip(self.of(method), self.of(BASELINE), self.of(CEILING), strict=True)
        return [pgr(*(outcome.held_out.pooled for outcome in outcomes)) for outcomes in three]
