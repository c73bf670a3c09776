"""Numbers that the page of results states about its committed files, computed again from them."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from statistics import correlation, fmean, linear_regression, stdev

import numpy as np
import pytest
import torch

from bird.lab.vision.corruptions import CORRUPTIONS, corrupt
from bird.lab.vision.data import to_float
from bird.lab.vision.datasets import load_splits
from bird.lab.vision.evaluation import first

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/reproduction"
PAGE = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
LIFTS = "snow", "frost", "fog", "brightness", "contrast"  # what black backgrounds are not black under
HELD_OUT = "spatter", "fog", "speckle_noise", "gaussian_blur"
BySeed = dict[str, float]  # in %, the mean over severities
Accuracies = dict[tuple[str, str], BySeed]  # by method and corruption
Variants = dict[tuple[str, str, str], BySeed]  # by variant, method and corruption


def variants(folder: str, table: str = "accuracies.csv") -> Variants:
    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (RESULTS / folder / table).open() as file:
        for row in csv.DictReader(file):
            found[row["variant"], row["method"], row["corruption"]][row["seed"]].append(100 * float(row["accuracy"]))
    return {key: {seed: fmean(values) for seed, values in of.items()} for key, of in found.items()}


def accuracies(folder: str) -> Accuracies:
    """Of a recipe of one variant."""
    return {(method, kind): of for (_, method, kind), of in variants(folder).items()}


def robust(of: Variants, variant: str, method: str, seed: str) -> float:
    """The paper's figure: clean images are one severity of six."""
    kinds = [of[variant, method, kind][seed] for kind in HELD_OUT]
    return (of[variant, method, "none"][seed] + 5 * fmean(kinds)) / 6


def told(values: list[float]) -> str:
    """Mean and 95 % interval, as the page writes them."""
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    low, high = stats.t.interval(0.95, len(values) - 1, fmean(values), stats.sem(values))
    return f"{fmean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def mean(of: Accuracies, method: str, corruption: str) -> float:
    return fmean(of[method, corruption].values())


@pytest.mark.parametrize(("folder", "share"), [("fashion-classes", "86.7 %"), ("fashion-digits", "82.5 %")])
def test_the_share_of_the_gap_under_what_lifts_black(folder: str, share: str) -> None:
    of = accuracies(folder)
    kinds = {corruption for _, corruption in of} - {"none", "saturate"}  # which does nothing to grey pictures
    assert len(kinds) == 18
    gap = {name: mean(of, "ceiling", name) - mean(of, "none", name) for name in kinds}
    assert f"{100 * sum(gap[name] for name in LIFTS) / sum(gap.values()):.1f} %" == share
    assert f"{share} {'of the gap between' if folder == 'fashion-classes' else 'in fashion-digits'}" in PAGE


def test_the_budget() -> None:
    """The registered claims, anew from the accuracies, with SciPy's test; and where the gain is."""
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    of = variants("fashion-budget")
    seeds, steps = [str(seed) for seed in range(100, 108)], (1000, 4000, 16000)

    def robustness(method: str, count: int, seed: str) -> float:
        return robust(of, f"{count:,} steps", method, seed)

    def gains(count: int) -> list[float]:
        return [robustness("bird", count, seed) - robustness("continued-alpha", count, seed) for seed in seeds]

    slopes = [
        linear_regression([math.log2(s) for s in steps], of_seed).slope
        for of_seed in zip(*map(gains, steps), strict=True)
    ]
    claims = (
        ("grows with the steps | |", slopes),
        ("after 16,000 steps | +3.5 (over None) |", gains(16000)),
    )
    for words, values in claims:
        assert f"BIRD above *Continued* at alpha {words} {told(values).replace(' [', ' points [')}" in PAGE
    price = [of["16,000 steps", "continued-alpha", "none"][s] - of["16,000 steps", "bird", "none"][s] for s in seeds]
    low, high = stats.t.interval(0.95, 7, fmean(price), stats.sem(price))
    assert f"{fmean(price):.1f} points of clean accuracy [{low:.1f}, {high:.1f}]" in PAGE
    for count in steps:  # by itself training on does nothing
        for method in ("continued", "continued-alpha"):
            over = [robustness(method, count, seed) - robustness("none", count, seed) for seed in seeds]
            assert abs(round(fmean(over), 1)) <= 0.3
            assert stats.ttest_1samp(over, 0).pvalue > 0.145
    assert f"| {2 * stats.ttest_1samp(gains(16000), 0).pvalue:.1e} | holds |" in PAGE
    for count in steps:
        cells = [
            [robustness(method, count, seed) for seed in seeds] for method in ("continued", "continued-alpha", "bird")
        ]
        row = " | ".join(f"{fmean(values):.1f} ± {stdev(values):.1f}" for values in cells)
        assert f"| {count:,} | {row} | {fmean(of[f'{count:,} steps', 'bird', 'none'].values()):.1f} |" in PAGE
    kinds = {kind for _, _, kind in of} - {"none", "saturate"}
    won = {
        kind: fmean(of["16,000 steps", "bird", kind][s] - of["16,000 steps", "continued-alpha", kind][s] for s in seeds)
        for kind in kinds
    }
    spots = "impulse_noise", "spatter"
    rest = kinds - {*LIFTS, *spots, "gaussian_noise"}
    lifted, spotted, others = (fmean(won[kind] for kind in some) for some in (LIFTS, spots, rest))
    assert f"gains {won['fog']:.1f} points in fog and {won['spatter']:.1f} in spatter" in PAGE
    assert f"it gains {fmean(won.values()):.1f} points [" in PAGE
    gap = {
        kind: fmean(of["4,000 steps", "ceiling", kind][s] - of["4,000 steps", "none", kind][s] for s in seeds)
        for kind in kinds
    }
    share = sum(gap[kind] for kind in LIFTS) / sum(gap.values())
    assert f"{lifted:.1f} in the mean of the five that lift black, which hold {100 * share:.0f} % of the gap" in PAGE
    none, bird, ceiling = (
        fmean(robustness(*call, seed) for seed in seeds)
        for call in (("none", 4000), ("bird", 16000), ("ceiling", 4000))
    )
    assert f"BIRD recovers {100 * (bird - none) / (ceiling - none):.0f} % of the gap after 16,000 steps" in PAGE
    assert f"of the gap; {won['gaussian_noise']:.1f} in Gaussian noise, which" in PAGE
    words = f"{spotted:.1f} in the mean of impulse noise and spatter, which put spots on them; and {others:.1f}"
    assert f"{words} in the mean of the ten others, which have {max(gap[kind] for kind in rest):.1f} points" in PAGE
    assert len(rest) == 10


def test_the_demo() -> None:
    """What one seed shows, what three do, and where."""
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    of = variants("fashion-demo")
    by_seed = {m: [robust(of, "", m, s) for s in "012"] for m in ("none", "continued-alpha", "bird", "ceiling")}
    assert f"shows {by_seed['bird'][0]:.1f} % against {by_seed['continued-alpha'][0]:.1f}; three" in PAGE
    none, continued, bird, ceiling = by_seed.values()
    levels = [f"{fmean(values):.1f} ± {stdev(values):.1f}" for values in (bird, none, continued)]
    p = [stats.ttest_rel(bird, other).pvalue for other in (none, continued)]
    assert f"| {levels[0]} against {levels[1]} (p {p[0]:.2g}) |" in PAGE
    assert f"| {levels[2]} (Continued at alpha; BIRD against it p {p[1]:.2g}) |" in PAGE
    shares = [100 * (b - n) / (c - n) for b, n, c in zip(bird, none, ceiling, strict=True)]
    assert f"| 31.8 % | {fmean(shares):.1f} ± {stdev(shares):.1f} % | - It" in PAGE

    def gain(kind: str) -> float:
        return fmean(of["", "bird", kind][s] - of["", "continued-alpha", kind][s] for s in "012")

    lifted = [gain(kind) for kind in (*LIFTS, "gaussian_noise") if kind != "fog"]
    assert f"{min(lifted):.0f} to {max(lifted):.0f} points under snow" in PAGE
    assert f"{gain('fog'):.0f} in fog, {gain('spatter'):.0f} in spatter and impulse noise" in PAGE
    assert f"BIRD pays {-gain('none'):.1f} points of clean accuracy." in PAGE


@pytest.mark.parametrize(("table", "ending"), [("accuracies.csv", "registered"), ("recalibrated.csv", "afterwards")])
def test_views_for_the_guidance_term(table: str, ending: str) -> None:
    """Each claim as registered, and with statistics of batch normalisation that were taken anew."""
    stats = pytest.importorskip("scipy.stats", reason="the t-test")
    of = variants("fashion-views", table)
    seeds = [str(seed) for seed in range(100, 108)]
    arms = {
        "BIRD": ("as it is", "bird"),
        "the same from a clean teacher": ("views, clean teacher", "bird"),
        "a permuted teacher with views": ("views", "bird-permuted"),
        "Continued at alpha": ("as it is", "continued-alpha"),
    }
    for name, arm in arms.items():
        gains = [robust(of, "views", "bird", seed) - robust(of, *arm, seed) for seed in seeds]
        row = f"| BIRD with views above {name}, {ending} | {told(gains)} |"
        assert f"{row} {stats.ttest_1samp(gains, 0).pvalue:.2g} |" in PAGE
    for name, arm in {"BIRD with views": ("views", "bird"), **arms}.items():
        row = f"| {name}, {ending} | {fmean(robust(of, *arm, seed) for seed in seeds):.1f} |"
        assert f"{row} {fmean(of[(*arm, 'none')].values()):.1f} |" in PAGE
    if ending == "afterwards":  # without views BIRD carries more under all that lifts black
        for kind in LIFTS:
            assert fmean(of["as it is", "bird", kind].values()) > fmean(of["views", "bird", kind].values())
        continued = arms["Continued at alpha"]
        for arm in (arms["the same from a clean teacher"], arms["a permuted teacher with views"]):
            noise = [fmean(of[(*one, "gaussian_noise")].values()) for one in (arm, continued)]
            assert f"{noise[0] - noise[1]:.0f} points each, for" in PAGE
        rest = {kind for _, _, kind in of} - {"none", "saturate", "gaussian_noise", "impulse_noise", "spatter", *LIFTS}
        assert len(rest) == 10
        for arm, words in ((("views", "bird"), "with views is at"), (("as it is", "bird"), "without them at")):
            lost = [fmean(of[(*arm, k)][s] - of[(*continued, k)][s] for k in rest) for s in seeds]
            assert re.search(rf"{words} {re.escape(told(lost))}", PAGE.replace(" against *Continued at alpha*", ""))
    else:
        kinds = "speckle_noise", "gaussian_blur", "spatter", "fog"
        over = [of["views", "bird", k][s] - of["as it is", "continued-alpha", k][s] for k in kinds for s in seeds]
        assert "; ".join(f"{fmean(over[i : i + 8]):+.1f}" for i in range(0, 32, 8)) in PAGE
        price = [of["views", "bird", "none"][s] - of["as it is", "bird", "none"][s] for s in seeds]
        assert f"less BIRD's, registered | {told(price)} |" in PAGE


def test_which_corruptions_change_a_black_background() -> None:
    """Of 200 garments of the package; what blurs and spots change is less."""
    data = first(load_splits("fashion-mnist-subset", None, classes=[5, 6, 7, 8, 9]).test, 200)
    x = to_float(data.images)
    change = {kind: (corrupt(x, kind, 3, index=torch.arange(200)) - x)[x == 0] for kind in CORRUPTIONS}
    changed = {kind: 100 * (of > 4 / 255).float().mean().item() for kind, of in change.items()}
    assert min(changed[kind] for kind in LIFTS) > 99.5
    assert f"changes {changed['gaussian_noise']:.0f} % of black pixels (severity 3" in PAGE
    assert max(of for kind, of in changed.items() if kind not in (*LIFTS, "gaussian_noise")) < 25


def test_the_five_move_together_and_little_is_left_without_fog() -> None:
    of = accuracies("fashion-classes")
    gains = [[of["bird", name][seed] - of["continued", name][seed] for seed in "01234"] for name in LIFTS]
    together = [correlation(a, b) for a, b in combinations(gains, 2)]
    assert f"correlate at {min(together):.2f} to {max(together):.2f}" in PAGE
    held_out = "spatter", "speckle_noise", "gaussian_blur"

    def without_fog(method: str) -> float:  # clean images are one severity of six
        clean, corrupted = mean(of, method, "none"), fmean(mean(of, method, name) for name in held_out)
        return (clean + 5 * corrupted) / 6

    bird, hints, continued = (without_fog(method) - without_fog("none") for method in ("bird", "hints", "continued"))
    told = f"BIRD is {bird:.1f} points of robust accuracy ahead of None there, Hints {hints:.1f}, and *Continued*"
    assert f"{told} {continued:.1f}" in PAGE


def test_short_trained_teachers_of_the_students_own_classes() -> None:
    with (RESULTS / "fashion-teachers/teachers.csv").open() as file:
        rows = {(row["networks"], row["variant"]): 100 * float(row["robust_accuracy"]) for row in csv.DictReader(file)}
    networks = dict.fromkeys(name for name, _ in rows)
    own, digits = (
        [f"{rows[n, f'{c}, all corruptions, 200 steps'] - rows[n, f'{c}, all corruptions']:+.1f}" for n in networks]
        for c in ("same classes", "digits")
    )
    assert "by {}, {}, {} and {} points".format(*(gain.removeprefix("+") for gain in own)) in PAGE
    assert f"for digits ({', '.join(digits)})" in PAGE


def test_what_teachers_of_other_classes_and_corruptions_leave() -> None:
    gains: dict[str, list[float]] = defaultdict(list)
    with (RESULTS / "fashion-teachers/teachers.csv").open() as file:
        for row in csv.DictReader(file):
            gains[row["variant"]].append(100 * (float(row["robust_accuracy"]) - float(row["untouched"])))
    for told, corruptions in (("all corruptions",) * 2, ("noises and blurs",) * 2, ("clean images", "clean")):
        cells = [fmean(gains[f"{classes}, {corruptions}"]) for classes in ("other classes", "same classes", "digits")]
        assert f"| {told} | {' | '.join(f'{gain:+.1f}' for gain in cells)} |" in PAGE
        if told != "noises and blurs":
            assert f"{max(cells) - min(cells):.1f}{' points' * (corruptions != 'clean')} ({corruptions})" in PAGE


def test_the_effective_rank_of_teachers_features() -> None:
    """Alone, and beside the paper's three properties; by NumPy's least squares, each row left out in turn."""
    with (RESULTS / "fashion-teachers/teachers.csv").open() as file:
        rows = list(csv.DictReader(file))
    students = rows, *([r for r in rows if r["networks"].endswith(name)] for name in ("-resnet-tiny", "-plain"))
    three = "probe_accuracy", "complementary_knowledge", "usefulness_min"

    def explained(some: list[dict[str, str]], names: tuple[str, ...]) -> tuple[float, float]:
        x = np.array([[1.0, *(float(row[name]) for name in names)] for row in some])
        y = np.array([float(row["robust_accuracy"]) for row in some])
        fits = [np.linalg.lstsq(x[own], y[own], rcond=None)[0] for own in ~np.eye(len(y), dtype=bool)]
        whole = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
        left_out = [target - row @ fit for row, target, fit in zip(x, y, fits, strict=True)]
        return (1 - whole.var() / y.var()) * 100, (1 - np.mean(np.square(left_out)) / y.var()) * 100

    alone, found, before = (
        [explained(some, names) for some in students]
        for names in (("effective_rank",), (*three, "effective_rank"), three)
    )
    assert all(left_out < 0 for _, left_out in alone)
    assert "alone {:.1f} %; {:.1f} %; {:.1f} % (each".format(*(r2 for r2, _ in alone)) in PAGE
    words = "with the three {:.1f} %; {:.1f} %; {:.1f} %".format(*(r2 for r2, _ in found))
    assert f"{words} ({', '.join(f'{left_out:.1f}' for _, left_out in found)} %)" in PAGE
    words = "{:.1f} %; {:.1f} %; {:.1f} %".format(*(r2 for r2, _ in before))
    assert f"{words} (each row left out: {', '.join(f'{left_out:.1f}' for _, left_out in before)} %)" in PAGE
    for row in rows:
        row["teacher"], row["student"] = (str(int(name in row["networks"])) for name in ("mobilenetv2", "-plain"))
    factors = *three, "teacher", "student"
    without, (with_rank, _) = explained(rows, factors)[0], explained(rows, (*factors, "effective_rank"))
    assert f"they explain {without:.1f} %, with the rank {with_rank:.1f} % (p of its coefficient 0.55)" in PAGE
    stats = pytest.importorskip("scipy.stats", reason="the F test")
    f = (with_rank - without) / (100 - with_rank) * (48 - 7)
    assert f"{stats.f.sf(f, 1, 48 - 7):.2f}" == "0.55"


def test_the_suites_of_fashion_photos() -> None:
    """The gap of each, the kinds that lose 5 points, and that none passes; of accuracies to 0.1 %, so within that."""
    suites: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = defaultdict(dict)
    with (RESULTS / "fashion-photos/suites.csv").open() as file:
        for row in csv.DictReader(file):
            of = suites[f"{int(row['steps']):,}", row["strongest"], row["data"]]
            of[row["kind"]] = float(row["none"]), float(row["ceiling"])
    told = {}
    for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| [\d,]+ \| [567] \|.* points", line):
            steps, strongest, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            for data, cell in zip(("fashion-photos", "fashion-levels", "fashion-mnist"), cells, strict=True):
                told[steps, strongest, data] = re.match(r"([\d.]+) points, (\d+) kinds", cell)
    assert set(told) == set(suites)
    for (steps, strongest, data), words in told.items():
        found = dict(suites[steps, strongest, data])
        none, ceiling = found.pop("clean")
        losses = {kind: theirs - ours for kind, (ours, theirs) in found.items()}
        weight = 1 / (1 + int(strongest))
        gap = (1 - weight) * fmean(losses.values()) + weight * (ceiling - none)
        assert words is not None
        assert gap < 9.9
        assert float(words[1]) == pytest.approx(gap, abs=0.11)
        least, most = (sum(loss > bound for loss in losses.values()) for bound in (5.1, 4.9))
        assert least <= int(words[2]) <= most
        if steps == "16,000" and data != "fashion-mnist":
            largest = max(losses, key=losses.__getitem__)
            share = 100 * losses[largest] / sum(losses.values())
            assert f"{share:.0f} % {largest.replace('_', ' ')} over" in PAGE
