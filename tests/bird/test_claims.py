"""Claims of a recipe: the tests against SciPy and by hand, every side of the rule, and what the page says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bird.lab.claims import Claim, claims_section, holm, json_rows, judge
from bird.lab.figures import claims
from bird.lab.vision.recipe import parse_vision
from tests.bird.test_recipes import VISION
from tests.bird.tiny_recipes import DIGITS, command, experiment_of, written

OURS, THEIRS = [0.80, 0.83, 0.79, 0.86], [0.78, 0.80, 0.78, 0.81]


def of(values: Mapping[tuple[str, str, str], list[float]], missing: int | None = None) -> Any:
    """A measure of numbers by method, variant and name."""

    def measure(method: str, variant: str, name: str) -> dict[int, float] | None:
        found = values.get((method, variant, name))
        return None if found is None else {100 + i: v for i, v in enumerate(found) if i != missing}

    return measure


def pair(ours: list[float], theirs: list[float], **more: list[float]) -> Any:
    return of({("a", "", "robust"): ours, ("b", "", "robust"): theirs} | {("a", "", n): v for n, v in more.items()})


def test_a_difference_is_scipys_paired_test() -> None:
    (found,) = judge({"it": Claim("a", "b")}, pair(OURS, THEIRS))
    known = stats.ttest_rel(OURS, THEIRS)
    interval = known.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((known.pvalue, interval.low, interval.high), rel=1e-9)
    assert found.mean == pytest.approx(0.0275)
    assert (found.seeds, found.corrected) == (4, found.p)


def test_seeds_that_one_method_lacks_are_left_out() -> None:
    measure = lambda method, variant, name: {100: 0.5, 101: 0.7, 102: 0.6} if method == "a" else {101: 0.6, 102: 0.4}  # noqa: E731
    (found,) = judge({"it": Claim("a", "b")}, measure)
    assert found.differences == pytest.approx([0.1, 0.2])
    assert judge({"it": Claim("a", "c")}, of({("a", "", "robust"): OURS})) == []


def test_a_trend_is_a_slope_per_doubling() -> None:
    """Each seed's differences over log2 of 1, 2, 16: slopes by the normal equations."""
    rng = np.random.default_rng(0)
    at = [1, 2, 16]
    values = {(m, f"v{a}", "robust"): [*rng.random(5)] for m in "ab" for a in at}
    claim = Claim("a", "b", variants=("v1", "v2", "v16"), at=(1, 2, 16))
    (found,) = judge({"it": claim}, of(values))
    x = np.array([0.0, 1.0, 4.0])
    y = np.array([np.subtract(values["a", f"v{a}", "robust"], values["b", f"v{a}", "robust"]) for a in at])
    slopes = ((x - x.mean()) @ (y - y.mean(0))) / ((x - x.mean()) ** 2).sum()
    assert found.differences == pytest.approx([*slopes])


def test_holm_is_the_published_procedure() -> None:
    """The example of R's p.adjust and of textbooks, and ties."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([float("nan"), 0.01, 0.02]) == pytest.approx([1.0, 0.03, 0.04])


def test_differences_without_spread_take_nothing_from_other_claims() -> None:
    """Equal accuracies in every seed have no p: the claim counts, as if it were 1, and JSON has null."""
    values = {("a", "", "robust"): STEADY, ("b", "", "robust"): [0.0] * 4, ("c", "", "robust"): STEADY}
    nothing, it = judge({"nothing": Claim("a", "c"), "it": Claim("a", "b")}, of(values))
    assert math.isnan(nothing.p)
    assert (nothing.corrected, nothing.verdict) == (1.0, "open")
    assert it.corrected == pytest.approx(2 * it.p)
    assert it.verdict == "holds"
    assert [row["p"] for row in json_rows([nothing, it])] == [None, it.p]


def test_secondary_claims_are_neither_counted_nor_judged() -> None:
    claims = {"one": Claim("a", "b"), "two": Claim("a", "b", secondary=True), "three": Claim("a", "b")}
    one, two, three = judge(claims, pair(OURS, THEIRS))
    assert one.corrected == three.corrected == pytest.approx(2 * one.p)
    assert (two.corrected, two.verdict) == (None, "")


STEADY = [0.01, 0.011, 0.012, 0.009]  # differences whose p is below 0.001


@pytest.mark.parametrize(
    ("differences", "options", "verdict"),
    [
        (STEADY, {}, "holds"),
        ([-d for d in STEADY], {"paper": 3.5}, "the contrary holds"),
        (STEADY, {"paper": 2.0}, "holds"),
        (STEADY, {"paper": 3.5}, "holds, but not at the paper's size"),
        ([0.01, -0.01, 0.005, -0.004], {"paper": 3.5}, "does not hold at the paper's size"),
        ([0.01, -0.01, 0.005, -0.004], {"paper": 2.0}, "open"),
        ([0.01, -0.01, 0.005, -0.004], {}, "open"),
        (STEADY, {"families": ("x", "y"), "agreeing": 1}, "holds"),
        (STEADY, {"families": ("x", "y"), "agreeing": 2}, "open"),
    ],
)
def test_the_rule(differences: list[float], options: dict[str, Any], verdict: str) -> None:
    zero = [0.0] * 4
    values = {("a", "", "robust"): differences, ("b", "", "robust"): zero}
    values |= {("a", "", "x"): STEADY, ("b", "", "x"): zero, ("a", "", "y"): zero, ("b", "", "y"): STEADY}
    (found,) = judge({"it": Claim("a", "b", **options)}, of(values))
    assert found.verdict == verdict
    assert verdict in claims_section({"it": Claim("a", "b", **options)}, [found])[-1]


def test_claims_that_have_not_been_run_count() -> None:
    """The first of four primary claims is not tested as if it were the only one, and a first look decides nothing."""
    claims = {"one": Claim("a", "b"), "two": Claim("a", "b", secondary=True)}
    claims |= {f"later {i}": Claim("a", "c") for i in range(3)}
    one, _ = judge(claims, pair(OURS, THEIRS))
    assert one.corrected == pytest.approx(4 * one.p)
    assert one.p < 0.05 < one.corrected
    assert one.verdict == "open"
    assert "4 in all" in claims_section(claims, [one])[1]
    (early,) = judge({"one": claims["one"]}, pair(STEADY, [0.0] * 4), seeds=8)
    assert early.verdict == "incomplete, 4 of 8 seeds"


@pytest.mark.parametrize("odd", [[0.0, 0.0], [0.3 - 0.2, 0.1], [0.01, float("nan")]])
@pytest.mark.filterwarnings("error")
def test_differences_without_a_test_leave_their_claim_open_and_others_alone(odd: list[float]) -> None:
    values = {("a", "", "robust"): odd, ("b", "", "robust"): [0.0] * 4, ("c", "", "robust"): STEADY}
    first, second = judge({"odd": Claim("a", "b", paper=3.5), "it": Claim("c", "b")}, of(values))
    assert (first.corrected, first.verdict) == (1.0, "open")
    assert np.isnan([first.p, first.low, first.high]).all()
    assert second.corrected == pytest.approx(2 * stats.ttest_1samp(STEADY, 0).pvalue)
    assert second.verdict == "holds"
    json.dumps(json_rows([first, second]), allow_nan=False)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"method": "bird", "over": "nothing"}, "'nothing'"),
        ({"method": "bird", "over": "ft", "variants": ["x"]}, "a variant of the claim 'it': there is no 'x'"),
        ({"method": "bird", "over": "ft", "measure": "dust"}, "a measure of the claim 'it': there is no 'dust'"),
        ({"method": "bird", "over": "ft", "families": ["dust"], "agreeing": 1}, "there is no 'dust'"),
        ({"method": "bird", "over": "ft", "agreeing": 1}, "agreeing must be 0 to 0"),
        ({"method": "bird", "over": "ft", "families": ["all"]}, "agreeing must be 1 to 1"),
        ({"method": "bird", "over": "ft", "paper": -1.0}, "paper must be at least 0"),
        ({"method": "bird", "over": "ft", "at": [1, 2]}, "one, or as many as there are numbers in at"),
        ({"method": "bird", "over": "ft", "variants": ["", ""], "at": [2, 2]}, "two or more different numbers"),
        ({"method": "bird", "over": "ft", "over_variant": "x"}, "there is no 'x'"),
        ({"method": "bird", "over": "ceiling"}, "what the variant '' runs, for the claim 'it': there is no 'ceiling'"),
    ],
)
def test_a_claim_of_what_is_not_run(claim: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_vision("x", VISION | {"methods": ["bird", "ft"], "claims": {"it": claim}})


def test_a_claim_over_the_recipe_as_it_is() -> None:
    """Its name is empty, and is a name all the same."""
    variants = {"": {"methods": ["none"]}, "c": {"methods": ["bird"]}}
    claim = {"method": "bird", "over": "none", "variants": ["c"]}
    table = VISION | {"variants": variants, "methods": ["bird", "none"]}
    recipe = parse_vision("x", table | {"claims": {"it": claim | {"over_variant": ""}}})
    values = {("bird", "c", "robust"): OURS, ("none", "", "robust"): THEIRS}
    (found,) = judge(recipe.claims, of(values))
    assert found.mean == pytest.approx(0.0275)
    with pytest.raises(ValueError, match="what the variant 'c' runs, for the claim 'it': there is no 'none'"):
        parse_vision("x", table | {"claims": {"it": claim}})


def test_a_recipe_with_claims_from_its_first_seed_on(tmp_path: Path) -> None:
    """Steps of a variant, seeds that do not begin at 0, and the page; numbers from the accuracies it reports."""
    more = """
networks.one = { teacher = "plain", student = "plain" }
variants.long = { steps = 9 }
variants.short = {}
first_seed = 7
claims.it = { method = "bird", over = "none", variants = ["long"], measure = "contrast", paper = 9.0 }
claims.trend = { method = "bird", over = "none", variants = ["short", "long"], at = [8, 9], secondary = true }
"""
    path = written(tmp_path, DIGITS + more, ('methods = ["none", "bird", "ceiling"]', 'methods = ["none", "bird"]'),
                   ("seeds = 1\n", "seeds = 2\n"))  # fmt: skip
    assert command("run", path) == 0
    cells = experiment_of(path).cells()
    assert {cell.seed for cell in cells} == {7, 8}
    steps = {
        cell.variant: cell.training.result(tmp_path / "runs")["histories"][0]["train"][-1]["step"]
        for cell in cells
        if cell.method == "bird"
    }
    assert steps == {"long": 9, "short": 8}
    page = (tmp_path / "runs/reports/try/README.md").read_text()
    assert "## Registered claims" in page
    assert "per doubling" in page
    rows = json.loads((tmp_path / "runs/reports/try/results.json").read_text())["claims"]
    scores = {
        (cell.method, cell.seed): np.mean(cell.scores["score"].result(tmp_path / "runs")["corrupted"]["contrast"])
        for cell in cells
        if cell.variant == "long"
    }
    expected = [scores["bird", seed] - scores["none", seed] for seed in (7, 8)]
    assert rows[0]["differences"] == pytest.approx(expected)
    assert [row["networks"] for row in rows] == ["one", "one"]


def test_the_picture_of_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means, ends of intervals, seeds and the paper's difference, in points; a claim without spread has no interval."""
    figure_module = pytest.importorskip("matplotlib.figure", reason="pictures")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    registered = {"it": Claim("a", "b", paper=3.5), "the same": Claim("a", "a", secondary=True)}
    judged = judge(registered, pair(OURS, THEIRS))
    claims(json_rows(judged), {name: claim.paper for name, claim in registered.items()}, tmp_path / "c.png", title="t")
    (axes,) = drawn[0].axes
    found = sorted(tuple(np.round(line.get_xdata(), 6)) for line in axes.lines)
    differences = [100 * (a - b) for a, b in zip(OURS, THEIRS, strict=True)]
    wanted = [(0.0, 0.0), differences, [np.mean(differences)], [3.5], [0.0] * 4, [0.0]]
    assert found == sorted(tuple(np.round(values, 6)) for values in wanted)
    (interval,) = (line.get_segments()[0][:, 0] for line in axes.collections)
    known = stats.ttest_rel(OURS, THEIRS).confidence_interval(0.95)
    assert interval == pytest.approx([100 * known.low, 100 * known.high])
