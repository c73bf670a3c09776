"""The parts of a bag of words' score add up."""

from __future__ import annotations

import pytest

pytest.importorskip("vaderSentiment", reason="needs the language extra")

from benchmarks.reproduction.words import log_odds
from bird.lab.language.judges import BagOfWords


def test_rated_and_other_words_are_the_whole_score() -> None:
    judge = BagOfWords(
        ["a great film", "great fun and film", "a dull plot", "awful and a plot"], [True, True, False, False]
    )
    responses = ["a great plot", "awful film and fun", "film", "great"]
    rated, others = log_odds(judge, responses)
    (constant,) = judge.pipeline[-1].intercept_
    assert rated + others + constant == pytest.approx(judge.pipeline.decision_function(responses).mean())
    rated, others = log_odds(judge, ["great"])  # VADER rates "great", and neither "film" nor "plot"
    assert rated > 0.1
    assert others == 0
    rated, others = log_odds(judge, ["film"])
    assert rated == 0
    assert others > 0.1
