"""What chunks cost and save: peak memory by batch size, and time beside two forwards and one backward.

    python -m benchmarks.chunks.measure --save

The demo's networks (a ResNet of 48 features, guided by a plain network of 96) on random 28 x 28 images in chunks of
512, made when they are needed, as a loader would. Memory is the process's peak beyond what a step on 16 images has
needed before, each figure from a process of its own. Times are of one process, in turns.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.results import origin
from bird import BirdLoss, Taps, Teacher, chunked_backward
from bird.lab.vision.models import PlainNet, ResNet

CHUNK = 512
ROWS = (1024, 4096, 16384, 65536)
WHOLE_ROWS = (1024, 4096)  # a batch at once: 1.5 GB at 4,096
RESULTS = Path(__file__).with_name("results.csv")


class Batch(Sequence[tuple[Tensor, Tensor]]):
    """n images and labels, in chunks."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n // CHUNK

    def __getitem__(self, i: Any) -> Any:
        generator = torch.Generator().manual_seed(range(len(self))[i])
        images = torch.rand(CHUNK, 1, 28, 28, generator=generator)
        return images.contiguous(memory_format=torch.channels_last), torch.arange(CHUNK) % 5


class Step:
    """One training step on n images: in chunks, at once, or the passes that chunks need, without CKA."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = ResNet(5).to(memory_format=torch.channels_last)
        self.teacher = Teacher(PlainNet(5).to(memory_format=torch.channels_last), ["block3"])
        self.taps = Taps(self.model, ["layer3"])
        self.loss = BirdLoss(pairs=[("block3", "layer3")])

    def forward(self, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's part and the student's features."""
        images, labels = chunk
        return F.cross_entropy(self.model(images), labels, reduction="sum"), self.taps.pop()

    def guides(self, chunk: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The teacher's features."""
        return self.teacher(chunk[0])

    def chunked(self, n: int) -> None:
        """In chunks."""
        chunked_backward(self.forward, self.guides, Batch(n), self.loss, model=self.model)

    def whole(self, n: int) -> None:
        """At once."""
        images, labels = (torch.cat(side) for side in zip(*Batch(n), strict=True))
        task, rows = self.forward((images, labels))
        self.loss(task, self.teacher(images), rows).backward()

    def passes(self, n: int) -> None:
        """Two forwards and one backward of the student, one forward of the teacher."""
        for chunk in Batch(n):
            with torch.no_grad():
                self.forward(chunk)
                self.guides(chunk)
        for chunk in Batch(n):
            task, rows = self.forward(chunk)
            torch.autograd.backward([task, rows["layer3"]], [torch.ones_like(task), torch.ones_like(rows["layer3"])])


def peak() -> float:
    """The largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(way: str, n: int) -> float:
    """What `_memory` finds in a new process, where freed memory goes back to the system."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.chunks.measure", "--memory", way, str(n)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _memory(way: str, n: int) -> float:
    """Peak memory of a step on n images beyond that of a step on 16, MB."""
    step = Step()
    images, labels = Batch(CHUNK)[0]
    task, rows = step.forward((images[:16], labels[:16]))
    step.loss(task, step.teacher(images[:16]), rows).backward()
    before = peak()
    getattr(step, way)(n)
    return peak() - before


def times(n: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step on n images, one way after the other in turns."""
    step = Step()
    ways: dict[str, Callable[[int], None]] = {"chunked": step.chunked, "passes": step.passes, "whole": step.whole}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(2 * CHUNK)
    for _ in range(repeats):
        for name, way in ways.items():
            step.model.zero_grad()
            start = time.perf_counter()
            way(n)
            seconds[name].append(time.perf_counter() - start)
    ours = seconds["chunked"]
    ratios = {f"of {k}": median(a / b for a, b in zip(ours, seconds[k], strict=True)) for k in ("passes", "whole")}
    return {name: median(values) for name, values in seconds.items()} | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="of each time (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name} beside this file")
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "ROWS"), help="one figure, of this process")
    options = parser.parse_args()
    if options.memory:
        print(_memory(options.memory[0], int(options.memory[1])))
        return
    rows: list[dict[str, Any]] = []
    for way, sizes in (("chunked", ROWS), ("whole", WHOLE_ROWS)):
        for n in sizes:
            rows.append({"what": "peak memory, MB", "way": way, "rows": n, "value": round(memory(way, n), 1)})
            print(rows[-1], flush=True)
    torch.set_num_threads(1)
    for name, value in times(4096, options.repeats).items():
        unit = "chunked, in units" if name.startswith("of") else "seconds a step"
        rows.append({"what": unit, "way": name, "rows": 4096, "value": round(value, 3)})
        print(rows[-1], flush=True)
    if options.save:
        about = asdict(origin(torch.device("cpu")))
        rows = [row | {name: about[name] for name in ("device", "torch", "commit", "date", "load")} for row in rows]
        with RESULTS.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
