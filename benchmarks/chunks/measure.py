"""What chunks cost and save: peak memory by batch size, and time beside two forwards and one backward.

    python -m benchmarks.chunks.measure --save

`resnet-tiny` (48 features), guided by `plain` (96), of bird.lab.vision.models, on random 28 x 28 images in chunks of
512, made when they are needed, as a loader would. Memory is the process's peak beyond what a step on 16 images has
needed before, each figure from a process of its own. Times are of one process, in turns; before that the gradient of a
step in chunks is held to that of the same chunks under one autograd graph.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, rows
from benchmarks.harness import Contestant, Evaluated, gate_of
from benchmarks.kernels import forms
from benchmarks.machine import Machine
from bird import BirdLoss, Taps, Teacher, chunked_backward
from bird.lab.vision.models import PlainNet, ResNet

CHUNK = 512
PEAKS = {"chunked": (1024, 4096, 16384, 65536), "whole": (1024, 4096)}  # a batch at once: 1.5 GB at 4,096
PEER = importlib.util.find_spec("grad_cache") is not None  # of github.com/luyug/GradCache; PyPI's cannot be imported
WAYS, TIMED = ("chunked", "passes", "whole", *(("gradcache",) * PEER)), 4096
RESULTS = Path(__file__).with_name("results.csv")
TOLERANCE = 1e-3  # of the gradient, relative to its norm


class ChunkedBatch(Sequence[tuple[Tensor, Tensor]]):
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

    def chunked(self, n: int) -> None:
        """In chunks."""
        chunked_backward(
            self.forward, lambda chunk: self.teacher(chunk[0]), ChunkedBatch(n), self.loss, model=self.model
        )

    def whole(self, n: int) -> None:
        """At once."""
        self.joined([tuple(torch.cat(side) for side in zip(*ChunkedBatch(n), strict=True))])

    def joined(self, batch: Sequence[tuple[Tensor, Tensor]]) -> None:
        """All chunks, each normalised by itself, in one graph."""
        tasks, *sides = zip(*((*self.forward(chunk), self.teacher(chunk[0])) for chunk in batch), strict=True)
        rows, guides = ({name: torch.cat([part[name] for part in side]) for name in side[0]} for side in sides)
        self.loss(sum(tasks), guides, rows).backward()

    def passes(self, n: int) -> None:
        """Two forwards and one backward of the student, one forward of the teacher."""
        for chunk in ChunkedBatch(n):
            with torch.no_grad():
                self.forward(chunk)
                self.teacher(chunk[0])
        for chunk in ChunkedBatch(n):
            task, rows = self.forward(chunk)
            torch.autograd.backward([task, rows["layer3"]], [torch.ones_like(task), torch.ones_like(rows["layer3"])])

    def gradcache(self, n: int) -> None:
        """The same gradient by GradCache, whose loss of representations is handed both parts of ours."""
        from grad_cache import GradCache

        images, labels = zip(*ChunkedBatch(n), strict=True)
        with torch.no_grad():
            guide = torch.cat([self.teacher(part)["block3"] for part in images]).flatten(1)

        class Student(torch.nn.Module):
            def __init__(self, step: Step) -> None:
                super().__init__()
                self.network, self.taps = step.model, step.taps

            def forward(self, chunk: Tensor) -> Tensor:
                scores = self.network(chunk)
                return torch.cat([scores, self.taps.pop()["layer3"].flatten(1)], 1)

        def loss(both: Tensor) -> Tensor:
            scores, rows = both[:, :5], both[:, 5:]
            task = F.cross_entropy(scores, torch.cat(labels), reduction="sum")
            return self.loss.alpha * task + self.loss.beta * forms.by_features(rows, guide)

        GradCache([Student(self)], CHUNK, loss, split_input_fn=lambda chunks, size: chunks)(images)

    def gradient(self, way: str, batch: Any) -> Evaluated:
        """The student's gradient after such a step, where it is one to compare."""
        self.model.zero_grad()
        getattr(self, way)(batch)
        # Of the other ways it is another gradient: a whole batch is normalised as one, and passes have no CKA.
        compared = way in ("chunked", "joined", "gradcache")
        return Evaluated(torch.zeros(()), [torch.cat([p.grad.flatten() for p in self.model.parameters()])] * compared)


def peak() -> float:
    """The largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_beyond(way: str, n: int) -> float:
    """Peak memory of a step on n images, MB, in a new process, where freed memory goes back to the system."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.chunks.measure", "--memory", way, str(n)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def peak_here(way: str, n: int) -> float:
    """The same of this process, beyond that of a step on 16 images."""
    step = Step()
    images, labels = ChunkedBatch(CHUNK)[0]
    step.joined([(images[:16], labels[:16])])
    before = peak()
    getattr(step, way)(n)
    return peak() - before


def times_of_ways(n: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step on n images, one way after the other in turns, and how many times the others' ours is.

    Raises:
        ValueError: a step in chunks has a wrong gradient.
    """
    step = Step()
    gate = gate_of(partial(step.gradient, "joined", ChunkedBatch(n)), 0.0, TOLERANCE)
    candidates = [Contestant(way, partial(step.gradient, way, n), captured=False) for way in WAYS]
    entries = list(harness.compete(Machine(torch.device("cpu")), candidates, gate, ["wall"], lambda *_: repeats))
    wrong = [f"{entry.name}: {entry.why}" for entry in entries if entry.status != "ok"]
    if wrong:
        raise ValueError("; ".join(wrong))
    seconds = {entry.name: entry.seconds["wall"] for entry in entries}
    ours = seconds["chunked"]
    ratios = {f"of {k}": median(a / b for a, b in zip(ours, seconds[k], strict=True)) for k in WAYS[1:]}
    return {name: median(values) for name, values in seconds.items()} | ratios


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="of each time (default: %(default)s)")
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "ROWS"), help="one figure, of this process")
    options = parser.parse_args()
    if options.memory:
        print(peak_here(options.memory[0], int(options.memory[1])))
        return
    torch.set_num_threads(1)
    about = rows.origin_of(torch.device("cpu")) | {"gradcache": rows.version_of("gradcache")}
    figures = [("peak memory, MB", way, n, peak_beyond(way, n)) for way, sizes in PEAKS.items() for n in sizes]
    for name, value in times_of_ways(TIMED, options.repeats).items():
        figures.append(("chunked, in units" if name.startswith("of") else "seconds a step", name, TIMED, value))
    columns = "what", "way", "rows", "value"
    page = rows.table_text([columns, *([rows.cell(value) for value in figure] for figure in figures)])
    rows.conclude(RESULTS, [dict(zip(columns, figure, strict=True)) | about for figure in figures], page, options.save)


if __name__ == "__main__":
    main()
