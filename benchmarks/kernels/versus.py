"""Some calls beside each other: the gate for each, then their times, in turns. What the small benchmarks share."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from benchmarks.kernels import measure, results, timers
from benchmarks.kernels.results import Origin

SHARE, PATIENCE = 3.0, 12.0  # seconds of measuring for one call, and the most that few rounds may take

Answer = tuple[Tensor, ...]  # what is compared with the truth: a matrix, or a loss and its gradients


@dataclass(frozen=True)
class Finish:
    """What came out for one call: seconds, bytes beyond the inputs, largest error; a ``red`` one has no time."""

    red: str
    error: float
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int | None
    peak_memory: int


def compete(
    calls: dict[str, Callable[[], Answer]], truth: Answer, device: torch.device, tolerance: float
) -> dict[str, Finish]:
    """Every call past the gate, then those that are right timed in turns."""
    takes: dict[str, timers.Take] = {}
    rounds: dict[str, int] = {}
    gate: dict[str, tuple[str, float, int]] = {}
    for name, call in calls.items():
        start = measure.clock(device)
        call()
        once = measure.clock(device) - start
        answer, memory = measure.watched(call, device)  # type: ignore[arg-type]
        error = max(_distance(got, true) for got, true in zip(answer, truth, strict=True))
        gate[name] = "" if error <= tolerance else f"off by {error:.1e}", error, memory
        if error <= tolerance:
            takes[name] = timers.TIMERS["wall" if device.type == "cpu" else "device"](call, once)
            rounds[name] = timers.rounds(once, SHARE, PATIENCE)
    times = timers.in_turns(takes, rounds)
    finishes = {}
    for name, (red, error, memory) in gate.items():
        timing = timers.Timing.of(times[name]) if name in times else None
        numbers = asdict(timing) if timing else dict(p20=None, p50=None, p80=None, rounds=None)
        finishes[name] = Finish(red, error, **numbers, peak_memory=memory)
    return finishes


def _distance(got: Tensor, true: Tensor) -> float:
    """The largest difference of a matrix or a value; of gradients their distance relative to the norm; NaN is inf."""
    difference = got.double() - true.double()
    gradient = true.ndim > 2 or (true.ndim == 2 and true.shape[1] > 50)
    far = difference.norm() / true.norm() if gradient else difference.abs().max()
    return float(far.nan_to_num(torch.inf))


def heading(title: str, origin: Origin) -> str:
    """The top of a page of results."""
    names = ("device", "torch", "commit", "date", "load", "omp_wait_policy")
    return f"# {title}\n\n" + "".join(f"- {n.replace('_', ' ')}: {getattr(origin, n)}\n" for n in names) + "\n"


def time_beside(p50: float | None, red: str, first: float | None) -> str:
    """``12 ms (1.5×)``, or why there is no time."""
    return red or f"{1e3 * (p50 or 0):.3g} ms ({(p50 or 0) / (first or 1):.2f}×)"


def save(what: str, rows: Sequence[Origin], page: str) -> None:
    """Keep the rows (of one dataclass) and the page as results/<device>-<what>.csv and .md."""
    path = results.path_for(rows[0].device)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [column.name for column in fields(rows[0])]
    writer.writerow(columns)
    writer.writerows([results._text(getattr(row, name)) for name in columns] for row in rows)
    results.write_text(path.with_name(f"{path.stem}-{what}.csv"), text.getvalue())
    results.write_text(path.with_name(f"{path.stem}-{what}.md"), page)
