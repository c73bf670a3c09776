"""The cost model's predictions and ``auto``'s choices for a list of problems on any GPU, which need not be here.

python -m bird_kernels.tuning --device "NVIDIA H200"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import cost
from ..types import RBF, Cost, Problem, Sheet

RESNET18 = (*[64] * 5, *[128] * 4, *[256] * 4, *[512] * 4, 1000)  # widths of the 18 layers
# Name, rows, width of both sides (0: the layers of RESNET18), dtype, precision, kernel.
PROBLEMS: tuple[tuple[str, int, int, str, str, RBF | None], ...] = (
    ("", 128, 512, "float32", "ieee", None),
    ("", 512, 2048, "bfloat16", "", None),
    ("", 4096, 1024, "float32", "ieee", None),
    ("", 4096, 1024, "float32", "tf32", None),
    ("", 4096, 1024, "bfloat16", "", None),
    ("", 16_384, 4096, "bfloat16", "", None),
    ("", 65_536, 1024, "bfloat16", "", None),
    ("conv", 128, 802_816, "bfloat16", "", None),
    ("matrix 18 x 18", 1000, 0, "float32", "ieee", None),
    ("RBF", 1024, 512, "float32", "ieee", RBF()),
    ("RBF", 8192, 512, "float32", "ieee", RBF()),
)
CANDIDATES = ("native", "triton", "library", "symmetric")


def lines(device_name: str) -> Iterator[str]:
    """The lines of a Markdown table: a problem, its dtype, predicted microseconds by candidate, and the choice."""
    yield f"| problem | dtype | {' | '.join(CANDIDATES)} | choice |"
    yield "|---" * (len(CANDIDATES) + 3) + "|"
    sheet = cost.sheet_of(device_name)
    for name, n, d, dtype, precision, kernel in PROBLEMS:
        costs, choice = _predicted(sheet, n, d, dtype, precision, kernel)
        cells = [f"{costs[c].us:,.0f}" if c in costs else "" for c in CANDIDATES]
        sizes = f"{n:,} x {d:,}" if d else f"n = {n:,}"
        number = precision if precision == "tf32" else dtype
        yield f"| {f'{name} {sizes}'.strip()} | {number} | {' | '.join(cells)} | {choice} |"


def _predicted(
    sheet: Sheet, n: int, d: int, dtype: str, precision: str, kernel: RBF | None
) -> tuple[dict[str, Cost], str]:
    options: Any = dict(precision=precision or None, kernel=kernel)
    problem = Problem(n, d or 1000, d or 1000, getattr(torch, dtype), torch.device("cuda"), **options)
    if not d:
        return {"triton": cost.matrix(n, RESNET18, problem, sheet)}, "triton"
    costs = cost.predict(problem, sheet)
    choice = cost.best(costs, problem, sheet)
    if choice == "native":  # which may not be built
        choice += ", else " + cost.best({name: c for name, c in costs.items() if name != "native"}, problem, sheet)
    return costs, choice


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the predictions for one device by its name."""
    parser = argparse.ArgumentParser(prog="python -m bird_kernels.tuning", description="What `auto` would choose.")
    parser.add_argument("--device", required=True, help="a GPU's name, as PyTorch or the data sheet has it")
    name = parser.parse_args(arguments).device
    if not name.strip():
        parser.error("--device needs a name, such as 'NVIDIA H200'")
    sheet = cost.sheet_of(name)
    if sheet is cost.UNKNOWN:
        sys.stdout.write(f"Its data sheet is not known, so a guess is used; known are {', '.join(cost.SHEETS)}.\n")
    sys.stdout.write(f"{name}, data sheet: {sheet.name}. Forward and backward, predicted microseconds\n\n")
    sys.stdout.writelines(f"{line}\n" for line in lines(name))


if __name__ == "__main__":
    main()
