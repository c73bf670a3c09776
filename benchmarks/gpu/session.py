"""The prepared runs on a GPU: is it right there, how fast is it, and what should be built next.

    ./dev gpu [--minutes 7] [--out FOLDER]      on a machine with CUDA
    ./dev gpu --sweep [--minutes 5]             the second run: warps and stages, NVIDIA's checkers
    ./dev gpu --rehearse [--sweep]              on any machine: tiny, on the CPU, with what a bare machine has

It is made for a bare machine that is lent for minutes: torch, Triton, NumPy and nvcc, no network, nothing installed,
the source tree as it is. Phases come in the order of their value and end at their deadlines; what is known is on the
disk at once. ``python -m benchmarks.gpu.read FOLDER`` makes a table of the files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import read, run
from benchmarks.gpu.run import Deadline, Place, PreparedRun
from benchmarks.rows import ROOT, output

# Warming is compiling by many processes; correctness begins when the native part is built, or without it.
STAGES = {
    "warm": Deadline(0.20),
    "ceilings": Deadline(0.26, limit=20),
    "native": Deadline(0.30),
    "correctness": Deadline(0.48, limit=20),
    "times": Deadline(0.80, limit=60),
    "profiles": Deadline(0.88, limit=20),
    "rivals": Deadline(0.98, limit=60),
}
SWEEP_STAGES = {
    "precompile": Deadline(0.30),
    "sweep": Deadline(0.60, limit=40),
    "checks": Deadline(0.98),
}
COMPILERS = 12  # processes, where there are so many cores
CHECKERS = ("memcheck", "racecheck")
SMI = "name,driver_version,compute_cap,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"


def main() -> None:
    """Go through the phases of one of the two runs; the first prints the table of what was found."""
    options = asked_for()
    minutes = options.minutes or (5.0 if options.sweep else 7.0)
    files = (SWEEP_STAGES, run.SWEEP, run.SWEEP_LOG) if options.sweep else (STAGES, run.EVENTS, run.LOG)
    default = Path("runs", "gpu", time.strftime("%Y%m%d-%H%M%S"))
    folder = Path(options.out or os.environ.get("OUT") or default).absolute()
    prepared = PreparedRun(folder, minutes, options.rehearse, *files)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite end still takes the processes along
    begin(prepared)
    if options.sweep:
        warm(prepared, "precompile")
        prepared.drive(["sweep"])
        check(prepared)
        prepared.event("end")
    else:
        session(prepared)
        prepared.event("end", **read.statuses(folder))
        print(read.summary(folder))


def asked_for() -> argparse.Namespace:
    """What is asked for.

    Raises:
        SystemExit: there is no GPU, and this is no rehearsal.
    """
    parser = argparse.ArgumentParser("./dev gpu", description="a prepared run on a GPU")
    parser.add_argument("--sweep", action="store_true", help="the second run, into the same folder or another")
    parser.add_argument("--minutes", type=float, help="for everything (default: 7, of the second run 5)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, with a bare machine's packages")
    parser.add_argument("--out", type=Path, help="the folder of the results (default: $OUT, or one in runs/gpu)")
    options = parser.parse_args()
    if options.minutes is not None and not 0.0 < options.minutes < 1440.0:
        parser.error(f"--minutes must be a positive number, not {options.minutes:g}")
    if not options.rehearse and not smi("name"):
        raise SystemExit("this needs a CUDA device, and nvidia-smi names none here; --rehearse runs on the CPU")
    return options


def begin(prepared: PreparedRun) -> None:
    """The first line: what is run where.

    Raises:
        SystemExit: the folder holds a run already.
    """
    if prepared.events.exists():
        raise SystemExit(f"{prepared.events} is there already: one run a folder")
    prepared.event(
        "start", seconds=prepared.seconds, rehearse=prepared.rehearse, python=platform.python_version(),
        cores=os.cpu_count(), system=platform.platform(), sources=sources(), smi=smi(SMI),
        nvcc=" ".join(output("nvcc", "--version").split()[-7:-1]),
    )  # fmt: skip


def session(prepared: PreparedRun) -> None:
    """Compile, then measure. The native part is built for this device alone, beside the first phases."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if prepared.rehearse:
        command = [sys.executable, "-c", "print('a rehearsal builds nothing')"]
    capability = smi("compute_cap")
    variables = {"BIRD_BUILD_EXT": "1"} | ({"TORCH_CUDA_ARCH_LIST": capability} if capability else {})
    with prepared.process(command, prepared.folder / run.BUILD, variables) as building:
        warm(prepared)
        prepared.drive(["ceilings"])
        for _, status in prepared.beside("native", {"native": building}):
            prepared.event("native build", status="not ready" if status is None else status)
    # What is not ready at its deadline has been stopped: it would disturb.
    prepared.drive(["correctness", "times", "profiles", "rivals"])
    prepared.event("device", smi=smi(SMI))


def warm(prepared: PreparedRun, phase: str = "warm") -> None:
    """Processes that make each later call once; what they have not compiled by the deadline is compiled when needed."""
    count = 2 if prepared.rehearse else max(2, min(COMPILERS, (os.cpu_count() or 4) - 2))
    with contextlib.ExitStack() as stack:
        prepared.event("phase", name=phase, processes=count)
        commands = [prepared.worker(Place([phase], part=part, parts=count)) for part in range(count)]
        workers = {str(i): stack.enter_context(prepared.process(c, prepared.log)) for i, c in enumerate(commands)}
        finished = sum(status == 0 for _, status in prepared.beside(phase, workers))
        prepared.event(phase, finished=finished, processes=count)


def check(prepared: PreparedRun) -> None:
    """NVIDIA's checkers of memory and of races, beside each other; a row each, as soon as it has ended."""
    tool = shutil.which("compute-sanitizer")
    if not (tool or prepared.rehearse):
        prepared.event("no compute-sanitizer")
        return
    program = [sys.executable, "-m", "tests.kernels.sanitize", "triton"]
    with contextlib.ExitStack() as stack:
        texts = {name: Path(stack.enter_context(tempfile.NamedTemporaryFile()).name) for name in CHECKERS}
        processes = {}
        for name in CHECKERS:
            command = [str(tool), "--tool", name, "--error-exitcode", "9", *program]
            if prepared.rehearse:
                command = [sys.executable, "-c", "print('no checker at a rehearsal')"]
            processes[name] = stack.enter_context(prepared.process(command, texts[name]))
        for name, status in prepared.beside("checks", processes):
            text = texts[name].read_text(encoding="utf-8", errors="replace")
            with prepared.log.open("a", encoding="utf-8") as log:
                log.writelines(f"{name}: {line}\n" for line in text.splitlines())
            said = re.findall(r"\d+ (?:passed|failed|errors?|skipped|hazards?)|ERROR SUMMARY: \d+ errors", text)
            outcome = "left out" if status is None else "ok" if status == 0 else "failed"
            row = {"item": name, "status": outcome, "message": ", ".join(said[-4:]), "exit": status}
            run.append(prepared.events, prepared.origin | {"phase": "checks"} | row | {"tail": text[-2000:]})
            prepared.event("checked", **row)


def smi(query: str) -> str:
    """What nvidia-smi answers for the first device; empty where there is none."""
    return output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split("\n")[0].strip()


def sources() -> str:
    """A digest of the sources: a machine that has no git still says what it ran."""
    digest = hashlib.sha256()
    for folder, pattern in (("bird_kernels", "*.py"), ("csrc", "*"), ("benchmarks", "*.py"), ("tests", "*.py")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
