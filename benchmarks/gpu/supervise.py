"""The process that never touches the device: it starts those that do, knows what they try, and outlives them.

A worker that dies, hangs or has lost its device is replaced; what it was trying gets its row and is left out. The whole
run ends at its time whatever hangs. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import bare, lines
from benchmarks.gpu.context import LOST

Row = dict[str, Any]
TICK = 0.05  # seconds between two looks at a worker
HOPELESS = 2  # workers in a row that die before their first item


class Deadline(NamedTuple):
    """``until``: the share of the whole time at which a phase ends. ``limit``: seconds for one item."""

    until: float
    limit: float = 60.0


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
        lines.append(self.events, {"event": name, "at": elapsed, **more})
        said = ", ".join(f"{key} {value}" for key, value in more.items() if value not in ("", None))
        print(f"[{elapsed:6.1f} s] {name}: {said}"[:300], flush=True)

    def environment(self) -> dict[str, str]:
        """What the processes of this run see."""
        changed = bare.VARIABLES if self.rehearse else {}
        kept = {k: v for k, v in os.environ.items() if self.rehearse or k not in ("TRITON_INTERPRET", "BIRD_EMULATE")}
        return kept | {"PYTHONUNBUFFERED": "1"} | changed

    @contextlib.contextmanager
    def process(
        self, command: Sequence[str], log: Path | None, variables: Mapping[str, str] | None = None, **options: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process in a session of its own, which ends with the block, and with all that it started.

        Its output goes to the end of ``log``, or to a pipe.
        """
        with log.open("ab") if log else contextlib.nullcontext(subprocess.PIPE) as output:
            process = subprocess.Popen(
                command, cwd=lines.ROOT, env=self.environment() | dict(variables or {}), stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, **options,
            )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def worker(self, phases: Sequence[str], *options: str) -> list[str]:
        """The command of a worker."""
        plan = [f"{name}@{min(self.until(name), self.end):.3f}" for name in phases]
        return [
            sys.executable, "-m", "benchmarks.gpu.worker", str(self.folder), *plan, *options,
            *(["--rehearse"] if self.rehearse else []),
        ]  # fmt: skip

    def drive(self, phases: Sequence[str]) -> None:
        """Go through the phases with as many workers as it takes."""
        place = Place(phases)
        died_early = 0
        while place.phases and time.time() < self.end:
            state, reason = self._watched(place)
            if reason is None:
                return
            died_early = 0 if "phase" in state else died_early + 1
            if died_early == HOPELESS:
                self.event("gave up", phases=" ".join(place.phases), reason=reason)
                return
            if "phase" in state:
                place = self._after(place, state, reason)

    def _watched(self, place: Place) -> tuple[Row, str | None]:
        """What a worker reported last, and None once it has gone through its phases, or why it ended or had to be."""
        pipe, other = os.pipe()
        options = ["--at", str(place.at), "--without", ",".join(sorted(place.without)), "--report", str(other)]
        state: Row = {}
        rest = b""
        with (
            os.fdopen(pipe, "rb", buffering=0) as messages,
            self.process(self.worker(place.phases, *options), self.log, pass_fds=[other]) as process,
        ):
            os.close(other)
            while True:
                ended = process.poll() is not None  # asked first: what it said before its end is still read
                waiting = select.select([messages], [], [], 0 if ended else TICK)[0]
                said = messages.read(2**16) if waiting else b""
                if said:
                    *whole, rest = (rest + said).split(b"\n")
                    for text in whole:
                        state = self._heard(json.loads(text), state)
                elif ended:
                    break
                elif waiting:  # it has closed the pipe and is about to end
                    time.sleep(TICK)
                reason = self._overdue(state)
                if reason is not None:
                    return state, reason
        status = process.returncode
        if status == 0 and "finished" in state:
            return state, None
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

    def _overdue(self, state: Row) -> str | None:
        now = time.time()
        if now > self.end - TICK:
            return "the time of the run was over"
        if "phase" not in state:
            return None
        grace = min(5.0, 0.02 * self.seconds)
        if now > self.until(state["phase"]) + grace:
            return "the time of the phase was over"
        limit = self.stages[state["phase"]].limit * (10 if self.rehearse else 1)
        return f"took more than {limit:g} s" if now - state["since"] > limit else None

    def _after(self, place: Place, state: Row, reason: str) -> Place:
        """Where the next worker begins; what this one was trying gets its row, unless it wrote that itself."""
        phase, item, step = state["phase"], state["item"], state.get("step", "")
        self.event("lost a worker", phase=phase, item=item, step=step, reason=reason)
        if reason != f"exit status {LOST}":
            row = {"phase": phase, "item": item, "candidate": step, "status": "failed", "message": reason}
            lines.append(self.folder / state["file"], self.origin | row)
        later = place.phases[place.phases.index(phase) :]
        if time.time() >= self.until(phase):
            return Place(later[1:])
        if step:
            same = place.at == state["index"] and place.phases[0] == phase
            return Place(later, state["index"], {step} | (place.without if same else set()))
        return Place(later, state["index"] + 1)


class Place(NamedTuple):
    """Where a worker begins: at an item of the first phase, ``without`` some of its steps."""

    phases: Sequence[str]
    at: int = 0
    without: set[str] = set()  # noqa: RUF012 - never changed
