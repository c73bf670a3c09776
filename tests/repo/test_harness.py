"""The benchmarks' harness on a CPU: the gate, the turns, the clocks, the origin of a row, and the files."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness, rows
from benchmarks.chunks import measure as chunks
from benchmarks.harness import Contestant, Entry, GateResult, quantiles
from benchmarks.kernels import layers, loss, statistics, tokens
from benchmarks.machine import Machine
from benchmarks.scale import ranks
from benchmarks.training import measure as training
from bird_kernels import clocks

CPU = torch.device("cpu")


def compete(*candidates: Contestant, timers: tuple[str, ...] = ("wall",), **options: Any) -> dict[str, Entry]:
    """Answers are numbers, and 1 is right."""

    def gate(answer: float) -> GateResult:
        return GateResult(None if answer == 1 else f"off by {abs(answer - 1):g}", abs(answer - 1))

    found = harness.compete(Machine(CPU), candidates, gate, timers, lambda once, takes: 5, **options)
    return {entry.name: entry for entry in found}


# ---------------------------------------------------------------------------------------------- the gate


def test_who_is_wrong_or_fails_gets_no_time_and_stops_nobody() -> None:
    def raises(error: Exception) -> Callable[[], float]:
        def run() -> float:
            raise error

        return run

    found = compete(
        Contestant("wrong", lambda: 3.0),
        Contestant("raises", raises(RuntimeError("no\nsuch kernel"))),
        Contestant("refuses", raises(ValueError('backend="native" cannot run here: is not built'))),
        Contestant("hungry", raises(torch.OutOfMemoryError("tried to allocate"))),
        Contestant("slow", raises(RuntimeError("it was called")), refusal="too slow"),
        Contestant("right", lambda: 1.0),
    )
    assert {name: (entry.status, entry.why) for name, entry in found.items()} == {
        "wrong": ("red", "off by 2"),
        "raises": ("failed", "RuntimeError: no such kernel"),
        "refuses": ("refused", 'ValueError: backend="native" cannot run here: is not built'),
        "hungry": ("refused", "out of memory"),
        "slow": ("refused", "too slow"),
        "right": ("ok", ""),
    }
    assert [name for name, entry in found.items() if entry.seconds] == ["right"]
    assert len(found["right"].seconds["wall"]) == 5


def test_what_is_judged_is_a_call_after_the_warm_up() -> None:
    """A compiler's own graph is made in the second or third call, and may be wrong from then on."""
    calls: list[int] = []

    def run() -> float:
        calls.append(1)
        return 1.0 if len(calls) <= harness.WARM_UP else 2.0

    assert compete(Contestant("compiled", run, compiles=True))["compiled"].status == "red"


def test_a_graph_is_judged_by_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[float] = []

    def captured(self: Machine, run: Callable[[], float]) -> tuple[Callable[[], None], list[float]]:
        return lambda: filled.append(run()), filled  # empty until it is replayed

    monkeypatch.setattr(Machine, "captured", captured)
    seen: list[object] = []
    found = harness.compete(
        Machine(CPU),
        [Contestant("a", lambda: 1.0)],
        lambda answer: seen.append(list(answer)) or GateResult(),  # type: ignore[func-returns-value]
        ("graph", "host"),
        lambda once, takes: 4,
    )
    (entry,) = found
    assert seen == [[1.0]]
    assert {clock: len(seconds) for clock, seconds in entry.seconds.items()} == {"graph": 4, "host": 4}
    assert len(filled) == 1 + 4


def test_what_no_graph_holds_has_the_devices_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(self: Machine, run: object) -> object:
        raise RuntimeError("it waits")

    monkeypatch.setattr(Machine, "captured", captured)
    found = compete(
        Contestant("a", lambda: 1.0), Contestant("b", lambda: 1.0, captured=False), timers=("graph", "host")
    )
    assert [set(entry.seconds) for entry in found.values()] == [{"device", "host"}] * 2
    assert [entry.no_graph for entry in found.values()] == ["RuntimeError: it waits", ""]


def test_nobody_begins_after_the_end() -> None:
    begun: list[str] = []
    over = iter([False, True, True])
    found = compete(
        Contestant("a", lambda: 1.0), Contestant("b", lambda: 1.0), begin=begun.append, stop=lambda: next(over)
    )
    assert begun == ["a", "b", ""]
    assert (found["b"].status, found["a"].seconds) == ("left out", {"wall": []})


def test_memory_is_watched() -> None:
    found = compete(Contestant("a", lambda: float(torch.ones(1000).sum() / 1000)), watch=True)
    assert 4000 <= (found["a"].peak_memory or 0) < 5000


# ---------------------------------------------------------------------------------------------- turns and clocks


def test_turns_are_mixed_and_spread() -> None:
    calls: list[str] = []

    def take(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    times = harness.in_turns({name: take(name) for name in "abc"}, {"a": 8, "b": 8, "c": 2})
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 8, "b": 8, "c": 2}
    first, second = (i for i, name in enumerate(calls) if name == "c")
    assert second - first > 6
    pairs = [tuple(name for name in calls if name != "c")[2 * i : 2 * i + 2] for i in range(8)]
    assert set(pairs) == {("a", "b"), ("b", "a")}


def test_rounds_fill_the_share_within_bounds() -> None:
    assert harness.rounds(0.01, share=0.25, patience=4) == 25
    assert harness.rounds(1e-6, share=0.25, patience=4) == harness.MOST_ROUNDS
    assert harness.rounds(0.5, share=0.25, patience=4) == harness.FEWEST_ROUNDS
    assert harness.rounds(1.0, share=0.25, patience=4) == 4
    assert harness.rounds(9.0, share=0.25, patience=4) == harness.FEWEST_SLOW_ROUNDS


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0, "rounds": 6}
    assert quantiles([2.0]) == {"p20": 2.0, "p50": 2.0, "p80": 2.0, "rounds": 1}
    assert quantiles([]) == {"p20": None, "p50": None, "p80": None, "rounds": None}


class FakeCuda:
    """Writes down what is asked of ``torch.cuda``, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append(f"sleep {cycles}"))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=self.waits("side")))
        current = SimpleNamespace(wait_stream=self.waits("current"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: self.within(f"capture in {pool}"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.within("side stream"))
        flush = SimpleNamespace(zero_=lambda: self.log.append("flush"))
        monkeypatch.setattr(clocks, "_twice_the_cache", lambda: flush)
        self.events = iter(["start", "end"])

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        name = next(self.events)
        return SimpleNamespace(
            record=lambda: self.log.append(name),
            synchronize=lambda: self.log.append(f"wait for {name}"),
            elapsed_time=lambda other: 3.0,  # ms
        )

    def waits(self, name: str) -> Callable[[object], None]:
        return lambda other: self.log.append(f"{name} waits")

    @contextlib.contextmanager
    def within(self, name: str) -> Any:
        self.log.append(name)
        yield
        self.log.append(f"end of {name}")


def test_device_time_is_cold_and_without_the_hosts_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    take = clocks.device(lambda: cuda.log.append("run"), once=1e-3)
    assert take() == pytest.approx(3e-3)
    assert cuda.log == ["sleep 4000000", "flush", "start", "run", "end", "wait for end"]


def test_a_gpus_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's starts with an empty queue and does not wait; it tells how long the device's has to sleep."""
    cuda, machine = FakeCuda(monkeypatch), Machine(torch.device("cuda"))
    assert machine.take("host", lambda: cuda.log.append("run"))() >= 0
    assert cuda.log == ["synchronize", "run"]
    cuda.log.clear()
    machine.take("device", lambda: cuda.log.append("run"))()
    assert cuda.log[:2] == ["synchronize", "run"]
    assert cuda.log[3:] == ["flush", "start", "run", "end", "wait for end"]


def test_capture_warms_up_beside_and_captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    run = lambda: cuda.log.append("run") or "result"  # type: ignore[func-returns-value]  # noqa: E731
    replay, result = Machine(torch.device("cuda")).captured(run)
    assert result == "result"
    side = ["side waits", "side stream", "run", "run", "run", "end of side stream", "current waits"]
    assert cuda.log == [*side, "capture in None", "run", "end of capture in None"]
    replay()
    assert cuda.log[-1] == "replay"


# ---------------------------------------------------------------------------------------------- rows and files


def test_a_row_says_where_it_was_measured() -> None:
    about = rows.origin_of(CPU)
    assert tuple(about) == rows.ORIGIN
    assert about["device"].endswith(f", {torch.get_num_threads()} threads")
    assert about["torch"] == torch.__version__
    assert all(about[name] for name in ("python", "commit", "date", "load"))


def test_csv_round_trip(tmp_path: Path) -> None:
    about = rows.origin_of(CPU) | {"driver": None, "omp_wait_policy": None, "commit": "1234567"}
    found = [
        about | dict(name='wrong: "value", off\nby 1', count=None, seconds=float("inf"), chosen=False),
        about | dict(name=None, count=0, seconds=1.5e-5, chosen=True),
    ]
    path = tmp_path / "new" / "device.csv"
    rows.write_rows(path, found)
    assert rows.load_rows(path) == found
    assert [file.name for file in path.parent.iterdir()] == ["device.csv"]
    rows.write_rows(path, [*found, about | {"newer": 3}])
    assert [row["newer"] for row in rows.load_rows(path)] == [None, None, 3]


def test_a_page_tells_what_rows_differ_in() -> None:
    about = rows.origin_of(CPU)
    text = rows.heading("Title", [about | {"commit": commit} for commit in ("abc", "def", "abc")])
    assert "- commit: abc, def\n" in text
    assert "- driver" not in text
    assert [rows.duration(t) for t in (None, 3.0, 1.42e-3, 8.16e-6)] == ["–", "3 s", "1.42 ms", "8.16 µs"]
    assert [rows.duration(t) for t in (0.00142, 0.9999e-3)] == ["1.42 ms", "1 ms"]
    assert [rows.size_of(size) for size in (999, 1_000, 2.15e9, 1.1e12)] == ["999 B", "1 kB", "2.15 GB", "1.1 TB"]


def test_parts_of_a_page_have_one_place() -> None:
    page = "a\n<!-- t -->\nold\nold\n<!-- end t -->\nb\n"
    assert rows.with_parts(page, [("t", "new\n")]) == "a\n<!-- t -->\nnew\n<!-- end t -->\nb\n"
    for text in ("", 2 * page):
        with pytest.raises(ValueError, match="places for 't'"):
            rows.with_parts(text, [("t", "new")])


FOLDER = Path(rows.__file__).parent
COMMITTED = sorted([*FOLDER.glob("*/results/*.csv"), *FOLDER.glob("*/results.csv")])


def page_of(path: Path) -> Callable[[list[rows.Row]], str] | None:
    """What makes the page beside a committed file."""
    if path.name == "results.csv":
        return None
    if path.parent.parent.name == "corruptions":
        return pytest.importorskip("benchmarks.corruptions.throughput").corruptions_page
    several = {"layers": layers, "statistics": statistics, "tokens": tokens, "ranks": ranks}.get(
        path.stem.rpartition("-")[2], loss
    )
    return several.BENCHMARK.page


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_committed_results_come_back(path: Path, tmp_path: Path) -> None:
    """Numbers to the digit. The page beside it says what its rows say."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    again = tmp_path / "again.csv"
    found = rows.load_rows(path)
    rows.write_rows(again, found)
    with again.open(encoding="utf-8", newline="") as file:
        kept = list(csv.DictReader(file))
    for line, copy in zip(lines, kept, strict=True):
        assert list(line) == list(copy)
        for name, text in line.items():
            assert copy[name] == text or float(copy[name]) == float(text)
    page = page_of(path)
    if page is not None:
        assert path.with_suffix(".md").read_text(encoding="utf-8") == page(found)


# ---------------------------------------------------------------------------------------------- steps in chunks


def test_steps_in_chunks_are_timed_behind_their_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 16)
    found = chunks.times_of_ways(32, repeats=1)
    assert set(found) == {"chunked", "passes", "whole", "of passes", "of whole"}
    assert min(found.values()) > 0
    monkeypatch.setattr(chunks.Step, "chunked", chunks.Step.whole)
    with pytest.raises(ValueError, match="chunked: gradient off by"):
        chunks.times_of_ways(32, repeats=1)


# ---------------------------------------------------------------------------------------------- small networks


def test_arrangements_of_four_students_are_timed_behind_their_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled one, for its minute; a student whose weights are another's is found."""
    names = [training.OURS, "vmap", "grouped convolutions"]
    found = training.time_arrangements(names, repeats=1)
    assert [(entry.name, entry.status) for entry in found] == [(name, "ok") for name in names]
    assert all(entry.checked.gradient_error < 1e-4 for entry in found)
    students = training.students
    monkeypatch.setattr(training, "students", lambda *dtype: [*students(*dtype)[:3], students(*dtype)[0]])
    truth = training.truth()
    monkeypatch.setattr(training, "students", students)
    monkeypatch.setattr(training, "truth", lambda: truth)
    assert {entry.status for entry in training.time_arrangements(names, repeats=1)} == {"red"}
