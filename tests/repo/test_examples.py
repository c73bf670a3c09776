"""The examples print what they promise; and every block of Python in README.md and the other documents runs."""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from tests.repo.documents import PAGES, ROOT, fences, name_of
from tests.repo.forks import Forks

TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"
ACCELERATE = "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_help_helps_and_runs_nothing(script: str, forks: Forks, tmp_path: Path) -> None:
    """The help is the head of the script, where the commands to start it are, then its options."""
    source = (ROOT / "examples" / script).read_text(encoding="utf-8")
    for extra in re.findall(r"^from (accelerate|datasets|trl|torchvision) ", source, re.MULTILINE):
        pytest.importorskip(extra, reason="the example is a run of it")
    text = forks.run(tmp_path, ROOT / "examples" / script, "--help")
    assert text.startswith(f"usage: {script} [-h]")
    assert f"examples/{script}" in text
    assert "step 1" not in text
    assert "CKA to the teacher 0" not in text
    assert list(tmp_path.iterdir()) == []


def ckas(launcher: tuple[str, ...], processes: int, script: str, **more: str) -> list[float]:
    """The CKAs that an example prints, first and last step."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, *launcher, f"examples/{script}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [float(cka) for cka in re.findall(rf"CKA (\S+) of 64 rows on {processes} processes", run.stdout)]


@pytest.fixture(scope="module")
def one_process() -> list[float]:
    """As torchrun would start it."""
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    first, last = ckas((), 1, "distributed.py", **group)
    assert last > first + 0.1
    return [first, last]


@needs_gloo
def test_torchrun(one_process: list[float]) -> None:
    assert ckas((*TORCHRUN, "2"), 2, "distributed.py") == pytest.approx(one_process, abs=1e-5)


@needs_gloo
def test_accelerate(one_process: list[float]) -> None:
    pytest.importorskip("accelerate", reason="needs the dev extra")
    assert ckas((*ACCELERATE, "2"), 2, "with_accelerate.py") == pytest.approx(one_process, abs=1e-5)


@pytest.mark.parametrize(("script", "steps"), [("dpo.py", 6), ("trl_sft.py", 6)])
def test_trainers_of_trl(script: str, steps: int, forks: Forks, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the example is a run of TRL's")
    text = forks.run(tmp_path, ROOT / "examples" / script)
    rows = re.findall(r"loss (\S+?),?  ?(?:DPO|of the task) (\S+?),?  ?CKA to the teacher (\S+)", text)
    assert len(rows) == steps
    for loss, task, cka in (map(float, row) for row in rows):
        assert loss == pytest.approx(task + 1 - cka, abs=2e-4)  # each has four decimals


def test_hidden_states_of_padded_and_of_packed_texts(forks: Forks, tmp_path: Path) -> None:
    """The same numbers: padding does not count, and a packed text does not see the others."""
    pytest.importorskip("datasets", reason="the example is a run of transformers' trainer")
    runs = [forks.run(tmp_path, ROOT / "examples/hidden_states.py", *options) for options in ((), ("--packed",))]
    padded, packed = (re.findall(r"loss (\S+), of the task (\S+), CKA to the teacher (\S+)", text) for text in runs)
    assert len(padded) == 4
    for ours, others in zip(padded, packed, strict=True):
        loss, task, cka = map(float, ours)
        assert loss == pytest.approx(0.5 * task + 0.5 * (1 - cka), abs=2e-5)
        assert [loss, task, cka] == pytest.approx([*map(float, others)], abs=2e-5)


LOOP = ROOT / "examples/own_loop.py"


def test_a_loop_of_ones_own_goes_on_where_it_stopped(forks: Forks, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="the example's networks")
    whole = forks.run(tmp_path, LOOP, "--steps", "4", "--checkpoint", "whole").splitlines()
    assert [line.split(":")[0] for line in whole] == [f"step {i}" for i in range(1, 5)]
    begun, resumed = (forks.run(tmp_path, LOOP, "--steps", steps).splitlines() for steps in ("2", "4"))
    assert resumed[0] == "2 of 4 steps are done: own_loop.safetensors"
    assert begun + resumed[1:] == whole
    assert (tmp_path / "own_loop.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_loop_over_a_folder_of_images(forks: Forks, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="the example's networks")
    for i, (image, _) in enumerate(datasets.FakeData(6, (3, 80, 70))):
        (tmp_path / "images" / f"class {i % 3}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / f"class {i % 3}" / f"{i}.png")
    text = forks.run(tmp_path, LOOP, "--images", "images", "--steps", "1")
    ((loss, cka),) = re.findall(r"step 1: loss (\S+), CKA (\S+)", text)
    assert 0 < float(loss) - 0.9 * (1 - float(cka)) < 0.1 * 2 * math.log(3)  # of three classes, by chance


LARGE = ROOT / "examples/large_batch.py"
SIZES = "--batch", "16", "--chunk", "4"


@needs_gloo
def test_a_large_batch_on_two_processes_is_that_of_one(forks: Forks, tmp_path: Path) -> None:
    """Values, and all weights and momenta after a step; and a run goes on from its checkpoint on fewer processes."""
    pytest.importorskip("torchvision", reason="the example's networks")
    one = forks.run(tmp_path, LARGE, *SIZES, "--steps", "2", "--checkpoint", "one")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *TORCHRUN, "2", str(LARGE), *SIZES, "--steps", "1", "--checkpoint", "two"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    resumed = forks.run(tmp_path, LARGE, *SIZES, "--steps", "2", "--checkpoint", "two")
    assert resumed.startswith("1 steps are done: two\n")
    first, second = re.findall(r"CKA (\S+) of 16 images on 1 processes", one)
    (apart,) = re.findall(r"CKA (\S+) of 16 images on 2 processes", run.stdout)
    (after,) = re.findall(r"CKA (\S+) of 16 images on 1 processes", resumed)
    assert [float(apart), float(after)] == pytest.approx([float(first), float(second)], abs=2e-6)
    assert 0 < float(re.findall(r"(\S+) % of the last step is CKA", one)[0]) < 100
    for name, tensor in load_file(tmp_path / "one").items():
        if "running_" not in name and "num_batches" not in name:  # of each process's own chunks, as in DDP
            difference = load_file(tmp_path / "two")[name] - tensor
            assert difference.float().norm() <= 1e-3 * tensor.float().norm(), name


# The first line of a block that cannot run here says why, where readers see it.
NOT_RUN = re.compile(r"# not run by the tests: \w.{10,}\n")


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")], ids=name_of)
def test_blocks_of_python_run(page: Path, forks: Forks, tmp_path: Path) -> None:
    """In their order, with the names of those before, as a reader would run them."""
    lines = ["shared = {}"]
    for number, block in enumerate(fences(page, "python"), 1):
        ast.parse(block)
        if not NOT_RUN.match(block):
            lines.append(f"exec(compile({block!r}, '{name_of(page)}: block {number}', 'exec'), shared)")
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(lines), encoding="utf-8")
    forks.run(tmp_path, script)


def test_a_block_that_is_not_run_says_why() -> None:
    marked = [block for page in PAGES for block in fences(page, "python") if "not run" in block]
    assert [block for block in marked if not NOT_RUN.match(block)] == []
    assert len(marked) <= 3
