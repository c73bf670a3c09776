"""Whether a set of corruptions can show a transfer of robustness at all: judged on None and Ceiling, before any method.

    python -m bird.lab.vision.suite fashion/photos    # the first of nine suites that passes, by the rule

Nothing but a student that has seen clean images and one that has seen the corruptions is trained, by a seed that no
experiment uses, and both are scored on validation images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from ..stages import complete
from .datasets import load_splits
from .evaluation import Robustness, first, robustness
from .experiment import Made, VisionExperiment
from .recipe import Networks, RecipeVariant, VisionRecipe, read_vision

GAP = 0.10  # that a suite leaves between None and Ceiling in pooled accuracy, at least
SHARE = 0.25  # of it that one kind of corruption may have, at most
LOSS, KINDS = 0.05, 10  # kinds under which None is so far behind Ceiling, at least
CLEAN = 0.03  # between the two on clean images, at most: else the student has not finished
BACKGROUNDS = (  # data and network, the last of which standardises each image by itself
    ("fashion-photos", "resnet-tiny"),
    ("fashion-levels", "resnet-tiny"),
    ("fashion-mnist", "resnet-tiny-standardised"),
)


def faults(none: Robustness, ceiling: Robustness) -> list[str]:
    """What speaks against a suite of corruptions, in words; nothing if it can be used.

    A kind's loss is Ceiling's mean accuracy over its severities minus None's, its share is of the sum of all losses.

    Args:
        none: of a student that has seen clean images, under every kind that is scored.
        ceiling: the same of one that has seen the teacher's corruptions.
    """
    losses = {kind: fmean(ceiling.corrupted[kind]) - fmean(none.corrupted[kind]) for kind in none.corrupted}
    gap, clean = ceiling.pooled - none.pooled, abs(ceiling.clean - none.clean)
    largest = max(losses, key=lambda kind: losses[kind])
    share = losses[largest] / total if (total := sum(losses.values())) > 0 else 1.0
    hurt = sum(loss >= LOSS for loss in losses.values())
    found = {
        f"the pooled gap is {100 * gap:.1f} points, below {100 * GAP:g}": gap < GAP,
        f"{largest} alone has {100 * share:.0f} % of the gap, above {100 * SHARE:g}": share > SHARE,
        f"{hurt} kinds lose {100 * LOSS:g} points, fewer than {KINDS}": hurt < KINDS,
        f"clean accuracies are {100 * clean:.1f} points apart, above {100 * CLEAN:g}": clean > CLEAN,
    }
    return [fault for fault, there in found.items() if there]


def suites(recipe: VisionRecipe) -> Iterator[tuple[str, VisionRecipe]]:
    """A recipe under published strengths, then with severity 6, then with 7; each over three backgrounds."""
    for strongest in (5, 6, 7):
        for data, network in BACKGROUNDS:
            sources = {side: replace(getattr(recipe, side), data=data) for side in ("teacher", "student")}
            networks = {network: Networks(network, network)}
            suite = replace(
                recipe, strongest=strongest, networks=networks, variants={"": RecipeVariant()}, claims={}, **sources
            )
            yield f"severities to {strongest}, {data}, {network}", suite


def none_and_ceiling(experiment: VisionExperiment, seed: int) -> tuple[Robustness, Robustness]:
    """None and Ceiling of a recipe's first networks, on validation images; trained if they are not yet."""
    recipe = experiment.recipe.at(seed)
    name, source = next(iter(recipe.networks)), recipe.student
    stages = [experiment.cell(name, "", method, seed).training for method in ("none", "ceiling")]
    trained = [Made(recipe.networks[name].student, source, stage) for stage in stages if stage is not None]
    complete([made.stage for made in trained], experiment.root, tell=_say, idle=_say)
    splits = load_splits(
        source.data, experiment.data_root, classes=source.classes, seed=seed, limit_per_class=source.limit_per_class
    )
    data = first(splits.validation, recipe.scoring.images).to(experiment.device)
    none, ceiling = (
        robustness(
            made.model(experiment.root, experiment.device),
            data,
            recipe.scoring.corruptions,
            range(1, 1 + recipe.strongest),
        )
        for made in trained
    )
    return none, ceiling


def main(arguments: Sequence[str] | None = None) -> int:
    """Go through the suites, up to the first that passes; returns 1 if none does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seed", type=int, default=900, help="which no experiment uses (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: BIRD_DATA)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, suite in suites(read_vision(options.recipe)):
        none, ceiling = none_and_ceiling(
            VisionExperiment(suite, options.out, torch.device("cpu"), options.data), options.seed
        )
        _say(f"{name}: pooled {none.pooled:.1%} and {ceiling.pooled:.1%}, clean {none.clean:.1%}, {ceiling.clean:.1%}")
        for kind in none.corrupted:
            _say(f"  {kind}: {fmean(none.corrupted[kind]):.1%} and {fmean(ceiling.corrupted[kind]):.1%}")
        found = faults(none, ceiling)
        _say("\n".join(f"  fails: {fault}" for fault in found) or "  passes")
        if not found:
            return 0
    return 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
