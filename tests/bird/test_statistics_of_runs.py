"""Confidence intervals, tests and shares: against SciPy, the normal approximation, and figures that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bird.lab.language.data import distinct_pairs
from bird.lab.statistics import bootstrap, paired_bootstrap, paired_p, pgr
from bird.lab.tables import percent, without_empty_columns
from bird.lab.vision.comparison import Comparison, Outcome
from bird.lab.vision.evaluation import Robustness


def test_distinct_by_hand() -> None:
    assert distinct_pairs(["a b a b", "b a", "", "c"]) == 2 / 4  # ab ba ab | ba
    assert distinct_pairs(["a", ""]) == distinct_pairs([]) == 0
    assert distinct_pairs(["so so so so so"] * 10) == 1 / 40


def test_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((3, 40)) ** 2
    for level in (0.95, 0.8):
        truth = stats.bootstrap(
            (values.mean(axis=0),), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=rng
        ).confidence_interval
        found = bootstrap(values, resamples=20_000, level=level, seed=1)
        assert found.mean == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((truth.low, truth.high), abs=2e-3)
    # prompts are drawn with all their seeds: single values would give a narrower interval
    hard = np.tile(rng.integers(0, 2, 40), (9, 1))
    found = bootstrap(hard)
    assert found.high - found.low == pytest.approx(2 * 1.96 * hard[0].std() / 40**0.5, rel=0.1)
    assert bootstrap(hard[0]) == found


def test_paired_differences() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(2, 200)) + 5 * rng.normal(size=200)  # prompts differ more than methods
    second = first.mean(axis=0) - 0.1 + 0.2 * rng.normal(size=(3, 200))
    found = paired_bootstrap(first, second, seed=1)
    difference = first.mean(axis=0) - second.mean(axis=0)
    half = 1.96 * difference.std() / 200**0.5
    assert found.mean == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.1 * half)
    assert found == bootstrap(difference, seed=1)
    assert found.low > 0 > bootstrap(first).low
    turned = paired_bootstrap(second, first, seed=1)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_draws_come_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(7)
    whole = bootstrap(values, resamples=1000)
    monkeypatch.setattr("bird.lab.statistics._AT_ONCE", 64)
    assert bootstrap(values, resamples=1000) == whole
    monkeypatch.setattr("bird.lab.statistics._AT_ONCE", 1)
    assert bootstrap(values, resamples=1000) == whole
    assert bootstrap(values, resamples=1000, seed=1) != whole


def test_intervals_of_nothing_are_refused() -> None:
    for values, said in (
        ([], r"\[seeds, prompts\] or \[prompts\], got \[0\]"),
        (np.zeros((1, 2, 3)), r"got \[1, 2, 3\]"),
        ([1.0, math.nan], "decide what a missing verdict counts"),
    ):
        with pytest.raises(ValueError, match=said):
            bootstrap(values)
    with pytest.raises(ValueError, match="the same prompts, got 3 and 4"):
        paired_bootstrap(np.zeros((2, 3)), np.zeros((2, 4)))
    for options in ({"resamples": 0}, {"level": 1.0}):
        with pytest.raises(ValueError, match="at least one resample and a level between 0 and 1"):
            bootstrap([1.0], **options)


def test_paired_p() -> None:
    a, b = [0.61, 0.64, 0.7, 0.66], [0.6, 0.61, 0.71, 0.6]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    assert paired_p(differences) == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_pgr_is_the_share_of_the_gap() -> None:
    found = [pgr(value, 0.6, 0.8) for value in (0.7, 0.6, 0.8, 0.5)]
    assert found == pytest.approx([0.5, 0, 1, -0.5])
    assert math.isnan(pgr(0.5, 0.6, 0.6))


def test_methods_and_shares_of_a_comparison() -> None:
    def outcome(method: str, seed: int, held_out: float) -> Outcome:
        corrupted = {"fog": [held_out + 0.1, held_out - 0.1], "speckle_noise": [held_out] * 2}
        return Outcome(method, seed, Robustness(0.9, corrupted), Robustness(0.9, {"contrast": [0.4]}), 0.5, None)

    shares = {"None": (0.5, 0), "FT": (0.55, 0.1), "BIRD": (0.45, 0), "Ceiling": (0.7, 0.1)}
    outcomes = [outcome(method, seed, a + b * seed) for seed in (0, 1) for method, (a, b) in shares.items()]
    found = Comparison(outcomes)
    assert found.methods == ["None", "FT", "BIRD", "Ceiling"]
    assert found.contenders == ["FT", "BIRD"]
    assert found.recovered("FT") == pytest.approx([0.05 / 0.2, 0.15 / 0.3])  # seed by seed, then the mean
    assert found.recovered("BIRD") == pytest.approx([-0.25, -1 / 6])
    assert (found.recovered("None"), found.recovered("Ceiling")) == ([0, 0], [1, 1])


def test_percent_gives_mean_and_sample_deviation() -> None:
    assert percent([0.25, 0.5]) == "37.5 ± 17.7"
    assert percent([0.25]) == "25.0"
    assert percent([0.25, math.nan]) == "nan ± nan"  # as of a gap that a seed does not have


def test_columns_with_nothing_in_them_are_left_out() -> None:
    rows = [["method", "robust (paper)", "robust", "gap"], ["None", "", "81.2", ""], ["BIRD", "", "84.2", "21.2"]]
    assert without_empty_columns(rows) == [["method", "robust", "gap"], ["None", "81.2", ""], ["BIRD", "84.2", "21.2"]]
