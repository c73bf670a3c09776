"""Results that are made once: each in a folder named after everything that decides it.

A `Stage` says what it is (plain data), what it needs (other stages), and how it is made. Its folder's name holds a hash
of the first two, so whoever asks for the same thing again finds it, and a changed setting never meets old results.

Any number of processes may work on the same stages, on one machine or on several that share a disk: `complete` takes
whatever nobody else is at. A process that is killed gives its stage back, and the next one goes on from its checkpoint.
`side_by_side` starts several processes here, `Lines` is a file that a stage fills row by row, and `require_same` tells
whose a folder or a file is where its name does not say.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .tensors import read_checked, write_checked

LOOKS = 10  # at what other processes are making, before a word is said


@dataclass(frozen=True, eq=False)
class Stage:
    """One result.

    Args:
        kind: begins the folder's name.
        about: everything that decides the result but the parents: numbers, strings, lists and dicts of them.
        make: gets the stage's folder, which may hold what an earlier, killed attempt left; returns the result, plain
            data as well.
        parents: stages that must be complete before.
        title: what people call it.
    """

    kind: str
    about: dict[str, Any]
    make: Callable[[Path], dict[str, Any]] = field(repr=False)
    parents: tuple[Stage, ...] = ()
    title: str = ""

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for kind, about and parents."""
        identity = [self.kind, self.about, [parent.key for parent in self.parents]]
        text = json.dumps(identity, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def folder(self, root: Path) -> Path:
        """Where it is made, and stays."""
        return root / f"{self.kind}-{self.key}"

    def result(self, root: Path) -> dict[str, Any] | None:
        """What `make` returned; None while that has not happened."""
        path, advice = self.folder(root) / "result.json", "delete it, and it is made again"
        try:
            found = read_checked(path, advice)
        except FileNotFoundError:
            return None
        name = found.pop("stage", None)
        self._require_own(name, path)
        if name is None and self._named(root) is not None:
            raise ValueError(f"{path} is damaged (it does not name its stage): {advice}")
        return found

    def _named(self, root: Path) -> str | None:
        """The name in ``stage.json``; None without the file, or if it was written before stages were named."""
        path = self.folder(root) / "stage.json"
        return read_checked(path, "delete the folder, and it is made again").get("stage") if path.exists() else None

    def _complete(self, root: Path) -> None:
        folder = self.folder(root)
        path, name = folder / "stage.json", f"{self.kind}-{self.key}"
        self._require_own(self._named(root), path)
        about = {"kind": self.kind, "about": self.about, "parents": [p.key for p in self.parents]}
        write_checked(about | {"stage": name}, path)
        write_checked(self.make(folder) | {"stage": name}, folder / "result.json")

    def _require_own(self, name: str | None, path: Path) -> None:
        """What was written before stages were named in their files says nothing."""
        if name not in (None, f"{self.kind}-{self.key}"):
            raise ValueError(f"{path} is of {name}, copied into this folder: delete the folder, and it is made again")


def lineage(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they need, each once, parents first."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in found:
            for parent in stage.parents:
                visit(parent)
            found[stage.key] = stage

    for stage in stages:
        visit(stage)
    return list(found.values())


def complete(
    stages: Sequence[Stage],
    root: Path,
    *,
    tell: Callable[[str], None] = lambda line: None,
    idle: Callable[[str], None] = lambda line: None,
    patience: float = 0.5,
) -> None:
    """Make all stages that are not there yet, and wait for those that other processes are making.

    Args:
        stages: with their parents they are made in order, as far as others leave them.
        root: the folder of the stages' folders.
        tell: gets a line for each stage that is made here, when it is done.
        idle: gets a line, once, if nothing was left to do here at `LOOKS` looks in a row.
        patience: seconds between two looks at what others are making.

    Raises:
        Exception: what a stage's ``make`` raises; what is complete stays.
    """
    wanted, looks = lineage(stages), 0
    left = [stage for stage in wanted if stage.result(root) is None]
    while left:
        ready = [stage for stage in left if all(parent.result(root) is not None for parent in stage.parents)]
        start = time.perf_counter()
        made = next((stage for stage in ready if _made(stage, root)), None)
        left = [stage for stage in left if stage.result(root) is None]
        if made is not None:
            done, seconds = len(wanted) - len(left), time.perf_counter() - start
            tell(f"[{done}/{len(wanted)}] {made.kind}-{made.key}  {made.title} ({seconds:.0f} s)")
            looks = min(looks, 0)
        elif left:
            looks += 1
            if looks == LOOKS:
                idle(f"waiting for other processes: {len(left)} of {len(wanted)} stages, {left[0].title} first")
                looks = -sys.maxsize
            time.sleep(patience)


@contextmanager
def alone(lock: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Inside no other process is, of those that name the same file; ``busy`` is called once if one is waited for.

    A killed process gives the lock back; the file stays.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        busy()
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _made(stage: Stage, root: Path) -> bool:
    """Make the stage, unless another process is making it, or has."""
    folder = stage.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if stage.result(root) is not None:
                return False
            try:
                stage._complete(root)
            except (FloatingPointError, ValueError) as error:  # which of many it was
                raise type(error)(f"{folder.name} ({stage.title}): {error}") from error
            return True
    except Timeout:
        return False


def require_same(old: Mapping[str, Any], new: Mapping[str, Any], whose: str, advice: str) -> None:
    """Refuse what a run of other settings has left.

    Raises:
        ValueError: whose it is, what was set otherwise, and what to do.
    """
    changes = [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(f"{whose} ({'; '.join(changes)}): {advice}")


def side_by_side(work: Callable[..., None], shares: Sequence[tuple[Any, ...]]) -> None:
    """Call ``work(*share)`` for each share in a process of its own, with this one's number of threads each.

    Args:
        work: a module's function; what it is given must be picklable.
        shares: its arguments in each process.

    Raises:
        ChildProcessError: one of the processes failed; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_child, args=(work, share, torch.get_num_threads()), daemon=True) for share in shares
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode != 0 for worker in workers):
        raise ChildProcessError("one of several processes failed, for the reason above; what is done stays")


def _child(work: Callable[..., None], share: tuple[Any, ...], threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # to death, at once: whoever goes on after a kill must have the files alone
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(threads)
    work(*share)


class Lines:
    """A file of JSON objects, one a line, that grows at its end; for one process at a time.

    A line counts once its newline is there. What a kill left of a last line is not read, and is cut off when the
    next one is written, not before: a file that turns out to be somebody else's stays as it is.

    Args:
        path: of the file; where there is none, it and its folder are made with the first line.

    Attributes:
        rows: what the file held when it was opened.

    Raises:
        ValueError: a whole line is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        self._end = data.rfind(b"\n") + 1
        self._torn = self._end < len(data)
        self.rows = [self._parse(line, i) for i, line in enumerate(data[: self._end].splitlines(), start=1)]

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows with one call, and wait until they are on the disk."""
        text = "".join(json.dumps(row) + "\n" for row in rows)  # ASCII: no character in it breaks a line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._torn:
                file.truncate(self._end)
            self._end, self._torn = file.seek(0, os.SEEK_END), True  # until all of it is there: the disk may be full
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._torn = False

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # of JSON or of UTF-8
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.path}: line {number} is not a JSON object: the file is damaged or something else;"
                " delete it to start over, or choose another path"
            )
        return row
