"""Files that are written at once by several processes, under hostile names, and through a power cut."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from bird.files import PARTIAL, atomic, write_json

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
def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "contents")
        sync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        order.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    with atomic(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert order == ["contents", "name", "folder"]
