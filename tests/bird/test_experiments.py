"""A tiny recipe through the command line: its stages, scores against an independent evaluation, its page and files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch

from bird import Taps, Teacher, cka
from bird.lab import cli, stages
from bird.lab.experiment import collect
from bird.lab.vision import evaluation
from bird.lab.vision import experiment as experiments
from bird.lab.vision import recipe as recipes
from bird.lab.vision import report as reproduction
from bird.lab.vision.corruptions import corrupt
from bird.lab.vision.data import Images, to_float
from bird.lab.vision.evaluation import accuracy
from bird.lab.vision.experiment import VisionExperiment
from tests.bird.official_files import write_image

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
def experiment(folder: Path) -> VisionExperiment:
    return VisionExperiment(recipes.read(str(folder / "try.toml")), folder / "runs", torch.device("cpu"))


def test_what_is_shared_is_made_once(experiment: VisionExperiment) -> None:
    kinds = [path.name.split("-")[0] for path in experiment.root.iterdir() if (path / "result.json").exists()]
    count = {kind: kinds.count(kind) for kind in kinds}
    # Two seeds. BIRD in three variants, the ceiling in two (layers do not touch it), each scored once.
    assert count["teacher"] == count["student"] == count["continued"] == count["lp"] == count["lwf"] == 2
    assert (count["bird"], count["ceiling"]) == (6, 4)
    assert count["score"] == 2 * (1 + 1 + 1 + 1 + 3 + 2)
    # the student's two layers are compared with the teacher's, each where a variant asks for it
    assert count["alignment"] == 2 * (2 + 1 + 1 + 1 + 3 + 3)


def test_scores_are_those_of_an_independent_evaluation(experiment: VisionExperiment) -> None:
    data = experiments._splits(experiment.recipe.student, 1, None)
    test = evaluation.first(data.test, 60)
    assert len(test) == 60
    assert len(data.test) == 143  # a fifth of each class
    cells = {c.method: c for c in experiment.cells(variants=["plain"]) if c.seed == 1}
    for method, source in (("bird", "student"), ("lwf", "teacher")):
        cell = cells[method]
        network = "resnet-tiny" if source == "student" else "plain"
        made = experiments.Made(network, experiment.recipe.student, cell.training)
        model = made.model(experiment.root, torch.device("cpu"))
        score = cell.scores["score"].result(experiment.root)
        assert score is not None
        assert score["clean"] == accuracy(model, test)
        for name in experiment.recipe.scoring.corruptions:
            for severity, share in enumerate(score["corrupted"][name], start=1):
                view = corrupt(to_float(test.images), name, severity, index=torch.arange(60))
                view = (view.double() * 255).round().float() / 255
                assert share == (model.eval()(view).argmax(dim=1) == test.labels).sum().item() / 60
        teacher = experiments.Made("plain", experiment.recipe.teacher, cells["none"].scores["alignment"].parents[1])
        theirs = Teacher(teacher.model(experiment.root, torch.device("cpu")), "block3")
        layer = "layer3" if source == "student" else "block3"
        x = to_float(test.images)
        with torch.no_grad(), Taps(model.eval(), layer) as taps:
            model(x)
            expected = cka(taps.pop()[layer], theirs(x)["block3"], estimator="unbiased").item()
        aligned = cell.scores["alignment"].result(experiment.root)
        assert aligned is not None
        assert aligned["cka"] == pytest.approx(expected, abs=1e-5)


def test_a_second_run_makes_nothing(
    experiment: VisionExperiment, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in experiment.root.glob("*/*")}
    assert cli.main(["run", str(folder / "try.toml"), "--out", str(experiment.root), "--device", "cpu"]) == 0
    assert {path: path.stat().st_mtime_ns for path in experiment.root.glob("*/*.json") if path in before} == {
        path: time for path, time in before.items() if path.suffix == ".json" and "reports" not in path.parts
    }
    assert "[1/" not in capsys.readouterr().out


def test_compiled_runs_make_the_same_stages(
    experiment: VisionExperiment, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That `fit` compiles is tested where `fit` is; here, who asks for it: teachers, students and methods."""
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    options = ["--out", str(tmp_path), "--device", "cpu", "--jobs", "1", "--seeds", "1", "--variant", "plain"]
    assert cli.main(["run", str(folder / "try.toml"), *options, "--method", "none", "bird", "--compile"]) == 0
    assert sorted(compiled) == ["PlainNet", "ResNet", "ResNet"]
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["try-plain-none-bird-seeds-1"]  # not the whole
    about = json.loads((tmp_path / "reports/try-plain-none-bird-seeds-1/results.json").read_text())
    cells = about["cells"]
    assert [(cost["method"], cost["steps_per_second"] > 0, cost["times"]["step"] > 0) for cost in about["costs"]] == [
        ("bird", True, True)
    ]
    assert about["origin"]["torch"] == torch.__version__
    assert [(cell["method"], cell["gap_recovered"]) for cell in cells] == [("None", None), ("BIRD", None)]
    assert {path.name for path in tmp_path.iterdir()} - {"reports"} <= {path.name for path in experiment.root.iterdir()}


def test_the_page_and_its_files(experiment: VisionExperiment, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_what_is_missing_is_said(experiment: VisionExperiment, tmp_path: Path) -> None:
    cells = experiment.cells(variants=["plain"], seeds=3)
    groups, missing = collect(experiment, cells)
    assert {cell.seed for cell in missing} == {2}
    assert len(missing) == 6
    assert {o.seed for o in reproduction.comparisons(experiment, groups)["pair", "plain"].outcomes} == {0, 1}
    page = reproduction.write_vision_report(experiment, cells, tmp_path)
    assert "6 cells are not done, the first: pair, plain, None, seed 2" in page
    one = next(cell for cell in cells if (cell.method, cell.seed) == ("lp", 1))
    path = one.scores["score"].folder(experiment.root) / "result.json"
    path.rename(path.with_suffix(".aside"))
    try:  # a seed that lacks a method would set means over other seeds beside each other
        groups, missing = collect(experiment, cells)
    finally:
        path.with_suffix(".aside").rename(path)
    assert {method: [*seeds] for method, seeds in groups["pair", "plain"].items()} == {c.method: [0] for c in cells}
    assert len(missing) == 7
    empty = VisionExperiment(experiment.recipe, tmp_path, experiment.device)
    with pytest.raises(ValueError, match=r"0 of 24 cells of try are done in .*, and no seed of all methods"):
        reproduction.write_vision_report(empty, empty.cells(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_stages_do_not_depend_on_where(experiment: VisionExperiment, tmp_path: Path) -> None:
    elsewhere = VisionExperiment(experiment.recipe, tmp_path, torch.device("meta"), tmp_path, progress=True)
    assert [c.scores["score"].key for c in elsewhere.cells()] == [c.scores["score"].key for c in experiment.cells()]
    assert len({s.key for s in stages.lineage(c.scores["score"] for c in elsewhere.cells())}) > 20


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arch", "pear"], "has no 'pear' among its networks: 'pair'"),
        (["--method", "ft"], "has no 'ft' among its methods: 'none', 'continued'"),
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
    first = list(evaluation.corrupted(data, ["contrast"], "a"))
    assert [name for name, _ in first] == ["contrast"] * 5
    again = list(evaluation.corrupted(data.select(torch.arange(2)), ["contrast"], "a"))
    assert len(again[0][1]) == 4  # kept
    other = list(evaluation.corrupted(data.select(torch.arange(2)), ["contrast"], "b"))
    assert len(other[0][1]) == 2


def test_pictures_that_are_too_many_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Images(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.arange(4))
    for kept, count in ((4 * 1024 * 5, 1), (4 * 1024 * 5 - 1, 0)):  # bytes of five severities
        monkeypatch.setattr(evaluation, "KEPT", kept)
        list(evaluation.corrupted(data, ["contrast"], ("c", kept)))
        assert len(evaluation._kept) == count


def changed(folder: Path, old: str, new: str) -> str:
    assert RECIPE.count(old) == 1
    (folder / "try.toml").write_text(RECIPE.replace(old, new))
    return str(folder / "try.toml")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('student_layer = "layer2"', 'student_layer = "layr2"', "layr2.*layer2"),
        ('student_layer = "layer2"', 'teacher_layer = "blok3"', "blok3.*block3"),
        ('data = "digits"\nclasses = [0, 1, 2]', 'data = "cifar100"\nclasses = [0, 1, 2]', "3 channels, digits 1"),
        ('held_out = ["contrast", "speckle_noise"]', 'held_out = ["contrast"]\nx = 1', "there is no 'x'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, complaint: str
) -> None:
    recipe = changed(tmp_path, old, new)
    assert cli.main(["run", recipe, "--out", str(tmp_path / "runs"), "--device", "cpu", "--jobs", "2"]) == 2
    said = capsys.readouterr().err
    assert re.search(complaint, said, re.DOTALL)
    assert said.count("bird: ") == 1
    assert not (tmp_path / "runs").exists()


def test_guidance_of_a_layer_between_the_listed_ones(tmp_path: Path) -> None:
    text = RECIPE.replace('methods = ["none", "bird", "ceiling"]\nstudent_layer = "layer2"', 'methods = ["hints"]\nXXX')
    (tmp_path / "try.toml").write_text(text.replace("XXX", 'student_layer = "layer2.body.0"'))
    options = ["--out", str(tmp_path / "runs"), "--device", "cpu", "--jobs", "1", "--variant", "layer", "--seeds", "1"]
    assert cli.main(["run", str(tmp_path / "try.toml"), *options]) == 0


def test_damaged_results_name_what_to_delete(
    experiment: VisionExperiment, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And deleting that is enough."""
    root = tmp_path / "runs"
    shutil.copytree(experiment.root, root)
    command = ["run", str(folder / "try.toml"), "--out", str(root), "--device", "cpu", "--jobs", "1"]
    command += ["--variant", "plain", "--method", "none", "bird"]
    teacher = min(root.glob("teacher-*"))
    (teacher / "model.pt").write_bytes(b"PK\x03\x04 nothing")
    for path in root.glob("bird-*"):
        shutil.rmtree(path)
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert f"Delete the whole folder {teacher}, and it is made again" in said
    assert re.search(r"bird-[0-9a-f]{16} \(resnet-tiny on digits, seed \d\): ", said)  # which of many
    shutil.rmtree(teacher)
    assert cli.main(command) == 0
    cell = experiment.cells(variants=["plain"], methods=["bird"])[0]
    score = cell.scores["score"].folder(root) / "result.json"
    whole = score.read_bytes()
    score.write_bytes(b"")
    assert cli.main(command) == 2
    assert f"{score} is damaged" in capsys.readouterr().err
    score.unlink()
    assert cli.main(command) == 0
    assert score.read_bytes() == whole


def test_teachers_and_students_begin_with_different_weights(tmp_path: Path) -> None:
    """Of one network, seed and number of classes, and before the first step, as good as."""
    text = RECIPE.replace("classes = [5, 6, 7, 8]", "classes = [5, 6, 7]")
    text = text.replace('student = "resnet-tiny"', 'student = "plain"').replace("steps = 12", "steps = 1")
    (tmp_path / "try.toml").write_text(text.replace("lr = 0.05", "lr = 1e-12"))
    recipe = recipes.read(str(tmp_path / "try.toml"))
    tried = VisionExperiment(recipe, tmp_path / "runs", torch.device("cpu"), progress=False)
    teacher, student, _ = tried._pair("pair", "plain", 0)
    stages.complete([teacher.stage, student.stage], tried.root)
    weights = [
        made.model(tried.root, torch.device("cpu")).state_dict()["block1.0.weight"] for made in (student, teacher)
    ]
    assert (weights[0] - weights[1]).abs().mean() > 0.01


def test_a_folder_of_images_is_told_from_another(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for place in ("one", "two"):
        for path in (f"{place}/{part}/{name}/{i}.png" for part in ("train", "val") for name in "ab" for i in range(2)):
            write_image(tmp_path / path, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    text = re.sub(r'data = "digits"\nclasses = \[[^]]*\]', 'data = "image-folder"\nclasses = [0, 1]', RECIPE)
    (tmp_path / "try.toml").write_text(text)
    recipe = recipes.read(str(tmp_path / "try.toml"))

    def keys(place: str) -> set[str]:
        experiments._fingerprint.cache_clear()
        cells = VisionExperiment(recipe, tmp_path / "runs", torch.device("cpu"), tmp_path / place).cells()
        return {stage.key for cell in cells for stage in stages.lineage(cell.wanted)}

    before = keys("one")
    assert not before & keys("two")
    assert keys("one") == before
    write_image(tmp_path / "one/val/b/0.png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert not before & keys("one")


def test_interrupted_commands_say_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "complete", interrupt)
    options = ["--out", str(folder / "y"), "--device", "cpu", "--jobs", "1"]
    assert cli.main(["run", str(folder / "try.toml"), *options]) == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err
