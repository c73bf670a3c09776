"""The demo: its whole path, killed and resumed, and what it must never do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bird.lab import cli
from bird.lab.vision import demo
from bird.lab.vision.data import Images, Splits, load_fashion

ROOT = Path(__file__).resolve().parents[2]
TINY = demo.Plan(steps=40, batch_size=16, limit_per_class=12)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and lose a lot where it has to share its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """``python -m bird demo``, on one thread, so that the numbers do not depend on how busy the machine is."""
    arguments = ["demo", "--quick", "--device", "cpu", "--out", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "bird", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_once_there(run: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()


def test_killed_and_resumed_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    whole, broken = start(tmp_path / "whole"), tmp_path / "broken"
    kill_once_there(start(broken), broken / "seed0/teacher/last.pt")
    assert not (broken / "results.json").exists()
    kill_once_there(start(broken, "--resume"), broken / "seed0/bird/last.pt")
    assert not (broken / "results.json").exists()
    resumed = start(broken, "--resume")
    for run in (whole, resumed):
        text, _ = run.communicate(timeout=120)
        assert run.returncode == 0, text
        assert "| BIRD " in text
    assert (broken / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    assert (broken / "table.md").read_text() in text
    assert (broken / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not list(broken.rglob(".partial*"))
    results = json.loads((broken / "results.json").read_text())
    assert list(results["summary"]) == ["None", "FT", "Hints", "BIRD", "Ceiling"]
    assert len(results["outcomes"]) == 5


def descendants(process: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    children = {child for child, parent in parents.items() if parent == process}
    return children.union(*map(descendants, children))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds its processes in Linux's /proc")
@pytest.mark.skipif(cli.cores() < 2, reason="one core: repetitions run one after the other")
def test_repetitions_side_by_side(tmp_path: Path) -> None:
    """The numbers of repetitions one after the other; and a killed demo leaves nobody who writes to its folder."""
    options = ("--seeds", "2", "--steps", "20")
    apart = tmp_path / "apart"
    run = start(apart, *options)
    while not (apart / "seed1/teacher/last.pt").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)
    workers = descendants(run.pid)
    assert len(workers) >= 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives the demo"
        time.sleep(0.01)

    resumed = start(apart, *options, "--resume")
    text, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, text
    assert all(f"seed {seed}  BIRD" in text for seed in (0, 1))
    demo.run(tmp_path / "one by one", replace(demo.QUICK, steps=20), 2)
    assert (apart / "results.json").read_bytes() == (tmp_path / "one by one/results.json").read_bytes()


def test_a_repetition_that_fails_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError, match="for the reason above; what is done stays"):
        demo.run(tmp_path, TINY, 2, jobs=2, device="cuda:99")
    assert "cuda" in capfd.readouterr().err.lower()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    demo.run(folder, TINY, 1)
    return folder


def test_a_folder_is_not_used_twice(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"holds a finished demo.*--resume.*--out"):
        demo.run(finished, TINY, 1)
    with pytest.raises(ValueError, match="holds another demo \\(steps was 40, is 80\\): choose another --out"):
        demo.run(finished, replace(TINY, steps=80), 1, resume=True)
    (tmp_path / "plan.json").write_text((finished / "plan.json").read_text())
    with pytest.raises(FileExistsError, match="holds an unfinished demo"):
        demo.run(tmp_path, TINY, 1)


def test_a_finished_demo_is_shown_again_without_training(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "results.json").read_bytes()
    monkeypatch.setattr(demo, "robustness", None)
    lines: list[str] = []
    demo.run(finished, TINY, 1, resume=True, echo=lines.append)
    assert (finished / "results.json").read_bytes() == before
    assert any((finished / "table.md").read_text().strip() in line for line in lines)


def test_test_images_decide_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other test images every weight, history and validation score stays as it was; only the scores change."""

    def with_other_test(*arguments: object, **options: object) -> Splits:
        splits = load_fashion(*arguments, **options)  # type: ignore[arg-type]
        noise = torch.randint(0, 256, splits.test.images.shape, dtype=torch.uint8)
        return Splits(splits.train, splits.validation, Images(noise, splits.test.labels))

    monkeypatch.setattr(demo, "load_fashion", with_other_test)
    demo.run(tmp_path, TINY, 1)
    for stage in ("teacher", "none", "ft", "hints", "bird", "ceiling"):
        ours, theirs = (torch.load(f / f"seed0/{stage}/last.pt", weights_only=True) for f in (tmp_path, finished))
        assert all(torch.equal(ours["modules"][name], theirs["modules"][name]) for name in theirs["modules"])
        assert ours["history"] == theirs["history"]
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (tmp_path, finished))
    assert ours["summary"]["BIRD"]["clean"] != theirs["summary"]["BIRD"]["clean"]


def test_methods_start_from_one_student_and_see_the_same_batches(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[list[float], object]] = {}
    real = demo.fit

    def watch(model: torch.nn.Module, train: Images, settings: object, **options: object) -> object:
        start = [value.sum().item() for value in model.state_dict().values()]
        seen[str(options["label"]).split()[-1]] = start, settings
        return real(model, train, settings, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "fit", watch)
    demo.run(tmp_path, TINY, 1)
    student = torch.load(tmp_path / "seed0/none/last.pt", weights_only=True)["modules"]
    start = [value.sum().item() for name, value in student.items()]
    assert all(seen[method] == (start, seen["FT"][1]) for method in ("FT", "Hints", "BIRD", "Ceiling"))
    assert len({str(seen[stage][1]) for stage in ("Teacher", "None", "FT")}) == 3  # other batches


def test_more_seeds_are_added_to_those_that_are_there(finished: Path, tmp_path: Path) -> None:
    one = json.loads((finished / "results.json").read_text())
    two = demo.run(finished, TINY, 2, resume=True)
    assert [outcome.seed for outcome in two.of("BIRD")] == [0, 1]
    both = json.loads((finished / "results.json").read_text())
    assert both["outcomes"][:5] == one["outcomes"]
    assert both["outcomes"][5:] != one["outcomes"]


def test_the_command_line_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "holds an unfinished demo: go on with --resume" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "a"), "--device", "abacus"]) == 2
    assert "--device abacus cannot be used here" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "b"), "--device", "cpu", "--seeds", "0"]) == 2
    assert "seeds must be at least 1, not 0" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "b"), "--device", "cpu", "--steps", "0"]) == 2
    assert "steps must be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.smoke
def test_the_command_line_sets_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[demo.Plan] = []
    monkeypatch.setattr(demo, "run", lambda folder, plan, *rest, **options: plans.append(plan))
    command = ["demo", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main([*command, "--batch", "32768", "--chunk", "512"]) == 0
    assert cli.main([*command, "--quick", "--steps", "7"]) == 0
    chosen = [plan.settings(0) for plan in plans]
    assert [(s.steps, s.batch_size, s.chunk_size) for s in chosen] == [(1000, 32768, 512), (7, 64, None)]


def test_info_names_every_backend_and_why_it_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.bird_kernels, "backend_status", lambda: {"library": None, "triton": "no GPU"})
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "backend library: available\n" in text
    assert "backend triton: not available: no GPU\n" in text
