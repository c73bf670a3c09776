"""Shares of a comparison whose figures are known."""

from __future__ import annotations

import math

import pytest

from bird.lab.tables import percent, without_empty_columns
from bird.lab.vision.checkpoints import History
from bird.lab.vision.comparison import Comparison, Outcome
from bird.lab.vision.evaluation import Robustness

matplotlib = pytest.importorskip("matplotlib", reason="pictures are an extra: pip install bird-kernels[demo]")


def outcome(method: str, seed: int, held_out: float, cka: float = 0.5) -> Outcome:
    rows: list[dict[str, float]] = [
        {"step": step, "lr": 0.1, "loss": 1 / step, "accuracy": 0.5, "task": 2 / step, "cka/a/b": step / 30}
        for step in (10, 20)
    ]
    return Outcome(
        method,
        seed,
        Robustness(0.9, {"fog": [held_out + 0.1, held_out - 0.1], "speckle_noise": [held_out] * 2}),
        Robustness(0.9, {"contrast": [0.4]}),
        cka,
        History(rows, [{"step": 20, "score": 0.8}], 20, 0.8),
    )


COMPARISON = Comparison(
    [
        outcome(method, seed, held_out)
        for seed in (0, 1)
        for method, held_out in (
            ("None", 0.5),
            ("FT", 0.55 + 0.1 * seed),
            ("BIRD", 0.45),
            ("Ceiling", 0.7 + 0.1 * seed),
        )
    ]
)


def test_methods_and_shares() -> None:
    assert COMPARISON.methods == ["None", "FT", "BIRD", "Ceiling"]
    assert COMPARISON.contenders == ["FT", "BIRD"]
    assert COMPARISON.recovered("FT") == pytest.approx([0.05 / 0.2, 0.15 / 0.3])  # seed by seed, then the mean
    assert COMPARISON.recovered("BIRD") == pytest.approx([-0.25, -1 / 6])
    assert COMPARISON.recovered("None") == [0, 0]
    assert COMPARISON.recovered("Ceiling") == [1, 1]


def test_percent_gives_mean_and_sample_deviation() -> None:
    assert percent([0.25, 0.5]) == "37.5 ± 17.7"
    assert percent([0.25]) == "25.0"
    assert percent([0.25, math.nan]) == "nan ± nan"  # as of a gap that a seed does not have


def test_columns_with_nothing_in_them_are_left_out() -> None:
    rows = [["method", "robust (paper)", "robust", "gap"], ["None", "", "81.2", ""], ["BIRD", "", "84.2", "21.2"]]
    assert without_empty_columns(rows) == [["method", "robust", "gap"], ["None", "81.2", ""], ["BIRD", "84.2", "21.2"]]
