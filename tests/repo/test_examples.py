"""The launch examples, as a user starts them: two processes give the numbers of one."""

from __future__ import annotations

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


def ckas(launcher: tuple[str, ...], processes: int, script: str) -> list[float]:
    """The CKAs that an example prints, first and last step."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(processes), f"examples/{script}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    return [float(cka) for cka in re.findall(rf"CKA (\S+) of 64 rows on {processes} processes", run.stdout)]


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


def test_dpo() -> None:
    pytest.importorskip("trl", reason="the example is a run of TRL's")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "examples/dpo.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"loss (\S+)  DPO (\S+)  CKA to the teacher (\S+)", run.stdout)
    assert len(rows) == 6
    for loss, task, cka in (map(float, row) for row in rows):
        assert loss == pytest.approx(0.1 * task + 0.9 * (1 - cka), abs=1e-4)
