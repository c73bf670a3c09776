"""Trains in processes that are killed, and says on stdout, as JSON, how it ended.

A program of its own, which imports PyTorch once, forks, and computes nothing itself before it forks. First come kills
at chosen moments, by the process itself, so that each kind is met on any machine; then some from outside, at any time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # by now, lest each process import it when it makes its optimizer
from torch import Tensor

from bird import files
from bird.lab.tensors import load_tensors
from tests.bird.loops import images, margin, train

# In a step, with half of a file written, with a whole file not yet in its place, with the file just put there.
MOMENTS = ("step", "torn", "written", "placed") * 3
FROM_OUTSIDE = 4


def die_at(moment: str, count: int) -> Callable[[], None]:
    """Arm this process to kill itself at the count-th such moment; returns what to call in every step."""
    seen = 0

    def met(file: int | None = None) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            if file is not None:
                os.truncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace = os.fsync, Path.replace
    if moment in ("torn", "written"):

        def watched(file: int) -> None:
            fsync(file)
            if stat.S_ISREG(os.fstat(file).st_mode):  # the folder is synced as well, once the name is there
                met(file if moment == "torn" else None)

        files.os.fsync = watched
    elif moment == "placed":
        Path.replace = lambda path, target: (replace(path, target), met())[0]  # type: ignore[method-assign]
    return met if moment == "step" else lambda: None


def run(folder: Path, ready: int, moment: str, count: int) -> None:
    """Says through a pipe when it takes its first step."""
    first, in_step = [b"!"], die_at(moment, count)

    def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        if first:
            os.write(ready, first.pop())
        in_step()
        return x

    options = {"steps": 120, "save_every": 1, "augment": augment, "validate": margin, "resume": True}
    train("bird", folder, images(50), **options)


def start(folder: Path, moment: str = "", count: int = 0) -> int:
    """A process that trains, and has begun to (or has ended)."""
    begun, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run(folder, ready, moment, count)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(ready)
    os.read(begun, 1)
    os.close(begun)
    return pid


def finish(pid: int) -> int:
    """Minus the signal that ended a process, or its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    pid, begin = start(folder / "whole"), time.monotonic()
    assert finish(pid) == 0
    seconds = time.monotonic() - begin
    random_, last = random.Random(0), folder / "broken/last.pt"
    killed, partial = list[int](), list[int]()
    for moment in MOMENTS:  # of 108 moments at most, so that 120 steps never end before
        code = finish(start(folder / "broken", moment, random_.randint(1, 9)))
        assert code == -signal.SIGKILL, f"{moment}: {code}"
        killed.append(load_tensors(last)["step"] if last.exists() else 0)
        partial.append(sum(1 for _ in (folder / "broken").glob(".partial.*")))
    for _ in range(FROM_OUTSIDE):
        pid = start(folder / "broken")
        time.sleep(random_.uniform(0, seconds / 2 / FROM_OUTSIDE))
        os.kill(pid, signal.SIGKILL)
        finish(pid)  # it may have ended before
    code = finish(start(folder / "broken"))
    whole, broken = (load_tensors(folder / name / "last.pt") for name in ("whole", "broken"))
    best = [load_tensors(folder / name / "best.pt") for name in ("whole", "broken")]

    outcome = {
        "code": code,
        "steps": killed,
        "partial": partial,
        "weights": equal(whole["modules"], broken["modules"]),
        "best": best[0]["step"] == best[1]["step"] and equal(best[0]["model"], best[1]["model"]),
        "history": whole["history"] == broken["history"],
        "end": broken["step"],
        "files": sorted(p.name for p in (folder / "broken").iterdir() if not p.name.startswith("events")),
    }
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
