"""What reports are made of: Markdown tables, numbers in percent, what a report was made on, and its files."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from ..files import atomic, write_json
from .tensors import FORMAT


def version(package: str) -> str:
    """Of an installed package; "not installed" of others, as of a source tree on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report_origin() -> dict[str, Any]:
    """Versions, and the machine that a report is made on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "bird-kernels": version("bird-kernels"),
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


def second_half(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the later half of a training's reports, of what the first of these has beside its step.

    What is measured of the guidance is of the later half of those reports in which it is on.
    A report may lack some of it: a small last batch of texts trains on the task alone, and logs no CKA.
    """
    late = reports[len(reports) // 2 :]
    names = [name for name in (late[0] if late else ()) if name != "step"]
    found = {name: [report[name] for report in late if name in report] for name in names}
    for name in {"task_grad", "guide_grad", "guide_beta"}.intersection(names):
        on = [report[name] for report in reports if name in report and report.get("guide_beta") != 0]
        found[name] = on[len(on) // 2 :] or found[name]
    return {name: fmean(values) for name, values in found.items()}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
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


def without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table's rows, the header first, without columns that have nothing below their header."""
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in kept] for row in rows]


def write_report(folder: Path, page: str, numbers: Mapping[str, Any]) -> None:
    """``README.md`` and ``results.json``, each atomically."""
    write_markdown(folder / "README.md", page)
    write_json({"format": FORMAT} | dict(numbers), folder / "results.json")


def write_markdown(path: Path, text: str) -> None:
    """A file, atomically; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Rows, the header first, atomically."""
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
