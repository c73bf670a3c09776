"""What reports are made of: Markdown tables, numbers in percent, and what a report was made on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from statistics import fmean, stdev
from typing import Any

import torch


def origin() -> dict[str, Any]:
    """Versions, and the machine that a report is made on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "bird-kernels": metadata.version("bird-kernels"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpu": gpu,
    }


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds, 0 for a single one; NaN if one of them is."""
    if any(map(math.isnan, values)):  # on which `stdev` fails in Python 3.11
        return math.nan
    return stdev(values) if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    """``mean ± standard deviation`` in percent; for a single value, no more than that."""
    mean = f"{100 * fmean(values):.1f}"
    return f"{mean} ± {100 * spread(values):.1f}" if len(values) > 1 else mean


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table from rows of cells, the header first; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"| {row[0]:<{widths[0]}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in rows
    ]
    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([lines[0], rule, *lines[1:]])
