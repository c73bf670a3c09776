"""Which words make a bag of words call responses positive: those that VADER rates, or others.

A score is the log odds that a response is positive, a sum over its words and pairs of words. Rated are those in VADER's
lexicon; the others are of a review's style. Means over the held-out prompts.

    BIRD_DATA=data python -m benchmarks.reproduction.words RUNS benchmarks/reproduction/positivity-dpo/words.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from bird.files import write_json
from bird.lab.language.experiment import texts_and_labels
from bird.lab.language.judges import BagOfWords
from bird.lab.language.preference import Preferences
from bird.lab.language.recipe import parse
from bird.lab.recipe import parsed

LEXICON = SentimentIntensityAnalyzer().lexicon


def log_odds(judge: BagOfWords, responses: Sequence[str]) -> tuple[float, float]:
    """Of the mean log odds of the responses, what comes from rated words and what from others; the rest is constant."""
    vectors, regression = (part for _, part in judge.pipeline.steps)
    names = vectors.get_feature_names_out()
    rated = np.array([any(word in LEXICON for word in name.split()) for name in names])
    parts = np.asarray(vectors.transform(responses).multiply(regression.coef_).mean(0)).ravel()
    return float(parts[rated].sum()), float(parts[~rated].sum())


def main(root: Path, path: Path) -> None:
    recipe = parsed("language/positivity-dpo", parse)
    experiment, rows = Preferences(recipe, root, torch.device("cpu")), []
    for cell in experiment.cells(variants=["small"]):
        found = cell.results(root)
        if found is None:
            raise SystemExit(f"{cell.method}, seed {cell.seed} is not there: bird run language/positivity-dpo")
        judge = BagOfWords(*texts_and_labels(experiment.material(cell.seed).judged))
        rated, others = log_odds(judge, found["responses"]["responses"])
        rows.append({"method": cell.method, "seed": cell.seed, "rated": rated, "others": others})
    write_json(rows, path)
    print("| method | rated words | other words |\n|---|---|---|")
    for method in dict.fromkeys(row["method"] for row in rows):
        means = (fmean(row[name] for row in rows if row["method"] == method) for name in ("rated", "others"))
        print(f"| {recipe.titles[method]} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("runs", type=Path, help="the folder of a finished run of language/positivity-dpo")
    options.add_argument("path", type=Path, help="the JSON file to write")
    given = options.parse_args()
    main(given.runs, given.path)
