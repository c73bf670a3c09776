"""The examples, as a user starts them: what they print is what they promise."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"
ACCELERATE = "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def printed(*command: str, folder: Path = ROOT) -> str:
    """What Python prints, started in a folder with these arguments."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_help_helps_and_runs_nothing(script: str, tmp_path: Path) -> None:
    """The help is the head of the script, where the commands to start it are, then its options."""
    source = (ROOT / "examples" / script).read_text(encoding="utf-8")
    for extra in re.findall(r"^from (accelerate|trl|torchvision) ", source, re.MULTILINE):
        pytest.importorskip(extra, reason="the example is a run of it")
    text = printed(str(ROOT / "examples" / script), "--help", folder=tmp_path)
    assert text.startswith(f"usage: {script} [-h]")
    assert f"examples/{script}" in text
    assert "step 1" not in text
    assert "CKA to the teacher 0" not in text
    assert list(tmp_path.iterdir()) == []


def ckas(launcher: tuple[str, ...], processes: int, script: str) -> list[float]:
    """The CKAs that an example prints, first and last step."""
    text = printed(*launcher, str(processes), f"examples/{script}")
    return [float(cka) for cka in re.findall(rf"CKA (\S+) of 64 rows on {processes} processes", text)]


@pytest.fixture(scope="module")
def one_process() -> list[float]:
    first, last = ckas(TORCHRUN, 1, "distributed.py")
    assert last > first + 0.1
    return [first, last]


def test_torchrun(one_process: list[float]) -> None:
    assert ckas(TORCHRUN, 2, "distributed.py") == pytest.approx(one_process, abs=1e-5)


def test_accelerate(one_process: list[float]) -> None:
    pytest.importorskip("accelerate", reason="needs the dev extra")
    assert ckas(ACCELERATE, 2, "with_accelerate.py") == pytest.approx(one_process, abs=1e-5)


@pytest.mark.parametrize(("script", "steps"), [("dpo.py", 6), ("trl_sft.py", 6)])
def test_trainers_of_trl(script: str, steps: int) -> None:
    pytest.importorskip("trl", reason="the example is a run of TRL's")
    text = printed(f"examples/{script}")
    rows = re.findall(r"loss (\S+?),?  ?(?:DPO|of the task) (\S+?),?  ?CKA to the teacher (\S+)", text)
    assert len(rows) == steps
    for loss, task, cka in (map(float, row) for row in rows):
        assert loss == pytest.approx(0.1 * task + 0.9 * (1 - cka), abs=1e-4)


LOOP = str(ROOT / "examples/own_loop.py")


def test_a_loop_of_ones_own_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="the example's networks")
    whole = printed(LOOP, "--steps", "4", "--checkpoint", "whole", folder=tmp_path).splitlines()
    assert [line.split(":")[0] for line in whole] == [f"step {i}" for i in range(1, 5)]
    begun, resumed = (printed(LOOP, "--steps", steps, folder=tmp_path).splitlines() for steps in ("2", "4"))
    assert resumed[0] == "2 of 4 steps are done: own_loop.safetensors"
    assert begun + resumed[1:] == whole
    assert (tmp_path / "own_loop.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_loop_over_a_folder_of_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="the example's networks")
    for i, (image, _) in enumerate(datasets.FakeData(6, (3, 80, 70))):
        (tmp_path / "images" / f"class {i % 3}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / f"class {i % 3}" / f"{i}.png")
    text = printed(LOOP, "--images", "images", "--steps", "1", folder=tmp_path)
    ((loss, cka),) = re.findall(r"step 1: loss (\S+), CKA (\S+)", text)
    assert 0 < float(loss) - 0.9 * (1 - float(cka)) < 0.1 * 2 * math.log(3)  # of three classes, by chance
