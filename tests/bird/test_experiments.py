"""A tiny recipe through the command line: its stages, scores against an independent evaluation, its page and files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
import scipy.stats
import torch

from bird import Taps, Teacher, cka, cli, experiments, recipes, reproduction, stages
from bird.evaluation import accuracy, robustness
from bird.experiments import Experiment
from bird.vision.data import Images, to_float

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which the vision extra brings")

RECIPE = """
title = "A try"
methods = ["none", "continued", "lp", "lwf", "bird", "ceiling"]
corruptions = ["brightness"]
held_out = ["contrast", "speckle_noise"]
seeds = 2
[teacher]
data = "digits"
classes = [0, 1, 2]
augment = "crop"
[student]
data = "digits"
classes = [5, 6, 7, 8]
augment = "none"
[pretraining]
steps = 12
batch_size = 16
lr = 0.05
[transfer]
steps = 8
batch_size = 16
lr = 0.05
[scoring]
corruptions = ["contrast", "speckle_noise", "brightness"]
images = 60
[networks.pair]
teacher = "plain"
student = "resnet-tiny"
paper = { bird = 54.77 }
[variants.plain]
[variants."batch 4"]
methods = ["none", "bird", "ceiling"]
batch_size = 4
[variants.layer]
methods = ["none", "bird", "ceiling"]
student_layer = "layer2"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "try.toml").write_text(RECIPE)
    arguments = ["run", str(folder / "try.toml"), "--out", str(folder / "runs"), "--device", "cpu", "--jobs", "1"]
    assert cli.main(arguments) == 0
    return folder


@pytest.fixture
def experiment(folder: Path) -> Experiment:
    return Experiment(recipes.read(str(folder / "try.toml")), folder / "runs", torch.device("cpu"))


def test_what_is_shared_is_made_once(experiment: Experiment) -> None:
    kinds = [path.name.split("-")[0] for path in experiment.root.iterdir() if (path / "result.json").exists()]
    count = {kind: kinds.count(kind) for kind in kinds}
    # Two seeds. BIRD in three variants, the ceiling in two (layers do not touch it), each scored once.
    assert count["teacher"] == count["student"] == count["continued"] == count["lp"] == count["lwf"] == 2
    assert (count["bird"], count["ceiling"]) == (6, 4)
    assert count["score"] == 2 * (1 + 1 + 1 + 1 + 3 + 2)
    # the student's two layers are compared with the teacher's, each where a variant asks for it
    assert count["alignment"] == 2 * (2 + 1 + 1 + 1 + 3 + 3)


def test_scores_are_those_of_an_independent_evaluation(experiment: Experiment) -> None:
    data = experiments._splits(experiment.recipe.student, 1, None)
    test = experiments._first(data.test, 60)
    assert len(test) == 60
    assert len(data.test) == 143  # a fifth of each class
    cells = {c.method: c for c in experiment.cells(variants=["plain"]) if c.seed == 1}
    for method, source in (("bird", "student"), ("lwf", "teacher")):
        cell = cells[method]
        network = "resnet-tiny" if source == "student" else "plain"
        made = experiments.Made(network, experiment.recipe.student, cell.training)
        model = made.model(experiment.root, torch.device("cpu"))
        score = cell.score.result(experiment.root)
        assert score is not None
        assert score["clean"] == accuracy(model, test)
        exact = robustness(model, test, experiment.recipe.scoring.corruptions).corrupted
        for name, accuracies in exact.items():  # bytes or not may change a picture or two
            assert score["corrupted"][name] == pytest.approx(accuracies, abs=2.5 / 60)
        teacher = experiments.Made("plain", experiment.recipe.teacher, cells["none"].alignment.parents[1])
        theirs = Teacher(teacher.model(experiment.root, torch.device("cpu")), "block3")
        layer = "layer3" if source == "student" else "block3"
        x = to_float(test.images)
        with torch.no_grad(), Taps(model.eval(), layer) as taps:
            model(x)
            expected = cka(taps.pop()[layer], theirs(x)["block3"], estimator="unbiased").item()
        aligned = cell.alignment.result(experiment.root)
        assert aligned is not None
        assert aligned["cka"] == pytest.approx(expected, abs=1e-5)


def test_a_second_run_makes_nothing(experiment: Experiment, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in experiment.root.glob("*/*")}
    assert cli.main(["run", str(folder / "try.toml"), "--out", str(experiment.root), "--device", "cpu"]) == 0
    assert {path: path.stat().st_mtime_ns for path in experiment.root.glob("*/*.json") if path in before} == {
        path: time for path, time in before.items() if path.suffix == ".json" and "reports" not in path.parts
    }
    assert "[1/" not in capsys.readouterr().out


def test_compiled_runs_make_the_same_stages(
    experiment: Experiment, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That `fit` compiles is tested where `fit` is; here, who asks for it: teachers, students and methods."""
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    options = ["--out", str(tmp_path), "--device", "cpu", "--jobs", "1", "--seeds", "1", "--variant", "plain"]
    assert cli.main(["run", str(folder / "try.toml"), *options, "--method", "none", "bird", "--compile"]) == 0
    assert sorted(compiled) == ["PlainNet", "ResNet", "ResNet"]
    cells = json.loads((tmp_path / "reports/try/results.json").read_text())["cells"]
    assert [(cell["method"], cell["gap_recovered"]) for cell in cells] == [("None", None), ("BIRD", None)]
    assert {path.name for path in tmp_path.iterdir()} - {"reports"} <= {path.name for path in experiment.root.iterdir()}


def test_the_page_and_its_files(experiment: Experiment, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder / "try.toml"), "--out", str(experiment.root)]) == 0
    page = capsys.readouterr().out
    report = experiment.root / "reports" / "try"
    assert {path.name for path in report.iterdir()} == {
        "README.md", "results.json", "accuracies.csv", "recovered.png",
        *(f"pair-{v}-{p}.png" for v in ("plain", "batch-4", "layer") for p in ("corruptions", "training")),
    }  # fmt: skip
    with (report / "accuracies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (6 + 3 + 3) * (1 + 3 * 5)
    of = [r for r in rows if (r["variant"], r["method"], r["seed"]) == ("plain", "bird", "1")]
    clean = next(float(r["accuracy"]) for r in of if r["severity"] == "0")
    held_out = [float(r["accuracy"]) for r in of if r["corruption"] in ("contrast", "speckle_noise")]
    assert len(held_out) == 10
    cells = json.loads((report / "results.json").read_text())["cells"]
    number = {(c["variant"], c["method"], c["seed"]): c for c in cells}
    bird = number["plain", "BIRD", 1]
    pooled = fmean([*held_out, clean, clean])  # severity 0 of two corruptions
    assert bird["pooled"] == pytest.approx(pooled)
    none, ceiling = (number["plain", title, 1]["pooled"] for title in ("None", "Ceiling"))
    assert bird["gap_recovered"] == pytest.approx((pooled - none) / (ceiling - none))
    both = [100 * number["plain", "BIRD", seed]["pooled"] for seed in (0, 1)]
    assert re.search(rf"\| BIRD +\| +54.77 \| +{fmean(both):.1f} ± {stdev(both):.1f} \|", page)
    assert "| BIRD " in page.split("loss, %")[1]  # what guidance costs
    assert page.count("| robust accuracy ") == 1  # the other variants have nobody to compare BIRD with


def test_what_is_missing_is_said(experiment: Experiment, tmp_path: Path) -> None:
    cells = experiment.cells(variants=["plain"], seeds=3)
    comparisons, missing = reproduction.collect(experiment, cells)
    assert {cell.seed for cell in missing} == {2}
    assert len(missing) == 6
    assert {o.seed for o in comparisons["pair", "plain"].outcomes} == {0, 1}
    assert "6 cells are not done, the first: pair, plain, None, seed 2" in reproduction.page(experiment, cells)
    one = next(cell for cell in cells if (cell.method, cell.seed) == ("lp", 1))
    path = one.score.folder(experiment.root) / "result.json"
    path.rename(path.with_suffix(".aside"))
    try:  # a seed that lacks a method would set means over other seeds beside each other
        comparisons, missing = reproduction.collect(experiment, cells)
    finally:
        path.with_suffix(".aside").rename(path)
    assert {o.seed for o in comparisons["pair", "plain"].outcomes} == {0}
    assert len(missing) == 7
    empty = Experiment(experiment.recipe, tmp_path, experiment.device)
    with pytest.raises(ValueError, match="no cell of try is done"):
        reproduction.write(empty, empty.cells(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_paired_p() -> None:
    a, b = [0.61, 0.64, 0.7, 0.66], [0.6, 0.61, 0.71, 0.6]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    assert reproduction.paired_p(differences) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)


def test_stages_do_not_depend_on_where(experiment: Experiment, tmp_path: Path) -> None:
    elsewhere = Experiment(experiment.recipe, tmp_path, torch.device("meta"), tmp_path, progress=True)
    assert [c.score.key for c in elsewhere.cells()] == [c.score.key for c in experiment.cells()]
    assert len({s.key for s in stages.lineage(c.score for c in elsewhere.cells())}) > 20


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arch", "pear"], "has no 'pear' among its networks: 'pair'"),
        (["--method", "brid"], "has no 'brid' among its methods"),
        (["--variant", "none"], "has no 'none' among its variants: 'plain', 'batch 4', 'layer'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_a_wrong_choice(folder: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(folder / "try.toml"), "--out", str(folder / "no"), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not (folder / "no").exists()


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "vision/c10-c100", "--arch", "mobilenetv2", "--seeds", "1", "--device", "cpu", "--jobs", "1"]
    assert cli.main([*arguments, "--data", str(tmp_path), "--out", str(tmp_path / "runs")]) == 2
    assert "cifar-10" in capsys.readouterr().err


def test_kept_pictures_are_those_of_the_data_asked_for() -> None:
    data = Images(torch.arange(256, dtype=torch.uint8).repeat(4, 1, 1, 4).view(4, 1, 32, 32), torch.arange(4))
    scoring = recipes.Scoring(("contrast",))
    first = list(experiments._corrupted(data, scoring, ("a",)))
    assert [name for name, _ in first] == ["contrast"] * 5
    again = list(experiments._corrupted(data.select(torch.arange(2)), scoring, ("a",)))
    assert len(again[0][1]) == 4  # kept
    other = list(experiments._corrupted(data.select(torch.arange(2)), scoring, ("b",)))
    assert len(other[0][1]) == 2
