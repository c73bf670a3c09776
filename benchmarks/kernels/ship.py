"""What a GPU's result file says of our backends, as the file that the package chooses by: ``bird_kernels/timings``.

    python -m benchmarks.kernels.ship benchmarks/kernels/results/<device>.csv

A call takes as long as the slower of host and device, forward and backward together.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels import results
from benchmarks.kernels.results import Row
from bird_kernels import backends, timings

OURS = tuple(name for name in backends.NAMES if name not in ("auto", "reference"))


def seconds(rows: Sequence[Row]) -> dict[tuple[object, ...], float]:
    """Seconds of a call, by all columns of a shipped file but the last."""
    found: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        if row.mode == "forward+backward" and row.timer in ("host", "device") and row.provider in OURS and row.p50:
            sizes = row.n, row.p, row.q
            key = row.device, row.commit, row.dtype, row.precision, row.estimator, *sizes, row.provider
            found.setdefault(key, {})[row.timer] = row.p50
    return {key: max(times.values()) for key, times in found.items() if len(times) == 2}


def ship(source: Path) -> Path:
    """Write the package's file of the device that ``source`` was measured on.

    Raises:
        ValueError: ``source`` holds no complete measurement of ours, or those of several devices.
    """
    found = seconds(results.read(source))
    devices = {key[0] for key in found}
    if len(devices) != 1:
        raise ValueError(f"{source} must hold measurements of one GPU with host and device time, it holds {devices}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(timings.COLUMNS)
    writer.writerows([*key, f"{value:.4g}"] for key, value in sorted(found.items(), key=str))
    target = timings.file_of(str(devices.pop()))
    results.write_text(target, text.getvalue())
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(ship(Path(name)))
