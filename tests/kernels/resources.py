"""docs/resources.csv: what the assembler made of every kernel, for every target; the tests hold it true.

PYTHONPATH=. python tests/kernels/resources.py      writes it anew (ten minutes)
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs/resources.csv"
CAPABILITIES = (80, 90, 100)
KEY = ("source", "capability", "kernel", "dtype", "precision")
COMPILED = ("compiler", "registers", "spilled", "shared")  # what a compiler decides
COLUMNS = (*KEY, "compiler", "variants", "registers", "spilled", "shared", "matrix")


def summary(source: str, compiler: str, capability: int, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a kernel, dtype and precision: how many variants there are, and the most that one of them takes.

    Registers of a thread, bytes spilled by it, bytes of shared memory of a block; ``matrix``: whether there are matrix
    instructions.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = source, str(capability), row["kernel"], row["dtype"], row["precision"]
        groups.setdefault(key, []).append(row)
    return [
        dict(zip(KEY, key, strict=True))
        | {"compiler": compiler, "variants": str(len(group))}
        | {name: str(max(row[name] for row in group)) for name in ("registers", "spilled", "shared")}
        | {"matrix": "yes" if any(row["matrix"] for row in group) else "no"}
        for key, group in sorted(groups.items())
    ]


def committed() -> list[dict[str, str]]:
    """The table as it stands."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def differences(found: list[dict[str, str]]) -> list[tuple[dict[str, str] | None, dict[str, str] | None]]:
    """(committed row, found row) wherever they differ.

    Another compiler gives other numbers: of its rows it counts which there are, how many variants each has, and whether
    there are matrix instructions.
    """
    scope = {(row["source"], row["capability"]) for row in found}
    known = [row for row in committed() if (row["source"], row["capability"]) in scope]
    left_out = () if {row["compiler"] for row in known} == {row["compiler"] for row in found} else COMPILED
    there, here = (
        {tuple(row[k] for k in KEY): {k: row[k] for k in COLUMNS if k not in left_out} for row in rows}
        for rows in (known, found)
    )
    return [(there.get(k), here.get(k)) for k in sorted(there | here) if there.get(k) != here.get(k)]


def triton_report(capability: int) -> list[dict[str, Any]]:
    """What aot.py prints, which needs a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    program = [sys.executable, "-W", "ignore", ROOT / "tests/kernels/aot.py", str(capability)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def with_precision(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of aot.py; the precision says something of fp32 products only."""
    named = row["dtype"] == "float32" and "PRECISION" in row["constants"]
    return {**row, "precision": row["constants"]["PRECISION"] if named else ""}


def main() -> None:
    """Compile everything and write the table."""
    import triton

    from tests.kernels import nvcc

    rows = []
    for capability in CAPABILITIES:
        report = map(with_precision, triton_report(capability))
        rows += summary("triton", triton.__version__, capability, report)
        with tempfile.TemporaryDirectory() as folder:
            rows += summary("native", nvcc.version(), capability, nvcc.report(capability, Path(folder)))
    TABLE.parent.mkdir(exist_ok=True)
    partial = TABLE.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [row[k] for k in KEY]))
    partial.replace(TABLE)


if __name__ == "__main__":
    main()
