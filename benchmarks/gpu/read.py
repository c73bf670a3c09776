"""What a run on a GPU found, as what is committed: its rows, a page to read, and the table that ``auto`` chooses by.

    python -m benchmarks.gpu.read FOLDER [--to FOLDER]      rows.csv, page.md and the tuning file

A problem's time is the replay of a CUDA graph with cold caches, or the device's for a call that no graph can hold.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.run import CHECKS, EVENTS, KERNELS, ROWS, SWEEP, read_lines
from benchmarks.rows import Row, beside, duration, table_text, write_rows

COLUMNS = (
    "device", "driver", "torch", "triton", "commit", "date", "phase", "problem", "n", "p", "q", "dtype", "precision",
    "estimator", "mode", "candidate", "timer", "p20", "p50", "p80", "rounds", "status", "gate", "message",
    "value_error", "gradient_error", "rate", "unit", "no_graph", "item",
)  # fmt: skip
KEY = ("phase", "item", "problem", "candidate", "timer", "n", "p", "q", "dtype", "precision")
HAND_WRITTEN = ("gram", "feature", "compiled")
CANDIDATES = ("auto", "library", "symmetric", "triton", "native", "gram", "feature", "naive", "fp64", "compiled")
BACKENDS = ("library", "triton", "native", "symmetric")
TOLD = frozenset({"phase", "status"})  # what every row has
CLOCKS = ("graph", "device")  # the first that a row has is its time


def timed_rows(folder: Path) -> list[Row]:
    """All that was timed; of a question that was asked twice, because a process died of it, the last answer."""
    swept = [row for row in read_lines(folder / SWEEP) if "status" in row and "phase" in row]
    found = {tuple(row.get(name, "") for name in KEY): row for row in (*read_lines(folder / ROWS, TOLD), *swept)}
    return list(found.values())


def checks_of(folder: Path) -> list[Row]:
    """The correctness calls."""
    return list({row["item"]: row for row in read_lines(folder / CHECKS, TOLD | {"item", "candidate"})}.values())


def statuses(folder: Path) -> dict[str, str]:
    """How many rows came out how, by phase."""
    found = [*timed_rows(folder), *checks_of(folder), *read_lines(folder / KERNELS, TOLD)]
    return _counted((row["phase"], row["status"]) for row in found)


def _counted(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = {}
    for name, status in pairs:
        counts.setdefault(name, Counter())[status] += 1
    return {name: ", ".join(f"{n} {status}" for status, n in found.items()) for name, found in counts.items()}


def summary(folder: Path) -> str:
    """Markdown: the problems, the correctness calls, the ceilings, the second run's sweeps and checkers."""
    found = timed_rows(folder)
    return "\n\n".join(filter(None, (problems_table(found), _correct(checks_of(folder)), _others(found))))


def run_page(folder: Path) -> str:
    """Where it was measured, and the summary."""
    events = list(read_lines(folder / EVENTS)) or [{}]
    what = {name: (timed_rows(folder) or [{}])[0].get(name) for name in COLUMNS[:6]}
    what |= {name: events[0].get(name) for name in ("python", "sources")}
    told = {"lost a worker": "{phase}, {item}: {reason}", "left out": "{phase} from {item} on, {items} items"}
    for event, text in told.items():
        what[event] = "; ".join(text.format(**e) for e in events if e.get("event") == event)
    rehearsal = "# A rehearsal: tiny sizes on a CPU, whose times mean nothing"
    title = rehearsal if rehearsed(folder) else "# A run on a GPU"
    lines = [f"- {name}: {value}" for name, value in what.items() if value]
    return "\n".join([title, "", *lines, "", summary(folder), ""])


def rehearsed(folder: Path) -> bool:
    """Whether the run was a rehearsal."""
    return any(event.get("rehearse") for event in read_lines(folder / EVENTS))


def problems_table(found: Sequence[Row]) -> str:
    """A line a problem: medians, and in brackets how many times the best hand-written form's.

    Of the configurations of the symmetric kernel the fastest stands for all.
    """
    lines: dict[str, list[Row]] = {}
    for row in found:
        if row["phase"] in ("times", "rivals") and row.get("problem"):
            lines.setdefault(row["problem"], []).append(row)
    cells = [["problem", "design's target (an estimate)", *CANDIDATES]]
    for problem, rows in lines.items():
        times: dict[str, float] = {}
        for row in sorted(rows, key=lambda row: row.get("timer") == "graph"):  # which replaces the device's
            if row.get("timer") in CLOCKS and row.get("p50"):
                times[row["candidate"]] = row["p50"]
        own = [time for name, time in times.items() if name.startswith("symmetric")]
        times |= {"symmetric": min(own)} if own else {}
        best = min((times[name] for name in HAND_WRITTEN if name in times), default=None)
        why = {row["candidate"]: row["status"] for row in rows}
        shown = [beside(times[name], best) if name in times else why.get(name, "–") for name in CANDIDATES]
        cells.append([problem, duration(rows[0]["target"]), *shown])
    return table_text(cells).rstrip() if lines else ""


def _correct(found: Sequence[Row]) -> str:
    lines = [f"- {name}: {text}" for name, text in _counted((r["candidate"], r["status"]) for r in found).items()]
    wrong = [row for row in found if row["status"] in ("red", "failed")]
    lines += [f"- **{row['item']}**: {row.get('gate') or row.get('message')}" for row in wrong]
    return "## Correctness\n\n" + "\n".join(lines) if found else ""


def _others(found: Sequence[Row]) -> str:
    """Ceilings, sweeps and checkers."""
    sections = []
    for phase in ("ceilings", "sweep", "checks"):
        cells = [["problem", "what", "clock", "median or status", "rate"]]
        for row in found:
            if row["phase"] == phase and (phase == "ceilings" or row.get("timer") in (None, *CLOCKS)):
                time = duration(row["p50"]) if row.get("p50") else f"{row['status']} {row.get('message', '')}"
                rate = f"{row['rate'] / 1e12:.3g} T{row['unit']}" if row.get("rate") else ""
                who = row.get("candidate", row["item"])
                cells.append([row.get("problem", ""), who, row.get("timer", ""), time, rate])
        if len(cells) > 1:
            sections.append(f"## {phase.capitalize()}\n\n{table_text(cells).rstrip()}")
    return "\n\n".join(sections)


def tuning_table(folder: Path, path: Path) -> int:
    """Write what `bird_kernels.tuning` reads: host and device microseconds of our backends; returns its rows.

    Nothing is written where nothing of that kind was measured. Linear kernels, forward and backward.
    """
    from bird_kernels import tuning

    times: dict[tuple[Any, ...], dict[str, float]] = {}
    ours = [row for row in timed_rows(folder) if row["phase"] == "times" and row.get("p50")]
    for row in ours:
        if row["candidate"].split()[0] in BACKENDS and row["problem"].split()[0] not in ("rbf", "matrix"):
            shape = row["n"], row["p"], row["q"], row["dtype"], row["precision"], row["estimator"], row["candidate"]
            times.setdefault(shape, {})["host" if row["timer"] == "host" else "device"] = row["p50"] * 1e6
    found = [tuning.Measurement(*shape, **us) for shape, us in times.items() if len(us) == 2]
    if found:
        key = tuning.Key(*(ours[0][name] for name in ("device", "cuda_driver", "torch", "triton")))
        tuning.write_table(path, tuning.Table(key, ours[0]["date"], tuple(found)))
    return len(found)


def main() -> None:
    """Write the files that are committed, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help="default: the same folder")
    options = parser.parse_args()
    found, target = timed_rows(options.folder), options.to or options.folder
    if not found and not checks_of(options.folder):
        raise SystemExit(f"{options.folder} holds no results of ./dev gpu")
    write_rows(target / "rows.csv", found, COLUMNS)
    text = run_page(options.folder)
    (target / "page.md").write_text(text, encoding="utf-8")
    print(text)
    if rehearsed(options.folder):
        print("no tuning.json: a rehearsal measures nothing")
        return
    try:
        print(f"{tuning_table(options.folder, target / 'tuning.json')} rows in {target / 'tuning.json'}")
    except ImportError as error:  # the page needs no torch
        print(f"no tuning.json: {error}")


if __name__ == "__main__":
    main()
