"""The rule that chooses a suite of corruptions, on tables by hand; and classes halved by a recipe's seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bird.lab.vision import suite
from bird.lab.vision.evaluation import Robustness
from bird.lab.vision.experiment import VisionExperiment
from bird.lab.vision.recipe import RecipeVariant, Source, read_vision
from bird.lab.vision.suite import faults, none_and_ceiling, suites
from tests.bird.tiny_recipes import TINY, command, experiment_of, written

PHOTOS = read_vision("fashion/photos")


def table(clean: float, *losses: float) -> Robustness:
    """Under the k-th kind 0.9 minus its loss, at each of five severities."""
    return Robustness(clean, {f"kind {k}": [0.9 - loss] * 5 for k, loss in enumerate(losses)})


CEILING = table(0.92, *[0] * 19)
GOOD = 10 * [0.26] + 9 * [0.0]


@pytest.mark.parametrize(
    ("none", "said"),
    [
        (table(0.92, *GOOD), None),
        (table(0.899, *GOOD), None),
        (table(0.889, *GOOD), "clean accuracies are 3.1 points apart, above 3"),
        (table(0.951, *GOOD), "clean accuracies are 3.1 points apart, above 3"),  # to the other side as well
        (table(0.92, *19 * [0.121]), None),  # 5/6 of it and of no clean gap: 10.1
        (table(0.92, *19 * [0.119]), "the pooled gap is 9.9 points, below 10"),
        (table(0.9, *19 * [0.119]), None),  # ... which a clean gap of 2 makes 10.3
        (table(0.92, 0.62, *9 * [0.21], *9 * [0.0]), None),  # 0.62 of 2.51
        (table(0.92, 0.66, *9 * [0.21], *9 * [0.0]), "kind 0 alone has 26 % of the gap, above 25"),
        (table(0.92, *9 * [0.24], 0.051, *9 * [0.04]), None),
        (table(0.92, *9 * [0.24], 0.049, *9 * [0.04]), "9 kinds lose 5 points, fewer than 10"),
    ],
)
def test_the_rule_on_each_side_of_every_condition(none: Robustness, said: str | None) -> None:
    assert faults(none, CEILING) == ([] if said is None else [said])


def test_every_fault_is_named() -> None:
    assert len(faults(table(0.8, 0.2, *18 * [-0.05]), CEILING)) == 4
    assert "kind 0 alone has 100 % of the gap, above 25" in faults(table(0.9, *19 * [0.0]), CEILING)


def test_suites_are_tried_strengths_first() -> None:
    found = [(s.strongest, s.student.data, s.teacher.data, *s.networks) for _, s in suites(PHOTOS)]
    backgrounds = [("fashion-photos", "resnet-tiny"), ("fashion-levels", "resnet-tiny")]
    backgrounds.append(("fashion-mnist", "resnet-tiny-standardised"))
    assert found == [(k, data, data, network) for k in (5, 6, 7) for data, network in backgrounds]


def test_only_the_first_that_passes_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, str, int]] = []

    def by_hand(experiment: VisionExperiment, seed: int) -> tuple[Robustness, Robustness]:
        asked.append((experiment.recipe.strongest, experiment.recipe.student.data, seed))
        return table(0.92, *(GOOD if len(asked) == 4 else 19 * [0.01])), CEILING

    monkeypatch.setattr(suite, "none_and_ceiling", by_hand)
    assert suite.main(["fashion/photos"]) == 0
    expected = [(5, "fashion-photos"), (5, "fashion-levels"), (5, "fashion-mnist"), (6, "fashion-photos")]
    assert asked == [(*one, 900) for one in expected]
    assert "fails: the pooled gap is 0.8 points, below 10" in capsys.readouterr().out
    monkeypatch.setattr(suite, "none_and_ceiling", lambda *_: (table(0.92, *19 * [0.0]), CEILING))
    assert suite.main(["fashion/photos"]) == 1


# ---------------------------------------------------------------------------------------------- classes


def test_a_seed_halves_the_classes() -> None:
    halves = []
    for seed in (*range(12), 900):
        own = PHOTOS.at(seed)
        theirs, ours = own.teacher.classes, own.student.classes
        assert theirs is not None
        assert ours is not None
        assert len(theirs) == len(ours) == 5
        assert sorted(theirs + ours) == list(range(10))
        assert own == PHOTOS.at(seed) == own.at(seed)
        halves.append(theirs)
    assert len(set(halves)) == 13
    counts = torch.bincount(torch.tensor(halves[:12]).flatten(), minlength=10)
    assert counts.tolist() == [8, 9, 3, 6, 5, 7, 7, 8, 4, 3]  # of twelve: every class is on either side
    plain = read_vision("fashion/classes")
    assert plain.at(3) is plain


def test_cells_and_teachers_follow_their_seed() -> None:
    taught = RecipeVariant(teacher=Source("fashion-photos", limit_per_class=7))
    recipe = replace(PHOTOS, variants={"": RecipeVariant(), "few": taught}, claims={})
    experiment = VisionExperiment(recipe, Path("runs"), torch.device("cpu"))
    for seed in (0, 5):
        own = recipe.at(seed)
        for variant in ("", "few"):
            cell = experiment.cell("resnet-tiny", variant, "bird", seed)
            assert cell.training is not None
            teacher, student = (stage.about for stage in cell.training.parents)
            assert (teacher["data"]["classes"], student["data"]["classes"]) == (
                own.teacher.classes,
                own.student.classes,
            )
            assert cell.scores["score"].about["data"]["classes"] == own.student.classes
    titles = {c.scores["properties"].key for c in experiment.candidates(seeds=3)}
    assert len(titles) == 6


def test_strengths_beyond_five_name_what_they_decide() -> None:
    def keys(strongest: int) -> dict[str, str]:
        experiment = VisionExperiment(replace(PHOTOS, strongest=strongest), Path("runs"), torch.device("cpu"))
        cells = {method: experiment.cell("resnet-tiny", "", method, 0) for method in ("none", "bird", "ceiling")}
        found = {method: cell.training.key for method, cell in cells.items() if cell.training is not None}
        return found | {"score": cells["none"].scores["score"].key}

    five, seven = keys(5), keys(7)
    assert {name for name in five if five[name] != seven[name]} == {"bird", "ceiling", "score"}


def test_such_a_recipe_runs_to_its_page(tmp_path: Path) -> None:
    more = ('title = "Tiny"', 'title = "Tiny"\nsplit_classes = true\nstrongest = 7')
    path = written(tmp_path, TINY, more, ('["none"]', '["none", "continued", "ceiling"]'))
    assert command("run", path) == 0
    experiment = experiment_of(path)
    of_none, _, of_ceiling = (cell.results(experiment.root) or {} for cell in experiment.cells())
    assert {len(shares) for shares in of_none["score"]["corrupted"].values()} == {7}
    assert of_ceiling["training"]["histories"]
    rows = (experiment.root / "reports" / "try" / "accuracies.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * (1 + 2 * 7)
    none, ceiling = none_and_ceiling(experiment, 900)
    assert [len(shares) for shares in none.corrupted.values()] == [7, 7]
    assert none.corrupted.keys() == ceiling.corrupted.keys() == {"brightness", "contrast"}


def test_what_cannot_be_is_said() -> None:
    some = replace(PHOTOS.student, classes=(0, 1))
    for change, said in (
        ({"student": some}, "split_classes is for a teacher and a student of the same data, and without classes"),
        ({"teacher": replace(PHOTOS.teacher, data="fashion-levels")}, "split_classes is for a teacher and a student"),
        ({"variants": {"": RecipeVariant(teacher=some)}}, "split_classes is for a teacher and a student"),
        ({"strongest": 8}, "strongest must be 5 to 7, not 8"),
        ({"strongest": 4}, "strongest must be 5 to 7, not 4"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(PHOTOS, **change)  # type: ignore[arg-type]
