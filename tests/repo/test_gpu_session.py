"""The prepared run for a GPU runs to its end on a CPU, keeps its time, and loses nothing when it is killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import bare, read, run, session, sweeps
from benchmarks.gpu.context import Context
from benchmarks.gpu.problems import QUESTIONS
from benchmarks.gpu.run import LOST, Deadline, Place, PreparedRun
from benchmarks.harness import Contestant, GateResult
from benchmarks.machine import Machine
from tests.kernels import on_device
from tests.kernels.on_device import Check
from tests.selection import short

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("ceilings", "correctness", "times", "profiles", "rivals")
CPU = torch.device("cpu")
MEASURED = ("device", "torch", "triton", "commit", "candidate", "timer", "p20", "p50", "p80", "rounds")
PROBLEM = ("problem", "n", "p", "q", "dtype", "precision", "gate")


def rehearsal(folder: Path, minutes: float, *more: str) -> subprocess.Popen[str]:
    command = [str(ROOT / "dev"), "gpu", *more, "--rehearse", "--minutes", str(minutes), "--out", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "OUT"} | {"BIRD_PYTHON": sys.executable}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole rehearsal; half a minute on two idle cores."""
    found = tmp_path_factory.mktemp("gpu") / "run"
    process = rehearsal(found, 12)
    said, _ = process.communicate(timeout=800)
    assert process.returncode == 0, said
    return found


def all_rows(folder: Path) -> list[dict[str, object]]:
    return [row for name in (run.ROWS, run.CHECKS, run.KERNELS) for row in run.read_lines(folder / name)]


def test_every_phase_comes_through(folder: Path) -> None:
    found = all_rows(folder)
    bad = [row for row in found if row["status"] not in ("ok", "refused")]
    assert not bad, bad[:3]
    assert {row["phase"] for row in found if row["status"] == "ok"} == set(PHASES)
    events = [event["event"] for event in run.read_lines(folder / run.EVENTS)]
    assert events[0] == "start"
    assert events[-1] == "end"
    assert not {"left out", "lost a worker", "gave up"} & set(events)


def test_rows_say_what_they_are(folder: Path) -> None:
    timed = [row for row in run.read_lines(folder / run.ROWS) if row["status"] == "ok"]
    for row in timed:
        names = MEASURED + (PROBLEM if row["phase"] != "ceilings" else ())
        assert [name for name in names if name not in row] == [], row
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]  # type: ignore[operator]
    by_problem: dict[object, set[object]] = {}
    for row in timed:
        if row["phase"] == "times":
            by_problem.setdefault(row["problem"], set()).add(row["candidate"])
            assert row["timer"] in ("graph", "device", "host")
    assert set(by_problem) == {question.name for question in QUESTIONS}
    assert all("auto" in who and who & set(read.HAND_WRITTEN) for who in by_problem.values())
    assert {"library", "triton"} <= by_problem["bird 128x512 fp32"]


def test_what_comes_back_fits(folder: Path) -> None:
    """A lent machine gives back eight plain files; two of them are the sweep's."""
    names = {path.name for path in folder.iterdir()}
    assert names == {run.EVENTS, run.ROWS, run.CHECKS, run.KERNELS, run.BUILD, run.LOG}
    assert len(names | {run.SWEEP, run.SWEEP_LOG}) <= 8


def test_reading_a_run(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.read", str(folder), "--to", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(read.timed_rows(folder))
    assert tuple(found[0]) == read.COLUMNS
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# A rehearsal: tiny sizes on a CPU")
    assert "no tuning.json" in done.stdout
    assert all(f"| {question.name} " in page for question in QUESTIONS)
    assert "## Ceilings" in page
    tuning = pytest.importorskip("bird_kernels.tuning")
    assert not (tmp_path / "tuning.json").exists()
    read.tuning_table(folder, tmp_path / "tuning.json")
    table = tuning.read_table(tmp_path / "tuning.json")
    assert {row.candidate for row in table.rows} >= {"library", "triton"}
    assert all(row.host > 0 and row.device > 0 for row in table.rows)


def test_reading_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "nonexistent", tmp_path):
        monkeypatch.setattr(sys, "argv", ["read", str(folder)])
        with pytest.raises(SystemExit, match=r"holds no results of \./dev gpu$"):
            read.main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.smoke
def test_a_table_has_the_ratio_to_the_best_by_hand(tmp_path: Path) -> None:
    about = dict(phase="times", problem="llm", target=9e-5, status="ok", n=8, p=4, q=4, dtype="bfloat16", precision="")
    times = {
        "auto": 1e-4,
        "library": 2e-4,
        "gram": 4e-4,
        "feature": 2e-4,
        "symmetric 64 64": 3e-4,
        "symmetric 128 64": 5e-4,
    }
    for candidate, p50 in times.items():
        for timer, factor in (("graph", 1), ("host", 9)):
            row = about | dict(item="llm", candidate=candidate, timer=timer, p50=factor * p50)
            run.append(tmp_path / run.ROWS, row)
    run.append(tmp_path / run.ROWS, about | dict(item="llm", candidate="native", status="refused"))
    (line,) = [line for line in read.problems_table(read.timed_rows(tmp_path)).splitlines() if line.startswith("| llm")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    whole = ["100 µs (0.50×)", "200 µs (1.00×)", "300 µs (1.50×)", "–", "refused", "400 µs (2.00×)", "200 µs (1.00×)"]
    assert cells == ["llm", "90 µs", *whole, "–", "–", "–"]


def test_a_short_run_ends_in_time(tmp_path: Path) -> None:
    start = time.time()
    process = rehearsal(tmp_path / "run", 0.1)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert time.time() - start < 6 + 8  # seconds; a loaded machine takes some to start Python
    assert [event["event"] for event in run.read_lines(tmp_path / "run" / run.EVENTS)][-1] == "end"


@short("the supervisor, the files and the reader are the first run's, which is in the short set", lambda: False)
def test_the_second_run(tmp_path: Path) -> None:
    """Sweeps beside the call as it is, and a row for each checker."""
    process = rehearsal(tmp_path, 8, "--sweep")
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert {path.name for path in tmp_path.iterdir()} == {run.SWEEP, run.SWEEP_LOG}
    rows = read.timed_rows(tmp_path)
    assert {row["status"] for row in rows} == {"ok"}
    swept = [row for row in rows if row["phase"] == "sweep"]
    assert {"as it is"} < {row["candidate"] for row in swept}
    assert any("warps" in str(row["candidate"]) for row in swept)
    assert all(row["p50"] > 0 for row in swept)
    checked = {row["item"]: row["status"] for row in rows if row["phase"] == "checks"}
    assert checked == {"memcheck": "ok", "racecheck": "ok"}
    assert "| as it is " in read.run_page(tmp_path)


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """What was known is there, in whole lines, and no process goes on."""
    folder = tmp_path / "run"
    process = rehearsal(folder, 5)
    try:
        wait_until(lambda: len(all_rows(folder)) >= 3, 250)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    wait_until(lambda: not processes_of(folder), 20)
    found = all_rows(folder)
    assert len(found) >= 3
    assert all({"device", "torch", "phase", "status"} <= set(row) for row in found)


def wait_until(true: object, seconds: float) -> None:
    end = time.time() + seconds
    while not true():  # type: ignore[operator]
        assert time.time() < end, "it did not come about"
        time.sleep(0.1)


def processes_of(folder: Path) -> list[str]:
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [command for command in commands if "benchmarks.gpu.worker" in command and str(folder) in command]


# ------------------------------------------------------------------------------------------ workers that die

WORKER = """
    import json, os, sys, time
    from multiprocessing.connection import Connection
    pipe, phases, at, without = Connection(int(sys.argv[1]), readable=False), *json.loads(sys.argv[2])
    def say(**message): pipe.send_bytes(json.dumps(message).encode())
    say(origin=dict(device="D"))
    for phase in phases:
        for index in range(at, 4):
            say(phase=phase, item=f"item {index}", index=index, file="rows.jsonl")
            open("done", "a").write(f"{phase}{index} ")
            if (phase, index) == ("a", 1): os.abort()
            if (phase, index) == ("a", 2): time.sleep(600)
            if (phase, index) == ("b", 0) and "x" not in without:
                say(step="x"); time.sleep(0.05); os._exit(75)
            if (phase, index) == ("c", 1): time.sleep(600)
        at = 0
    say(finished=True)
"""


class Faked(PreparedRun):
    """Its workers are the script above."""

    def worker(self, place: Place, report: int | None = None) -> list[str]:
        script = f"import os; os.chdir({str(self.folder)!r})" + textwrap.dedent(WORKER)
        return [sys.executable, "-S", "-c", script, str(report), json.dumps([place.phases, place.at, place.without])]


@pytest.fixture
def faked(tmp_path: Path) -> Faked:
    stages = {"a": Deadline(0.9, limit=2.0), "b": Deadline(0.9), "c": Deadline(0.95)}
    return Faked(tmp_path, 0.15, False, stages, run.EVENTS, run.LOG)


def test_workers_that_die_are_replaced(faked: Faked) -> None:
    """One aborts, one hangs beyond its limit, one loses its device in a step, one hangs to the end of the run."""
    faked.drive(["a", "b", "c"])
    assert time.time() < faked.end + 3
    assert (faked.folder / "done").read_text().split() == [
        *("a0", "a1", "a2", "a3"),
        *("b0", "b0", "b1", "b2", "b3"),
        "c0",
        "c1",
    ]
    failures = [(row["item"], row["message"], row["device"]) for row in run.read_lines(faked.folder / run.ROWS)]
    assert failures[:2] == [("item 1", "ended by SIGABRT", "D"), ("item 2", "took more than 2 s", "D")]
    assert [item for item, *_ in failures[2:]] == ["item 1"]  # b's worker writes its own row before exit status LOST
    lost = [e["reason"] for e in run.read_lines(faked.folder / run.EVENTS) if e["event"] == "lost a worker"]
    assert f"exit status {LOST}" in lost


def test_hopeless_workers_are_given_up(faked: Faked) -> None:
    faked.worker = lambda *_: [sys.executable, "-c", "raise SystemExit(3)"]  # type: ignore[method-assign]
    faked.drive(["a"])
    events = [event["event"] for event in run.read_lines(faked.folder / run.EVENTS)]
    assert events == ["gave up"]


def test_a_worker_that_has_finished_need_not_end(faked: Faked) -> None:
    """A compiler's processes may take longer to go than anybody waits."""
    script = """
        import sys, time
        from multiprocessing.connection import Connection
        pipe = Connection(int(sys.argv[1]), readable=False)
        pipe.send_bytes(b'{"phase": "a", "item": "i", "index": 0, "file": "rows.jsonl"}')
        pipe.send_bytes(b'{"finished": true}')
        pipe.close()
        time.sleep(600)
    """
    command = [sys.executable, "-S", "-c", textwrap.dedent(script)]
    faked.worker = lambda place, report: [*command, str(report)]  # type: ignore[method-assign]
    faked.drive(["a"])
    assert [event["event"] for event in run.read_lines(faked.folder / run.EVENTS)] == ["phase"]


# ------------------------------------------------------------------------------------------ candidates, rows, packages


def test_a_candidate_that_fails_stops_nobody() -> None:
    def raises() -> object:
        raise RuntimeError("no\nsuch kernel")

    def refuses() -> object:
        raise ValueError('backend="native" cannot run here: is not built')

    context = Context(Machine(CPU))
    context.without = {"deadly"}
    right, wrong = torch.ones(1), torch.zeros(1)
    candidates = [
        Contestant("raises", raises), Contestant("wrong", lambda: wrong), Contestant("refuses", refuses),
        Contestant("deadly", lambda: os.abort()), Contestant("right", lambda: right),
    ]  # fmt: skip
    rows = list(context.timed(candidates, lambda r: GateResult(None if r is right else "off by 1", 0.5), 0.1))
    assert [(row["candidate"], row["status"]) for row in rows] == [
        ("raises", "failed"), ("wrong", "red"), ("refuses", "refused"), ("right", "ok"), ("right", "ok"),
    ]  # fmt: skip
    assert rows[0]["message"] == "RuntimeError: no such kernel"
    assert rows[1]["gate"] == "off by 1"
    assert "p50" not in rows[1]
    assert {row["timer"] for row in rows[3:]} == {"graph", "host"}
    assert rows[3]["rounds"] >= 3


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda loss, calls: loss, set()),
        (lambda loss, calls: loss * 1.001, {"accurate"}),
        (lambda loss, calls: loss + 1e-7 * (calls % 2), {"second call", "repeats", "streams", "replay"}),
    ],
)
def test_the_correctness_calls_see_what_is_wrong(
    change: Callable[[Tensor, int], Tensor], wrong: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def cka_loss(*args: object, **options: object) -> Tensor:
        calls.append(1)
        return change(right(*args, **options), len(calls))

    right = on_device.cka_loss
    monkeypatch.setattr(on_device, "cka_loss", cka_loss)
    found = on_device.judged(Check("library", (16, 9, 8), masked=True, pairs=2), Machine(CPU))
    red = {name for name, holds in found.items() if holds is False}
    assert red <= wrong
    assert bool(red) == bool(wrong)


def test_lines_survive_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run.append(path, {"a": float("nan"), "b": (1, 2)})
    run.append(path, {"a": 1.5})
    path.write_text(path.read_text() + '{"a": 2')
    assert list(run.read_lines(path)) == [{"a": "nan", "b": [1, 2]}, {"a": 1.5}]
    path.write_text('{"a"\n{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        list(run.read_lines(path))


@pytest.mark.parametrize("name", [run.CHECKS, run.ROWS, run.SWEEP])
@pytest.mark.parametrize("line", ["5", "[1, 2]"])
def test_rows_without_their_fields_are_named(name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match=rf"{name}, line 1 has not all of"):
        read.run_page(tmp_path)


def test_the_sweep_knows_every_kernel_and_puts_launches_back() -> None:
    """Warps and stages of the kernel that is named are others while it is asked, and of no other."""
    launch = pytest.importorskip("bird_kernels.backends.triton.launch", reason="needs Triton")
    found = sweeps.kernels()
    assert len(found) > 10
    assert all(name.endswith("_kernel") for name in found)
    make = launch.Launch.__init__
    kernels = [SimpleNamespace(__name__=name, arg_names=["x", "y", "N"]) for name in found[:2]]
    with sweeps.launched_with(found[0], {"num_warps": 32}) as seen:
        made = [launch.Launch(kernel, (1,), {"N": 1}, num_warps=4) for kernel in kernels]
    assert [one._options["num_warps"] for one in made] == [32, 4]
    assert seen == set(found[:2])
    assert launch.Launch.__init__ is make


def test_a_rehearsal_hides_what_a_bare_machine_lacks() -> None:
    script = """
        from benchmarks.gpu import bare
        bare.enter()
        import importlib.util, torch, triton, numpy, bird_kernels
        names = ["pytest", "matplotlib", "cka", "tqdm", "scipy", "torchvision"]
        print([name for name in names if importlib.util.find_spec(name)], torch.cuda.is_available())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n")[0] == "[] False", done.stderr
    with pytest.raises(RuntimeError, match="before torch"):
        bare.enter()


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["session", "--out", str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        session.main()
    assert not list(tmp_path.iterdir())


def test_one_run_a_folder(faked: Faked) -> None:
    session.begin(faked)
    with pytest.raises(SystemExit, match="one run a folder"):
        session.begin(faked)
