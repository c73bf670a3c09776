"""Two result files side by side: ``./dev bench --compare BEFORE.csv AFTER.csv``.

A regression is a row of ours that takes longer than before by more than the threshold and whose fastest fifth is slower
than the slowest fifth was, or that has no time any more. Rivals are shown too: where they moved, the machine did.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels import results
from benchmarks.kernels.providers import OURS
from benchmarks.kernels.results import Key, Row
from benchmarks.rows import markdown

THRESHOLD = 1.1


class Change(NamedTuple):
    """One measurement before and after; ``ratio`` above 1 is slower, None where one of the two has no time."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float | None:
        """Median after over median before."""
        old, new = self.before.p50, self.after.p50
        return None if old is None or new is None else new / old

    def regressed(self, threshold: float = THRESHOLD) -> bool:
        """Whether ours is slower beyond threshold and noise, or has turned red."""
        if self.after.provider not in OURS:
            return False
        before, after = self.before, self.after
        if before.p50 is None or before.p80 is None:
            return False
        if after.p50 is None or after.p20 is None:
            return True
        return after.p50 > threshold * before.p50 and after.p20 > before.p80


def changes(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Change], list[Key], list[Key]]:
    """What both have, the keys that are gone, and the keys that are new."""
    old, new = {row.key: row for row in before}, {row.key: row for row in after}
    both = [Change(old[key], new[key]) for key in old if key in new]
    return both, [key for key in old if key not in new], [key for key in new if key not in old]


def report(before: Sequence[Row], after: Sequence[Row], threshold: float = THRESHOLD) -> tuple[str, int]:
    """The text, and how many regressions it lists."""
    both, gone, new = changes(before, after)
    cells = [["case", "before", "after", "ratio", ""]]
    for change in sorted(both, key=lambda change: -(change.ratio or math.inf)):
        mark = "REGRESSION" if change.regressed(threshold) else ""
        ratio = "–" if change.ratio is None else f"{change.ratio:.2f}"
        cells.append([_name(change.after.key), _time(change.before), _time(change.after), ratio, mark])
    means = [["provider", "rows", "ratio, geometric mean"]]
    for name in dict.fromkeys(change.after.provider for change in both):
        logs = [math.log(c.ratio) for c in both if c.after.provider == name and c.ratio is not None]
        if logs:
            means.append([name, str(len(logs)), f"{math.exp(sum(logs) / len(logs)):.3f}"])
    count = sum(change.regressed(threshold) for change in both)
    lines = [
        f"before: {_origin(before)}", f"after:  {_origin(after)}", "", markdown(cells), markdown(means),
        *(f"gone: {_name(key)}" for key in gone), *(f"new: {_name(key)}" for key in new),
        f"{count} regressions of ours in {len(both)} rows that both have",
    ]  # fmt: skip
    return "\n".join(lines), count


def _name(key: Key) -> str:
    return " ".join(str(part) for part in key if part != "")


def _time(row: Row) -> str:
    return row.red or "not timed" if row.p50 is None else f"{row.p50:.3g} s"


def _origin(rows: Sequence[Row]) -> str:
    return "; ".join(dict.fromkeys(f"{row.device}, torch {row.torch}, {row.commit}, {row.date}" for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; the exit status is 1 where there are regressions."""
    parser = argparse.ArgumentParser(description="Compare two result files of the kernel benchmarks.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="a ratio up to it is no regression")
    given = parser.parse_args(arguments)
    text, count = report(results.read(given.before), results.read(given.after), given.threshold)
    print(text)
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main())
