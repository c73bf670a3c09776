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
from benchmarks.kernels import bench, ceilings, compare, estimates, gate, plots, problems, providers, results, tables
from benchmarks.kernels.bench import case_contest
from benchmarks.kernels.estimates import Ceilings
from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import Provider
from benchmarks.kernels.results import KernelsRow

CPU = torch.device("cpu")
TINY = Case("bird", 12, 5, 7)
FAST = Ceilings(copies={1: 1e12}, products={"float32 ieee": 1e15, "float64": 1e15, "bfloat16": 1e15})


def plant(loss: Callable[[Tensor, Tensor], Tensor], name: str = "gram") -> Provider:
    return Provider(name, lambda case: loss)


def row(provider: str = "auto", p50: float | None = 1e-3, **changes: Any) -> KernelsRow:
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
    return KernelsRow(**(base | timing | changes))


# ---------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("mode", problems.BOTH)
def test_every_provider_that_takes_part_passes_the_gate(estimator: str, mode: str) -> None:
    case = replace(TINY, estimator=estimator, mode=mode)
    part = providers.taking_part(case, CPU)
    assert {"fp64", "gram", "feature", "library", "auto"} <= {provider.name for provider in part}
    entries = case_contest(case, FAST, part, timed=False)
    assert {name: entry.why for name, entry in entries.items()} == {p.name: "" for p in part}


def test_gaussian_kernels_pass_the_gate() -> None:
    case = replace(TINY, problem="rbf")
    part = providers.taking_part(case, CPU)
    assert {provider.name for provider in part} == {"naive", "gram", "library", "auto"}
    entries = case_contest(case, FAST, part, timed=False)
    assert [entry.why for entry in entries.values()] == [""] * 4
    linear = providers.by_grams(*case.features(CPU))
    assert abs(linear - gate.true_result(case, *case.features(CPU)).value) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hand_written_forms_do_their_best_in_halves(dtype: str) -> None:
    """Sums of fp16 products overflow from 65504 on; a rival that is crippled proves nothing."""
    case = Case("bird", 64, 96, 96, dtype, "")
    x, y = case.features(CPU)
    judge = gate.judge(case, x, y)
    for form in (providers.by_grams, providers.by_features):
        assert judge(gate.call(form, x, y, True)()).red is None


def gradient_off(x: Tensor, y: Tensor) -> Tensor:
    extra = 0.01 * x.sum()
    return providers.by_grams(x, y) + extra - extra.detach()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x, y: providers.by_grams(x, y) + 1e-3, "value off by 1.0e-03"),
        (lambda x, y: providers.by_grams(x, y) * torch.nan, "value off by nan"),
        (gradient_off, "gradient off by"),
        (lambda x, y: providers.by_grams(x, y.T), "RuntimeError: "),
    ],
)
def test_a_wrong_provider_gets_no_time(wrong: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    entries = case_contest(TINY, FAST, [plant(wrong, "auto"), plant(providers.by_features, "feature")])
    entry = entries["auto"]
    assert reason in entry.why
    kept = results.row(rows.origin_of(CPU), TINY, entry, FAST)
    assert (kept.p50, kept.rounds, kept.red) == (None, None, entry.why)
    assert len(entries["feature"].seconds["wall"]) >= 5


# ---------------------------------------------------------------------------------------------- estimates


def test_floor_by_hand() -> None:
    """n = 10, p = 20, q = 30: Gram route, 100 * 50 flops and 2 * 100 * 20 for the gradient; fp32."""
    slow_products = Ceilings(copies={1: 1e30}, products={"float32 ieee": 1000.0, "float64": 1.0})
    slow_copy = Ceilings(copies={1000: 1e9, 2000: 1000.0, 9000: 1e30}, products={"float32 ieee": 1e30, "float64": 1.0})
    case = Case("bird", 10, 20, 30)
    forward = replace(case, mode="forward")
    assert estimates.floor(forward, slow_products) == pytest.approx(5.0)
    assert estimates.floor(case, slow_products) == pytest.approx(9.0)
    assert estimates.floor(forward, slow_copy) == pytest.approx(2.0)  # 10 * 50 numbers of 4 bytes
    # n = 100, p = q = 10: cross route, 100 * 400 and 2 * 100 * 20 * 10 more
    assert estimates.floor(Case("batch", 100, 10, 10), slow_products) == pytest.approx(80.0)


def test_ceilings_of_a_number() -> None:
    seen = Ceilings({1: 1.0}, {"float64": 1.0, "float32 ieee": 8.0, "bfloat16": 4.0})
    assert seen.rate(Case("bird", 8, 8, 8)) == 8.0
    assert seen.rate(Case("bird", 8, 8, 8), "fp64") == 1.0
    assert seen.rate(Case("bird", 8, 8, 8, "bfloat16", "")) == 8.0  # where halves are slow fp32 is the way


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPIED", (2**10, 2**12))
    monkeypatch.setattr(ceilings, "WIDTH", 8)
    seen = ceilings.measured_ceilings(["bfloat16"])
    assert set(seen.copies) == {2**10, 2**12}
    assert set(seen.products) == {"bfloat16", "float32 ieee", "float64"}
    assert min(*seen.copies.values(), *seen.products.values()) > 0
    copy = ceilings.copying(CPU, 64)
    assert torch.equal(copy(), torch.ones(32, dtype=torch.uint8))
    torch.manual_seed(0)
    product = ceilings.multiplying(CPU, torch.bfloat16, 3, 4, 5, wide=True)()
    torch.manual_seed(0)
    a, b = (torch.randn(shape).bfloat16() for shape in ((5, 3), (5, 4)))
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, a.float().T @ b.float(), atol=0.05, rtol=0.05)


def test_what_takes_too_long_is_not_called() -> None:
    slow = Ceilings({1: 1.0}, {"float64": 1.0, "float32 ieee": 1e6})
    case = Case("batch", 100, 10, 10)
    reason = estimates.too_slow("gram", case, slow, patience=0.5)
    assert reason == "too slow (at least 1 s a call)"  # 2 * 100^2 * 20 and 4 * 100^2 * 10 flops
    assert estimates.too_slow("gram", case, slow, patience=0.9) is None
    for asked in ("feature", "auto"):  # the better form here, and ours
        assert estimates.too_slow(asked, case, slow, patience=0.0) is None
    called: list[int] = []
    spy = plant(lambda x, y: called.append(1) or providers.by_grams(x, y))
    slow.products["float32 ieee"] = 1e5
    entries = case_contest(case, slow, [spy, plant(providers.by_features, "feature")])
    assert entries["gram"].why == "too slow (at least 8 s a call)"
    assert entries["feature"].why == ""
    assert called == []


# ---------------------------------------------------------------------------------------------- cases


def test_cases_are_distinct_and_have_a_gate() -> None:
    chosen = problems.CASES
    assert len(set(map(str, chosen))) == len(chosen) > 20
    assert {estimates.number(case) for case in chosen} <= set(gate.TOLERANCE)
    assert {case.problem for case in chosen} == {"bird", "batch", "llm", "conv", "rbf"}


def test_cases_are_chosen_by_part_or_glob() -> None:
    assert {case.problem for case in problems.cases("conv")} == {"conv"}
    assert {case.dtype for case in problems.cases("bird*bfloat16*")} == {"bfloat16"}
    assert problems.cases("nothing of the kind") == []


# ---------------------------------------------------------------------------------------------- files


@pytest.fixture
def two_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device with two tiny cases; the folder of its results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(problems, "CASES", (TINY, replace(TINY, n=16)))
    monkeypatch.setattr(bench.ceilings, "measured_ceilings", lambda numbers: FAST)
    return tmp_path


def test_a_run_from_case_to_files(two_cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--save", "--problem", "12x"]) == 0
    path = results.path_for(CPU)
    part = results.read_kernels(path)
    assert {kept.n for kept in part} == {12}
    assert {kept.provider for kept in part} >= {"naive", "fp64", "gram", "feature", "library", "auto"}
    assert all(kept.p50 and kept.peak_memory and kept.floor and kept.launches is None for kept in part)
    assert "forward+backward, float32 ieee, biased" in capsys.readouterr().out

    rows.write_rows(path, [*part, replace(part[0], provider="of a provider that is no more")])
    bench.main(["--save", "--problem", "16x"])
    assert len(results.read_kernels(path)) == 2 * len(part) + 1  # it was asked for one case only
    bench.main(["--save"])
    assert {kept.provider for kept in results.read_kernels(path)} == {kept.provider for kept in part}
    assert "forward+backward, float32 ieee, biased" in path.with_suffix(".md").read_text()


def test_rows_are_kept_while_a_run_goes_on(two_cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def spied(*args: Any) -> dict[str, Entry]:
        path = results.path_for(CPU)
        kept.append(len(results.read_kernels(path)) if path.exists() else 0)
        return case_contest(*args)

    monkeypatch.setattr(bench, "case_contest", spied)
    bench.main(["--save", "--provider", "gram"])
    assert kept == [0, 1]


def test_a_run_fails_where_ours_is_wrong(
    two_cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [plant(lambda x, y: providers.by_grams(x, y) + 1e-3, name) for name in ("auto", "naive")]
    monkeypatch.setattr(providers, "PROVIDERS", wrong)
    assert bench.main(["--gates"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert [" auto: value off by 1.0e-03" in line for line in told] == [True, True]  # a rival may be
    assert list(two_cases.iterdir()) == []


def test_no_case_is_begun_late(two_cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--minutes", "-1"]) == 0
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
        rows.write_rows(file, found)
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
    page = tables.kernels_page([*lines, row("auto", 4e-6, mode="forward"), row("feature", 8e-6, mode="forward")])
    both, forward = page.split("\n## ")[1:]
    heading, _, line = [part for part in both.splitlines() if part.startswith("|")][:3]
    named = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (heading, line)), strict=True))
    assert named["gram"] == named["hand-written"] == "3 ms (1.50×)"
    assert (named["naive"], named["feature"], named["floor"]) == ("out of memory", "5 ms (2.50×)", "10 µs")
    assert "8 µs (2.00×)" in forward
    assert "| bird    | 128 | 512 | 512 | 1" in both.split("Peak memory beyond the inputs, MiB.")[1]


def test_no_plot_of_a_few_rows(tmp_path: Path) -> None:
    assert plots.draw_plots([row()], tmp_path / "device.png") == []
