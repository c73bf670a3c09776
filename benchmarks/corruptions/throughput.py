"""Time per image of every corruption: ours on a batch beside the usual way, one picture at a time.

    python -m benchmarks.corruptions.throughput --save

The usual way is `tests.bird.usual_corruptions`: NumPy, SciPy, scikit-image, OpenCV and Pillow, held by the tests to
the same values. Everything takes turns in one process: the usual way on some pictures with one thread, ours on the
batch with one thread and with two. What is reported is the median over the rounds: of processor time for one thread,
which other programs on the machine disturb little, and of elapsed time for two, which they do. Pictures are 32 x 32 in
colour; the usual way's conversion from bytes is in its time, ours starts from floats. With ``--device cuda`` ours runs
there, and its time is elapsed time, the device waited for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch

from benchmarks import harness, rows
from benchmarks.machine import Machine
from benchmarks.rows import Origin
from bird.lab.vision.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bird.lab.vision.data import to_float
from tests.bird.usual_corruptions import REFERENCE

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "scipy", "scikit-image", "opencv-python-headless", "pillow")


@dataclass(frozen=True, kw_only=True)
class CorruptionsRow(Origin):
    """One corruption at one severity; seconds per image."""

    libraries: str
    corruption: str
    severity: int
    batch: int
    usual_images: int
    rounds: int
    usual: float
    ours: float
    ours_two_threads: float | None


def measure(batch: int, usual_images: int, turns: int, device: torch.device) -> list[CorruptionsRow]:
    """All corruptions at all severities, in turns."""
    rng = np.random.default_rng(0)
    smooth = [cv2.resize(picture, (32, 32), interpolation=cv2.INTER_CUBIC) for picture in rng.random((batch, 6, 6, 3))]
    images = np.clip(255 * np.stack(smooth) + rng.normal(0, 5, (batch, 32, 32, 3)), 0, 255).astype(np.uint8)
    x, index = to_float(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).to(device), torch.arange(batch)
    cv2.setNumThreads(1)
    machine = Machine(device)

    def usual(name: str, severity: int) -> None:
        for image in images[:usual_images]:
            REFERENCE[name](image, severity, rng)

    def ours(name: str, severity: int) -> None:
        corrupt(x, name, severity, index=index)
        machine.wait()

    elapsed, processor = time.perf_counter, time.process_time
    ways = {"usual": (usual, usual_images, 1, processor), "ours": (ours, batch, 1, processor)}
    if device.type == "cpu":
        ways["ours_two_threads"] = (ours, batch, 2, elapsed)
    else:
        ways["ours"] = (ours, batch, 1, elapsed)
    cases = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    takes = {(case, way): partial(_time, case, *about) for case in cases for way, about in ways.items()}
    for take in takes.values():
        take()  # which fills the tables
    seconds = harness.in_turns(takes, dict.fromkeys(takes, turns))
    about = rows.origin_of(device) | {"libraries": " ".join(f"{n} {version(n)}" for n in LIBRARIES)}
    about |= {"device": re.sub(r", \d+ threads$", "", about["device"])}
    return [
        CorruptionsRow(
            **about, corruption=name, severity=severity, batch=batch, usual_images=usual_images, rounds=turns,
            **{"ours_two_threads": None} | {way: median(seconds[(name, severity), way]) for way in ways},
        )
        for name, severity in cases
    ]  # fmt: skip


def _time(
    case: tuple[str, int],
    corrupts: Callable[[str, int], None],
    images: int,
    threads: int,
    clock: Callable[[], float],
) -> float:
    """Seconds per image."""
    torch.set_num_threads(threads)
    start = clock()
    corrupts(*case)
    return (clock() - start) / images


CLOCKS = "processor time with one thread, elapsed time with two, which suffers from the load"


def corruptions_page(found: list[CorruptionsRow]) -> str:
    """Markdown: the sum over the five severities of each corruption, then of all."""
    groups = {name: [row for row in found if row.corruption == name] for name in CORRUPTIONS}
    groups["all 19"] = found
    groups["all but glass_blur"] = [row for row in found if row.corruption != "glass_blur"]
    cells = [["corruption", "one at a time, µs", "batched, µs", "times as fast", "2 threads, elapsed, µs"]]
    for name, members in groups.items():
        usual, ours = (1e6 * sum(getattr(row, way) for row in members) for way in ("usual", "ours"))
        two = 1e6 * sum(row.ours_two_threads or 0.0 for row in members)
        cells.append([name, f"{usual:,.0f}", f"{ours:,.0f}", f"{usual / ours:.1f}", f"{two:,.0f}" if two else "–"])
    first = found[0]
    return (
        f"{rows.heading('Corruptions: time per image', found)}"
        f"Sum over the five severities, 32 x 32 in colour. Medians of {first.rounds} rounds in turns: the usual way on "
        f"{first.usual_images} pictures,\none at a time, and ours on a batch of {first.batch}: "
        f"{CLOCKS if first.ours_two_threads else 'elapsed time on the device, one thread for the usual way'}.\n"
        f"{first.libraries}.\n\n{rows.table_text(cells)}"
    )


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("--batch", type=int, default=500, help="images of ours at once (default: %(default)s)")
    parser.add_argument("--usual", type=int, default=10, help="images of the usual way (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of ours (default: cpu)")
    options = parser.parse_args()
    found = measure(options.batch, options.usual, options.rounds, options.device)
    rows.conclude(RESULTS / f"{rows.slug(found[0].device)}.csv", found, corruptions_page(found), options.save)


if __name__ == "__main__":
    main()
