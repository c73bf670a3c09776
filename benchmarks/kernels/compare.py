"""Two result files side by side: ``./dev bench --compare BEFORE.csv AFTER.csv``.

A regression is a row of ours that takes longer than before by more than the threshold and whose fastest fifth is slower
than the slowest fifth was, or that has no time any more. Rivals are shown too: where they moved, the machine did.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

from benchmarks.kernels import results
from benchmarks.kernels.providers import OURS
from benchmarks.kernels.results import KernelsRow, Key
from benchmarks.rows import table_text

THRESHOLD = 1.1
Rows = Sequence[KernelsRow]


def ratio(before: KernelsRow, after: KernelsRow) -> float | None:
    """Median after over median before, above 1 is slower; None where one of the two has no time."""
    return None if before.p50 is None or after.p50 is None else after.p50 / before.p50


def regressed(before: KernelsRow, after: KernelsRow, threshold: float = THRESHOLD) -> bool:
    """Whether ours is slower beyond threshold and noise, or has turned red."""
    if after.provider not in OURS or before.p50 is None or before.p80 is None:
        return False
    if after.p50 is None or after.p20 is None:
        return True
    return after.p50 > threshold * before.p50 and after.p20 > before.p80


def comparison(
    before: Sequence[KernelsRow], after: Sequence[KernelsRow], threshold: float = THRESHOLD
) -> tuple[str, int]:
    """The text, and how many regressions it lists."""
    old, new = {row.key: row for row in before}, {row.key: row for row in after}
    both = [(old[key], new[key]) for key in old if key in new]
    cells = [["case", "before", "after", "ratio", ""]]
    for pair in sorted(both, key=lambda pair: -(ratio(*pair) or math.inf)):
        mark = "REGRESSION" if regressed(*pair, threshold) else ""
        found = ratio(*pair)
        cells.append([_name(pair[0].key), *map(_time, pair), "–" if found is None else f"{found:.2f}", mark])
    means = [["provider", "rows", "ratio, geometric mean"]]
    for name in dict.fromkeys(row.provider for _, row in both):
        ratios = [found for pair in both if pair[1].provider == name and (found := ratio(*pair)) is not None]
        if ratios:
            means.append([name, str(len(ratios)), f"{geometric_mean(ratios):.3f}"])
    count = sum(regressed(*pair, threshold) for pair in both)
    lines = [
        f"before: {_origin(before)}", f"after:  {_origin(after)}", "", table_text(cells), table_text(means),
        *(f"gone: {_name(key)}" for key in old if key not in new),
        *(f"new: {_name(key)}" for key in new if key not in old),
        f"{count} regressions of ours in {len(both)} rows that both have",
    ]  # fmt: skip
    return "\n".join(lines), count


def _name(key: Key) -> str:
    return " ".join(str(part) for part in key if part != "")


def _time(row: KernelsRow) -> str:
    return row.red or "not timed" if row.p50 is None else f"{row.p50:.3g} s"


def _origin(rows: Sequence[KernelsRow]) -> str:
    return "; ".join(dict.fromkeys(f"{row.device}, torch {row.torch}, {row.commit}, {row.date}" for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; the exit status is 1 where there are regressions."""
    parser = argparse.ArgumentParser(description="Compare two result files of the kernel benchmarks.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="a ratio up to it is no regression")
    given = parser.parse_args(arguments)
    text, count = comparison(results.read_kernels(given.before), results.read_kernels(given.after), given.threshold)
    print(text)
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main())
