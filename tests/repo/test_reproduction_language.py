"""Numbers that the page of results states about language models, computed again from the committed files."""

from __future__ import annotations

import json
import math
import re
from statistics import fmean, linear_regression, stdev
from typing import Any

import pytest

from tests.repo.test_reproduction import PAGE, RESULTS


def norms(folder: str, method: str) -> list[float]:
    """Of the gradients in the second half of training, seed by seed."""
    cells: list[dict[str, Any]] = json.loads((RESULTS / folder / "results.json").read_text())["cells"]
    return [cell["training"]["second_half"]["grad_norm"] for cell in cells if cell["method"] == method]


def test_what_language_models_gradients_are_made_of() -> None:
    alone, guided = (norms("positivity-dpo", method) for method in ("dpo", "dpo-bird"))
    told = "from {:.1f}, {:.1f} and {:.1f} (seed by seed) to {:.1f}, {:.1f} and {:.1f}. If DPO's part"
    assert told.format(*alone, *guided) in PAGE
    shares = [a / g for a, g in zip(alone, guided, strict=True)]
    assert "by {:.2f}, {:.2f} and {:.2f} of what it does without".format(*shares) in PAGE
    alone, guided = (norms("weak-to-strong-sentiment", method) for method in ("naive", "bird"))
    shares = [10 * a / g for a, g in zip(alone, guided, strict=True)]
    assert "is {:.0f}, {:.0f} and {:.0f} % (seed by seed)".format(*shares) in PAGE


def test_the_regime_of_scarce_preferences() -> None:
    regime = json.loads((RESULTS / "scarce-dpo/regime.json").read_text(encoding="utf-8"))
    margins = regime["margins by pairs"]
    assert f"which ranks {100 * regime['ranked rightly by the teacher']:.1f} % rightly itself" in PAGE
    rows = re.findall(
        r"^\| (10|20|40|80) \| (\S+) % \| (\S+) \|$", (RESULTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [pairs for pairs, *_ in rows] == list(margins)
    for pairs, right, margin in rows:
        assert len(margins[pairs]) == 300
        assert f"{100 * fmean(m > 0 for m in margins[pairs]):.1f}" == right
        assert f"{fmean(margins[pairs]):.2f}" == margin


def test_words_and_definitions() -> None:
    """What the difficulty was chosen by; and each arm and claim anew, seed by seed."""
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    folder = RESULTS / "weak-to-strong-glosses"
    chosen = json.loads((folder / "difficulty.json").read_text(encoding="utf-8"))
    models, labels = chosen["models"], chosen["mean larger probability of the labels, seeds 0 to 7"]
    assert f"its larger probability is {fmean(labels):.2f} in the mean" in PAGE
    assert len(labels) == 8
    assert {len(model["right"]) for model in models} == {1000}
    told = tuple(model["right"].count("1") / 10 for model in models)
    assert (
        "weak model has {:.1f} %; the ceiling has {:.1f} % above 24 frozen blocks, {:.1f} % above 18, and".format(*told)
        + f" {told[-1]:.1f} % in bf16"
        in PAGE
    )
    assert [(m["method"], m["frozen"], m["bf16"]) for m in models[1:]] == [
        ("ceiling", 24, False), ("ceiling", 18, False), ("ceiling", 18, True)
    ]  # fmt: skip
    assert 60 <= told[0] <= 70
    assert told[-1] >= told[0] + 10 > told[1]

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    of = {
        (variant.removeprefix("minilm-smollm2, "), method): values
        for variant, methods in results.items()
        for method, values in methods.items()
    }
    naive = of["1 to 1", "naive"]["accuracy"]
    assert all(weak > soft for weak, soft in zip(of["1 to 1", "weak"]["accuracy"], naive, strict=True))

    def less(some: list[float], other: list[float]) -> tuple[str, list[float]]:
        found = [100 * (a - b) for a, b in zip(some, other, strict=True)]
        low, high = stats.t.interval(0.95, 7, fmean(found), stats.sem(found))
        return f"{fmean(found):+.2f} [{low:+.2f}, {high:+.2f}]", found

    arms = {
        "weak model": ("1 to 1", "weak"),
        "soft labels": ("1 to 1", "naive"),
        "BIRD, 1 to 0.1": ("1 to 0.1", "bird"),
        "BIRD, 1 to 1": ("1 to 1", "bird"),
        "BIRD, 0.1 to 0.9": ("0.1 to 0.9", "bird"),
        "a permuted teacher, 1 to 1": ("1 to 1", "bird-permuted"),
        "the weak model before its task, 1 to 1": ("1 to 1", "bird-pretrained"),
        "the student before its task, 1 to 1": ("1 to 1", "bird-anchored"),
        "ceiling: true labels": ("1 to 1", "ceiling"),
    }
    for name, arm in arms.items():
        values = of[arm]["accuracy"]
        row = f"| {name} | {100 * fmean(values):.1f} ± {100 * stdev(values):.1f} |"
        if arm[1] not in ("weak", "naive"):
            told_of, found = less(values, naive)
            row += f" {told_of}, {stats.ttest_1samp(found, 0).pvalue:.2g} |"
        assert row in PAGE, row

    mistakes = [of[variant, "bird"]["mistakes_repeated"] for variant in ("1 to 0.1", "1 to 1", "0.1 to 0.9")]
    beside = of["1 to 1", "naive"]["mistakes_repeated"]
    slopes = [
        linear_regression([math.log2(at) for at in (1, 10, 90)], [each - soft for each in seed]).slope
        for *seed, soft in zip(*mistakes, beside, strict=True)
    ]
    primary = {
        "BIRD (1 to 1) above soft labels | some +1 (estimated) |": (less(of["1 to 1", "bird"]["accuracy"], naive), ""),
        "BIRD (1 to 1) above a permuted teacher | |": (
            less(*(of["1 to 1", method]["accuracy"] for method in ("bird", "bird-permuted"))), ""
        ),
        "mistakes repeated rise with beta to alpha | |": (less(slopes, [0.0] * 8), " for every doubling"),
    }  # fmt: skip
    p = sorted((stats.ttest_1samp(found, 0).pvalue, claim) for claim, ((_, found), _) in primary.items())
    corrected = 0.0
    for rank, (value, claim) in enumerate(p):
        corrected = max(corrected, (3 - rank) * value)
        (told_of, _), unit = primary[claim]
        assert f"| {claim} {told_of}{unit} | {corrected:.2g} |" in PAGE
