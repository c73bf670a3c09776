"""The second prepared run on a GPU: warps, stages and settings of the kernels, NVIDIA's checkers, and the tests.

    ./dev gpu --sweep [--minutes 5] [--out FOLDER]     after `benchmarks.gpu.session`, into the same folder or another
    ./dev gpu --sweep --rehearse                       on any machine

The checkers and, where pytest is there, the tests run beside each other after the sweeps, until the time is over.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.session import arguments, begin, ended_by_signals, folder_of, warm
from benchmarks.gpu.supervise import Run, Stage

STAGES = {
    "precompile": Stage(0.30),
    "sweep": Stage(0.60, limit=40),
    "checks": Stage(0.98),
}
TESTS = ("test_cuda", "test_accuracy", "test_pairs")
TOOLS = ("memcheck", "racecheck")
TAIL = 1500  # characters of a program's output that its row keeps; all of it is in the log


def main() -> None:
    """Sweep, then check."""
    options = arguments("sweeps and checkers on a GPU", 5.0)
    run = Run(folder_of(options), options.minutes, options.rehearse, STAGES, lines.SWEEP, lines.SWEEP_LOG)
    with ended_by_signals():
        begin(run)
        warm(run, "precompile")
        run.drive(["sweep"])
        check(run, commands(run.rehearse))
    run.event("end")


def commands(rehearse: bool) -> dict[str, list[str] | str]:
    """What is run, or why it is not."""
    python = sys.executable
    found: dict[str, list[str] | str] = {}
    tool = shutil.which("compute-sanitizer")
    for name in TOOLS:
        program = [python, "-m", "tests.kernels.sanitize", "triton"]
        if rehearse:
            found[name] = [python, "-c", "print('no checker at a rehearsal')"]
        else:
            found[name] = [tool, "--tool", name, "--error-exitcode", "9", *program] if tool else "no compute-sanitizer"
    has = subprocess.run([python, "-c", "import pytest"], capture_output=True, check=False).returncode == 0
    if rehearse or not has:
        found["tests"] = "pytest is not installed"
    else:
        files = [f"tests/kernels/{name}.py" for name in TESTS]
        options = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-k", "not sanitizer"]
        found["tests"] = [python, "-m", "pytest", *files, *options]
    return found


def check(run: Run, programs: dict[str, list[str] | str]) -> None:
    """Run all programs beside each other until the deadline; a row each, as soon as it has ended."""
    about = run.origin | {"phase": "checks"}
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        for name, command in programs.items():
            if isinstance(command, str):
                lines.write(run.events, about | {"item": name, "status": "refused", "message": command})
                continue
            log = run.folder / f".{name}.part"  # in a file of its own while it runs
            stack.callback(_keep, run, name, log)
            running[name] = stack.enter_context(run.process(command, log)), log
        while running and time.time() < run.until("checks"):
            time.sleep(0.05)
            for name, (process, log) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _tell(run, about, name, process.returncode, log)
        for name, (_, log) in running.items():
            _tell(run, about, name, None, log)


def _tell(run: Run, about: dict[str, object], name: str, status: int | None, log: Path) -> None:
    text = log.read_text(encoding="utf-8", errors="replace")
    outcome = "left out" if status is None else "ok" if status == 0 else "failed"
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)|ERROR SUMMARY: \d+ errors|hazards? displayed", text)
    more = {"message": ", ".join(counts[-4:]), "exit": status, "tail": text[-TAIL:]}
    lines.write(run.events, about | {"item": name, "status": outcome} | more)
    run.event("checked", item=name, status=outcome, message=more["message"])


def _keep(run: Run, name: str, log: Path) -> None:
    """The program's output goes to the end of the common log."""
    with contextlib.suppress(OSError), run.log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {name}\n" + log.read_text(encoding="utf-8", errors="replace"))
        log.unlink()


if __name__ == "__main__":
    main()
