"""What is known of a teacher before the transfer, and how well it predicts what the student becomes: NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

PREDICTORS = ("probe_accuracy", "complementary_knowledge", "usefulness_min")
PROPERTY_NAMES = {
    "probe_accuracy": "probe accuracy",
    "complementary_knowledge": "complementary knowledge",
    "usefulness_min": "usefulness, worst corruption",
    "usefulness_mean": "usefulness, mean corruption",
    "effective_rank": "effective rank",
}


@dataclass(frozen=True)
class Properties:
    """What a teacher's features are worth to a student; `bird.lab.vision.selection.measure_teacher` measures it.

    Args:
        probe_accuracy: held-out accuracy of a linear probe on them, a share of 1.
        complementary_knowledge: share of held-out samples that this probe gets right and the student's own gets wrong.
        usefulness_min: behavioural relevance: how useful a feature stays under the worst of the corruptions, on
            average over features; in standard deviations of a feature, and negative where corruptions turn it over.
        usefulness_mean: the same under the corruptions' average.
        effective_rank: how many directions the features take, from 1 to their number; not among the paper's.
    """

    probe_accuracy: float
    complementary_knowledge: float
    usefulness_min: float
    usefulness_mean: float
    effective_rank: float


@dataclass(frozen=True)
class TeacherRow:
    """One teacher for one student.

    Args:
        name: of the teacher.
        properties: its properties.
        accuracy: the student's robust accuracy after the transfer, a share of 1; None where nobody has tried.
        kind: what the teacher has seen, to tell points of a picture apart by.
    """

    name: str
    properties: Properties
    accuracy: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Fit:
    """How much of the variance of the accuracies a linear model explains, as shares of 1.

    Args:
        r2: of the rows it was fitted to.
        r2_loo: of rows left out one at a time, ``1 - PRESS / SS``; below 0 where the mean is a better guess, NaN where
            a fit without some row is not determined.
    """

    r2: float
    r2_loo: float


@dataclass(frozen=True)
class Regression:
    """A linear model of the robust accuracy after the transfer; `regress` makes it.

    Args:
        coefficients: by property: by how many standard deviations the accuracy rises with one of the property.
        centre: by property: its mean over the rows.
        scale: by property: its standard deviation.
        accuracy: mean of the accuracies.
        deviation: their standard deviation.
        fit: of the whole model.
        alone: by property: of the model that has nothing but it.
        n: how many rows.
    """

    coefficients: Mapping[str, float]
    centre: Mapping[str, float]
    scale: Mapping[str, float]
    accuracy: float
    deviation: float
    fit: Fit
    alone: Mapping[str, Fit]
    n: int


def regress(rows: Sequence[TeacherRow], *, predictors: Sequence[str] = PREDICTORS) -> Regression:
    r"""Ordinary least squares of the accuracies on standardised properties, with an intercept.

    With residuals :math:`e_i` and leverages :math:`h_{ii}`, the diagonal of the hat matrix :math:`X(X'X)^{-1}X'`,

    .. math::  R^2 = 1 - \frac{\sum_i e_i^2}{\sum_i (y_i - \bar y)^2} \qquad
               R^2_\mathrm{LOO} = 1 - \frac{\sum_i (e_i / (1 - h_{ii}))^2}{\sum_i (y_i - \bar y)^2}

    where :math:`e_i / (1 - h_{ii})` is exactly the error at row i of the model fitted to the others (PRESS, Allen
    1974). With few rows :math:`R^2` flatters; believe :math:`R^2_\mathrm{LOO}`.

    Args:
        rows: at least two more than there are predictors, each with an accuracy.
        predictors: names of `Properties`, each once.

    Raises:
        ValueError: too few rows, a row without an accuracy, accuracies that are all the same, predictors that do not
            vary or are linear functions of each other.
    """
    x, y = _observed(rows, predictors)
    centre, scale = x.mean(axis=0), x.std(axis=0)
    deviation = y.std()
    z, target = (x - centre) / scale, (y - y.mean()) / deviation
    coefficients = np.linalg.lstsq(z, target, rcond=None)[0]
    return Regression(
        coefficients=_named(predictors, coefficients),
        centre=_named(predictors, centre),
        scale=_named(predictors, scale),
        accuracy=float(y.mean()),
        deviation=float(deviation),
        fit=_fit(z, target),
        alone={name: _fit(z[:, [i]], target) for i, name in enumerate(predictors)},
        n=len(rows),
    )


def _observed(rows: Sequence[TeacherRow], predictors: Sequence[str]) -> tuple[Float64Array, Float64Array]:
    """Properties ``[n, p]`` and accuracies ``[n]``, fit to be regressed."""
    if len(rows) < len(predictors) + 2:
        raise ValueError(f"{len(predictors)} predictors need at least {len(predictors) + 2} rows, got {len(rows)}")
    if missing := [row.name for row in rows if row.accuracy is None]:
        raise ValueError(f"there is no accuracy after the transfer for {missing}: measure it, or leave these rows out")
    x = np.array([[getattr(row.properties, name) for name in predictors] for row in rows], dtype=np.float64)
    y = np.array([row.accuracy for row in rows], dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("properties and accuracies must be finite")
    if np.ptp(y) == 0:
        raise ValueError("all rows have the same accuracy: there is nothing to explain")
    if flat := [name for name, column in zip(predictors, x.T, strict=True) if np.ptp(column) == 0]:
        raise ValueError(f"{flat} are the same in all rows: leave them out of the predictors")
    if np.linalg.matrix_rank((x - x.mean(axis=0)) / x.std(axis=0)) < len(predictors):
        raise ValueError(f"{list(predictors)} are linear functions of each other over these rows: leave one out")
    return x, y


def _fit(z: Float64Array, target: Float64Array) -> Fit:
    """For centred ``z [n, p]`` and a target of mean 0 and variance 1."""
    n = len(target)
    q = np.linalg.qr(z)[0]
    errors = target - q @ (q.T @ target)
    leverage = 1 / n + (q**2).sum(axis=1)  # the intercept's part, and the rest, which is orthogonal to it
    own = 1 - leverage
    left_out = errors / np.where(own > 1e-9, own, np.nan)
    return Fit(float(1 - errors @ errors / n), float(1 - left_out @ left_out / n))


def _named(names: Sequence[str], values: Float64Array) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
