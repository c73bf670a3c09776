"""NVIDIA's checkers of memory and of races, beside each other, until the time is over."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.supervise import PreparedRun

TOOLS = ("memcheck", "racecheck")
LAST = 30  # lines of a program's output that are looked at for its row; all of it is in the log


def commands(rehearse: bool) -> dict[str, list[str]]:
    """What is run; nothing where there are no such checkers."""
    if rehearse:
        return {name: [sys.executable, "-c", "print('no checker at a rehearsal')"] for name in TOOLS}
    tool, program = shutil.which("compute-sanitizer"), [sys.executable, "-m", "tests.kernels.sanitize", "triton"]
    return {name: [tool, "--tool", name, "--error-exitcode", "9", *program] for name in TOOLS} if tool else {}


def check(run: PreparedRun, programs: dict[str, list[str]]) -> None:
    """PreparedRun all programs beside each other until the deadline; a row each, as soon as it has ended."""
    about = run.origin | {"phase": "checks"}
    running: dict[str, Program] = {}
    if not programs:
        run.event("no compute-sanitizer")
    with contextlib.ExitStack() as stack:
        for name, command in programs.items():
            running[name] = Program(name, stack.enter_context(run.process(command, None)), run.log)
        while running and time.time() < run.until("checks"):
            time.sleep(0.05)
            for name in [name for name, program in running.items() if program.process.poll() is not None]:
                _tell(run, about, running.pop(name))
        for program in running.values():
            _tell(run, about, program)


class Program:
    """A process whose output goes to the common log line by line, and whose last lines are kept."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log
        self.last: deque[str] = deque(maxlen=LAST)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("a", encoding="utf-8", buffering=1) as log:
            for line in self.process.stdout:
                text = line.decode(errors="replace")
                self.last.append(text)
                log.write(f"{self.name}: {text}")


def _tell(run: PreparedRun, about: dict[str, object], program: Program) -> None:
    status = program.process.poll()
    if status is not None:
        program.reader.join(timeout=2)
    outcome = "left out" if status is None else "ok" if status == 0 else "failed"
    tail = "".join(list(program.last))
    said = ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped|hazards?)|ERROR SUMMARY: \d+ errors", tail)[-4:])
    row = {"item": program.name, "status": outcome, "message": said, "exit": status, "tail": tail[-2000:]}
    lines.append(run.events, about | row)
    run.event("checked", item=program.name, status=outcome, message=said)
