"""The README's two tables, from the files of measurements; a test compares.

python -m benchmarks.readme    # writes them into README.md
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.accuracy import measure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
SPEED = ROOT / "benchmarks/kernels/results/cpu-amd-epyc-2-threads.csv"
# What a row is called, and its case: problem, n, width of both sides, dtype, mode.
CASES = {
    "128 × 512": ("bird", 128, 512, "float32", "forward+backward"),
    "4,096 × 512": ("batch", 4096, 512, "float32", "forward+backward"),
    "128 × 512, forward alone": ("bird", 128, 512, "float32", "forward"),
    "128 × 512, Gaussian kernels": ("rbf", 128, 512, "float32", "forward+backward"),
    "1,024 × 1,024 in bf16": ("llm", 1024, 1024, "bfloat16", "forward+backward"),
}


def accuracy() -> str:
    """Errors of gradients: a row for each loss, a column for each mean, both dtypes in a cell."""
    rows = measure.committed()
    dtypes = {"float32": "fp32", "bfloat16": "bf16"}
    cells = {(row.loss, row.dtype, row.mean): row for row in rows}
    names = list(measure.LOSSES)
    (date,) = {row.date for row in rows}
    (torch,) = {row.torch.split("+")[0] for row in rows}
    lines = [
        f"| mean / spread, {' / '.join(dtypes.values())} | " + " | ".join(f"{mean:,}" for mean in measure.MEANS) + " |",
        "|---|" + "---|" * len(measure.MEANS),
    ]
    for name in names:
        errors = [" / ".join(_error(cells[name, dtype, mean].error) for dtype in dtypes) for mean in measure.MEANS]
        lines.append(f"| {f'`{name}`' if name == 'cka_loss' else name} | " + " | ".join(errors) + " |")
    return "\n".join([*lines, "", f"(CPU, PyTorch {torch}, {date}. 1 is a gradient of zeros, or one as wrong.)"])


def speed() -> str:
    """Medians of five cases, and how many times that of `cka_loss` they are."""
    with SPEED.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["estimator"] == "biased"]
    lines = [
        "| rows × width | authors' formula | formula in fp64 | best by hand | `cka_loss` | measured |",
        "|" + "---|" * 6,
    ]
    for title, (problem, n, width, dtype, mode) in CASES.items():
        case = {"problem": problem, "n": str(n), "p": str(width), "q": str(width), "dtype": dtype, "mode": mode}
        found = {row["provider"]: row for row in rows if case.items() <= row.items()}
        ours = float(found["auto"]["p50"])
        best = min((found[name] for name in ("gram", "feature") if name in found), key=lambda row: _seconds(row))
        cells = [_cell(found.get("naive"), ours), _cell(found.get("fp64"), ours), _cell(best, ours), _time(ours)]
        lines.append(f"| {title} | " + " | ".join([*cells, found["auto"]["date"]]) + " |")
    return "\n".join(lines)


def _error(error: float) -> str:
    if math.isnan(error):
        return "NaN"
    return f"{error:.0e}".replace("e-0", "e-") if error < 0.095 else f"{error:.2g}"


def _seconds(row: dict[str, str]) -> float:
    return float(row["p50"] or "inf")


def _cell(row: dict[str, str] | None, ours: float) -> str:
    if row is None:
        return "–"
    if row["red"]:
        return row["red"].replace(" a call)", ")")
    seconds = _seconds(row)
    ratio = f"{seconds / ours:.2g}×" if seconds < 10 * ours else f"{seconds / ours:.0f}×"
    return f"{_time(seconds)} (**{ratio}**)" if seconds < ours else f"{_time(seconds)} ({ratio})"


def _time(seconds: float) -> str:
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3)
    return f"{seconds * factor:.3g} {unit}"


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy, "speed": speed}


def written(page: str) -> str:
    """The page with both tables in their places, between ``<!-- name -->`` and ``<!-- end name -->``."""
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- end {name} -->"
        page, places = re.subn(rf"<!-- {name} -->\n.*?<!-- end {name} -->", lambda _, b=block: b, page, flags=re.DOTALL)
        if places != 1:
            raise ValueError(f"README.md has {places} places for the table {name!r}")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
