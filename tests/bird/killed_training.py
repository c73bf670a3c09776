"""Trains in processes that are killed at random moments, and says on stdout, as JSON, how it ended.

A program of its own, which imports PyTorch once, forks, and computes nothing itself before it forks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # by now, lest each process import it when it makes its optimizer
from torch import Tensor, nn

from bird import BirdLoss, Taps, Teacher
from bird.checkpoints import Settings, load
from bird.steps import Guide
from bird.training import fit
from bird.vision.data import Images

KILLS = 12


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Dropout(0.3), nn.Flatten(), nn.Linear(width * 36, 3)
    )


def train(folder: Path, ready: int) -> None:
    """Says through a pipe when it takes its first step."""
    torch.manual_seed(0)
    student, teacher = network(6), Teacher(network(4), "0")
    pixels = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    first = [b"!"]

    def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        if first:
            os.write(ready, first.pop())
        return x

    fit(
        student,
        Images(pixels, torch.arange(50) % 3),
        Settings(steps=120, batch_size=16, lr=0.05, log_every=3, save_every=1),
        guide=Guide(teacher, Taps(student, "0"), BirdLoss(pairs=[("0", "0")])),
        augment=augment,
        validate=lambda model: model(pixels.float() / 255).std().item(),
        folder=folder,
        resume=True,
        progress=False,
    )


def start(folder: Path) -> int:
    """A process that trains, and has begun to (or has ended)."""
    begun, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, ready)
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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    pid, begin = start(folder / "whole"), time.monotonic()
    assert finish(pid) == 0
    seconds = time.monotonic() - begin
    moments, halves, steps = random.Random(0), 0, list[int]()
    while True:
        pid = start(folder / "broken")
        if len(steps) < KILLS:
            time.sleep(moments.uniform(0, seconds / KILLS))
            os.kill(pid, signal.SIGKILL)
        code = finish(pid)
        if code != -signal.SIGKILL:
            break
        last = folder / "broken/last.pt"
        steps.append(load(last)["step"] if last.exists() else 0)
        halves += any((folder / "broken").glob(".partial.*"))
    whole, broken = (load(folder / name / "last.pt") for name in ("whole", "broken"))
    best = [load(folder / name / "best.pt") for name in ("whole", "broken")]

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    outcome = {
        "code": code,
        "steps": steps,
        "halves": halves,
        "weights": same(whole["modules"], broken["modules"]),
        "best": best[0]["step"] == best[1]["step"] and same(best[0]["model"], best[1]["model"]),
        "history": whole["history"] == broken["history"],
        "end": broken["step"],
        "files": sorted(p.name for p in (folder / "broken").iterdir() if not p.name.startswith("events")),
    }
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
