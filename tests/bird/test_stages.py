"""Stages: made once, named after what decides them, shared by processes, taken up where a killed one stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bird.files import PARTIAL, atomic, write_json
from bird.lab import cli, tables
from bird.lab.stages import LOOKS, Stage, alone, complete, lineage, side_by_side

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
    keys = {s.key for s in (base, other, stage("top", base), stage("top", other), stage("pot", base))}
    assert len(keys) == 5
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
    bad = Stage("bad", {}, fail, (base,))
    with pytest.raises(RuntimeError, match="no luck"):
        complete([bad], tmp_path)
    assert base.result(tmp_path) is not None
    assert bad.result(tmp_path) is None


def test_results_of_other_stages_and_versions(tmp_path: Path) -> None:
    ours, theirs = stage("score", value=1), stage("score", value=2)
    complete([ours], tmp_path)
    path = ours.folder(tmp_path) / "result.json"
    write_json({"clean": 0.5}, path)  # as before there were versions
    (path.parent / "stage.json").unlink()
    assert ours.result(tmp_path) == {"clean": 0.5}
    write_json({"clean": 0.5, "format": 2}, path)
    with pytest.raises(ValueError, match=r"result\.json has format 2, of a later version"):
        ours.result(tmp_path)
    write_json({}, path)
    with pytest.raises(ValueError, match=r"result\.json is damaged \(it is empty\): delete it"):
        ours.result(tmp_path)
    path.unlink()
    complete([ours], tmp_path)
    assert ours.result(tmp_path) == {"folder": f"score-{ours.key}", "value": 1}
    whole = path.read_bytes()
    for wrong in ({"x": 2}, {"clean": 0.5}):  # beside what this version wrote
        write_json(wrong, path)
        with pytest.raises(ValueError, match=r"result\.json is damaged \(it does not name its stage\): delete it"):
            ours.result(tmp_path)
    path.write_bytes(whole)
    ours.folder(tmp_path).rename(theirs.folder(tmp_path))
    for read in (theirs.result, theirs._complete):
        with pytest.raises(ValueError, match=rf"is of score-{ours.key}, copied into this folder: delete the folder"):
            read(tmp_path)
    tables.write_report(tmp_path, "page", {"cells": []})
    assert json.loads((tmp_path / "results.json").read_text()) == {"format": 1, "cells": []}


# Processes


def _note(folder: Path) -> dict[str, Any]:
    with (folder.parent / "log").open("a") as log:
        log.write(f"{folder.name} {os.getpid()}\n")
    time.sleep(0.05)
    return {}


def _many() -> list[Stage]:
    return [Stage("leaf", {"n": n}, _note, (Stage("base", {"n": n % 3}, _note),)) for n in range(12)]


def _work(root: Path) -> None:
    complete(_many(), root, patience=0.01)


def test_processes_share_the_work(tmp_path: Path) -> None:
    side_by_side(_work, [(tmp_path,)] * 3)
    made, by = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert sorted(made) == sorted(s.folder(tmp_path).name for s in lineage(_many()))
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


def _busy() -> None:
    raise RuntimeError("busy")


@pytest.mark.smoke
def test_alone_tells_only_where_it_waits(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        with alone(tmp_path / "lock", lambda: said.append("waits")):
            assert not said
            with pytest.raises(RuntimeError, match="busy"), alone(tmp_path / "lock", _busy):
                pass


def test_stages_of_others_are_waited_for_with_a_word(tmp_path: Path) -> None:
    slow = Stage("slow", {}, lambda folder: {}, title="The slow one")
    folder = slow.folder(tmp_path)
    folder.mkdir(parents=True)
    lock, said = FileLock(folder / ".lock", thread_local=False), list[str]()
    lock.acquire()

    def idle(line: str) -> None:
        said.append(line)
        threading.Timer(20 * 0.002, lock.release).start()

    rescue = threading.Timer(20, lock.release)  # of a test that fails: nobody would end the wait
    rescue.start()
    # The lock is of a thread's other lock object, as it would be of another process.
    complete([slow], tmp_path, idle=idle, patience=0.002)
    rescue.cancel()
    assert said == ["waiting for other processes: 1 of 1 stages, The slow one first"]
    assert LOOKS > 1


def test_a_report_of_many_parts_has_a_name_that_a_disk_takes() -> None:
    choice = {"variants": [f"variant number {i}, with a long name" for i in range(20)], "seeds": None}
    name = cli._named("fashion/demo", choice)
    assert len(name) < 100
    assert name != cli._named("fashion/demo", choice | {"seeds": 1})
    assert cli._named("fashion/demo", {"networks": ["a b"], "seeds": 2}) == "fashion/demo-a-b-seeds-2"


# Files that are written at once by several processes, under hostile names, and through a power cut

WRITERS, WRITES = 4, 50


def write_often(path: Path, number: int) -> None:
    for turn in range(WRITES):
        write_json({"writer": number, "turn": turn, "filler": [number] * 2000}, path)


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    """Each write ends well, and what is there is one writer's. With one name for all, a writer loses its file."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path / "a.json", number)) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["filler"] == [found["writer"]] * 2000
    assert found["turn"] == WRITES - 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can guess the name of the partial file could point it at a file of the user's."""
    other = tmp_path / "other"
    other.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (tmp_path / f"{PARTIAL}00000000.a.json").symlink_to(other)
    with pytest.raises(FileExistsError):
        write_json({}, tmp_path / "a.json")
    assert other.read_text() == "precious"


@pytest.mark.skipif(os.name != "posix", reason="a folder is no file there")
def test_contents_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name before the end."""
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "contents")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", lambda path, target: order.append("name") or replace(path, target))
    with atomic(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert order == ["contents", "name", "folder"]
