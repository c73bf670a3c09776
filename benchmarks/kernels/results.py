"""What was measured: one tidy row per measurement with its origin, and the files that keep them."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.kernels import estimates
from benchmarks.kernels.contest import Entry
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case
from benchmarks.kernels.timers import Timing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"

# Of the last minute, before this run added its own: above a few tenths, other programs had a share of the times.
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


@dataclass(frozen=True)
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


class Key(NamedTuple):
    """What tells the rows of one file apart."""

    problem: str
    n: int
    p: int
    q: int
    dtype: str
    precision: str
    estimator: str
    mode: str
    timer: str
    provider: str


@dataclass(frozen=True)
class Row(Origin):
    """One measurement. Times and floor in seconds, memory in bytes, ceilings in bytes/s and flop/s; None is unknown.

    With a red gate there is the reason and no time. ``launches`` counts kernels, copies and fills on a GPU.
    """

    problem: str
    n: int
    p: int
    q: int
    dtype: str
    precision: str
    estimator: str
    mode: str
    timer: str
    provider: str
    red: str
    value_error: float | None
    gradient_error: float | None
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int | None
    launches: int | None
    peak_memory: int | None
    floor: float | None
    copy_ceiling: float | None
    product_ceiling: float | None

    @property
    def key(self) -> Key:
        """Problem, numbers, mode, timer and provider."""
        return Key(*(getattr(self, name) for name in Key._fields))

    @property
    def question(self) -> Key:
        """The key without the provider: rows of one question compete."""
        return self.key._replace(provider="")


def row(origin: Origin, case: Case, timer: str, entry: Entry, ceilings: Ceilings, device: torch.device) -> Row:
    """A contest's entry as a row."""
    verdict = entry.verdict
    timing = Timing.of(entry.seconds) if entry.seconds else None
    return Row(
        **asdict(origin),
        problem=case.problem, n=case.n, p=case.p, q=case.q,
        dtype=case.dtype, precision=case.precision, estimator=case.estimator, mode=case.mode,
        timer=timer, provider=entry.provider.name, red=verdict.red or "",
        value_error=verdict.errors.value if verdict.errors else None,
        gradient_error=verdict.errors.gradient if verdict.errors else None,
        p20=timing.p20 if timing else None, p50=timing.p50 if timing else None, p80=timing.p80 if timing else None,
        rounds=timing.rounds if timing else None,
        launches=verdict.launches, peak_memory=verdict.peak_memory,
        floor=estimates.floor(case, ceilings, device),
        copy_ceiling=ceilings.copy(estimates.traffic(case, device)), product_ceiling=ceilings.rate(case),
    )  # fmt: skip


def origin(device: torch.device) -> Origin:
    """The origin of what is measured now."""
    return Origin(
        device=device_name(device),
        driver=_driver() if device.type == "cuda" else "",
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        load=f"{LOAD:.1f}",
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", ""),
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.findall(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)[0]
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"CPU {name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the sources, with a mark where files were changed since."""
    return _output("git", "describe", "--always", "--dirty", "--exclude=*") or "unknown"


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def path_for(device: str) -> Path:
    """The CSV file of a device, by its name."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv")


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace a CSV file by these rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.name for column in fields(Row)]
    writer.writerow(names)
    writer.writerows([_text(getattr(row, name)) for name in names] for row in rows)
    write_text(path, text.getvalue())


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: its columns are not a row's.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = [column.name for column in fields(Row)]
        if reader.fieldnames != names:
            raise ValueError(f"{path} has columns {reader.fieldnames}, expected {names}: measure again with --save")
        return [Row(**{name: _value(kind, line[name]) for name, kind in _KINDS.items()}) for line in reader]  # type: ignore[arg-type]


def write_text(path: Path, text: str) -> None:
    """Replace a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old rows, each replaced where there is a new one with the same key, and the new ones that have no old one."""
    return list(({row.key: row for row in old} | {row.key: row for row in new}).values())


_KINDS = {column.name: str(column.type) for column in fields(Row)}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(kind: str, text: str) -> str | int | float | None:
    if kind == "str":
        return text
    if not text:
        return None
    return int(text) if kind.startswith("int") else float(text)
