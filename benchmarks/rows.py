"""What the benchmarks keep: rows that say where they were measured, in files that are whole or not there, and a page.

A row is a dataclass that inherits `Origin` and the dataclass of its question. The fields are the columns of a CSV file.
Only where a row was measured needs torch: results can be read without.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

R = TypeVar("R", bound="Origin")

ROOT = Path(__file__).resolve().parents[1]
# Of the last minute, before this run added its own: above a few tenths, other programs had a share of the times.
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where and with what a row was measured; ``load`` is the machine's before the run."""

    device: str
    driver: str
    torch: str
    triton: str
    python: str
    commit: str
    date: str
    load: str
    omp_wait_policy: str


def origin_of(device: torch.device) -> dict[str, str]:
    """The fields of `Origin` for what is measured now."""
    import torch

    smi = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return dict(
        device=device_name(device),
        driver=(output(*smi).split("\n")[0] or "unknown") if device.type == "cuda" else "",
        torch=torch.__version__,
        triton=version_of("triton"),
        python=platform.python_version(),
        commit=output("git", "describe", "--always", "--dirty", "--exclude=*") or "unknown",
        date=time.strftime("%Y-%m-%d"),
        load=f"{LOAD:.1f}",
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", ""),
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that PyTorch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.findall(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)[0]
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"CPU {name}, {torch.get_num_threads()} threads"


def output(*command: str) -> str:
    """What a program prints that takes seconds at the most; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def version_of(package: str) -> str:
    """The installed version, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---------------------------------------------------------------------------------------------- rows and files


def columns_of(kind: type) -> dict[str, str]:
    """The columns of a row's dataclass with their types; a field that takes no part in comparisons is none."""
    return {column.name: str(column.type) for column in fields(kind) if column.compare}


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Replace a CSV file by these rows of one dataclass, whole or not at all."""
    names = list(columns_of(type(rows[0])))
    write_cells(path, [names, *([getattr(row, name) for name in names] for row in rows)])


def write_cells(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """Replace a CSV file, whole or not at all; a number has six digits, None is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(cell, line) for line in lines)
    write_text(path, text.getvalue())


def cell(value: object) -> str:
    """A value as a file has it."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def load_rows(path: Path, kind: type[R]) -> list[R]:
    """The rows of a CSV file.

    Raises:
        ValueError: its columns are not a row's.
    """
    kinds = columns_of(kind)
    needed = {column.name for column in fields(kind) if column.compare and column.default is MISSING}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = set(reader.fieldnames or [])
        if names - kinds.keys() or needed - names:
            raise ValueError(f"{path} has columns {reader.fieldnames}, not {list(kinds)}: measure again with --save")
        return [kind(**{name: _value(kinds[name], text) for name, text in line.items()}) for line in reader]


def _value(kind: str, text: str) -> str | int | float | bool | None:
    if kind == "str":
        return text
    if not text:
        return None
    return text == "True" if kind == "bool" else int(text) if kind.startswith("int") else float(text)


def write_text(path: Path, text: str) -> None:
    """Replace a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def message(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def slug(name: str) -> str:
    """A name as a file's: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---------------------------------------------------------------------------------------------- pages and command lines


def heading(title: str, rows: Sequence[Origin]) -> str:
    """The top of a page: what all rows share of their origin, and where they differ every value."""
    text = f"# {title}\n\n"
    for name in columns_of(Origin):
        values = dict.fromkeys(str(getattr(row, name)) for row in rows)
        if any(values):
            text += f"- {name.replace('_', ' ')}: {', '.join(value or 'not set' for value in values)}\n"
    return text + "\n"


def table_text(cells: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading, its columns aligned in the source too."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def with_unit(value: float, units: Sequence[str]) -> str:
    """Three digits and a unit, each a thousand of the one before."""
    *smaller, largest = units
    for unit in smaller:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {largest}"


def duration(seconds: float | None) -> str:
    """Three digits and a unit; a dash for None."""
    return "–" if seconds is None else with_unit(seconds * 1e6, ("µs", "ms", "s"))


def beside(seconds: float | None, base: float | None) -> str:
    """``12 ms (1.50×)``: a time, and how many times the ``base`` it is where there is one."""
    ratio = f" ({seconds / base:.2f}×)" if seconds is not None and base is not None else ""
    return duration(seconds) + ratio


def plain_page(found: Sequence[Any]) -> str:
    """Markdown: the rows as they are, without what they say of the machine."""
    names = [name for name in columns_of(type(found[0])) if name not in columns_of(Origin)]
    return table_text([names, *([cell(getattr(row, name)) for name in names] for row in found)])


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every benchmark has; the description is its module's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--save", action="store_true", help="keep the rows, and the page beside them")
    return made


def conclude(path: Path, found: Sequence[Any], text: str, save: bool) -> None:
    """Print the page of the rows; where it is asked for, keep the rows in ``path`` and the page beside them."""
    print(text)
    if save:
        write_rows(path, found)
        write_text(path.with_suffix(".md"), text)
        print(path)
