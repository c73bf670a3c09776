"""Which backend is fastest, from measurements that ship with the package: a CSV per device in this folder.

They come from the benchmarks (``python -m benchmarks.kernels.ship benchmarks/kernels/results/<device>.csv``). Pure
functions of sizes, types and the device's name; on a device without a file nothing is known, and the order in
`backends` decides.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
COLUMNS = ("device", "commit", "dtype", "precision", "estimator", "n", "p", "q", "backend", "seconds")
# A measurement speaks for problems up to this many times larger or smaller, over all three sizes.
REACH = 8.0


class Shape(NamedTuple):
    """Rows and widths of a problem."""

    n: int
    p: int
    q: int

    def distance(self, other: Shape) -> float:
        """How many times larger or smaller, multiplied over the sizes; as a logarithm."""
        return sum(abs(math.log(a / b)) for a, b in zip(self, other, strict=True))


class Finding(NamedTuple):
    """The nearest problem that was measured, and seconds of forward and backward by backend."""

    shape: Shape
    seconds: dict[str, float]


def file_of(device: str) -> Path:
    """Where the measurements of a device stand, by its name as PyTorch gives it."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv")


def nearest(device: str, dtype: str, precision: str, estimator: str, shape: Shape) -> Finding | None:
    """The measurement of the same types whose sizes are nearest, or None within REACH.

    ``dtype`` and ``precision`` as in the benchmarks' rows: "float32" with "ieee", "tf32" or "tf32x3", else "".
    """
    findings = _findings(device).get((dtype, precision, estimator), ())
    best = min(findings, key=lambda finding: shape.distance(finding.shape), default=None)
    return best if best is not None and shape.distance(best.shape) <= math.log(REACH) else None


def is_always_fastest(name: str, device: str, dtype: str, candidates: Sequence[str]) -> bool:
    """Whether no measurement of all candidates on this device was won by another; so where there is none."""
    of_dtype = (found for key, found in _findings(device).items() if key[0] == dtype)
    return all(fastest(finding, candidates) in (None, name) for found in of_dtype for finding in found)


def fastest(finding: Finding | None, candidates: Sequence[str]) -> str | None:
    """The quickest of the candidates, if all of them were measured."""
    if finding is None or not all(name in finding.seconds for name in candidates):
        return None
    return min(candidates, key=finding.seconds.__getitem__)


@lru_cache
def _findings(device: str) -> dict[tuple[str, str, str], list[Finding]]:
    seconds: dict[tuple[str, str, str], dict[Shape, dict[str, float]]] = {}
    path = file_of(device)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["device"] == device:
                    key = row["dtype"], row["precision"], row["estimator"]
                    shape = Shape(int(row["n"]), int(row["p"]), int(row["q"]))
                    seconds.setdefault(key, {}).setdefault(shape, {})[row["backend"]] = float(row["seconds"])
    return {key: [Finding(*item) for item in shapes.items()] for key, shapes in seconds.items()}
