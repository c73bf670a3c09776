"""The process that touches the device: it goes through the items of its phases and writes what they yield.

`benchmarks.gpu.session` starts it, hears of every item and every step through a pipe, and starts another one where it
dies or hangs. A failed call may leave a CUDA context in which nothing works any more: then this process says so, and
ends with `LOST`.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import rows
from benchmarks.gpu import bare, lines
from benchmarks.gpu.context import Context, Item, Phase, Row, failure, healthy_or_exit

if TYPE_CHECKING:
    import torch


def go_through(folder: Path, plan: Sequence[tuple[str, float]], options: argparse.Namespace) -> None:
    """Go through the phases of ``plan``, each until its time, from the item that ``options.at`` says."""
    import torch

    from benchmarks.machine import Machine

    phases = _phases()
    machine = Machine(torch.device("cpu" if options.rehearse else "cuda"))
    origin = _origin(machine.device)

    def report(row: Row) -> None:
        if options.report is not None:
            os.write(options.report, json.dumps(row).encode() + b"\n")

    report({"origin": origin})
    context = Context(machine, report)
    at = options.at
    for name, until in plan:
        phase = phases[name]
        context.until, context.warms = until, phase.warms
        items = list(phase.items(context))[options.part :: options.parts]
        for index, item in list(enumerate(items))[at:]:
            context.without = set(options.without.split(",")) if index == at else set()
            context.items_left = len(items) - index
            row = {"phase": name, "item": item.name}
            if context.left() <= 0:
                events = lines.SWEEP if phase.file == lines.SWEEP else lines.EVENTS
                lines.append(folder / events, row | {"event": "left out", "items": len(items) - index})
                break
            report(row | {"index": index, "file": phase.file})
            _do(folder / phase.file, item, context, origin | row)
        at = 0
    report({"finished": True})


def _origin(device: torch.device) -> Row:
    """Device, driver, versions and commit, as every row names them; the driver as `bird_kernels.tuning` does, too."""
    from bird_kernels import tuning

    found = rows.origin_of(device)
    names = ("device", "driver", "torch", "triton", "commit", "date")
    cuda_driver = tuning.key_of(device).driver if device.type == "cuda" else ""
    return {name: found[name] for name in names} | {"cuda_driver": cuda_driver}


def _phases() -> dict[str, Phase]:
    """The phases by name; imported late, because a rehearsal hides packages before torch is imported."""
    from benchmarks.gpu import ceilings, correctness, sweeps, times

    return {
        "warm": Phase(times.warm_items, lines.EVENTS, warms=True),
        "ceilings": Phase(ceilings.ceiling_items, lines.ROWS),
        "correctness": Phase(correctness.check_items, lines.CHECKS),
        "times": Phase(times.time_items, lines.ROWS),
        "profiles": Phase(times.profile_items, lines.KERNELS),
        "rivals": Phase(times.rival_items, lines.ROWS),
        # Of the second run:
        "precompile": Phase(sweeps.precompile_items, lines.SWEEP, warms=True),
        "sweep": Phase(sweeps.sweep_items, lines.SWEEP),
    }


def _do(file: Path, item: Item, context: Context, about: Row) -> None:
    """Every row of an item, or the row of its failure; ends the process where the device has failed."""
    machine = context.machine
    try:
        for row in item.run(context):
            lines.append(file, about | row)
        machine.wait()
    except Exception as error:  # of any kind: the others must go on
        traceback.print_exc()
        lines.append(file, about | failure("", error))
    healthy_or_exit(machine)


def _die_with_the_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Called by `benchmarks.gpu.session`: phases as ``name@seconds of the epoch``."""
    parser = argparse.ArgumentParser(description="one process of ./dev gpu")
    parser.add_argument("folder", type=Path)
    parser.add_argument("phases", nargs="+")
    parser.add_argument("--at", type=int, default=0, help="the first item of the first phase")
    parser.add_argument("--without", default="", help="steps that this item leaves out, joined by commas")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1, help="take the items of one part of so many")
    parser.add_argument("--report", type=int, help="a pipe to the parent")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    _die_with_the_parent()
    if options.rehearse:
        bare.enter()
    plan = [(name, float(until)) for name, _, until in (text.partition("@") for text in options.phases)]
    go_through(options.folder, plan, options)


if __name__ == "__main__":
    main()
