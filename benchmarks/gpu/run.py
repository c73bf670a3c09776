"""A run on a lent machine: its files, its clock, and the processes that touch the device.

The supervisor never does: it starts workers, knows what they try, and outlives them. A worker that dies, hangs or has
lost its device is replaced; what it was trying gets its row and is left out. The whole run ends at its time whatever
hangs. A machine may be taken away at any moment: every row is a line of JSON, written by one call and forced to the
disk, so a reader finds whole lines and at most one torn one, the last of a file. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import bare
from benchmarks.rows import ROOT, Row

# At most eight files in all: what a lent machine gives back. The last two are of the second run.
EVENTS = "session.jsonl"  # versions, phases, processes: what happened and when
ROWS = "rows.jsonl"  # ceilings, times, compiled rivals: all that was timed
CHECKS = "correctness.jsonl"
KERNELS = "kernels.jsonl"  # the profiler's, a line a kernel
BUILD, LOG = "build.log", "log.txt"
SWEEP, SWEEP_LOG = "sweep.jsonl", "sweep-log.txt"

LOST = 75  # the exit status of a worker whose device no longer answers; the failure has its row
TICK = 0.05  # seconds between two looks at a worker
HOPELESS = 2  # workers in a row that die before their first item


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append one row; a number that is not finite is written as a text."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, json.dumps(plain).encode() + b"\n")  # several processes may write to one file
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path, needed: Set[str] = frozenset()) -> Iterator[Row]:
    """The rows of a file, none where it does not exist; a torn last line is left out.

    Raises:
        ValueError: a line that is not the last cannot be read, or a row lacks a ``needed`` field.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is no JSON: {line[:80]}") from error
            return
        if not isinstance(row, dict) or not needed <= row.keys():
            raise ValueError(f"{path}, line {number} has not all of {sorted(needed)}: {line[:80]}")
        yield row


class Deadline(NamedTuple):
    """``until``: the share of the whole time at which a phase ends. ``limit``: seconds for one item."""

    until: float
    limit: float = 60.0


class Place(NamedTuple):
    """Where a worker begins: at an item of the first phase, without some of its steps; one part of so many of all."""

    phases: Sequence[str]
    at: int = 0
    without: Sequence[str] = ()
    part: int = 0
    parts: int = 1


class PreparedRun:
    """One run: its folder, its clock, and the processes that it must not leave behind."""

    def __init__(
        self, folder: Path, minutes: float, rehearse: bool, stages: Mapping[str, Deadline], events: str, log: str
    ) -> None:
        self.folder, self.rehearse, self.stages = folder, rehearse, stages
        self.events, self.log = folder / events, folder / log
        self.start = time.time()
        self.seconds = 60 * minutes
        self.end = self.start + self.seconds
        self.origin: Row = {}
        folder.mkdir(parents=True, exist_ok=True)

    def until(self, stage: str) -> float:
        """The second of the epoch at which a stage ends."""
        return self.start + self.stages[stage].until * self.seconds

    def event(self, name: str, /, **more: object) -> None:
        """Write and print what happened."""
        elapsed = round(time.time() - self.start, 2)
        append(self.events, {"event": name, "at": elapsed, **more})
        said = ", ".join(f"{key} {value}" for key, value in more.items() if value not in ("", None))
        print(f"[{elapsed:6.1f} s] {name}: {said}"[:300], flush=True)

    @contextlib.contextmanager
    def process(
        self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None, **options: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process in a session of its own, which ends with the block, and with all that it started.

        Its output goes to the end of ``log``.
        """
        hidden = () if self.rehearse else ("TRITON_INTERPRET", "BIRD_EMULATE")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"PYTHONUNBUFFERED": "1"} | (bare.VARIABLES if self.rehearse else {}) | dict(variables or {})
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, **options,
            )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def beside(self, stage: str, processes: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[tuple[str, int | None]]:
        """The name and exit status of each process as it ends, and at the end of a stage None of those that go on."""
        running = dict(processes)
        while running and time.time() < self.until(stage):
            time.sleep(TICK)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                yield name, running.pop(name).returncode
        yield from dict.fromkeys(running).items()

    def worker(self, place: Place, report: int | None = None) -> list[str]:
        """The command of a worker, which tells what it does through the pipe ``report``."""
        plan = [(name, min(self.until(name), self.end)) for name in place.phases]
        asked = place._asdict() | dict(folder=str(self.folder), phases=plan, rehearse=self.rehearse, report=report)
        return [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(asked)]

    def drive(self, phases: Sequence[str]) -> None:
        """Go through the phases with as many workers as it takes."""
        place, died_early = Place(phases), 0
        while place.phases and time.time() < self.end:
            state, reason = self._watched(place)
            if not reason:
                return
            if "phase" in state:
                place, died_early = self._after(place, state, reason), 0
                continue
            died_early += 1
            if died_early == HOPELESS:
                self.event("gave up", phases=" ".join(place.phases), reason=reason)
                return

    def _watched(self, place: Place) -> tuple[Row, str]:
        """What a worker reported last, and why it ended or had to be; "" once it has gone through its phases."""
        messages, other = Pipe(duplex=False)
        state: Row = {}
        with (
            messages,
            self.process(self.worker(place, other.fileno()), self.log, pass_fds=[other.fileno()]) as process,
        ):
            other.close()
            reason = ""
            with contextlib.suppress(EOFError):  # of a pipe that ends with the worker, if nothing else holds it
                while "finished" not in state and not (reason := self._overdue(state)):
                    ended = process.poll() is not None  # asked first: what it said before its end is still read
                    if messages.poll(0 if ended else TICK):
                        state = self._heard(json.loads(messages.recv_bytes()), state)
                    elif ended:
                        break
            if reason or "finished" in state:  # how it ends then, and when, is no matter
                return state, reason
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        status = process.returncode
        return state, f"exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"

    def _heard(self, message: Row, state: Row) -> Row:
        """The state after a message: the item that is being done, and the step."""
        if "origin" in message:
            self.origin = message["origin"]
            self.event("worker", **message["origin"])
            return state
        if "phase" not in message:
            return state | message
        if message["phase"] != state.get("phase"):
            self.event("phase", name=message["phase"])
        return message | {"since": time.time()}

    def _overdue(self, state: Row) -> str:
        now = time.time()
        if now > self.end - TICK:
            return "the time of the run was over"
        if "phase" not in state:
            return ""
        if now > self.until(state["phase"]) + min(5.0, 0.02 * self.seconds):
            return "the time of the phase was over"
        limit = self.stages[state["phase"]].limit * (10 if self.rehearse else 1)
        return f"took more than {limit:g} s" if now - state["since"] > limit else ""

    def _after(self, place: Place, state: Row, reason: str) -> Place:
        """Where the next worker begins; what this one was trying gets its row, unless it wrote that itself."""
        phase, item, step = state["phase"], state["item"], state.get("step", "")
        self.event("lost a worker", phase=phase, item=item, step=step, reason=reason)
        if reason != f"exit status {LOST}":
            row = {"phase": phase, "item": item, "candidate": step, "status": "failed", "message": reason}
            append(self.folder / state["file"], self.origin | row)
        later = place.phases[place.phases.index(phase) :]
        if time.time() >= self.until(phase):
            return Place(later[1:])
        if step:
            same = place.at == state["index"] and place.phases[0] == phase
            return Place(later, state["index"], [step, *(place.without if same else ())])
        return Place(later, state["index"] + 1)
