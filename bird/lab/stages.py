"""Results that are made once: each in a folder named after everything that decides it.

A `Stage` says what it is (plain data), what it needs (other stages), and how it is made. Its folder's name holds a hash
of the first two, so whoever asks for the same thing again finds it, and a changed setting never meets old results.

Any number of processes may work on the same stages, on one machine or on several that share a disk: `complete` takes
whatever nobody else is at. A process that is killed gives its stage back, and the next one goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import write_json


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
        path = self.folder(root) / "result.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it is made again") from error

    def _complete(self, root: Path) -> None:
        folder = self.folder(root)
        write_json(
            {"kind": self.kind, "about": self.about, "parents": [p.key for p in self.parents]}, folder / "stage.json"
        )
        write_json(self.make(folder), folder / "result.json")


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
    patience: float = 0.5,
) -> None:
    """Make all stages that are not there yet, and wait for those that other processes are making.

    Args:
        stages: with their parents they are made in order, as far as others leave them.
        root: the folder of the stages' folders.
        tell: gets a line for each stage that is made here, when it is done.
        patience: seconds between two looks at what others are making.

    Raises:
        Exception: what a stage's ``make`` raises; what is complete stays.
    """
    wanted = lineage(stages)
    left = [stage for stage in wanted if stage.result(root) is None]
    while left:
        ready = [stage for stage in left if all(parent.result(root) is not None for parent in stage.parents)]
        start = time.perf_counter()
        made = next((stage for stage in ready if _made(stage, root)), None)
        left = [stage for stage in left if stage.result(root) is None]
        if made is not None:
            done, seconds = len(wanted) - len(left), time.perf_counter() - start
            tell(f"[{done}/{len(wanted)}] {made.kind}-{made.key}  {made.title} ({seconds:.0f} s)")
        elif left:
            time.sleep(patience)


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
