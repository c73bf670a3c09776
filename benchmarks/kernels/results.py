"""What was measured: rows with their origin, the table for people, the file for the README."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.kernels.measure import Timing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
OURS = "auto"

# Of the last minute, before this run added its own: above a few tenths, other programs had a share of the times.
LOAD = os.getloadavg()[0]


@dataclass(frozen=True)
class Row:
    """One measurement: memory in bytes, time as `Timing`; with a red gate the reason and no number."""

    problem: str
    n: int
    p: int
    q: int
    dtype: str
    mode: str
    provider: str
    value_error: float
    gradient_error: float | None
    red: str | None = None
    timing: Timing | None = None
    peak_memory: int | None = None


def device_name() -> str:
    """The GPU's name, or the processor's with the number of threads that PyTorch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.findall(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)[0]
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"CPU {name}, {torch.get_num_threads()} threads"


def origin() -> dict[str, str]:
    """Where and with what the rows of this run were measured."""
    found = {"device": device_name(), "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    found["load before"] = f"{LOAD:.1f}"
    found["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "not set")
    found["python"] = platform.python_version()
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit of the sources, with a mark where files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(rows: list[Row]) -> Path:
    """Write ``results/<device>.json`` and its table, each whole or not at all; returns the first."""
    about = origin()
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"origin": about, "rows": [asdict(row) for row in rows]}, indent=1)
    heading = "\n".join(f"- {key}: {value}" for key, value in about.items())
    _write(RESULTS / f"{name}.md", f"# Kernel benchmarks\n\n{heading}\n\n{table(rows)}")
    _write(RESULTS / f"{name}.json", content + "\n")
    return RESULTS / f"{name}.json"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def table(rows: Iterable[Row]) -> str:
    """Markdown: per mode and dtype a line for each problem and a column for each provider."""
    sections: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sections.setdefault((row.mode, row.dtype), []).append(row)
    return "\n".join(_section(*title, section) for title, section in sections.items())


def _section(mode: str, dtype: str, rows: list[Row]) -> str:
    providers = list(dict.fromkeys(row.provider for row in rows))
    problems: dict[tuple[str, int, int, int], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault((row.problem, row.n, row.p, row.q), {})[row.provider] = row
    times = [["problem", "n", "p", "q", *providers]]
    memory = [["problem", *providers]]
    for key, by_provider in problems.items():
        ours = by_provider.get(OURS)
        times.append([*map(str, key), *(_time(by_provider.get(name), ours) for name in providers)])
        memory.append([key[0], *(_memory(by_provider.get(name)) for name in providers)])
    text = f"## {mode}, {dtype}\n\nMedian of a call (over the median of {OURS}).\n\n{_markdown(times)}"
    if any(row.peak_memory is not None for row in rows):
        text += f"\nPeak memory beyond the inputs, MiB.\n\n{_markdown(memory)}"
    return text


def _time(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "–"
    if row.timing is None:
        return f"wrong: {row.red}"
    seconds = row.timing.median
    text = f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    return text if ours is None or ours.timing is None else f"{text} ({seconds / ours.timing.median:.2f}×)"


def _memory(row: Row | None) -> str:
    return "–" if row is None or row.peak_memory is None else f"{row.peak_memory / 2**20:.3g}"


def _markdown(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
