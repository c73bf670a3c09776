"""The command line: several processes in one run folder, pipes that close, terminals of ASCII, mistakes in words."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from bird.lab import cli, tables
from bird.lab.recipe import at_home, data_root
from tests.bird.tiny_recipes import TINY, command, said, written

ROOT = Path(__file__).resolve().parents[2]
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


def files(root: Path) -> dict[str, bytes]:
    """All that is there, without locks, and checkpoints, which hold how long steps took."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if Path(name).name not in (".lock", ".report.lock", "last.pt")}


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which ``python`` is this one; a pipe ends as its worst command does."""
    line = line.replace("python ", f"{sys.executable} ", 1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], check=False, **options)


def test_processes_that_share_a_folder_end_with_the_same_files(tmp_path: Path) -> None:
    """On a fresh folder, on a finished one, and all reporting at once."""
    recipe, many = written(tmp_path, TINY), tmp_path / "many.py"
    many.write_text(MANY)
    for count in (1, 3):
        done = shell(f"python {many} {count} {recipe} {tmp_path / str(count)}", PYTHONPATH=str(ROOT))
        assert done.stdout.count(f"codes {[0] * count}") == 3, done.stdout + done.stderr
    ours, theirs = files(tmp_path / "3"), files(tmp_path / "1")
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("results.json"):
            assert json.loads(ours[name])["cells"] == json.loads(theirs[name])["cells"]
        elif not name.endswith("result.json"):  # which hold steps per second
            assert ours[name] == theirs[name], name


def test_a_report_waits_for_another_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, TINY)
    assert command("run", recipe) == 0
    page = tmp_path / "runs/reports/try/README.md"
    page.unlink()
    codes: list[int] = []
    with FileLock(tmp_path / "runs/.report.lock"):
        report = threading.Thread(target=lambda: codes.append(command("report", recipe)))
        report.start()
        text, end = "", time.monotonic() + 60.0
        while "waiting for another process, which writes the report" not in text:
            assert report.is_alive()
            assert time.monotonic() < end, "no word while it waits"
            text += capsys.readouterr().out
            time.sleep(0.01)
        assert not page.exists()
    report.join()
    assert codes == [0]
    assert page.exists()


def test_training_goes_on_where_nobody_reads_and_ascii_is_all_there_is(tmp_path: Path) -> None:
    recipe, out = written(tmp_path, TINY, ("seeds = 1", "seeds = 2")), tmp_path / "out"
    done = shell(f"python -m bird run {recipe} --device cpu --jobs 1 --out {out} | head -c 1 >/dev/null")
    assert done.returncode == 0, done.stderr
    assert "±" in (out / "reports/try/README.md").read_text(encoding="utf-8")
    done = shell(f"python -m bird report {recipe} --out {out}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "+-" in done.stdout
    assert done.stdout.isascii()


class Closed(io.TextIOWrapper):
    """A stream whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__(io.BytesIO(), "utf-8")
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.smoke
def test_a_line_that_cannot_be_written_stops_nothing() -> None:
    """And what an encoding lacks is replaced."""
    for error in (BrokenPipeError(), OSError(28, "No space left on device")):
        cli._say("a line", Closed(error))
    for encoding, line in (("ascii", "1 +- 2 ?\n"), ("latin-1", "1 ± 2 ?\n"), ("utf-8", "1 ± 2 →\n")):
        raw = io.BytesIO()
        terminal = io.TextIOWrapper(raw, encoding, newline="\n")  # it closes what it wraps when it goes
        cli._say("1 ± 2 →", terminal)
        assert raw.getvalue().decode(encoding) == line


def test_versions_and_backends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed has no version and no error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"bird-kernels {tables.version('bird-kernels')}\n"

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert tables.report_origin()["bird-kernels"] == "not installed"
    monkeypatch.setattr(cli.bird_kernels, "backend_status", lambda: {"library": None, "triton": "no GPU"})
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "backend library: available\n" in text
    assert "backend triton: not available: no GPU\n" in text


NOBODY = "~nobody-of-this-name"


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--device", "cpu"], {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is no number"),
        (["--device", "cpu"], {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', which is no number"),
        (["--device", "meta"], {}, "--device meta cannot be used here"),
        (["--device", ""], {}, "--device  cannot be used here"),
        (["--device", "cpu"], {"BIRD_DATA": NOBODY}, f"{NOBODY}: there is no home of"),
        (["--device", "cpu", "--data", f"{NOBODY}/x"], {}, f"{NOBODY}/x: there is no home of"),
    ],
)
def test_mistakes_are_told_in_words(
    arguments: list[str], environment: dict[str, str], words: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = written(tmp_path, TINY.replace("fashion-mnist-subset", "fashion-mnist"))
    assert cli.main(["run", str(recipe), *arguments, "--jobs", "1", "--out", str(tmp_path / "out")]) == 2
    assert words in said(capsys)
    assert not (tmp_path / "out").exists()


def test_homes_and_folders_that_there_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", "fashion/demo", "--out", str(tmp_path / "no")]) == 2
    assert "there is no folder" in said(capsys)
    assert not (tmp_path / "no").exists()
    monkeypatch.setenv("HOME", "/somewhere")
    assert data_root("~/data") == Path("/somewhere/data")
    with pytest.raises(ValueError, match="no home of such a user"):
        at_home(NOBODY)
    networks: Any = pytest.importorskip("bird.lab.language.models", reason="an extra: bird-kernels[language]")
    with pytest.raises(ValueError, match="no home of such a user"):
        networks.locate_network(f"{NOBODY}/x")


def test_held_out_corruptions_alone_make_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before any work, and not when the report is written."""
    path = written(tmp_path, TINY, ('corruptions = ["brightness", "contrast"]', 'corruptions = ["brightness"]'))
    assert command("run", path) == 2
    assert "scoring.corruptions must hold some that are not held out, too" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_no_teacher_is_trained_under_what_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, TINY, ('corruptions = ["contrast"]', 'corruptions = ["contrast", "brightness"]'))
    assert command("run", path) == 2
    assert "held_out has ['brightness'], under which teachers are trained" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, TINY)
    assert command("run", path, out=path) == 2
    assert f"--out {path} is a file: name a folder" in capsys.readouterr().err


def test_data_that_is_not_where_it_was_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The digits come with scikit-learn, so the recipe would run without: and of a system's copy nobody would know."""
    path = written(tmp_path, TINY)
    assert command("run", path, "--data", str(tmp_path / "nowhere"), out=tmp_path / "runs") == 2
    assert f"--data {tmp_path / 'nowhere'}: there is no folder of this name" in capsys.readouterr().err
