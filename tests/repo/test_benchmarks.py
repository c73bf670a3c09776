"""The benchmark of `cka_loss`: its gate, its floor, a run from case to files, and what is read out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.harness import Entry
from benchmarks.kernels import bench, compare, contest, estimates, gate, plots, problems, providers, results, tables
from benchmarks.kernels.contest import Contest
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import Provider
from benchmarks.kernels.results import Row
from benchmarks.machine import Machine

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
    assert {name: entry.why for (name, _), entry in entries.items()} == {p.name: "" for p in part}


def test_gaussian_kernels_pass_the_gate() -> None:
    case = replace(TINY, problem="rbf")
    part = providers.taking_part(case, CPU)
    assert {provider.name for provider in part} == {"naive", "gram", "library", "auto"}
    entries = Contest(case, CPU, FAST).run(part, timed=False)
    assert [entry.why for entry in entries.values()] == [""] * 4
    linear = providers.gram(*case.features(CPU))
    assert abs(linear - gate.truth(case, *case.features(CPU)).value) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hand_written_forms_do_their_best_in_halves(dtype: str) -> None:
    """Sums of fp16 products overflow from 65504 on; a rival that is crippled proves nothing."""
    case = Case("bird", 64, 96, 96, dtype, "")
    x, y = case.features(CPU)
    judge = gate.judge(case, x, y)
    for form in (providers.gram, providers.feature):
        assert judge(gate.call(form, x, y, True)()).red is None


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
    entries = Contest(TINY, CPU, FAST).run([plant(wrong, "auto"), plant(providers.feature, "feature")])
    entry = entries["auto", "wall"]
    assert reason in entry.why
    assert bench._broken(entries) == [entry]  # it is ours
    kept = results.row(rows.origin(CPU), TINY, "wall", entry, FAST, CPU)
    assert (kept.p50, kept.rounds, kept.red) == (None, None, entry.why)
    assert len(entries["feature", "wall"].seconds["wall"]) >= 5


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
    assert entries["naive", "wall"].why == "out of memory (needs 0.0 GiB)"
    assert entries["feature", "wall"].why == ""
    tried.available = 0  # not even for the features
    assert tried.run([spy])["naive", "wall"].why == "out of memory (needs 0.0 GiB)"
    assert called == []


def test_what_takes_too_long_is_not_called() -> None:
    slow = Ceilings({1: 1.0}, {"float64": 1.0, "float32 ieee": 1e6})
    case = Case("batch", 100, 10, 10)
    reason = estimates.why_not_run("gram", case, slow, 2**40, patience=0.5)
    assert reason == "too slow (at least 1 s a call)"  # 2 * 100^2 * 20 and 4 * 100^2 * 10 flops
    assert estimates.why_not_run("gram", case, slow, 2**40, patience=0.9) is None
    for asked in ("feature", "auto"):  # the better form here, and ours
        assert estimates.why_not_run(asked, case, slow, 2**40, patience=0.0) is None


# ---------------------------------------------------------------------------------------------- cases and phases


@pytest.mark.parametrize("chosen", [problems.CPU, problems.CUDA], ids=["cpu", "cuda"])
def test_cases_are_distinct_and_have_a_gate(chosen: tuple[Case, ...]) -> None:
    assert len(set(map(str, chosen))) == len(chosen) > 20
    assert {estimates.number(case) for case in chosen} <= set(gate.TOLERANCE)
    assert {case.problem for case in chosen} == {"bird", "batch", "llm", "conv", "rbf"}


def test_cases_are_chosen_by_part_or_glob() -> None:
    assert {case.problem for case in problems.cases(CPU, "conv")} == {"conv"}
    assert {case.dtype for case in problems.cases(CPU, "bird*bfloat16*")} == {"bfloat16"}
    assert problems.cases(CPU, "nothing of the kind") == []


def test_the_phases_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host and device of the call itself, then a capture of one that has no graphs of its own."""
    built, pools = [], []

    def build(case: Case, capture: bool) -> providers.Loss:
        built.append(capture)
        return providers.gram

    def captured(self: Machine, run: Callable[[], object], pool: object) -> tuple[Callable[[], object], object]:
        pools.append(pool)
        return run, run()

    monkeypatch.setitem(contest.PHASES, "cpu", contest.PHASES["cuda"])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(Machine, "captured", captured)
    entries = Contest(TINY, CPU, FAST).run([Provider("gram", build)])
    assert list(entries) == [("gram", timer) for timer in ("host", "device", "graph")]
    assert all(len(entry.seconds[timer]) >= 5 for (_, timer), entry in entries.items())
    assert (built, pools) == ([False, True], ["pool"])


def test_what_cannot_be_captured_has_no_row_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(self: Machine, run: object, pool: object) -> object:
        raise RuntimeError("it waits")

    monkeypatch.setitem(contest.PHASES, "cpu", contest.PHASES["cuda"])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(Machine, "captured", captured)
    entries = Contest(TINY, CPU, FAST).run([plant(providers.gram)])
    kept = results.row(rows.origin(CPU), TINY, "graph", entries["gram", "graph"], FAST, CPU)
    assert (kept.red, kept.p50) == ("RuntimeError: it waits", None)
    assert entries["gram", "device"].why == ""


# ---------------------------------------------------------------------------------------------- files


@pytest.fixture
def two_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device with two tiny cases; the folder of its results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(problems, "CPU", (TINY, replace(TINY, n=16)))
    monkeypatch.setattr(bench.ceilings, "measured", lambda device, numbers: FAST)
    return tmp_path


def test_a_run_from_case_to_files(two_cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--save", "--problem", "12x"]) == 0
    path = results.path_for(CPU)
    part = results.read(path)
    assert {kept.n for kept in part} == {12}
    assert {kept.provider for kept in part} >= {"naive", "fp64", "gram", "feature", "library", "auto"}
    assert all(kept.p50 and kept.peak_memory and kept.floor and kept.launches is None for kept in part)
    assert "forward+backward, float32 ieee, biased" in capsys.readouterr().out

    rows.write(path, [*part, replace(part[0], provider="of a provider that is no more")])
    bench.main(["--device", "cpu", "--save", "--problem", "16x"])
    assert len(results.read(path)) == 2 * len(part) + 1  # it was asked for one case only
    bench.main(["--device", "cpu", "--save"])
    assert {kept.provider for kept in results.read(path)} == {kept.provider for kept in part}
    assert "forward+backward, float32 ieee, biased" in path.with_suffix(".md").read_text()


def test_rows_are_kept_while_a_run_goes_on(two_cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    run = Contest.run

    def spied(self: Contest, *args: Any) -> dict[tuple[str, str], Entry]:
        path = results.path_for(CPU)
        kept.append(len(results.read(path)) if path.exists() else 0)
        return run(self, *args)

    monkeypatch.setattr(Contest, "run", spied)
    bench.main(["--device", "cpu", "--save", "--provider", "gram"])
    assert kept == [0, 1]


def test_a_run_fails_where_ours_is_wrong(
    two_cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [plant(lambda x, y: providers.gram(x, y) + 1e-3, name) for name in ("auto", "naive")]
    monkeypatch.setattr(providers, "PROVIDERS", wrong)
    assert bench.main(["--device", "cpu", "--gates"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert [" auto: value off by 1.0e-03" in line for line in told] == [True, True]  # a rival may be
    assert list(two_cases.iterdir()) == []


def test_no_case_is_begun_late(two_cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--minutes", "-1"]) == 0
    assert "2 cases were not begun" in capsys.readouterr().out


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
    for file, found in zip(files, (before, after), strict=True):
        rows.write(file, found)
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


def test_no_plot_of_a_few_rows(tmp_path: Path) -> None:
    assert plots.draw([row()], tmp_path / "device.png") == []
