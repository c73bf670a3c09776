"""The demo: a recipe at the size asked for, killed and gone on with; and that test images decide nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bird.lab import cli
from bird.lab.experiment import Cell
from bird.lab.stages import complete, lineage
from bird.lab.vision import experiment as experiments
from bird.lab.vision.data import Images
from bird.lab.vision.experiment import VisionExperiment
from bird.lab.vision.recipe import VisionRecipe, read_vision

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path) -> subprocess.Popen[str]:
    """``python -m bird demo``, on one thread, so that the numbers do not depend on how busy the machine is."""
    arguments = ["demo", "--quick", "--steps", "8", "--device", "cpu", "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "bird", *arguments], cwd=ROOT, env=environment, **pipes)


def kill_once_there(run: subprocess.Popen[str], folder: Path, pattern: str) -> set[int]:
    """Kill a run when a file has come; the processes that it had started."""
    deadline = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(0.005)
    workers = descendants(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    return workers


def descendants(process: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    children = {child for child, parent in parents.items() if parent == process}
    return children.union(*map(descendants, children))


def ended(run: subprocess.Popen[str]) -> str:
    """What a run said that came to its end."""
    text, _ = run.communicate(timeout=240)
    assert run.returncode == 0, text
    assert "| BIRD " in text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that nobody disturbed."""
    folder = tmp_path_factory.mktemp("demo") / "whole"
    ended(start(folder))
    assert (folder / "mobilenetv2-resnet-corruptions.png").read_bytes().startswith(b"\x89PNG")
    return folder


def cells(root: Path, *methods: str) -> list[Cell]:
    recipe = sized("--quick", "--steps", "8")
    return VisionExperiment(recipe, root, torch.device("cpu"), progress=False).cells(methods=methods)


def test_killed_and_gone_on_with_it_ends_with_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    """And a killed demo leaves nobody behind who writes to its folder. What it makes is what one method needs alone."""
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    of_all, own = (lineage(cells(broken, method)[0].wanted) for method in ("none", "continued-alpha"))
    for stage in own:
        if stage.key not in {other.key for other in of_all}:
            shutil.rmtree(stage.folder(broken))
    for path in broken.iterdir():
        if path.is_file():
            path.unlink()
    workers = kill_once_there(start(broken), broken, "continued-*/phase1/last.pt")
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives the demo"
        time.sleep(0.01)
    assert not workers or len(workers) >= cli.cores()
    assert not (broken / "results.json").exists()
    text = ended(start(broken))
    assert (broken / "README.md").read_text() in text
    assert (broken / "accuracies.csv").read_bytes() == (whole / "accuracies.csv").read_bytes()
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (broken, whole))
    assert ours["cells"] == theirs["cells"]
    assert [(cell["method"], cell["seed"]) for cell in ours["cells"]] == [
        (method, 0) for method in ("None", "Continued, alpha", "BIRD", "Ceiling")
    ]
    assert not list(broken.rglob(".partial*"))


def sized(*arguments: str) -> VisionRecipe:
    options = cli._parser().parse_args(["demo", *arguments])
    experiment, _ = cli._experiment(options, torch.device("cpu"), 1)
    return experiment.recipe


def test_the_demo_is_a_recipe_at_the_size_asked_for() -> None:
    recipe = read_vision(cli.DEMO)
    assert sized() == recipe
    assert recipe.pretraining == replace(recipe.transfer, lr=2 * recipe.transfer.lr)
    large = sized("--batch", "32768", "--chunk", "512")
    for stage in ("transfer", "pretraining"):
        assert getattr(large, stage) == replace(getattr(recipe, stage), batch_size=32768, chunk_size=512)
    quick = sized("--quick", "--steps", "7")
    assert (quick.transfer.steps, quick.transfer.batch_size, quick.seeds) == (7, 64, 1)
    assert quick.student == replace(recipe.student, limit_per_class=40)
    assert sized("--quick").pretraining.steps == 40


def test_a_stage_is_named_after_the_images_in_memory_only_where_they_are_said() -> None:
    names = []
    for recipe in (sized(), sized("--chunk", "16"), sized("--chunk", "32")):
        experiment = VisionExperiment(recipe, Path(), torch.device("cpu"))
        stages = lineage(experiment.cells(methods=["bird"], seeds=1)[0].wanted)
        names.append([stage.key for stage in stages])
        assert ("chunk_size" in stages[0].about["budget"]) == (recipe.transfer.chunk_size is not None)
    assert not set(names[0]) & set(names[1])
    assert not set(names[1]) & set(names[2])


def test_test_images_decide_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other test images every weight and history stays as it was; only the scores change."""
    real, threads = experiments._splits, torch.get_num_threads()

    def with_other_test(*arguments: object) -> object:
        splits = real(*arguments)  # type: ignore[arg-type]
        noise = torch.randint(0, 256, splits.test.images.shape, dtype=torch.uint8)
        return replace(splits, test=Images(noise, splits.test.labels))

    monkeypatch.setattr(experiments, "_splits", with_other_test)
    asked = cells(tmp_path, "bird", "ceiling")
    torch.set_num_threads(1)  # as the demo does
    complete([stage for cell in asked for stage in cell.wanted], tmp_path)
    torch.set_num_threads(threads)
    for cell in asked:
        assert cell.training is not None
        for stage in lineage([cell.training]):
            a, b = (torch.load(stage.folder(root) / "model.pt", weights_only=True) for root in (whole, tmp_path))
            assert all(a[name].equal(b[name]) for name in b)
            a, b = ((stage.result(root) or {})["histories"] for root in (whole, tmp_path))
            assert a == b
        assert cell.scores["score"].result(whole) != cell.scores["score"].result(tmp_path)


@pytest.mark.smoke
def test_the_command_line_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--device", "cpu", "--seeds", "0"], "seeds must be at least 1, not 0"),
        (["--device", "cpu", "--steps", "0"], "steps must be at least 1, not 0"),
    ):
        assert cli.main(["demo", "--out", str(tmp_path / "a"), *arguments]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_what_the_demo_needs_is_named_by_its_own_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    for command, extra in (("demo", "demo"), ("run fashion/digits", "vision")):
        assert cli.main([*command.split(), "--out", str(tmp_path / "a"), "--device", "cpu"]) == 2
        assert f"matplotlib is not installed: pip install 'bird-kernels[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
