"""Claims that a recipe registers before its runs, and what the runs say of them.

A claim compares two methods, seed by seed, by a two-sided paired t-test; the primary claims of a recipe are tested
together (Holm, 1979), those that have not been run yet included. The rule, once all registered seeds are there: it
*holds* where the corrected p is below 0.05 and the difference is positive (and, if asked, most families of corruptions
agree); it does not hold *at the paper's size* where the 95 % interval ends below half of the paper's difference, which
is said of a claim that holds, too; the *contrary* holds where the corrected p is below 0.05 and the difference is
negative; else it is *open*. Differences without spread have no t-test, and leave a claim open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from .recipe import require_known, require_within
from .statistics import paired_test
from .tables import markdown_table, without_empty_columns

LEVEL = 0.05
# measure(method, variant, name): the values by seed, shares of 1; None where the method has not been run.
Measure = Callable[[str, str, str], "Mapping[int, float] | None"]


@dataclass(frozen=True)
class Claim:
    """One comparison; its name is the key in the recipe.

    Args:
        method: what is claimed to be ahead.
        over: of which method.
        variants: in which variants of the recipe, one, or several for a trend.
        at: of a trend, where each variant stands: the claim is then of the slope over log2 of these numbers.
        over_variant: the variant that ``over`` is taken in; None: the same.
        measure: what is compared; the wing of the recipe knows the names.
        paper: the paper's difference, in percentage points; None where it gives none.
        secondary: reported with its p, and not judged.
        families: measures of which at least ``agreeing`` must be ahead, too, for the claim to hold.
        agreeing: how many.
    """

    method: str
    over: str
    variants: tuple[str, ...] = ("",)
    at: tuple[int, ...] = ()
    over_variant: str | None = None
    measure: str = "robust"
    paper: float | None = None
    secondary: bool = False
    families: tuple[str, ...] = ()
    agreeing: int = 0

    def __post_init__(self) -> None:
        require_within(self, agreeing=(min(1, len(self.families)), len(self.families)), paper=0)
        if len(self.variants) != (len(self.at) or 1):
            raise ValueError(f"variants {[*self.variants]}: one, or as many as there are numbers in at, {[*self.at]}")
        if self.at and (min(self.at) < 1 or len(set(self.at)) < 2):
            raise ValueError(f"a slope needs two or more different numbers from 1 on, not at = {[*self.at]}")

    def other(self, variant: str) -> str:
        """The variant that ``over`` is taken in, where ``method`` is taken in this one."""
        return variant if self.over_variant is None else self.over_variant

    def differences(self, measure: Measure, name: str | None = None) -> list[float] | None:
        """Seed by seed; of a trend, the slopes per doubling. None where something has not been run.

        Args:
            measure: what was measured.
            name: of what is compared; None for the claim's own measure.
        """
        found = []
        for variant in self.variants:
            ours = measure(self.method, variant, name or self.measure)
            theirs = measure(self.over, self.other(variant), name or self.measure)
            if ours is None or theirs is None:
                return None
            found.append({seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()})
        seeds = sorted(set.intersection(*map(set, found)))
        if len(seeds) < 2:
            return None
        values = np.array([[of[seed] for seed in seeds] for of in found])
        if self.at:
            return [float(slope) for slope in np.polyfit(np.log2(self.at), values, 1)[0]]
        return [float(value) for value in values[0]]


@dataclass(frozen=True)
class Judgement:
    """What the runs say of a claim; differences are shares of 1.

    Args:
        claim: its name.
        seeds: how many there are of all that it compares.
        mean: of the differences.
        low: the lower end of their 95 % interval (Student's t).
        high: its upper end.
        p: two-sided, of the mean against 0. Like the interval NaN where all differences are equal or one is NaN.
        corrected: the same by Holm, over all registered primary claims; None of a secondary one.
        ahead: by family, the mean difference.
        verdict: by the rule above; "incomplete" until all seeds are there; empty of a secondary claim.
        differences: seed by seed.
    """

    claim: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float
    corrected: float | None
    ahead: Mapping[str, float]
    verdict: str
    differences: Sequence[float]


def require_claims(recipe: Any, measures: Collection[str]) -> None:
    """Raises a ValueError unless the claims of a recipe speak of what it runs, and of what its wing measures."""
    for name, claim in recipe.claims.items():
        variants = (*claim.variants, *(() if claim.over_variant is None else (claim.over_variant,)))
        for variant in variants:
            require_known(f"a variant of the claim {name!r}", variant, recipe.variants)
        for measure in (claim.measure, *claim.families):
            require_known(f"a measure of the claim {name!r}", measure, measures)
        for variant in claim.variants:
            for method, there in ((claim.method, variant), (claim.over, claim.other(variant))):
                runs = recipe.variants[there].methods or recipe.methods
                require_known(f"what the variant {there!r} runs, for the claim {name!r}", method, runs)


def judge(claims: Mapping[str, Claim], measure: Measure, seeds: int = 2) -> list[Judgement]:
    """Of the claims whose methods have been run, with two seeds or more in common.

    Holm counts all primary claims: of one that has not been run p counts as 1, so a corrected p can only fall later.

    Args:
        claims: by name, all that are registered.
        measure: what was measured.
        seeds: how many are registered; with fewer a claim is not judged.

    Raises:
        ImportError: SciPy is missing.
    """
    found = []
    for name, claim in claims.items():
        values = claim.differences(measure)
        if values is None:
            continue
        families = {family: claim.differences(measure, family) for family in claim.families}
        low, high, p = paired_test(values, 1 - LEVEL)
        ahead = {family: fmean(of) for family, of in families.items() if of is not None}
        found.append(Judgement(name, len(values), fmean(values), low, high, p, None, ahead, "", values))
    primary = [judgement for judgement in found if not claims[judgement.claim].secondary]
    unknown = [1.0] * (sum(not claim.secondary for claim in claims.values()) - len(primary))
    ps = holm([*(j.p for j in primary), *unknown])  # of the unknown at its end
    corrected = dict(zip((j.claim for j in primary), ps, strict=False))
    return [
        replace(j, corrected=corrected[j.claim], verdict=_verdict(claims[j.claim], j, corrected[j.claim], seeds))
        if j.claim in corrected
        else j
        for j in found
    ]


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for their number, step down (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    NaN, of a test that cannot be made, counts as 1.
    """
    ps = [1.0 if math.isnan(p) else p for p in ps]
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, largest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def _verdict(claim: Claim, judgement: Judgement, p: float, seeds: int) -> str:
    if judgement.seeds < seeds:
        return f"incomplete, {judgement.seeds} of {seeds} seeds"
    small = claim.paper is not None and 100 * judgement.high < claim.paper / 2
    agree = sum(value > 0 for value in judgement.ahead.values()) >= claim.agreeing
    if p < LEVEL and judgement.mean > 0 and agree:
        return "holds, but not at the paper's size" if small else "holds"
    if p < LEVEL and judgement.mean < 0:
        return "the contrary holds"
    if small:
        return "does not hold at the paper's size"
    return "open"


def claims_section(claims: Mapping[str, Claim], judgements: Sequence[Judgement]) -> list[str]:
    """Markdown; nothing where nothing was registered."""
    if not judgements:
        return []
    rows = [["claim", "paper", "here: difference in points [95 %]", "p", "p, Holm", "families ahead", "verdict"]]
    for j in judgements:
        claim = claims[j.claim]
        rows.append(
            [
                j.claim,
                "" if claim.paper is None else f"{claim.paper:+.1f}",
                f"{100 * j.mean:+.2f} [{100 * j.low:+.2f}, {100 * j.high:+.2f}]{' per doubling' if claim.at else ''}",
                f"{j.p:.2g}",
                "" if j.corrected is None else f"{j.corrected:.2g}",
                f"{sum(v > 0 for v in j.ahead.values())} of {len(j.ahead)}" if j.ahead else "",
                j.verdict or "secondary",
            ]
        )
    seeds = sorted({j.seeds for j in judgements})
    said = (
        f"Registered before the runs; two-sided paired t-tests over {' or '.join(map(str, seeds))} seeds, corrected "
        f"by Holm over the primary claims, {sum(not claim.secondary for claim in claims.values())} in all.\n"
    )
    return ["## Registered claims\n", said, markdown_table(without_empty_columns(rows)) + "\n"]


def json_rows(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """For JSON, which has no NaN: None in its place."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(of) for key, of in value.items()}
        if isinstance(value, list):
            return [*map(plain, value)]
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(vars(judgement)) for judgement in judgements]
