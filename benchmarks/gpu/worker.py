"""The process that touches the device: it goes through the items of its phases and writes what they yield.

`benchmarks.gpu.run` starts it, hears of every item and every step through a pipe, and starts another one where it dies
or hangs.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from benchmarks.gpu import bare
from benchmarks.gpu.run import EVENTS, SWEEP, append
from benchmarks.rows import Row, message, origin_of

if TYPE_CHECKING:
    import torch


def go_through(asked: SimpleNamespace) -> None:
    """Go through the phases, each until its time, from the item of the first one that was asked for."""
    import torch

    from benchmarks.gpu.context import Context
    from benchmarks.gpu.phases import PHASES
    from benchmarks.machine import Machine

    pipe, folder = asked.report and Connection(asked.report, readable=False), Path(asked.folder)

    def report(**told: object) -> None:
        if pipe:
            pipe.send_bytes(json.dumps(told).encode())

    context = Context(Machine(torch.device("cpu" if asked.rehearse else "cuda")), lambda name: report(step=name))
    origin = _origin(context.machine.device)
    report(origin=origin)
    for name, until in asked.phases:
        phase = PHASES[name]
        context.until, context.warms = until, phase.warms
        items = list(phase.items(context))
        if phase.warms:  # shared by several processes: the long ones are not all of one
            random.Random(0).shuffle(items)
        items = items[asked.part :: asked.parts]
        for index, item in list(enumerate(items))[asked.at :]:
            context.without = set(asked.without) if index == asked.at else set()
            context.items_left = len(items) - index
            about = {"phase": name, "item": item.name}
            if context.left() <= 0:
                events = SWEEP if phase.file == SWEEP else EVENTS
                append(folder / events, about | {"event": "left out", "items": len(items) - index})
                break
            report(**about, index=index, file=phase.file)
            try:
                for row in item.run(context):
                    append(folder / phase.file, origin | about | row)
                context.machine.wait()
            except Exception as error:  # of any kind: the others must go on
                traceback.print_exc()
                failed = {"candidate": "", "status": "failed", "message": message(error)}
                append(folder / phase.file, origin | about | failed)
            context.healthy_or_exit()
        asked.at, asked.without = 0, ()
    report(finished=True)


def _origin(device: torch.device) -> Row:
    """Device, driver, versions and commit, as every row names them; the driver as `bird_kernels.tuning` does, too."""
    from bird_kernels import tuning

    names = ("device", "driver", "torch", "triton", "commit", "date")
    found = origin_of(device)
    cuda_driver = tuning.key_of(device).driver if device.type == "cuda" else ""
    return {name: found[name] for name in names} | {"cuda_driver": cuda_driver}


def _die_with_the_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _die_with_the_parent()
    given = SimpleNamespace(**json.loads(sys.argv[1]))
    if given.rehearse:
        bare.enter()
    go_through(given)
