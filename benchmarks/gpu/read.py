"""What a run on a GPU found, as what is committed: its rows, a page to read, and the table that ``auto`` chooses by.

    python -m benchmarks.gpu.read FOLDER [--to FOLDER]      rows.csv, page.md and the tuning file

A problem's time is the replay of a CUDA graph with cold caches, or the device's for a call that no graph can hold.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import lines
from benchmarks.rows import beside, duration, table_text, write_cells

Row = dict[str, Any]

COLUMNS = (
    "device", "driver", "torch", "triton", "commit", "date", "phase", "problem", "n", "p", "q", "dtype", "precision",
    "estimator", "mode", "candidate", "timer", "p20", "p50", "p80", "rounds", "status", "gate", "message",
    "value_error", "gradient_error", "rate", "unit", "no_graph", "item",
)  # fmt: skip
KEY = ("phase", "item", "problem", "candidate", "timer", "n", "p", "q", "dtype", "precision")
HAND_WRITTEN = ("gram", "feature", "compiled")
CANDIDATES = ("auto", "library", "symmetric", "triton", "native", "gram", "feature", "naive", "fp64", "compiled")
BACKENDS = ("library", "triton", "native", "symmetric")
CLOCKS = ("graph", "device")  # the first that a row has is its time


def rows(folder: Path) -> list[Row]:
    """All that was timed; of a question that was asked twice, because a process died of it, the last answer."""
    swept = [row for row in lines.read_lines(folder / lines.SWEEP) if "status" in row and "phase" in row]
    found = {tuple(row.get(name, "") for name in KEY): row for row in (*lines.read_lines(folder / lines.ROWS), *swept)}
    return list(found.values())


def checks_of(folder: Path) -> list[Row]:
    """The correctness calls."""
    return list({str(row["item"]): row for row in lines.read_lines(folder / lines.CHECKS)}.values())


def statuses(folder: Path) -> dict[str, str]:
    """How many rows came out how, by phase."""
    found: dict[str, Counter[str]] = {}
    for row in [*rows(folder), *checks_of(folder), *lines.read_lines(folder / lines.KERNELS)]:
        found.setdefault(str(row["phase"]), Counter())[str(row["status"])] += 1
    return {phase: " ".join(f"{n} {status}" for status, n in c.items()) for phase, c in found.items()}


def seconds(found: Sequence[Row], problem: str) -> dict[str, float]:
    """The median of every candidate that has one, by name."""
    times: dict[str, float] = {}
    for clock in reversed(CLOCKS):
        for row in found:
            if row.get("problem") == problem and row.get("timer") == clock and row.get("p50"):
                times[row["candidate"]] = row["p50"]
    return times


def run_page(folder: Path) -> str:
    """Markdown: where it was measured, the problems, the correctness calls, the ceilings, the second run."""
    found = rows(folder)
    events = list(lines.read_lines(folder / lines.EVENTS))
    return "\n\n".join(
        filter(None, (_heading(found, events), problems_table(folder), _correct(folder), _rates(found), _parts(found)))
    ) + "\n"  # fmt: skip


def tuning_table(folder: Path, path: Path) -> int:
    """Write what `bird_kernels.tuning` reads: host and device microseconds of our backends; returns its rows.

    Nothing is written where nothing of that kind was measured. Linear kernels, forward and backward.
    """
    from bird_kernels import tuning

    times: dict[tuple[Any, ...], dict[str, float]] = {}
    ours = [row for row in rows(folder) if row["phase"] == "times" and row.get("p50")]
    for row in ours:
        if row["candidate"].split()[0] in BACKENDS and row["problem"].split()[0] not in ("rbf", "matrix"):
            shape = row["n"], row["p"], row["q"], row["dtype"], row["precision"], row["estimator"], row["candidate"]
            times.setdefault(shape, {})["host" if row["timer"] == "host" else "device"] = row["p50"] * 1e6
    found = [
        tuning.Measurement(*shape, host=us["host"], device=us["device"]) for shape, us in times.items() if len(us) == 2
    ]
    if found:
        key = tuning.Key(*(ours[0][name] for name in ("device", "cuda_driver", "torch", "triton")))
        tuning.write_table(path, tuning.Table(key, ours[0]["date"], tuple(found)))
    return len(found)


def summary(folder: Path) -> str:
    """What the end of a run prints: the table, what is wrong, the ceilings."""
    return "\n\n".join(filter(None, (problems_table(folder), _correct(folder), _rates(rows(folder)))))


def rehearsed(events: Sequence[Row]) -> bool:
    """Whether the run was a rehearsal."""
    return any(event.get("rehearse") for event in events)


def _heading(found: Sequence[Row], events: Sequence[Row]) -> str:
    origin = found[0] if found else {}
    start = events[0] if events else {}
    what = {name: origin.get(name, "") for name in ("device", "driver", "torch", "triton", "commit", "date")}
    what |= {name: start.get(name, "") for name in ("python", "sources")}
    lost = [
        f"{e.get('phase')}, {e.get('item')}: {e.get('reason', '')}" for e in events if e.get("event") == "lost a worker"
    ]
    cut = [f"{e['phase']} from {e['item']} on, {e['items']} items" for e in events if e.get("event") == "left out"]
    what |= {"processes lost": "; ".join(lost), "left out": "; ".join(cut)}
    title = "# A rehearsal: tiny sizes on a CPU, whose times mean nothing" if rehearsed(events) else "# A run on a GPU"
    return f"{title}\n\n" + "\n".join(f"- {name}: {value}" for name, value in what.items() if value)


def problems_table(folder: Path) -> str:
    """A line a problem: medians, and in brackets how many times the best hand-written form's.

    Of the configurations of the symmetric kernel the fastest stands for all.
    """
    found = [row for row in rows(folder) if row["phase"] in ("times", "rivals") and row.get("problem")]
    problems = list(dict.fromkeys(row["problem"] for row in found))
    cells = [["problem", "design's target (an estimate)", *CANDIDATES]]
    for problem in problems:
        times = seconds(found, problem)
        own = [time for name, time in times.items() if name.startswith("symmetric")]
        times |= {"symmetric": min(own)} if own else {}
        best = min((times[name] for name in HAND_WRITTEN if name in times), default=None)
        target = next(row["target"] for row in found if row["problem"] == problem)
        why = {row["candidate"]: row["status"] for row in found if row["problem"] == problem}
        shown = [_cell(times.get(name), best, why.get(name, "")) for name in CANDIDATES]
        cells.append([problem, duration(target), *shown])
    return table_text(cells).rstrip() if problems else ""


def _cell(time: float | None, best: float | None, why: str) -> str:
    return why or "–" if time is None else beside(time, best)


def _correct(folder: Path) -> str:
    found = checks_of(folder)
    if not found:
        return ""
    by_backend: dict[str, Counter[str]] = {}
    for row in found:
        by_backend.setdefault(str(row.get("backend", row.get("candidate"))), Counter())[str(row["status"])] += 1
    text = "## Correctness\n\n" + "\n".join(
        f"- {name}: " + ", ".join(f"{n} {status}" for status, n in c.items()) for name, c in by_backend.items()
    )
    wrong = [row for row in found if row["status"] in ("red", "failed")]
    return text + "".join(f"\n- **{row['item']}**: {row.get('gate') or row.get('message')}" for row in wrong)


def _rates(found: Sequence[Row]) -> str:
    chosen = [row for row in found if row["phase"] == "ceilings" and row.get("p50")]
    if not chosen:
        return ""
    cells = [["what", "clock", "median", "rate"]]
    for row in chosen:
        rate = f"{row['rate'] / 1e12:.3g} T{row['unit']}" if row.get("rate") else ""
        cells.append([row["candidate"], row["timer"], duration(row["p50"]), rate])
    return "## Ceilings\n\n" + table_text(cells).rstrip()


def _parts(found: Sequence[Row]) -> str:
    """Sweeps and checkers."""
    sections = []
    for phase in ("sweep", "checks"):
        cells = [["problem", "what", "clock", "median or status"]]
        for row in found:
            if row["phase"] == phase and row.get("timer") in (None, *CLOCKS):
                time = duration(row["p50"]) if row.get("p50") else f"{row['status']} {row.get('message', '')}"
                cells.append([row.get("problem", ""), row.get("candidate", row["item"]), row.get("timer", ""), time])
        if len(cells) > 1:
            sections.append(f"## {phase.capitalize()}\n\n{table_text(cells)}")
    return "\n".join(sections).strip()


def main() -> None:
    """Write the files beside the run, or where ``--to`` says."""
    parser = argparse.ArgumentParser(description="what ./dev gpu found, as what is committed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help="default: the same folder")
    options = parser.parse_args()
    if not rows(options.folder) and not checks_of(options.folder):
        raise SystemExit(f"{options.folder} holds no results of ./dev gpu")
    target: Path = options.to or options.folder
    target.mkdir(parents=True, exist_ok=True)
    write_cells(target / "rows.csv", [COLUMNS, *([row.get(n) for n in COLUMNS] for row in rows(options.folder))])
    text = run_page(options.folder)
    (target / "page.md").write_text(text, encoding="utf-8")
    print(text)
    if rehearsed(list(lines.read_lines(options.folder / lines.EVENTS))):
        print("no tuning.json: a rehearsal measures nothing")
        return
    try:
        print(f"{tuning_table(options.folder, target / 'tuning.json')} rows in {target / 'tuning.json'}")
    except ImportError as error:  # the page needs no torch
        print(f"no tuning.json: {error}")


if __name__ == "__main__":
    main()
