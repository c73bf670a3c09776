"""Several processes in one run folder: the same files, one writer of the report, a word for who waits."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from bird.lab import cli

ROOT = Path(__file__).resolve().parents[2]
SIDE = 'data = "fashion-mnist-subset"\nlimit_per_class = 4\naugment = "none"\n'
TINY = f"""
title = "Tiny"
methods = ["none"]
seeds = 1
corruptions = ["contrast"]
held_out = ["brightness"]
[teacher]
{SIDE}
[student]
{SIDE}
[pretraining]
steps = 1
batch_size = 8
[transfer]
steps = 1
batch_size = 8
[scoring]
corruptions = ["brightness", "contrast"]
images = 8
[networks.one]
teacher = "plain"
student = "plain"
"""
# Imports once and computes nothing before it forks, as processes do that are started one after the other.
MANY = """
import os, sys
from bird.lab import cli
import matplotlib.figure, torch._dynamo
def started(arguments):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = cli.main(arguments)
        finally:
            os._exit(code)
    return pid
count, recipe, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
for command in (["run", "--device", "cpu", "--jobs", "1"], ["run", "--device", "cpu", "--jobs", "1"], ["report"]):
    processes = [started([command[0], recipe, *command[1:], "--out", out]) for _ in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]
    print("codes", codes, flush=True)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def files(root: Path) -> dict[str, bytes]:
    """All that is there, without locks, and checkpoints, which hold how long steps took."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if Path(name).name not in (".lock", ".report.lock", "last.pt")}


def test_processes_that_share_a_folder_end_with_the_same_files(recipe: Path, tmp_path: Path) -> None:
    """On a fresh folder, on a finished one, and all reporting at once."""
    alone_, shared = tmp_path / "alone", tmp_path / "shared"
    for count, out in ((1, alone_), (3, shared)):
        done = subprocess.run(
            [sys.executable, "-c", MANY, str(count), str(recipe), str(out)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.stdout.count(f"codes {[0] * count}") == 3, done.stdout + done.stderr
    ours, theirs = files(shared), files(alone_)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith("result.json") and name != "reports/tiny/results.json":  # which hold steps per second
            assert ours[name] == theirs[name], name
    for name in (name for name in ours if name.endswith("results.json")):
        assert json.loads(ours[name])["cells"] == json.loads(theirs[name])["cells"]


def test_a_report_waits_for_another_and_says_so(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["run", str(recipe), "--device", "cpu", "--jobs", "1", "--out", str(out)]) == 0
    page = out / "reports/tiny/README.md"
    page.unlink()
    codes: list[int] = []
    with FileLock(out / ".report.lock"):
        report = threading.Thread(target=lambda: codes.append(cli.main(["report", str(recipe), "--out", str(out)])))
        report.start()
        said, end = "", time.monotonic() + 60.0
        while "waiting for another process, which writes the report" not in said:
            assert report.is_alive()
            assert time.monotonic() < end, "no word while it waits"
            said += capsys.readouterr().out
            time.sleep(0.01)
        assert not page.exists()
    report.join()
    assert codes == [0]
    assert page.exists()
