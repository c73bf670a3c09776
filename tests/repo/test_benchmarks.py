"""The benchmarks of one loss, of layers and of tokens: gate, floor, a run from question to files, comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import rows, run
from benchmarks.kernels import forms, layers, limits, loss, tokens
from benchmarks.kernels.limits import Ceilings
from benchmarks.kernels.loss import BENCHMARK, Case, Provider
from benchmarks.rows import Row
from benchmarks.run import Benchmark

CPU = torch.device("cpu")
TINY = Case("bird", 12, 5, 7)
FAST = Ceilings(copies={1: 1e12}, products={"float32 ieee": 1e15, "float64": 1e15, "bfloat16": 1e15})


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that nobody measured, and shallow networks."""
    monkeypatch.setattr(limits, "ceilings", lambda number: FAST)
    monkeypatch.setitem(layers.NETWORKS, "ResNet18", [8, 24, 40])


def plant(monkeypatch: pytest.MonkeyPatch, **planted: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Other providers, whose names may be ours."""
    monkeypatch.setattr(loss, "PROVIDERS", [Provider(name, form) for name, form in planted.items()])
    flops = forms.flops
    known = {form: forms.by_grams for form in planted.values() if form not in (forms.by_grams, forms.by_features)}
    monkeypatch.setattr(forms, "flops", lambda form, *sizes: flops(known.get(form, form), *sizes))


def quick(benchmark: Benchmark, *questions: Any) -> Benchmark:
    return replace(benchmark, share=0.0, patience=torch.inf, questions=questions or benchmark.questions)


def row(provider: str = "auto", p50: float | None = 1e-3, **changes: Any) -> Row:
    timing: Row = dict.fromkeys(("p20", "p50", "p80", "rounds"))
    if p50:
        timing = dict(p20=round(0.9 * p50, 9), p50=p50, p80=round(1.1 * p50, 9), rounds=7)
    base = dict(
        device="CPU Some, 2 threads", torch="2.11", commit="abc", date="2026-01-01",
        problem="bird", n=128, p=512, q=512, dtype="float32", precision="ieee", estimator="biased",
        mode="forward+backward", provider=provider, red=None, value_error=1e-7, gradient_error=2e-6,
        peak_memory=2**20, floor=1e-5,
    )  # fmt: skip
    return base | timing | changes


# ---------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("mode", loss.BOTH)
def test_every_provider_that_takes_part_passes_the_gate(estimator: str, mode: str) -> None:
    found = BENCHMARK.ask(replace(TINY, estimator=estimator, mode=mode), timed=False)
    assert {"fp64", "gram", "feature", "library", "auto"} <= {row["provider"] for row in found}
    assert [row["red"] for row in found] == [""] * len(found)
    assert all(row["value_error"] < 1e-5 for row in found)
    assert all((row["gradient_error"] is None) == (mode == "forward") for row in found)


def test_gaussian_kernels_pass_the_gate() -> None:
    case = replace(TINY, problem="rbf")
    found = BENCHMARK.ask(case, timed=False)
    assert [(row["provider"], row["red"]) for row in found] == [(n, "") for n in ("naive", "gram", "library", "auto")]
    x, y = case.features(CPU)
    linear = case.call(forms.by_grams, x, y)
    assert case.gate(x, y)(linear()).red.startswith("value off by")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hand_written_forms_do_their_best_in_halves(dtype: str) -> None:
    """Sums of fp16 products overflow from 65504 on; a rival that is crippled proves nothing."""
    case = Case("bird", 64, 96, 96, dtype, "")
    x, y = case.features(CPU)
    for form in (forms.by_grams, forms.by_features):
        assert case.gate(x, y)(case.call(form, x, y)()).red is None


def gradient_off(x: Tensor, y: Tensor) -> Tensor:
    extra = 0.01 * x.sum()
    return forms.by_grams(x, y) + extra - extra.detach()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x, y, **_: forms.by_grams(x, y) + 1e-3, "value off by 1.0e-03"),
        (lambda x, y, **_: forms.by_grams(x, y) * torch.nan, "value off by inf"),
        (lambda x, y, **_: gradient_off(x, y), "gradient off by"),
        (lambda x, y, **_: forms.by_grams(x, y.T), "RuntimeError: "),
    ],
)
def test_a_wrong_provider_gets_no_time(
    wrong: Callable[[Tensor, Tensor], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, auto=wrong, feature=forms.by_features)
    bad, good = quick(BENCHMARK).ask(TINY)
    assert reason in bad["red"]
    assert (bad["p50"], bad["rounds"]) == (None, None)
    assert good["rounds"] >= 5


def test_networks_are_as_deep_as_their_names() -> None:
    networks = layers.NETWORKS
    assert len(networks["ResNet50"]) == 50
    assert networks["ResNet50"][1:4] == [64, 64, 256]
    assert networks["ResNet50"][-4:] == [512, 512, 2048, 1000]


@pytest.mark.parametrize("what", ["matrix", "matrix, itself", "pairs"])
def test_everybody_knows_the_layers(what: str) -> None:
    pytest.importorskip("cka", reason="pytorch-cka is in the bench extra")
    found = quick(layers.BENCHMARK).ask(layers.LayersQuestion(what, "ResNet18", 32))
    assert [row["provider"] for row in found] == list(layers.PAIRS if what == "pairs" else layers.MATRIX)
    assert all((row["red"], row["rounds"]) == ("", 5) and row["value_error"] < 1e-5 for row in found)
    assert all(what != "pairs" or row["gradient_error"] < 1e-5 for row in found)


@pytest.mark.parametrize("which", tokens.CALLS)
def test_everybody_knows_the_tokens(which: str) -> None:
    found = quick(tokens.BENCHMARK).ask(tokens.TokensQuestion(which, 6, 14, 9, 60))
    assert [row["provider"] for row in found] == list(tokens.CALLS[which])
    assert all((row["red"], row["rounds"]) == ("", 5) for row in found)
    assert all(max(row["value_error"], row["gradient_error"]) < 1e-5 for row in found)


def test_a_loss_that_ignores_the_mask_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return forms.by_features(x.flatten(0, 1), y.flatten(0, 1))

    monkeypatch.setitem(tokens.CALLS["all"], "token_cka_loss", unmasked)
    first, *others = quick(tokens.BENCHMARK).ask(tokens.TokensQuestion("all", 4, 8, 5, 6))
    assert (first["p50"], first["red"][:13]) == (None, "value off by ")
    assert all(row["p50"] for row in others)
    assert f"| {first['red']}" in tokens.BENCHMARK.page([first, *others])


def test_uncentred_products_are_wrong_far_from_the_origin() -> None:
    pytest.importorskip("cka", reason="pytorch-cka is in the bench extra")
    asked = layers.LayersQuestion("matrix", "ResNet18", 200, mean=100.0)
    found = {row["provider"]: row for row in quick(layers.BENCHMARK).ask(asked)}
    assert found["cka_matrix"]["red"] == ""
    assert found["pytorch-cka"]["p50"] is None
    assert found["pytorch-cka"]["red"].startswith("value off by")


# ---------------------------------------------------------------------------------------------- the floor


def test_floor_by_hand() -> None:
    """n = 10, p = 20, q = 30: Gram route, 100 * 50 flops and 2 * 100 * 20 for the gradient; fp32."""
    slow_products = Ceilings(copies={1: 1e30}, products={"float32 ieee": 1000.0, "float64": 1.0})
    slow_copy = Ceilings(copies={1000: 1e9, 2000: 1000.0, 9000: 1e30}, products={"float32 ieee": 1e30, "float64": 1.0})
    case = Case("bird", 10, 20, 30)
    forward = replace(case, mode="forward")
    assert limits.floor(forward.spec(CPU), slow_products)["floor"] == pytest.approx(5.0)
    assert limits.floor(case.spec(CPU), slow_products)["floor"] == pytest.approx(9.0)
    assert limits.floor(forward.spec(CPU), slow_copy)["floor"] == pytest.approx(2.0)  # 10 * 50 numbers of 4 bytes
    # n = 100, p = q = 10: cross route, 100 * 400 and 2 * 100 * 20 * 10 more
    assert limits.floor(Case("batch", 100, 10, 10).spec(CPU), slow_products)["floor"] == pytest.approx(80.0)


def test_ceilings_of_a_number() -> None:
    seen = Ceilings({1: 1.0}, {"float64": 1.0, "float32 ieee": 8.0, "bfloat16": 4.0})
    assert [seen.rate(number) for number in ("float32 ieee", "float64", "bfloat16")] == [8.0, 1.0, 8.0]


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(limits, "COPIED", (2**10, 2**12))
    monkeypatch.setattr(limits, "WIDTH", 8)
    seen = limits.ceilings("bfloat16")
    for measured in (limits._copies, limits._product):
        measured.cache_clear()
    assert set(seen.copies) == {2**10, 2**12}
    assert set(seen.products) == {"bfloat16", "float32 ieee", "float64"}
    assert min(*seen.copies.values(), *seen.products.values()) > 0
    copy = limits.copying(CPU, 64)
    assert torch.equal(copy(), torch.ones(32, dtype=torch.uint8))
    torch.manual_seed(0)
    product = limits.multiplying(CPU, torch.bfloat16, 3, 4, 5, wide=True)()
    torch.manual_seed(0)
    a, b = (torch.randn(shape).bfloat16() for shape in ((5, 3), (5, 4)))
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, a.float().T @ b.float(), atol=0.05, rtol=0.05)


def test_what_takes_too_long_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Ceilings({1: 1.0}, {"float64": 1.0, "float32 ieee": 1e5})
    monkeypatch.setattr(limits, "ceilings", lambda number: slow)
    called: list[int] = []
    monkeypatch.setattr(forms, "by_grams", lambda x, y, **_: called.append(1) or forms.by_features(x, y))
    providers = [Provider("gram", forms.by_grams), Provider("feature", forms.by_features), Provider("auto")]
    monkeypatch.setattr(loss, "PROVIDERS", providers)
    monkeypatch.setattr(forms.by_grams, "__name__", "by_grams")
    found = {row["provider"]: row for row in quick(BENCHMARK).ask(Case("batch", 100, 10, 10))}
    assert found["gram"]["red"] == "too slow (at least 8 s a call)"  # 2 * 100^2 * 20 and 4 * 100^2 * 10 flops
    assert [found[name]["red"] for name in ("feature", "auto")] == ["", ""]  # the better form here, and ours
    assert called == []


def test_cases_are_distinct_and_have_a_gate() -> None:
    assert len(set(map(str, loss.CASES))) == len(loss.CASES) > 20
    assert {case.number for case in loss.CASES} <= set(loss.TOLERANCE)
    assert {case.problem for case in loss.CASES} == {"bird", "batch", "llm", "conv", "rbf"}
    assert [case.p for case in loss.CASES if case.problem == "conv" and case.compiled] == [25_088, 25_088]


# ---------------------------------------------------------------------------------------------- a run


@pytest.fixture
def two_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark of two tiny cases; the file of its results."""
    tiny = replace(quick(BENCHMARK, TINY, replace(TINY, n=16)), folder=tmp_path)
    monkeypatch.setattr(loss, "BENCHMARK", tiny)
    return tiny.path(rows.device_name(CPU))


def test_a_run_from_case_to_files(two_cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--save", "--problem", "12x"]) == 0
    part = rows.load_rows(two_cases)
    assert {kept["n"] for kept in part} == {12}
    assert {kept["provider"] for kept in part} >= {"naive", "fp64", "gram", "feature", "library", "auto"}
    assert all(kept["p50"] and kept["peak_memory"] and kept["floor"] for kept in part)
    assert "forward+backward, float32, ieee, biased" in capsys.readouterr().out

    rows.write_rows(two_cases, [*part, part[0] | {"provider": "of a provider that is no more"}])
    run.main(["--save", "--problem", "*-16x*"])
    assert len(rows.load_rows(two_cases)) == 2 * len(part) + 1  # it was asked for one case only
    run.main(["--save"])
    assert {kept["provider"] for kept in rows.load_rows(two_cases)} == {kept["provider"] for kept in part}
    assert two_cases.with_suffix(".md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--problem", "nothing of the kind"])


def test_rows_are_kept_while_a_run_goes_on(two_cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    ask = Benchmark.ask

    def spied(*args: Any) -> list[Row]:
        kept.append(len(rows.load_rows(two_cases)) if two_cases.exists() else 0)
        return ask(*args)

    monkeypatch.setattr(Benchmark, "ask", spied)
    run.main(["--save", "--provider", "gram"])
    assert kept == [0, 1]


def test_a_run_fails_where_ours_is_wrong(
    two_cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = lambda x, y, **_: forms.by_grams(x, y) + 1e-3  # noqa: E731
    plant(monkeypatch, auto=wrong, naive=wrong)
    assert run.main(["--gates"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert [" auto: value off by 1.0e-03" in line for line in told] == [True, True]  # a rival may be
    assert list(two_cases.parent.iterdir()) == []


def test_a_case_that_fails_keeps_its_rows(two_cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.main(["--save", "--provider", "auto"]) == 0
    features = Case.features

    def failing(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
        if case.n == 16:
            raise MemoryError("no room")
        return features(case, device)

    monkeypatch.setattr(Case, "features", failing)
    assert run.main(["--save"]) == 1
    assert {row["n"] for row in rows.load_rows(two_cases)} == {12, 16}


def test_no_case_is_begun_late(two_cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--minutes", "-1"]) == 0
    assert "2 questions were not begun" in capsys.readouterr().out


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
    compared = ["--compare", *map(str, files)]
    assert run.main(compared) == 1
    text = capsys.readouterr().out
    marked = [line.split()[9] for line in text.splitlines() if "REGRESSION" in line]
    assert sorted(marked) == ["auto", "native"]
    assert "2 regressions of ours in 5 rows" in text
    assert "gone: bird 128 512 512 float32 ieee biased forward+backward feature" in text
    assert "new: bird 128 512 512 float32 ieee biased forward auto" in text
    assert " 0.50 " in text
    assert run.main(["--compare", str(files[0]), str(files[0])]) == 0
    assert run.main([*compared, "--threshold", "1.6"]) == 1  # a lost one stays lost


def test_table_from_planted_rows() -> None:
    lines = [row(p50=2e-3), row("gram", 3e-3), row("feature", 5e-3), row("naive", None, red="out of memory")]
    page = BENCHMARK.page([*lines, row("auto", 4e-6, mode="forward"), row("feature", 8e-6, mode="forward")])
    both, forward = page.split("\n## ")[1:]
    heading, _, line = [part for part in both.splitlines() if part.startswith("|")][:3]
    named = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (heading, line)), strict=True))
    assert named["gram"] == named["hand-written"] == "3 ms (1.50×)"
    assert (named["naive"], named["feature"], named["floor"]) == ("out of memory", "5 ms (2.50×)", "10 µs")
    assert "8 µs (2.00×)" in forward
    assert "| bird    | 128 | 512 | 512 | 1" in both.split("Peak memory beyond the inputs, MiB.")[1]
    assert "| 2.0e-06" in both.split("Largest error against fp64.")[1]


COMMITTED = Path(run.__file__).parent / "kernels/results/cpu-amd-epyc-2-threads"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compare", f"{COMMITTED}-tokens.csv", f"{COMMITTED}-tokens.csv"], "is not of this benchmark: name the one"),
        (["tokens", "--compare", f"{COMMITTED}.csv", f"{COMMITTED}.csv"], "is not of this benchmark"),
        (["--compare", "nowhere.csv", f"{COMMITTED}.csv"], "No such file or directory: 'nowhere.csv'"),
        (["--compare", __file__, __file__], "is no table"),
        (["--provider", "nope", "--gates", "--problem", "rbf"], "no provider of these questions matches 'nope'"),
        (["--minutes", "nan"], "--minutes must be a number, and --threads at least 1"),
        (["--threads", "0"], "--minutes must be a number, and --threads at least 1"),
    ],
)
def test_what_would_compare_or_time_nothing_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
