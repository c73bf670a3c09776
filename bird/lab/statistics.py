"""How far a mean over prompts or seeds can be trusted: intervals by bootstrap, paired t-tests, the gap recovered.

SciPy draws the samples; the ends of an interval are read off here, as its own differ in the last bit of a float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDING = 1e-12  # of differences of shares: 0.3 - 0.2 and 0.1 are equal
_AT_ONCE = 2_000_000  # indices in memory at a time: 16 MB


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Args:
        mean: over seeds and prompts.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap(values: ArrayLike, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile interval (Efron and Tibshirani, 1993, ch. 13) of the mean over seeds and prompts.

    Prompts are drawn, with all their seeds: it says what other prompts of the kind would give, with the networks that
    there are. It does not say what other seeds would give.

    Args:
        values: ``[seeds, prompts]``, or ``[prompts]`` of one seed; verdicts as 0 and 1.
        resamples: how many samples of as many prompts.
        level: the share of them that the interval holds.
        seed: of the draws.

    Raises:
        ValueError: another shape, no values, values that are not finite, an option out of range.
        ImportError: SciPy is missing.
    """
    return _interval(_over_seeds(values), resamples, level, seed)


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The same for the mean of ``first`` less that of ``second``, on the same prompts in the same order.

    Each draw takes the same prompts of both, so what makes prompts hard for both cancels. The numbers of seeds may
    differ. Arguments and errors as for `bootstrap`; another number of prompts is an error too.
    """
    ours, theirs = _over_seeds(first), _over_seeds(second)
    if ours.shape != theirs.shape:
        raise ValueError(f"a paired difference needs the same prompts, got {len(ours)} and {len(theirs)}")
    return _interval(ours - theirs, resamples, level, seed)


def _over_seeds(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"values must be [seeds, prompts] or [prompts], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("values are not all finite: decide what a missing verdict counts before")
    return array if array.ndim == 1 else array.mean(axis=0)


def _interval(values: NDArray[np.float64], resamples: int, level: float, seed: int) -> Interval:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"at least one resample and a level between 0 and 1 are needed, got {resamples} and {level}")
    mean = float(values.mean())
    if len(values) == 1:  # which SciPy refuses
        return Interval(mean, mean, mean)
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = np.quantile(drawn.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def pgr(accuracy: float, baseline: float, ceiling: float) -> float:
    """Performance gap recovered, a share of 1: ``(accuracy - baseline) / (ceiling - baseline)``.

    NaN where there is no gap.

    Args:
        accuracy: of the method.
        baseline: of the untouched student, or of the weak model.
        ceiling: of the student that learned from corrupted images, or from true labels.
    """
    gap = ceiling - baseline
    return (accuracy - baseline) / gap if gap else math.nan


def difference(values: Sequence[float]) -> str:
    """``mean (p)`` of paired differences, in percentage points."""
    return f"{100 * fmean(values):+.1f} (p {paired_p(values):.2g})"


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p of Student's t-test that the mean of paired differences is 0; NaN if they have no spread.

    Raises:
        ImportError: SciPy is missing.
    """
    return paired_test(differences)[2]


def paired_test(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Both ends of Student's interval of the mean of paired differences, and the two-sided p that it is 0.

    NaN if they have no spread up to rounding (two seeds that differ equally are no proof), or one of them is NaN.

    Raises:
        ImportError: SciPy is missing.
    """
    from scipy.stats import ttest_1samp

    values = np.asarray(differences, dtype=np.float64)
    if not np.ptp(values) > ROUNDING:
        return math.nan, math.nan, math.nan
    test = ttest_1samp(values, 0)
    low, high = test.confidence_interval(level)
    return float(low), float(high), float(test.pvalue)
