"""A few calls beside each other for each of some questions: what the benchmarks of layers and of tokens share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import harness, rows
from benchmarks.harness import Contestant, Judge, Verdict
from benchmarks.machine import Machine

RESULTS = Path(__file__).parent / "results"
SHARE, PATIENCE = 3.0, 12.0  # seconds of measuring for one call, and the most that few rounds may take

Answer = tuple[Tensor, ...]  # what is compared with the truth: a matrix, or a loss and its gradients
Calls = dict[str, Callable[[], Answer]]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What came out for one call: seconds, bytes beyond the inputs, largest error; a ``red`` one has no time."""

    provider: str
    red: str
    error: float | None
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int | None
    peak_memory: int | None


class Question(Protocol):
    """A dataclass whose fields are columns; the first provider is what the others are compared with."""

    def contest(self, device: torch.device) -> tuple[Calls, Answer]:
        """The calls by provider, and the truth in fp64."""


@dataclass(frozen=True)
class Benchmark:
    """``questions`` of one type, the dataclass of a ``row``, and the gate's ``tolerance`` of values and gradients."""

    name: str
    questions: Sequence[Any]
    row: type[Any]
    tolerance: float
    explanation: str

    def ask(self, question: Question, device: torch.device) -> list[Any]:
        """Every provider past the gate, then timed in turns."""
        calls, truth = question.contest(device)
        candidates = [Contestant(name, call, captured=False) for name, call in calls.items()]
        judge = judge_of(lambda: truth, self.tolerance)
        found = harness.contest(Machine(device), candidates, judge, "device", SHARE, PATIENCE, watch=True)
        about = rows.origin_of(device) | vars(question)
        return [
            self.row(
                **about, provider=name, red=found[name].why, error=found[name].verdict.value_error,
                **found[name].timing("device"), peak_memory=found[name].peak_memory,
            )
            for name in calls
        ]  # fmt: skip

    def page(self, found: Sequence[Any]) -> str:
        """Markdown: the origin, then a line for each row."""
        asked = list(rows.columns_of(type(self.questions[0])))
        cells = [[*asked, "provider", "time", "error", "memory, MiB"]]
        first: dict[tuple[object, ...], Any] = {}
        for row in found:
            question = tuple(getattr(row, name) for name in asked)
            base = first.setdefault(question, row)
            error = "–" if row.error is None else f"{row.error:.1e}"
            memory = "–" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}"
            cells.append(
                [*map(rows.cell, question), row.provider, row.red or rows.beside(row.p50, base.p50), error, memory]
            )
        return rows.heading(self.name.capitalize(), found) + self.explanation + "\n" + rows.table_text(cells)

    def main(self, description: str | None) -> None:
        """Ask everything, print the page, and keep it if asked to."""
        parser = rows.parser(description)
        parser.add_argument("--only", default="", help="questions whose text holds this: 'matrix', 'ResNet18'")
        parser.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's)")
        options = parser.parse_args()
        if options.threads:
            torch.set_num_threads(options.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = [
            question for question in self.questions if options.only in " ".join(map(str, vars(question).values()))
        ]
        found = [row for question in chosen for row in self.ask(question, device)]
        path = RESULTS / f"{rows.slug(rows.device_name(device))}-{self.name}.csv"
        rows.conclude(path, found, self.page(found), options.save)


def judge_of(truth: Callable[[], Answer], tolerance: float) -> Judge:
    """By the largest distance of an answer's parts from the truth's, which is asked for when it is needed."""

    def judge(answer: Answer) -> Verdict:
        return Verdict.within(max(map(_distance, answer, truth())), tolerance)

    return judge


def _distance(got: Tensor, true: Tensor) -> float:
    """The largest difference of a matrix or a value; of gradients their distance relative to the norm; NaN is inf."""
    difference = got.double() - true.double()
    gradient = true.ndim > 2 or (true.ndim == 2 and true.shape[1] > 50)
    far = difference.norm() / true.norm() if gradient else difference.abs().max()
    return float(far.nan_to_num(torch.inf))
