"""What the benchmarks keep: rows that say where they were measured, in files that are whole or not there, and pages.

A row is a dictionary: where and with what it was measured (`origin_of`), the question, and what came out. Its keys are
the columns of a CSV file. Only where a row was measured needs torch: results can be read without.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
ORIGIN = ("device", "driver", "torch", "triton", "python", "commit", "date", "load", "omp_wait_policy")
# Of the last minute, before this run added its own: above a few tenths, other programs had a share of the times.
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def origin_of(device: torch.device) -> Row:
    """Where and with what a row is measured now; the load is the machine's before the run."""
    import torch

    smi = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    found = (
        device_name(device),
        (output(*smi).split("\n")[0] or "unknown") if device.type == "cuda" else "",
        str(torch.__version__),
        version_of("triton"),
        platform.python_version(),
        output("git", "describe", "--always", "--dirty", "--exclude=*") or "unknown",
        time.strftime("%Y-%m-%d"),
        f"{LOAD:.1f}",
        os.environ.get("OMP_WAIT_POLICY", ""),
    )
    return dict(zip(ORIGIN, found, strict=True))


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


# ---------------------------------------------------------------------------------------------- files


def write_rows(path: Path, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Replace a CSV file, whole or not at all; its columns are all that some row has, or these.

    A number has six digits, None is empty.
    """
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerows([names, *([cell(row.get(name)) for name in names] for row in rows)])
    write_text(path, text.getvalue())


def cell(value: object) -> str:
    """A value as a file has it."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def load_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; what is empty is None. A ValueError where a line has more cells than the first."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if any(None in line for line in lines):
        raise ValueError(f"{path} is no table: a line has more cells than the first")
    return [{name: _value(name, text) for name, text in line.items()} for line in lines]


def _value(name: str, text: str) -> str | int | float | bool | None:
    if not text or text in ("True", "False"):
        return text == "True" if text else None
    for kind in (int, float) if name not in ORIGIN else ():  # a commit may look like a number
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


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


def heading(title: str, rows: Sequence[Row]) -> str:
    """The top of a page: what all rows share of their origin, and where they differ every value."""
    text = f"# {title}\n\n"
    for name in ORIGIN:
        values = dict.fromkeys(row.get(name) or "not set" for row in rows)
        if list(values) != ["not set"]:
            text += f"- {name.replace('_', ' ')}: {', '.join(values)}\n"
    return text + "\n"


def table_text(cells: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading, its columns aligned in the source too."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def with_parts(page: str, parts: Iterable[tuple[str, str]]) -> str:
    """The page with these texts, by name, in their places: between ``<!-- name -->`` and ``<!-- end name -->``.

    Raises:
        ValueError: a part has no place, or several.
    """
    for name, text in parts:
        between = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        page, places = between.subn(lambda found, text=text: found[1] + text.rstrip() + found[2], page)
        if places != 1:
            raise ValueError(f"the page has {places} places for {name!r}")
    return page


def with_unit(value: float, units: Sequence[str]) -> str:
    """Three digits and a unit, each a thousand of the one before."""
    *smaller, largest = units
    for unit in smaller:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {largest}"


def size_of(size: float) -> str:
    """Bytes for people, powers of 1000."""
    return with_unit(size, ("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float | None) -> str:
    """Three digits and a unit; a dash for None."""
    return "–" if seconds is None else with_unit(seconds * 1e6, ("µs", "ms", "s"))


def beside(seconds: float | None, base: float | None) -> str:
    """``12 ms (1.50×)``: a time, and how many times the ``base`` it is where there is one."""
    ratio = f" ({seconds / base:.2f}×)" if seconds is not None and base is not None else ""
    return duration(seconds) + ratio


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every benchmark has; the description is its module's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--save", action="store_true", help="keep the rows, and the page beside them")
    return made


def conclude(path: Path, rows: Sequence[Row], text: str, save: bool) -> None:
    """Print the page of the rows; where it is asked for, keep the rows in ``path`` and the page beside them."""
    print(text)
    if save:
        write_rows(path, rows)
        write_text(path.with_suffix(".md"), text)
        print(path)
