"""Time per image of every corruption: ours on a batch beside the usual way, one picture at a time.

    python -m benchmarks.corruptions.throughput --save

The usual way is `tests.bird.usual_corruptions`: NumPy, SciPy, scikit-image, OpenCV and Pillow, held by the tests to the
same values. Everything takes turns in one process: the usual way on some pictures with one thread, ours on the batch
with one thread and with two. What is reported is the median over the rounds: of processor time for one thread, which
other programs on the machine disturb little, and of elapsed time for two, which they do. Pictures are 32 x 32 in
colour; the usual way's conversion from bytes is in its time, ours starts from floats.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch

from benchmarks import harness, rows
from benchmarks.rows import Row
from bird.lab.vision.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bird.lab.vision.data import to_float
from tests.bird.usual_corruptions import REFERENCE

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "scipy", "scikit-image", "opencv-python-headless", "pillow")
WAYS = "usual", "ours", "ours_two_threads"


def measure(batch: int, usual_images: int, turns: int) -> list[Row]:
    """All corruptions at all severities, in turns: seconds per image."""
    rng = np.random.default_rng(0)
    smooth = [cv2.resize(picture, (32, 32), interpolation=cv2.INTER_CUBIC) for picture in rng.random((batch, 6, 6, 3))]
    images = np.clip(255 * np.stack(smooth) + rng.normal(0, 5, (batch, 32, 32, 3)), 0, 255).astype(np.uint8)
    x, index = to_float(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()), torch.arange(batch)
    cv2.setNumThreads(1)

    def usual(name: str, severity: int) -> None:
        for image in images[:usual_images]:
            REFERENCE[name](image, severity, rng)

    def ours(name: str, severity: int) -> None:
        corrupt(x, name, severity, index=index)

    def take(name: str, severity: int, way: str) -> float:
        """Seconds per image."""
        torch.set_num_threads(2 if way == "ours_two_threads" else 1)
        clock: Callable[[], float] = time.perf_counter if way == "ours_two_threads" else time.process_time
        start = clock()
        (usual if way == "usual" else ours)(name, severity)
        return (clock() - start) / (usual_images if way == "usual" else batch)

    takes = {case: partial(take, *case) for case in product(CORRUPTIONS, SEVERITIES, WAYS)}
    for warm_up in takes.values():
        warm_up()  # which fills the tables
    seconds = harness.in_turns(takes, dict.fromkeys(takes, turns))
    about = rows.origin_of(x.device) | {"libraries": " ".join(f"{name} {version(name)}" for name in LIBRARIES)}
    about |= {"device": re.sub(r", \d+ threads$", "", about["device"])}
    return [
        about
        | dict(corruption=name, severity=severity, batch=batch, usual_images=usual_images, rounds=turns)
        | {way: median(seconds[name, severity, way]) for way in WAYS}
        for name, severity in product(CORRUPTIONS, SEVERITIES)
    ]


def corruptions_page(found: list[Row]) -> str:
    """Markdown: the sum over the five severities of each corruption, then of all."""
    groups = {name: [row for row in found if row["corruption"] == name] for name in CORRUPTIONS}
    groups |= {"all 19": found, "all but glass_blur": [row for row in found if row["corruption"] != "glass_blur"]}
    cells = [["corruption", "one at a time, µs", "batched, µs", "times as fast", "2 threads, elapsed, µs"]]
    for name, members in groups.items():
        usual, ours, two = (1e6 * sum(row[way] for row in members) for way in WAYS)
        cells.append([name, f"{usual:,.0f}", f"{ours:,.0f}", f"{usual / ours:.1f}", f"{two:,.0f}"])
    heading, how = rows.heading("Corruptions: time per image", found), EXPLANATION.format(**found[0])
    return f"{heading}{how}\n{rows.table_text(cells)}"


EXPLANATION = """\
Sum over the five severities, 32 x 32 in colour. Medians of {rounds} rounds in turns: the usual way on {usual_images} pictures,
one at a time, and ours on a batch of {batch}: processor time with one thread, elapsed time with two, which suffers from the load.
{libraries}.
"""  # noqa: E501 - its lines are the page's


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("--batch", type=int, default=500, help="images of ours at once (default: %(default)s)")
    parser.add_argument("--usual", type=int, default=10, help="images of the usual way (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    options = parser.parse_args()
    found = measure(options.batch, options.usual, options.rounds)
    rows.conclude(RESULTS / f"{rows.slug(found[0]['device'])}.csv", found, corruptions_page(found), options.save)


if __name__ == "__main__":
    main()
