"""Time per image of every corruption: ours on a batch beside the usual way, one picture at a time.

    python -m benchmarks.corruptions.throughput --save

The usual way is `benchmarks.corruptions.reference`: NumPy, SciPy, scikit-image, OpenCV and Pillow, held by the tests to
the same values. Everything takes turns in one process: the usual way on some pictures with one thread, ours on the
batch with one thread and with two. What is reported is the median over the rounds: of processor time for one thread,
which other programs on the machine disturb little, and of elapsed time for two, which they do. Pictures are 32 x 32 in
colour; the usual way's conversion from bytes is in its time, ours starts from floats. With ``--device cuda`` ours runs
there, and its time is elapsed time, the device waited for.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch

from benchmarks.corruptions.reference import REFERENCE
from benchmarks.kernels.results import Origin, origin, write_text
from benchmarks.kernels.tables import markdown
from bird.lab.vision.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bird.lab.vision.data import to_float

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "scipy", "scikit-image", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Row(Origin):
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


def measure(batch: int, usual_images: int, rounds: int, device: torch.device) -> list[Row]:
    """All corruptions at all severities, in turns."""
    rng = np.random.default_rng(0)
    smooth = [cv2.resize(picture, (32, 32), interpolation=cv2.INTER_CUBIC) for picture in rng.random((batch, 6, 6, 3))]
    images = np.clip(255 * np.stack(smooth) + rng.normal(0, 5, (batch, 32, 32, 3)), 0, 255).astype(np.uint8)
    x, index = to_float(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).to(device), torch.arange(batch)
    cv2.setNumThreads(1)
    about = asdict(origin(device)) | {"libraries": " ".join(f"{n} {version(n)}" for n in LIBRARIES)}
    about["device"] = re.sub(r", \d+ threads$", "", about["device"])
    cases = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    seconds: dict[tuple[str, int], list[list[float]]] = {case: [] for case in cases}

    def usual(name: str, severity: int) -> None:
        for image in images[:usual_images]:
            REFERENCE[name](image, severity, rng)

    def ours(name: str, severity: int) -> None:
        corrupt(x, name, severity, index=index)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()

    for turn in range(rounds + 1):
        for case in cases:
            torch.set_num_threads(1)
            times = [_time(usual, case, time.process_time) / usual_images]
            if device.type == "cpu":
                times.append(_time(ours, case, time.process_time) / batch)
                torch.set_num_threads(2)
            times.append(_time(ours, case, time.perf_counter) / batch)
            if turn > 0:  # the first one fills the tables
                seconds[case].append(times)
    middles = {case: [median(way) for way in zip(*times, strict=True)] for case, times in seconds.items()}
    return [Row(*about.values(), *case, batch, usual_images, rounds, *(*middles[case], None)[:3]) for case in cases]


def _time(function: Callable[[str, int], None], case: tuple[str, int], clock: Callable[[], float]) -> float:
    start = clock()
    function(*case)
    return clock() - start


CLOCKS = "processor time with one thread, elapsed time with two, which suffers from the load"


def page(rows: list[Row]) -> str:
    """Markdown: the sum over the five severities of each corruption, then of all."""
    heading = ["corruption", "one at a time, µs", "batched, µs", "times as fast", "2 threads, elapsed, µs"]
    groups = {name: [row for row in rows if row.corruption == name] for name in CORRUPTIONS}
    groups["all 19"] = rows
    groups["all but glass_blur"] = [row for row in rows if row.corruption != "glass_blur"]
    table = [heading]
    for name, members in groups.items():
        usual, ours, two = (
            sum(getattr(row, way) or 0.0 for row in members) for way in ("usual", "ours", "ours_two_threads")
        )
        table.append(
            [
                name,
                f"{1e6 * usual:,.0f}",
                f"{1e6 * ours:,.0f}",
                f"{usual / ours:.1f}",
                f"{1e6 * two:,.0f}" if two else "–",
            ]
        )
    first = rows[0]
    return (
        "# Corruptions: time per image\n\n"
        f"Sum over the five severities, 32 x 32 in colour, {first.device}, commit {first.commit}, {first.date},\n"
        f"load before {first.load}. Medians of {first.rounds} rounds in turns: the usual way on {first.usual_images} "
        f"pictures, one at a time, and ours\non a batch of {first.batch}: "
        f"{CLOCKS if first.ours_two_threads else 'elapsed time on the device, one thread for the usual way'}. "
        f"Python {first.python}, torch {first.torch},\n{first.libraries}.\n\n" + markdown(table)
    )


def save(rows: list[Row]) -> Path:
    """The rows as CSV and the page beside them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.name for column in fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in values])
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", rows[0].device.lower()).strip("-") + ".csv")
    write_text(path, text.getvalue())
    write_text(path.with_suffix(".md"), page(rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=500, help="images of ours at once (default: %(default)s)")
    parser.add_argument("--usual", type=int, default=10, help="images of the usual way (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of ours (default: cpu)")
    parser.add_argument("--save", action="store_true", help=f"keep the rows in {RESULTS.name}/")
    options = parser.parse_args()
    rows = measure(options.batch, options.usual, options.rounds, options.device)
    print(page(rows))
    if options.save:
        print(save(rows))


if __name__ == "__main__":
    main()
