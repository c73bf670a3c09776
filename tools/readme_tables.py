"""The README's two tables, from the files of measurements; a test compares.

python -m tools.readme_tables    # writes them into README.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.accuracy import measure
from benchmarks.kernels import loss
from benchmarks.rows import duration, load_rows, with_parts

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


def accuracy_table() -> str:
    """Errors of gradients: a row for each loss, a column for each mean, both dtypes in a cell."""
    rows = load_rows(measure.RESULTS)
    dtypes = {"float32": "fp32", "bfloat16": "bf16"}
    cells = {(row["loss"], row["dtype"], row["mean"]): row["error"] for row in rows}
    (date,) = {row["date"] for row in rows}
    (torch,) = {row["torch"].split("+")[0] for row in rows}
    lines = [
        f"| mean / spread, {' / '.join(dtypes.values())} | " + " | ".join(f"{mean:,}" for mean in measure.MEANS) + " |",
        "|---|" + "---|" * len(measure.MEANS),
    ]
    for name in measure.LOSSES:
        errors = [" / ".join(_error(cells[name, dtype, mean]) for dtype in dtypes) for mean in measure.MEANS]
        lines.append(f"| {f'`{name}`' if name == 'cka_loss' else name} | " + " | ".join(errors) + " |")
    return "\n".join([*lines, "", f"(CPU, PyTorch {torch}, {date}. 1 is a gradient of zeros, or one as wrong.)"])


def speed_table() -> str:
    """Medians of five cases, and how many times that of `cka_loss` they are."""
    rows = [row for row in load_rows(SPEED) if row["estimator"] == "biased"]
    lines = [
        "| rows × width | authors' formula | features in fp64 | best by hand | `cka_loss` | measured |",
        "|" + "---|" * 6,
    ]
    for title, (problem, n, width, *numbers) in CASES.items():
        case = [problem, n, width, width, *numbers]
        asked = ("problem", "n", "p", "q", "dtype", "mode")
        found = {row["provider"]: row for row in rows if [row[name] for name in asked] == case}
        ours = found["auto"]["p50"]
        rivals = [found[name]["p50"] or found[name]["red"] if name in found else None for name in ("naive", "fp64")]
        cells = [_cell(rival, ours) for rival in (*rivals, loss.hand_written(found))]
        lines.append(f"| {title} | " + " | ".join([*cells, duration(ours), found["auto"]["date"]]) + " |")
    return "\n".join(lines)


def _error(error: float) -> str:
    if math.isnan(error):
        return "NaN"
    return f"{error:.0e}".replace("e-0", "e-") if error < 0.095 else f"{error:.2g}"


def _cell(rival: float | str | None, ours: float) -> str:
    """A time and how many times ours it is, bold where it is less; or the reason why there is none."""
    if rival is None or isinstance(rival, str):
        return rival.replace(" a call)", ")") if rival else "–"
    ratio = f"{rival / ours:.2g}×" if rival < 10 * ours else f"{rival / ours:.0f}×"
    return f"{duration(rival)} ({f'**{ratio}**' if rival < ours else ratio})"


def tables() -> Iterator[tuple[str, str]]:
    """The names of the README's generated parts, and their text."""
    yield "accuracy", accuracy_table()
    yield "speed", speed_table()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(with_parts(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
