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
from bird.lab.vision import report as reproduction
from bird.lab.vision.corruptions import corrupt
from bird.lab.vision.data import to_float
from bird.lab.vision.evaluation import image_accuracy
from bird.lab.vision.experiment import VisionExperiment
from tests.bird.official_files import write_image
from tests.bird.tiny_recipes import CPU, DIGITS, command, experiment_of, said, written

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which the vision extra brings")

RECIPE = (
    DIGITS
    + """
networks.pair = { teacher = "plain", student = "resnet-tiny", paper = { bird = 54.77 } }
variants.plain = { methods = ["none", "continued", "lp", "lwf", "bird", "ceiling"] }
variants."batch 4" = { batch_size = 4 }
variants.layer = { student_layer = "layer2" }
"""
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = written(tmp_path_factory.mktemp("recipe"), RECIPE, ("seeds = 1", "seeds = 2"))
    assert command("run", path) == 0
    return path


@pytest.fixture
def experiment(path: Path) -> VisionExperiment:
    return experiment_of(path)


def test_what_is_shared_is_made_once(experiment: VisionExperiment) -> None:
    kinds = [path.name.split("-")[0] for path in experiment.root.iterdir() if (path / "result.json").exists()]
    count = {kind: kinds.count(kind) for kind in kinds}
    # Two seeds. BIRD in three variants, the ceiling in two (layers do not touch it), each scored once.
    assert count["teacher"] == count["student"] == count["continued"] == count["lp"] == count["lwf"] == 2
    assert (count["bird"], count["ceiling"]) == (6, 4)
    assert count["score"] == 2 * (1 + 1 + 1 + 1 + 3 + 2)
    # the student's two layers are compared with the teacher's, each where a variant asks for it
    assert count["alignment"] == 2 * (2 + 1 + 1 + 1 + 3 + 3)


@pytest.mark.parametrize(
    ("method", "network", "layer"), [("bird", "resnet-tiny", "layer3"), ("lwf", "plain", "block3")]
)
def test_scores_are_those_of_an_independent_evaluation(
    experiment: VisionExperiment, method: str, network: str, layer: str
) -> None:
    recipe, root, device = experiment.recipe, experiment.root, torch.device("cpu")
    data = experiments._splits(recipe.student, 1, None)
    test = evaluation.first(data.test, 60)
    assert (len(test), len(data.test)) == (60, 143)  # a fifth of each class
    cells = {c.method: c for c in experiment.cells(variants=["plain"]) if c.seed == 1}
    cell = cells[method]
    model = experiments.Made(network, recipe.student, cell.training).model(root, device)
    score, aligned = (cell.scores[name].result(root) or {} for name in ("score", "alignment"))
    assert score["clean"] == image_accuracy(model, test)
    x = to_float(test.images)
    for name in recipe.scoring.corruptions:
        for severity, share in enumerate(score["corrupted"][name], start=1):
            view = (corrupt(x, name, severity, index=torch.arange(60)).double() * 255).round().float() / 255
            assert share == (model.eval()(view).argmax(dim=1) == test.labels).sum().item() / 60
    teacher = experiments.Made("plain", recipe.teacher, cells["none"].scores["alignment"].parents[1])
    theirs = Teacher(teacher.model(root, device), "block3")
    with torch.no_grad(), Taps(model.eval(), layer) as taps:
        model(x)
        expected = cka(taps.pop()[layer], theirs(x)["block3"], estimator="unbiased").item()
    assert aligned["cka"] == pytest.approx(expected, abs=1e-5)


def test_a_second_run_makes_nothing(
    experiment: VisionExperiment, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in experiment.root.glob("*/*.json") if "reports" not in p.parts}

    before = times()
    assert command("run", path) == 0
    assert times() == before
    assert "[1/" not in capsys.readouterr().out


def test_compiled_runs_make_the_same_stages(
    experiment: VisionExperiment, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That `fit` compiles is tested where `fit` is; here, who asks for it: teachers, students and methods."""
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    options = ["--seeds", "1", "--variant", "plain", "--method", "none", "bird", "--compile"]
    assert command("run", path, *options, out=tmp_path) == 0
    assert sorted(compiled) == ["PlainNet", "ResNet", "ResNet"]
    (report,) = (tmp_path / "reports").iterdir()
    assert report.name == "try-plain-none-bird-seeds-1"  # not the whole
    about = json.loads((report / "results.json").read_text())
    (cost,) = about["costs"]
    assert (cost["method"], cost["steps_per_second"] > 0, cost["times"]["step"] > 0) == ("bird", True, True)
    assert about["origin"]["torch"] == torch.__version__
    assert [(cell["method"], cell["gap_recovered"]) for cell in about["cells"]] == [("None", None), ("BIRD", None)]
    assert {p.name for p in tmp_path.iterdir()} - {"reports"} <= {p.name for p in experiment.root.iterdir()}


def test_the_page_and_its_files(experiment: VisionExperiment, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", path) == 0
    page, report = capsys.readouterr().out, experiment.root / "reports" / "try"
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
    pooled = fmean([*held_out, clean, clean])  # severity 0 of two corruptions
    assert number["plain", "BIRD", 1]["pooled"] == pytest.approx(pooled)
    none, ceiling = (number["plain", title, 1]["pooled"] for title in ("None", "Ceiling"))
    assert number["plain", "BIRD", 1]["gap_recovered"] == pytest.approx((pooled - none) / (ceiling - none))
    both = [100 * number["plain", "BIRD", seed]["pooled"] for seed in (0, 1)]
    assert re.search(rf"\| BIRD +\| +54.77 \| +{fmean(both):.1f} ± {stdev(both):.1f} \|", page)
    assert "| BIRD " in page.split("loss, %")[1]  # what guidance costs
    told = "deviation.\n\nAnother network than the others, plain, because they start from the teacher: LP, LwF.\n\n|"
    assert page.count(told) == page.count("Another network") == 1  # in the variant that has them
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
        (["--method", "ft"], "has no 'ft' among its methods: 'none', 'bird'"),
        (["--variant", "none"], "has no 'none' among its variants: 'plain', 'batch 4', 'layer'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_a_wrong_choice(path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("run", path, *arguments, out=path.parent / "no") == 2
    assert complaint in said(capsys)
    assert not (path.parent / "no").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('student_layer = "layer2"', 'student_layer = "layr2"', "layr2.*layer2"),
        ('student_layer = "layer2"', 'teacher_layer = "blok3"', "blok3.*block3"),
        ('student_layer = "layer2"', 'student_layer = "layer*"', r"'layer\*' is a glob: name one layer"),
        ('"digits", classes = [0, 1, 2]', '"cifar100", classes = [0, 1, 2]', "3 channels, digits 1"),
        ("seeds = 1", "seeds = 1\nx = 1", "there is no 'x'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, complaint: str
) -> None:
    assert command("run", written(tmp_path, RECIPE, (old, new))) == 2
    text = said(capsys)
    assert re.search(complaint, text, re.DOTALL)
    assert text.count("bird: ") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.smoke
def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "vision/c10-c100", "--arch", "mobilenetv2", "--seeds", "1", *CPU]
    assert cli.main([*arguments, "--data", str(tmp_path), "--out", str(tmp_path / "runs")]) == 2
    assert "cifar-10" in said(capsys)


def test_guidance_of_a_layer_between_the_listed_ones(tmp_path: Path) -> None:
    between = 'methods = ["hints"], student_layer = "layer2.body.0"'
    path = written(tmp_path, RECIPE, ('student_layer = "layer2"', between))
    assert command("run", path, "--variant", "layer") == 0


def test_damaged_results_name_what_to_delete(
    experiment: VisionExperiment, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And deleting that is enough."""
    root = tmp_path / "runs"
    shutil.copytree(experiment.root, root)
    choice = ("--variant", "plain", "--method", "none", "bird")
    teacher = min(root.glob("teacher-*"))
    (teacher / "model.pt").write_bytes(b"PK\x03\x04 nothing")
    for folder in root.glob("bird-*"):
        shutil.rmtree(folder)
    assert command("run", path, *choice, out=root) == 2
    text = said(capsys)
    assert f"Delete the whole folder {teacher}, and it is made again" in text
    assert re.search(r"bird-[0-9a-f]{16} \(resnet-tiny on digits, seed \d\): ", text)  # which of many
    shutil.rmtree(teacher)
    assert command("run", path, *choice, out=root) == 0
    cell = experiment.cells(variants=["plain"], methods=["bird"])[0]
    score = cell.scores["score"].folder(root) / "result.json"
    whole = score.read_bytes()
    score.write_bytes(b"")
    assert command("run", path, *choice, out=root) == 2
    assert f"{score} is damaged" in said(capsys)
    score.unlink()
    assert command("run", path, *choice, out=root) == 0
    assert score.read_bytes() == whole


def test_teachers_and_students_begin_with_different_weights(tmp_path: Path) -> None:
    """Of one network, seed and number of classes, and before the first step, as good as."""
    same = ("[5, 6, 7, 8]", "[5, 6, 7]"), ('"resnet-tiny"', '"plain"')
    tried = experiment_of(
        written(tmp_path, RECIPE, *same, ("steps = 12, batch_size = 16, lr = 0.05", "steps = 1, lr = 1e-12"))
    )
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
    text = re.sub(r'data = "digits", classes = \[[^]]*\]', 'data = "image-folder", classes = [0, 1]', RECIPE)
    recipe = experiment_of(written(tmp_path, text)).recipe

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
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "complete", interrupt)
    assert command("run", path, out=path.parent / "y") == 130
    assert "interrupted; the same command goes on from here" in said(capsys)
