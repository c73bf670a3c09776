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
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import checkers, lines, read
from benchmarks.gpu.supervise import Deadline, PreparedRun
from benchmarks.rows import output

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
SMI = "name,driver_version,compute_cap,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"


def main() -> None:
    """Go through the phases of one of the two runs; the first prints the table of what was found."""
    options = asked_for()
    minutes = options.minutes or (5.0 if options.sweep else 7.0)
    files = (SWEEP_STAGES, lines.SWEEP, lines.SWEEP_LOG) if options.sweep else (STAGES, lines.EVENTS, lines.LOG)
    default = Path("runs", "gpu", time.strftime("%Y%m%d-%H%M%S"))
    run = PreparedRun(
        (options.out or Path(os.environ.get("OUT") or default)).absolute(), minutes, options.rehearse, *files
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite end still takes the processes along
    begin(run)
    if options.sweep:
        warm(run, "precompile")
        run.drive(["sweep"])
        checkers.check(run, checkers.commands(run.rehearse))
        run.event("end")
    else:
        session(run)
        run.event("end", **read.statuses(run.folder))
        print(read.summary(run.folder))


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


def begin(run: PreparedRun) -> None:
    """The first line: what is run where.

    Raises:
        SystemExit: the folder holds a run already.
    """
    if run.events.exists():
        raise SystemExit(f"{run.events} is there already: one run a folder")
    run.event(
        "start", seconds=run.seconds, rehearse=run.rehearse, python=platform.python_version(), cores=os.cpu_count(),
        system=platform.platform(), sources=sources(), smi=smi(SMI),
        nvcc=" ".join(output("nvcc", "--version").split()[-7:-1]),
    )  # fmt: skip


def session(run: PreparedRun) -> None:
    """Compile, then measure."""
    with _build(run) as building:  # what is not ready at its deadline is stopped: it would disturb
        warm(run)
        run.drive(["ceilings"])
        while building.poll() is None and time.time() < run.until("native"):
            time.sleep(0.1)
        status = building.poll()
        run.event("native build", status="not ready" if status is None else status)
    run.drive(["correctness", "times", "profiles", "rivals"])
    run.event("device", smi=smi(SMI))


def _build(run: PreparedRun) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """The native part is built for this device alone."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if run.rehearse:
        command = [sys.executable, "-c", "print('a rehearsal builds nothing')"]
    capability = smi("compute_cap")
    known = {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}
    return run.process(command, run.folder / lines.BUILD, {"BIRD_BUILD_EXT": "1"} | known)


def warm(run: PreparedRun, phase: str = "warm") -> None:
    """Processes that make each later call once; what they have not compiled by the deadline is compiled when needed."""
    count = 2 if run.rehearse else max(2, min(COMPILERS, (os.cpu_count() or 4) - 2))
    with contextlib.ExitStack() as stack:
        run.event("phase", name=phase, processes=count)
        commands = [run.worker([phase], "--part", str(part), "--parts", str(count)) for part in range(count)]
        workers = [stack.enter_context(run.process(command, run.log)) for command in commands]
        while any(worker.poll() is None for worker in workers) and time.time() < run.until(phase):
            time.sleep(0.05)
        run.event(phase, finished=sum(worker.poll() == 0 for worker in workers), processes=count)


def smi(query: str) -> str:
    """What nvidia-smi answers for the first device; empty where there is none."""
    return output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split("\n")[0].strip()


def sources() -> str:
    """A digest of the sources: a machine that has no git still says what it ran."""
    digest = hashlib.sha256()
    for folder, pattern in (("bird_kernels", "*.py"), ("csrc", "*"), ("benchmarks", "*.py")):
        for path in sorted((lines.ROOT / folder).rglob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(lines.ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
