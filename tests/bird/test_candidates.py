"""`bird select` on a tiny recipe: properties and accuracies against their sources, the page, and its files."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from bird import Teacher
from bird.lab.vision import candidates
from bird.lab.vision import experiment as experiments
from bird.lab.vision.candidates import MODELS
from bird.lab.vision.experiment import Made, VisionExperiment
from bird.lab.vision.selection import measure_teacher
from tests.bird.tiny_recipes import DIGITS, command, experiment_of, written

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which the vision extra brings")

RECIPE = (
    DIGITS
    + """
networks.a = { teacher = "plain", student = "resnet-tiny" }
networks.b = { teacher = "plain", student = "plain" }
variants.usual = {}
variants.short = { teacher_steps = 4 }
variants.clean = { teacher_corruptions = [] }
variants.own = { teacher = { data = "digits", classes = [5, 6, 7, 8], augment = "none" } }
variants.fog = { teacher_corruptions = ["fog"] }
variants.early = { teacher_layer = "block1" }
"""
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = (
        ('corruptions = ["brightness"]\n', 'corruptions = ["brightness", "fog"]\n'),
        ("images = 60", "images = 50"),
    )
    fewer = ("limit_per_class = 100", "limit_per_class = 15"), ("steps = 12", "steps = 16")
    path = written(tmp_path_factory.mktemp("recipe"), RECIPE, *changes, *fewer)
    assert command("select", path) == 0
    return path


@pytest.fixture
def experiment(path: Path) -> VisionExperiment:
    return experiment_of(path)


def made(experiment: VisionExperiment) -> dict[str, int]:
    kinds = [path.parent.name.split("-")[0] for path in experiment.root.glob("*/result.json")]
    return {kind: kinds.count(kind) for kind in kinds}


def test_no_transfer_is_needed_and_what_is_shared_is_made_once(experiment: VisionExperiment) -> None:
    # Teachers, all of one network: usual (and early), short, clean, own, fog.
    assert made(experiment) == {"teacher": 5, "student": 2, "properties": 12}


def test_a_teacher_is_what_its_variant_says(experiment: VisionExperiment) -> None:
    about = {c.variant: c.scores["properties"].parents[0].about for c in experiment.candidates(networks=["a"])}
    assert about["usual"]["corruptions"] == about["short"]["corruptions"] == ("brightness", "fog")
    assert about["clean"]["corruptions"] == ()
    assert about["fog"]["corruptions"] == ("fog",)
    assert (about["usual"]["budget"]["steps"], about["short"]["budget"]["steps"]) == (16, 4)
    assert about["own"]["data"]["classes"] == (5, 6, 7, 8)
    assert about["usual"]["data"]["classes"] == about["clean"]["data"]["classes"] == (0, 1, 2)


def test_properties_are_those_of_the_networks(experiment: VisionExperiment) -> None:
    """Measured again from the stages' weights, on the first 50 validation images of the fixed order."""
    candidate = next(c for c in experiment.candidates(networks=["a"]) if c.variant == "early")
    guide, student = candidate.scores["properties"].parents
    recipe, device = experiment.recipe, torch.device("cpu")
    data = experiments._splits(recipe.student, 0, None)
    assert len(data.validation) > 50
    order = torch.randperm(len(data.validation), generator=torch.Generator().manual_seed(0))[:50]
    expected = measure_teacher(
        Teacher(Made("plain", recipe.teacher, guide).model(experiment.root, device), ["block1"]),
        Teacher(Made("resnet-tiny", recipe.student, student).model(experiment.root, device), ["layer3"]),
        replace(data, validation=data.validation.select(order)),
        corruptions=("brightness", "fog"),
    )
    result = candidate.scores["properties"].result(experiment.root)
    assert result is not None
    assert result == expected._asdict() | {"properties": asdict(expected.properties)}


def test_accuracies_come_in_when_they_are_there(
    experiment: VisionExperiment, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = experiment.root / "teachers/try"
    page = (report / "README.md").read_text()
    assert "accuracy after transfer" not in page
    assert "explained" not in page
    assert {path.name for path in report.iterdir()} == {
        "README.md", "teachers.csv", "results.json", "resnet-tiny.png", "plain.png",
    }  # fmt: skip
    before = (report / "plain.png").read_bytes()
    assert command("run", path, "--method", "none", "bird") == 0
    capsys.readouterr()
    assert command("select", path) == 0
    page = capsys.readouterr().out
    assert page.count("### ") == 3  # each student, and all
    assert (report / "plain.png").read_bytes() != before
    with (report / "teachers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    cells = {(c.networks, c.variant, c.method): c.scores["score"] for c in experiment.cells()}
    for row in rows:
        for column, method in (("robust_accuracy", "bird"), ("untouched", "none")):
            score = cells[row["networks"], row["variant"], method].result(experiment.root)
            assert score is not None
            held_out = [*score["corrupted"]["contrast"], *score["corrupted"]["speckle_noise"]]
            assert float(row[column]) == pytest.approx(fmean([score["clean"], score["clean"], *held_out]))
    check_regression(rows, json.loads((report / "results.json").read_text())["regressions"]["all students"])


def check_regression(rows: list[dict[str, str]], found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Least squares by the normal equations, from the file."""
    y = np.array([float(row["robust_accuracy"]) for row in rows])
    for kind, predictors in MODELS.items():
        x = np.array([[1.0, *(float(row[name]) for name in predictors)] for row in rows])
        errors = y - x @ np.linalg.solve(x.T @ x, x.T @ y)
        assert found[kind]["fit"]["r2"] == pytest.approx(1 - errors @ errors / ((y - y.mean()) ** 2).sum(), abs=1e-6)


def test_a_choice_of_teachers(path: Path, experiment: VisionExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("select", path, "--arch", "b", "--variant", "usual", "own") == 0
    page = capsys.readouterr().out
    assert "2 candidates" in page
    assert "b, own" in page
    assert "a, own" not in page
    assert "b, clean" not in page


@pytest.mark.smoke
def test_nothing_measured(tmp_path: Path, experiment: VisionExperiment) -> None:
    with pytest.raises(ValueError, match=r"no teacher of .* was measured in .*: bird select it first"):
        candidates.write_teachers(replace(experiment, root=tmp_path), experiment.candidates(), tmp_path)
