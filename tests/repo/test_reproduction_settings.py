"""Numbers that the page of results states of what BIRD depends on (weight, layer, rows in a batch), from the files."""

from __future__ import annotations

import math
from statistics import fmean, linear_regression

import numpy as np
import pytest

from tests.repo.test_reproduction import HELD_OUT, LIFTS, PAGE, robust, told, variants


def test_the_weight_of_the_guidance() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    of, seeds = variants("fashion-weight"), ("100", "101", "102")

    def gains(beta: str, over: tuple[str, str] | None = None) -> list[float]:
        other = over or (f"beta {beta}", "none")
        return [robust(of, f"beta {beta}", "bird", seed) - robust(of, *other, seed) for seed in seeds]

    for beta, label in (("0.5", "0.5"), ("0.8", "0.8"), ("0.9", "0.9 (published)"), ("0.99", "0.99")):
        level = fmean(of[f"beta {beta}", "bird", "none"].values())
        assert f"| {label} | {told(gains(beta))} | {level:.1f} |" in PAGE
    none = ("beta 0.5", "none")
    assert f"(None {fmean(of[(*none, 'none')].values()):.1f} %) | CKA to the teacher | after" in PAGE
    assert f"over None ({fmean(robust(of, *none, seed) for seed in seeds):.1f} %) [95 %]" in PAGE
    slopes = [
        linear_regression([0, 2, math.log2(9)], seed).slope
        for seed in zip(*map(gains, ("0.5", "0.8", "0.9")), strict=True)
    ]
    harm = gains("0.99", ("beta 0.9", "bird"))
    tested = {"growth": slopes, "harm": harm}
    p = {name: stats.ttest_1samp(values, 0).pvalue for name, values in tested.items()}
    assert 2 * p["harm"] < p["growth"]  # Holm
    assert f"from 1 to 9 | {told(slopes)} for every doubling | {p['growth']:.2f} | open |" in PAGE
    assert f"above BIRD of 0.9 | {told(harm)} | {2 * p['harm']:.2g} | open |" in PAGE
    assert f"(secondary) | {told(gains('0.5', ('beta 0.5', 'continued-alpha')))} | 0.0092, not" in PAGE
    clean = {
        beta: [of[f"beta {beta}", "bird", "none"][s] - of[f"beta {beta}", "none", "none"][s] for s in seeds]
        for beta in ("0.5", "0.8", "0.9", "0.99")
    }
    assert f"{told(clean['0.5'])} with 0.5 and {told(clean['0.9'])} with 0.9" in PAGE
    falls = np.polyfit([0, 2, math.log2(9)], [clean[beta] for beta in ("0.5", "0.8", "0.9")], 1)[0]
    assert f"| {told(falls.tolist())} for every doubling | 0.15, not" in PAGE
    harm = [a - b for a, b in zip(clean["0.99"], clean["0.9"], strict=True)]
    assert f"less that of 0.9 (secondary) | {told(harm)} | 0.016, not" in PAGE
    lifted = [fmean(of["beta 0.99", "bird", k][s] - of["beta 0.99", "none", k][s] for s in seeds) for k in LIFTS]
    assert f"most of all, {min(lifted):.1f} to {max(lifted):.1f} points" in PAGE
    budget = variants("fashion-budget")
    for kind in HELD_OUT:
        for seed in seeds:
            assert of["beta 0.9", "bird", kind][seed] == budget["16,000 steps", "bird", kind][seed]


def test_the_guiding_and_the_guided_layer() -> None:
    """Each variant over None, and each claim with Holm's correction, anew from the accuracies."""
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    of, seeds = variants("fashion-layer"), ("100", "101", "102")
    section = PAGE[PAGE.index("## fashion-layer") : PAGE.index("## fashion-weight")]

    def gains(variant: str, over: str, method: str) -> list[float]:
        return [robust(of, variant, "bird", seed) - robust(of, over, method, seed) for seed in seeds]

    for variant in ("early", "middle", "late", "middle to late"):
        clean = fmean(of[variant, "bird", "none"].values())
        assert f"| {told(gains(variant, variant, 'none'))} | {clean:.1f} |" in section
    claims = {
        f"{variant} above late": gains(variant, "late", "bird") for variant in ("early", "middle", "middle to late")
    }
    corrected = 0.0
    p = sorted((stats.ttest_1samp(values, 0).pvalue, claim) for claim, values in claims.items())
    for rank, (value, claim) in enumerate(p):
        corrected = max(corrected, min(1.0, (3 - rank) * value))
        assert f"| {claim} | {told(claims[claim])} | {corrected:.2g} |" in section
    budget = variants("fashion-budget")
    for seed in seeds:
        assert robust(of, "late", "bird", seed) == robust(budget, "16,000 steps", "bird", seed)


def test_the_rows_in_a_batch() -> None:
    """Each size beside training on at its weight and its size, the estimators, and the claims; anew from accuracies."""
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    of, seeds = variants("fashion-batch-size"), ("100", "101", "102", "103")
    section = PAGE[PAGE.index("## fashion-batch-size") : PAGE.index("## fashion-layer")]
    sizes = (16, 32, 64, 128)

    def gains(size: int, method: str = "bird", over: str = "continued-alpha", other: int | None = None) -> list[float]:
        mine, theirs = f"batch {size}", f"batch {other or size}"
        return [robust(of, mine, method, seed) - robust(of, theirs, over, seed) for seed in seeds]

    def slopes(values: list[list[float]]) -> list[float]:
        return [linear_regression([4, 5, 6, 7], seed).slope for seed in zip(*values, strict=True)]

    prices = []
    for size in sizes:
        clean = [of[f"batch {size}", method, "none"] for method in ("bird", "continued-alpha")]
        prices.append([clean[0][seed] - clean[1][seed] for seed in seeds])
        row = f"| {size} | {told(gains(size))} | {told(gains(size, over='none'))} | {fmean(clean[0].values()):.1f}"
        row += f" ({fmean(clean[1].values()):.1f}) |"
        assert row in section
        if size < 64:
            assert f"{row} {told(gains(size, 'bird-unbiased', 'bird'))} |" in section
    primary = {
        "grows with the rows, from 16 to 128": slopes([gains(size) for size in sizes]),
        "at 16 rows: the unbiased estimator above the biased": gains(16, "bird-unbiased", "bird"),
    }
    p = sorted((stats.ttest_1samp(values, 0).pvalue, claim) for claim, values in primary.items())
    corrected = [min(1.0, 2 * p[0][0]), max(min(1.0, 2 * p[0][0]), p[1][0])]
    for (_, claim), value in zip(p, corrected, strict=True):
        unit = " for every doubling" if claim.startswith("grows") else ""
        assert f"{claim} | {told(primary[claim])}{unit} | {value:.2g} |" in section
    secondary = {
        "at 32 rows: the unbiased estimator above the biased": gains(32, "bird-unbiased", "bird"),
        "BIRD of 128 rows above BIRD of 64": gains(128, over="bird", other=64),
        "BIRD of 16 rows above *Continued* at alpha": gains(16),
        "clean accuracy of BIRD, less *Continued* at alpha, grows": slopes(prices),
    }
    for claim, values in secondary.items():
        unit = " for every doubling" if claim.endswith("grows") else ""
        value = stats.ttest_1samp(values, 0).pvalue
        assert f"{claim} (secondary) | {told(values)}{unit} | {value:.2g}, not corrected |" in section
    budget = variants("fashion-budget")
    for seed in seeds:
        assert robust(of, "batch 64", "bird", seed) == robust(budget, "16,000 steps", "bird", seed)
