"""The files of a run on a lent machine: a line of JSON for every row, on the disk before the next thing is tried.

A machine may be taken away at any moment. Each line is written by one call and forced to the disk, so a reader finds
whole lines and at most one torn one, the last of a file. Several processes may write to one file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# At most eight in all: what a lent machine gives back. The last two are of `benchmarks.gpu.sweep`.
EVENTS = "session.jsonl"  # versions, phases, processes: what happened and when
ROWS = "rows.jsonl"  # ceilings, times, prototypes, compiled rivals: all that was timed
CHECKS = "correctness.jsonl"
KERNELS = "kernels.jsonl"  # the profiler's, a line a kernel
BUILD, LOG = "build.log", "log.txt"
SWEEP, SWEEP_LOG = "sweep.jsonl", "sweep-log.txt"


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append one row: numbers, texts, lists of them; a number that is not finite is written as a text."""
    text = json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[dict[str, object]]:
    """The rows of a file, none where it does not exist; a torn last line is left out.

    Raises:
        ValueError: a line that is not the last cannot be read.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number} is no JSON: {line[:80]}") from error
        yield row


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
