"""The benchmarks' own machinery: the gate, the floor, the clocks, the files and what is read out of them. On a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytest_benchmark", reason="the benchmarks need the bench extra")

from benchmarks.kernels import (
    compare,
    contest,
    estimates,
    measure,
    plots,
    problems,
    providers,
    results,
    session,
    tables,
    timers,
)
from benchmarks.kernels.contest import Contest, Entry, Verdict
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import Provider
from benchmarks.kernels.results import Row
from benchmarks.kernels.timers import Timing
from bird_kernels import clocks

CPU = torch.device("cpu")
TINY = Case("bird", 12, 5, 7)
FAST = Ceilings(copies={1: 1e12}, products={"float32 ieee": 1e15, "float64": 1e15, "bfloat16": 1e15})


def plant(loss: Callable[[Tensor, Tensor], Tensor], name: str = "gram") -> Provider:
    return Provider(name, lambda case, capture: loss)


def row(provider: str = "auto", p50: float | None = 1e-3, **changes: Any) -> Row:
    timing: dict[str, Any] = {}
    if p50:
        timing = dict(p20=round(0.9 * p50, 9), p50=p50, p80=round(1.1 * p50, 9), rounds=7)
    base = dict(
        device="CPU Some, 2 threads", driver="", torch="2.11", triton="", python="3.12", commit="abc",
        date="2026-01-01", load="0.1", omp_wait_policy="passive",
        problem="bird", n=128, p=512, q=512, dtype="float32", precision="ieee", estimator="biased",
        mode="forward+backward", timer="wall", provider=provider, red="", value_error=1e-7, gradient_error=2e-6,
        p20=None, p50=None, p80=None, rounds=None, launches=None, peak_memory=2**20, floor=1e-5,
        copy_ceiling=1e10, product_ceiling=1e11,
    )  # fmt: skip
    return Row(**(base | timing | changes))


# ---------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("mode", problems.BOTH)
def test_every_provider_that_takes_part_passes_the_gate(estimator: str, mode: str) -> None:
    case = replace(TINY, estimator=estimator, mode=mode)
    part = providers.taking_part(case, CPU)
    assert {"fp64", "gram", "feature", "library", "auto"} <= {provider.name for provider in part}
    entries = Contest(case, CPU, FAST).run(part, timed=False)
    assert {name: entry.verdict.red for (name, _), entry in entries.items()} == {p.name: None for p in part}


def test_gaussian_kernels_pass_the_gate() -> None:
    case = replace(TINY, problem="rbf")
    part = providers.taking_part(case, CPU)
    assert {provider.name for provider in part} == {"naive", "gram", "library", "auto"}
    entries = Contest(case, CPU, FAST).run(part, timed=False)
    assert [entry.verdict.red for entry in entries.values()] == [None] * 4
    linear = providers.gram(*case.features(CPU))
    assert abs(linear - measure.truth(case, *case.features(CPU)).value) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hand_written_forms_do_their_best_in_halves(dtype: str) -> None:
    """Sums of fp16 products overflow from 65504 on; a rival that is crippled proves nothing."""
    case = Case("bird", 64, 96, 96, dtype, "")
    x, y = case.features(CPU)
    true = measure.truth(case, x, y)
    for form in (providers.gram, providers.feature):
        assert measure.errors(measure.call(form, x, y, True)(), true).red(dtype) is None


def gradient_off(x: Tensor, y: Tensor) -> Tensor:
    extra = 0.01 * x.sum()
    return providers.gram(x, y) + extra - extra.detach()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x, y: providers.gram(x, y) + 1e-3, "value off by 1.0e-03"),
        (lambda x, y: providers.gram(x, y) * torch.nan, "value off by nan"),
        (gradient_off, "gradient off by"),
        (lambda x, y: providers.gram(x, y.T), "RuntimeError: "),
    ],
)
def test_a_wrong_provider_gets_no_time(wrong: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    entries = Contest(TINY, CPU, FAST).run([plant(wrong), plant(providers.feature, "feature")])
    entry = entries["gram", "wall"]
    assert entry.verdict.broken
    assert reason in str(entry.verdict.red)
    kept = results.row(results.origin(CPU), TINY, "wall", entry, FAST, CPU)
    assert (kept.p50, kept.rounds, kept.red) == (None, None, entry.verdict.red)
    assert len(entries["feature", "wall"].seconds) >= timers.FEWEST_ROUNDS


# ---------------------------------------------------------------------------------------------- estimates


def test_floor_by_hand() -> None:
    """n = 10, p = 20, q = 30: Gram route, 100 * 50 flops and 2 * 100 * 20 for the gradient; fp32."""
    slow_products = Ceilings(copies={1: 1e30}, products={"float32 ieee": 1000.0, "float64": 1.0})
    slow_copy = Ceilings(copies={1000: 1e9, 2000: 1000.0, 9000: 1e30}, products={"float32 ieee": 1e30, "float64": 1.0})
    case = Case("bird", 10, 20, 30)
    forward = replace(case, mode="forward")
    assert estimates.floor(forward, slow_products, CPU) == pytest.approx(5.0)
    assert estimates.floor(case, slow_products, CPU) == pytest.approx(9.0)
    assert estimates.floor(forward, slow_copy, CPU) == pytest.approx(2.0)  # 10 * 50 numbers of 4 bytes
    # n = 100, p = q = 10: cross route, 100 * 400 and 2 * 100 * 20 * 10 more
    assert estimates.floor(Case("batch", 100, 10, 10), slow_products, CPU) == pytest.approx(80.0)


def test_ceilings_of_a_number() -> None:
    seen = Ceilings({1: 1.0}, {"float64": 1.0, "float32 ieee": 8.0, "float32 tf32": 30.0, "bfloat16": 4.0})
    assert seen.rate(Case("bird", 8, 8, 8)) == 8.0
    assert seen.rate(Case("bird", 8, 8, 8), "fp64") == 1.0
    assert seen.rate(Case("bird", 8, 8, 8, precision="tf32x3")) == 10.0  # three products for one
    assert seen.rate(Case("bird", 8, 8, 8, "bfloat16", "")) == 8.0  # where halves are slow fp32 is the way


def test_what_does_not_fit_is_not_called() -> None:
    case = Case("batch", 1000, 10, 10)
    assert estimates.needed("naive", case) == 4 * 20_000 + 24 * 10_000 + 11 * 4_000_000 + 4 * 10_000
    called = []
    spy = plant(lambda x, y: called.append(1) or providers.gram(x, y), "naive")
    tried = Contest(case, CPU, FAST)
    tried.available = 10_000_000
    entries = tried.run([spy, plant(providers.feature, "feature")])
    assert entries["naive", "wall"].verdict == Verdict(red="out of memory (needs 0.0 GiB)")
    assert entries["feature", "wall"].verdict.red is None
    tried.available = 0  # not even for the features
    assert tried.run([spy])["naive", "wall"].verdict.red == "out of memory (needs 0.0 GiB)"
    assert called == []


def test_what_takes_too_long_is_not_called() -> None:
    slow = Ceilings({1: 1.0}, {"float64": 1.0, "float32 ieee": 1e6})
    case = Case("batch", 100, 10, 10)
    reason = estimates.why_not_run("gram", case, slow, 2**40, patience=0.5)
    assert reason == "too slow (at least 1 s a call)"  # 2 * 100^2 * 20 and 4 * 100^2 * 10 flops
    assert estimates.why_not_run("gram", case, slow, 2**40, patience=0.9) is None
    for asked in ("feature", "auto"):  # the better form here, and ours
        assert estimates.why_not_run(asked, case, slow, 2**40, patience=0.0) is None


def test_an_allocation_that_fails_is_a_row_and_no_failure() -> None:
    def hungry(x: Tensor, y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    verdict = Contest(TINY, CPU, FAST).run([plant(hungry)])["gram", "wall"].verdict
    assert str(verdict.red).startswith("out of memory")
    assert not verdict.broken


# ---------------------------------------------------------------------------------------------- cases and clocks


@pytest.mark.parametrize("chosen", [problems.CPU, problems.CUDA], ids=["cpu", "cuda"])
def test_cases_are_distinct_and_have_a_gate(chosen: tuple[Case, ...]) -> None:
    assert len(set(map(str, chosen))) == len(chosen) > 20
    assert {estimates.number(case) for case in chosen} <= set(measure.TOLERANCE)
    assert {case.problem for case in chosen} == {"bird", "batch", "llm", "conv", "rbf"}


def test_cases_are_chosen_by_part_or_glob() -> None:
    assert {case.problem for case in problems.cases(CPU, "conv")} == {"conv"}
    assert {case.dtype for case in problems.cases(CPU, "bird*bfloat16*")} == {"bfloat16"}
    assert problems.cases(CPU, "nothing of the kind") == []


def test_turns_are_mixed_and_spread() -> None:
    calls: list[str] = []

    def take(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    times = timers.in_turns({name: take(name) for name in "abc"}, {"a": 8, "b": 8, "c": 2})
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 8, "b": 8, "c": 2}
    first, second = (i for i, name in enumerate(calls) if name == "c")
    assert second - first > 6
    pairs = [tuple(name for name in calls if name != "c")[2 * i : 2 * i + 2] for i in range(8)]
    assert set(pairs) == {("a", "b"), ("b", "a")}


def test_rounds_fill_the_share_within_bounds() -> None:
    assert timers.rounds(0.01, share=0.25, patience=4) == 25
    assert timers.rounds(1e-6, share=0.25, patience=4) == timers.MOST_ROUNDS
    assert timers.rounds(0.5, share=0.25, patience=4) == timers.FEWEST_ROUNDS
    assert timers.rounds(1.0, share=0.25, patience=4) == 4
    assert timers.rounds(9.0, share=0.25, patience=4) == timers.FEWEST_SLOW_ROUNDS


def test_quantiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Timing(2.0, 3.5, 5.0, 6)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_recorded_clock_shows_what_was_taken() -> None:
    clock = timers.Recorded()
    for seconds in ([0.5, 0.25], [3.0]):
        call = clock.play(seconds)
        shown = []
        for _ in seconds:
            start = clock()
            call()
            shown.append(clock() - start)
        assert shown == seconds


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
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
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
    take = timers.device(lambda: cuda.log.append("run"), once=1e-3)
    assert take() == pytest.approx(3e-3)
    assert cuda.log == ["sleep 4000000", "flush", "start", "run", "end", "wait for end"]


def test_host_time_starts_with_an_empty_queue_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    assert timers.host(lambda: cuda.log.append("run"), once=0.0)() >= 0
    assert cuda.log == ["synchronize", "run"]


def test_capture_warms_up_beside_and_captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    graph, result = timers.capture(lambda: cuda.log.append("run") or "result", (0, 1))  # type: ignore[func-returns-value]
    assert (graph, result) == ("graph", "result")
    side = ["side waits", "side stream", "run", "run", "run", "end of side stream", "current waits"]
    assert cuda.log == [*side, "capture in (0, 1)", "run", "end of capture in (0, 1)"]


def test_the_phases_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host and device of the call itself, then a capture of one that has no graphs of its own, judged by its replay."""
    built, replays, sleeps = [], [], []

    def build(case: Case, capture: bool) -> providers.Loss:
        built.append(capture)
        return providers.gram

    def capture(run: Callable[[], measure.Result], pool: object) -> tuple[SimpleNamespace, measure.Result]:
        assert pool == "pool"
        value, gradient = run()
        empty = measure.Result(torch.full_like(value, torch.nan), gradient)  # until a replay fills it

        def replay() -> None:
            replays.append(1)
            with torch.no_grad():
                empty.value.copy_(value)

        return SimpleNamespace(replay=replay), empty

    def device(run: Callable[[], object], once: float) -> Callable[[], float]:
        sleeps.append(once)
        return timers.wall(run, once)

    monkeypatch.setitem(contest.PHASES, "cpu", contest.PHASES["cuda"])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(timers, "capture", capture)
    monkeypatch.setattr(timers, "TIMERS", {"host": lambda run, once: lambda: 0.25, "device": device, "graph": device})
    entries = Contest(TINY, CPU, FAST).run([Provider("gram", build)])
    assert list(entries) == [("gram", "host"), ("gram", "device"), ("gram", "graph")]
    assert [entry.verdict.red for entry in entries.values()] == [None] * 3
    assert built == [False, True]
    assert sleeps[0] == 0.25  # the device sleeps as long as the host was seen to take
    assert len(replays) == 1 + len(entries["gram", "graph"].seconds)


# ---------------------------------------------------------------------------------------------- files


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [
        row(),
        row("naive", None, red='wrong: "value", off\nby 1', value_error=float("inf"), gradient_error=None, floor=None),
        row("library", 1.5e-5, launches=3, peak_memory=0, mode="forward", driver="580.1"),
    ]
    path = tmp_path / "new" / "device.csv"
    results.write(path, rows)
    assert results.read(path) == rows
    assert [file.name for file in path.parent.iterdir()] == ["device.csv"]
    path.write_text("device,seconds\nhere,1\n")
    with pytest.raises(ValueError, match="measure again"):
        results.read(path)


def test_a_later_part_replaces_its_own_rows_only() -> None:
    old, other, new = row(p50=1.0), row("library", 2.0), row(p50=3.0)
    assert results.merged([old, other], [new]) == [new, other]


def test_a_run_from_case_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = replace(TINY, n=16)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(problems, "CPU", (TINY, second))
    monkeypatch.setattr(session.ceilings, "measured", lambda device, numbers: FAST)
    run = session.Session(CPU, None, saves=True, minutes=1)
    assert run.entries(TINY, timed=True) is run.entries(TINY, timed=True)
    part = results.read(run.path)  # there before the run is over
    assert {kept.n for kept in part} == {12}
    assert {kept.provider for kept in part} >= {"naive", "fp64", "gram", "feature", "library", "auto"}
    assert all(kept.p50 and kept.peak_memory and kept.floor and kept.launches is None for kept in part)

    results.write(run.path, [*part, row("of a provider that is no more")])
    rest = session.Session(CPU, None, saves=True, minutes=1)
    rest.entries(second, timed=True)
    rest.finish()
    assert len(results.read(run.path)) == 2 * len(part) + 1  # it was asked for one case only

    whole = session.Session(CPU, None, saves=True, minutes=1)
    for case in (TINY, second):
        whole.entries(case, timed=True)
    csv, page, *_ = whole.finish()
    assert {kept.provider for kept in results.read(csv)} == {kept.provider for kept in part}
    assert "forward+backward, float32 ieee, biased" in page.read_text()

    late = session.Session(CPU, None, saves=False, minutes=0)
    with pytest.raises(pytest.skip.Exception, match="minutes"):
        late.entries(TINY, timed=True)
    assert late.left_out == {TINY}


# ---------------------------------------------------------------------------------------------- reading them


def test_compare_finds_the_planted_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [row(), row("library"), row("native"), row("triton"), row("gram"), row("feature")]
    after = [
        row(p50=1.5e-3),  # slower beyond doubt
        row("library", 1.15e-3),  # slower, but its fastest fifth is within the noise of before
        row("native", None, red="value off"),  # lost
        row("triton", 0.5e-3),
        row("gram", 2e-3),  # a rival's time is the machine's business
        row(mode="forward"),
    ]
    files = tmp_path / "before.csv", tmp_path / "after.csv"
    for file, rows in zip(files, (before, after), strict=True):
        results.write(file, rows)
    assert compare.main([str(file) for file in files]) == 1
    text = capsys.readouterr().out
    marked = [line.split()[10] for line in text.splitlines() if "REGRESSION" in line]
    assert sorted(marked) == ["auto", "native"]
    assert "2 regressions of ours in 5 rows" in text
    assert "gone: bird 128 512 512 float32 ieee biased forward+backward wall feature" in text
    assert "new: bird 128 512 512 float32 ieee biased forward wall auto" in text
    assert " 0.50 " in text
    assert compare.main([str(files[0]), str(files[0])]) == 0
    assert compare.main([*map(str, files), "--threshold", "1.6"]) == 1  # a lost one stays lost


def test_table_from_planted_rows() -> None:
    lines = [row(p50=2e-3), row("gram", 3e-3), row("feature", 5e-3), row("naive", None, red="out of memory")]
    page = tables.page([*lines, row("auto", 4e-6, timer="host", launches=3), row("feature", 8e-6, timer="host")])
    wall, host = page.split("\n## ")[1:]
    heading, _, line = [part for part in wall.splitlines() if part.startswith("|")][:3]
    named = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (heading, line)), strict=True))
    assert named["gram"] == named["hand-written"] == "3 ms (1.50×)"
    assert (named["naive"], named["feature"], named["floor"]) == ("out of memory", "5 ms (2.50×)", "10 µs")
    assert "8 µs (2.00×)" in host
    assert "Launches" in host
    assert "Launches" not in wall


def swept() -> list[Row]:
    sizes = [(n, 512) for n in (32, 128, 512, 2048)] + [(128, d) for d in (64, 256, 1024)]
    return [row(name, n * d * t, n=n, p=d, q=d) for n, d in sizes for name, t in (("auto", 1e-9), ("gram", 2e-9))]


def test_plots_from_planted_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    seen: dict[str, Any] = {}
    curves, speed_up = plots._curves, plots._speed_up
    monkeypatch.setattr(plots, "_curves", lambda axes, *a: (curves(axes, *a), seen.update({a[-1]: axes})))
    monkeypatch.setattr(plots, "_speed_up", lambda axes, lines: (speed_up(axes, lines), seen.update(map=axes)))
    (path,) = plots.draw(swept(), tmp_path / "device.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in tmp_path.iterdir()] == ["device.png"]
    by_n = {line.get_label(): line for line in seen["n"].get_lines()}
    assert list(by_n["auto"].get_xdata()) == [32, 128, 512, 2048]
    assert list(by_n["floor"].get_ydata()) == [1e-5] * 4
    assert list(seen["d"].get_lines()[0].get_xdata()) == [64, 256, 512, 1024]
    assert {text.get_text() for text in seen["map"].texts} == {"2"}
    assert len(seen["map"].texts) == 7

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plots.draw(swept(), tmp_path / "none.png") == []


def test_no_plot_of_a_few_rows(tmp_path: Path) -> None:
    assert plots.draw([row()], tmp_path / "device.png") == []


def test_entry_without_time_is_no_number() -> None:
    entry = Entry(plant(providers.gram), Verdict(measure.Errors(1e-8, None)))
    kept = results.row(results.origin(CPU), TINY, "wall", entry, FAST, CPU)
    assert (kept.p50, kept.red, kept.value_error, kept.gradient_error) == (None, "", 1e-8, None)
