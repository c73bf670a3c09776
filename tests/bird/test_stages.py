"""Stages: made once, named after what decides them, shared by processes, taken up where a killed one stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bird.lab.stages import Stage, complete, lineage, side_by_side

ROOT = Path(__file__).resolve().parents[2]


def stage(name: str, *parents: Stage, value: Any = None, log: list[str] | None = None) -> Stage:
    def make(folder: Path) -> dict[str, Any]:
        if log is not None:
            log.append(name)
        return {"folder": folder.name, "value": value}

    return Stage(name, {"value": value}, make, parents)


def test_everything_is_made_once_parents_first(tmp_path: Path) -> None:
    log: list[str] = []
    base = stage("base", log=log)
    left, right = stage("left", base, log=log), stage("right", base, log=log)
    top = stage("top", left, right, value=3, log=log)
    complete([top, left], tmp_path)
    assert log == ["base", "left", "right", "top"]
    assert top.result(tmp_path) == {"folder": f"top-{top.key}", "value": 3}
    complete([top], tmp_path)
    assert len(log) == 4
    about = json.loads((top.folder(tmp_path) / "stage.json").read_text())
    told = {"kind": "top", "about": {"value": 3}, "parents": [left.key, right.key], "stage": f"top-{top.key}"}
    assert {name: about[name] for name in about if name != "sha256"} == told | {"format": 1}


def test_the_name_depends_on_kind_about_and_parents_alone() -> None:
    base, other = stage("base"), stage("base", value=1)
    assert base.key != other.key
    assert stage("top", base).key != stage("top", other).key
    assert stage("top", base).key != stage("pot", base).key
    assert stage("top", base, log=[]).key == stage("top", stage("base")).key
    assert Stage("a", {"x": 1, "y": (2, 3)}, dict).key == Stage("a", {"y": [2, 3], "x": 1}, dict).key
    assert len(base.key) == 16
    assert [s.key for s in lineage([stage("top", base), base])] == [base.key, stage("top", base).key]
    with pytest.raises(ValueError, match="JSON compliant"):
        _ = stage("nan", value=float("nan")).key


def test_a_failure_is_raised_and_what_is_complete_stays(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        raise RuntimeError("no luck")

    base = stage("base")
    with pytest.raises(RuntimeError, match="no luck"):
        complete([Stage("bad", {}, fail, (base,))], tmp_path)
    assert base.result(tmp_path) is not None
    assert Stage("bad", {}, fail, (base,)).result(tmp_path) is None


def _note(folder: Path) -> dict[str, Any]:
    with (folder.parent / "log").open("a") as log:
        log.write(f"{folder.name} {os.getpid()}\n")
    time.sleep(0.05)
    return {}


def _many(root: Path) -> list[Stage]:
    return [Stage("leaf", {"n": n}, _note, (Stage("base", {"n": n % 3}, _note),)) for n in range(12)]


def _work(root: Path) -> None:
    complete(_many(root), root, patience=0.01)


def test_processes_share_the_work(tmp_path: Path) -> None:
    side_by_side(_work, [(tmp_path,)] * 3)
    made, by = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert sorted(made) == sorted(s.folder(tmp_path).name for s in lineage(_many(tmp_path)))
    assert len(set(by)) > 1


KILLED = """
import sys, time
from pathlib import Path
from bird.lab.stages import Stage, complete
def make(folder):
    (folder / "begun").touch()
    time.sleep(60)
complete([Stage("slow", {}, make)], Path(sys.argv[1]))
"""


def test_a_killed_process_gives_its_stage_back(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=env)
    slow = Stage("slow", {}, lambda folder: {"found": (folder / "begun").exists()})
    while not (slow.folder(tmp_path) / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete([slow], tmp_path)
    assert slow.result(tmp_path) == {"found": True}
