"""The report of a language recipe, beside the paper's figures: a page, JSON, a picture, and sample responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from .. import figures
from ..claims import claims_section, json_rows, judge
from ..experiment import Cell, Group, Results, collect, named, repetitions, report_page
from ..statistics import Interval, bootstrap, paired_bootstrap, paired_p, pgr
from ..tables import markdown_table, percent, report_origin, second_half, spread, write_markdown, write_report
from .experiment import LanguageExperiment
from .recipe import LanguageRecipe

SAMPLES = 12
RANKING = "pairs ranked rightly", "margin"  # the columns of held-out pairs


def write_language_report(experiment: LanguageExperiment, cells: Sequence[Cell], folder: Path) -> str:
    """Write ``README.md``, ``results.json``, a picture and, for preferences, ``samples.md``; returns the page.

    Raises:
        ValueError: no seed of all methods is done yet.
    """
    groups, missing = collect(experiment, cells)
    recipe = experiment.recipe
    of_kind = _preferences if recipe.kind == "preference" else _weak_to_strong
    sections, numbers = {}, {}
    for group, results in groups.items():
        pair = recipe.networks[group[0]]
        text, numbers[named(*group)] = of_kind(recipe, group, results)
        about = (
            f"{pair.teacher} teaches {pair.student}; {repetitions(results)}, shares in %: mean ± "
            "standard deviation over seeds, and the 95 % bootstrap interval over what was asked.\n"
        )
        sections[group] = [about, text]
    judged, claims = _claims(recipe, groups)
    text = report_page(recipe, sections, missing, closing=judged)
    # Samples need the data, so they are made before any file is written.
    samples = _samples(experiment, groups) if recipe.kind == "preference" else None
    told: dict[str, Any] = {"recipe": asdict(recipe), "origin": report_origin()}
    if claims:
        told["claims"] = claims
    write_report(folder, text, told | {"results": numbers, "cells": _kept(groups)})
    if samples is not None:
        write_markdown(folder / "samples.md", samples)
    if claims:
        paper = {name: claim.paper for name, claim in recipe.claims.items()}
        figures.claims(claims, paper, folder / "claims.png", title=recipe.title)
    _draw(recipe, groups, folder / "results.png")
    return text


def _claims(recipe: LanguageRecipe, groups: Mapping[Group, Results]) -> tuple[list[str], list[dict[str, Any]]]:
    """The section of a page, and rows of JSON, for every pair of networks."""
    sections, rows = list[str](), list[dict[str, Any]]()
    for networks in recipe.networks:

        def measure(method: str, variant: str, name: str, networks: str = networks) -> dict[int, float] | None:
            methods = groups.get((networks, variant), {})
            of = methods.get(method)
            if name == "repeated" and of is not None and "weak" in methods:
                return dict(zip(of, _heritage(_right(of), _right(methods["weak"]))[0], strict=True))
            if name == "repeated" or of is None:
                return None
            return {seed: _measured(results, name) for seed, results in of.items()}

        judgements = judge(recipe.claims, measure, recipe.seeds) if recipe.claims else []
        sections += [f"{networks}:\n"] if judgements and len(recipe.networks) > 1 else []
        sections += claims_section(recipe.claims, judgements)
        rows += [{"networks": networks} | row for row in json_rows(judgements)]
    return sections, rows


def _measured(results: Mapping[str, Any], name: str) -> float:
    """What claims compare, of one cell; the names are those of `LanguageRecipe`."""
    places = {"ranking": ("ranking", "accuracy"), "margin": ("ranking", "margin"), "accuracy": ("test", "accuracy")}
    if name in places:
        stage, key = places[name]
        return float(results[stage][key])
    return fmean(verdict or 0 for verdict in _raw(results, name))


def _draw(recipe: LanguageRecipe, groups: Mapping[Group, Results], path: Path) -> None:
    preference = recipe.kind == "preference"
    judge = next(iter(recipe.judges), "")
    bars: dict[str, dict[str, tuple[list[float], float, float]]] = {}
    for group, results in groups.items():
        for method, of in results.items():
            values = _verdicts(of, judge) if preference else _right(of)
            interval = bootstrap(values)
            shown = values.mean(1).tolist(), interval.low, interval.high
            bars.setdefault(named(*group), {})[recipe.titles[method]] = shown
    label = f"good responses, %, by the {judge}" if preference else "test accuracy, %"
    figures.shares(bars, path, title=recipe.title, y_label=label)


# ---------------------------------------------------------------------------------------------- preferences


def _preferences(recipe: LanguageRecipe, group: Group, results: Results) -> tuple[str, dict[str, Any]]:
    """The tables of methods and of their differences as Markdown, and the numbers in them."""
    paper, judges = recipe.networks[group[0]].paper, [*recipe.judges]
    margins = {m: _margins(of) for m, of in results.items() if all("ranking" in r for r in of.values())}
    rows = [["method", "paper", *(f"good, {judge}" for judge in judges), *(RANKING if margins else ())]]
    rows[0] += ["perplexity", "distinct pairs of words", "CKA"]
    good = {m: {j: _verdicts(of, j) for j in judges} for m, of in results.items()}
    for method, of_pairs in margins.items():
        good[method][RANKING[0]] = (of_pairs > 0).astype(float)
    for method, of in results.items():
        per_seed = [*of.values()]
        rows.append(
            [
                recipe.titles[method],
                f"{paper[method]:.2f}" if method in paper else "",
                *(_share(good[method][judge]) for judge in judges),
                *(_ranked(margins.get(method)) if margins else ()),
                _mean(r["responses"]["perplexity"] for r in per_seed),
                percent([r["responses"]["distinct"] for r in per_seed]),
                f"{fmean(r['alignment']['cka'] for r in per_seed):.2f}",
            ]
        )
    teachers = [100 * r["teacher"]["accuracy"] for r in next(iter(results.values())).values()]
    parts = [
        markdown_table(rows) + "\n",
        f"The teacher is right on {min(teachers):.1f} to {max(teachers):.1f} % of rows that it has not seen.\n",
    ]
    if margins:
        ranks = [100 * r["teacher's ranking"]["accuracy"] for r in next(iter(results.values())).values()]
        told_of = f"the teacher ranks {min(ranks):.1f} to {max(ranks):.1f} % of them rightly"
        if "dpo" in margins:
            leads = [rank - 100 * share for rank, share in zip(ranks, (margins["dpo"] > 0).mean(1), strict=True)]
            told_of += f", and leads DPO by {min(leads):.1f} to {max(leads):.1f} points"
        parts.append(f"Ranked are pairs that nobody was trained on, by DPO's implicit reward; {told_of}.\n")
    numbers: dict[str, Any] = {
        method: {of: asdict(bootstrap(values)) for of, values in good[method].items()} for method in results
    }
    told: list[list[str]] = []
    columns = [*judges, *(RANKING[:1] if margins else ())]
    for method in results:
        for other in ("none", "dpo", "dpo-bird-permuted"):
            if other in results and other != method and (other == "none" or "bird" in method) and method != "none":
                gains = {j: _gain(good[method][j], good[other][j]) for j in good[method] if j in good[other]}
                texts = [gains[column][0] if column in gains else "" for column in columns]
                if margins:
                    texts.append(_margins_gain(margins[method], margins[other]) if other in margins else "")
                title = f"{recipe.titles[method]} minus {recipe.titles[other]}"
                told.append([title, *texts])
                numbers[f"{method} minus {other}"] = {j: asdict(interval) for j, (_, interval) in gains.items()}
    parts += _differences(["difference", *judges, *(RANKING if margins else ())], told, "prompts")
    unparsable = sum(v is None for of in results.values() for r in of.values() for j in judges for v in _raw(r, j))
    if unparsable:
        parts.append(f"{unparsable} answers of judges could not be parsed; they count as not good.\n")
    return "\n".join(parts), numbers


def _margins(of: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
    """Margins of implicit rewards ``[seeds, pairs]``."""
    return np.array([results["ranking"]["margins"] for results in of.values()])


def _ranked(margins: np.ndarray | None) -> list[str]:
    """The cells of `RANKING`: the share of pairs ranked rightly, and the mean margin; empty for what ranks nothing."""
    if margins is None:
        return [""] * len(RANKING)
    means = margins.mean(1).tolist()
    return [
        _share((margins > 0).astype(float)),
        f"{fmean(means):.2f}" + (f" ± {spread(means):.2f}" if len(means) > 1 else ""),
    ]


def _margins_gain(ours: np.ndarray, theirs: np.ndarray) -> str:
    differences = (ours.mean(1) - theirs.mean(1)).tolist()
    return f"{fmean(differences):+.2f}" + (f" (p {paired_p(differences):.2g})" if len(differences) > 1 else "")


def _raw(results: Mapping[str, Any], judge: str) -> list[int | None]:
    return results[f"judge {judge}"]["verdicts"]


def _verdicts(of: Mapping[int, Mapping[str, Any]], judge: str) -> np.ndarray:
    """Verdicts ``[seeds, prompts]``: 1 for good, 0 for bad and for what could not be parsed."""
    return np.array([[verdict or 0 for verdict in _raw(results, judge)] for results in of.values()], dtype=float)


def _share(values: np.ndarray) -> str:
    interval = bootstrap(values)
    return f"{percent(values.mean(1).tolist())} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _gain(ours: np.ndarray, theirs: np.ndarray) -> tuple[str, Interval]:
    interval = paired_bootstrap(ours, theirs)
    text = f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    differences = (ours.mean(1) - theirs.mean(1)).tolist()
    if len(differences) > 1:
        text += f" (p {paired_p(differences):.2g})"
    return text, interval


def _differences(head: list[str], rows: list[list[str]], drawn: str) -> list[str]:
    """The table of what methods differ by, and how it is read; nothing where there are none."""
    said = f"Points with the 95 % interval, the same {drawn} drawn of both, and p of a paired t-test over seeds.\n"
    return [markdown_table([head, *rows]) + "\n", said] if rows else []


def _mean(values: Any) -> str:
    listed = [float(value) for value in values]
    return f"{fmean(listed):.1f}" if max(listed) < 1e6 else f"{fmean(listed):.1e}"


def _samples(experiment: Any, groups: Mapping[Group, Results]) -> str:
    """A page with the first prompts, and each method's responses to them with the first seed."""
    parts = ["# Samples\n", "The first held-out prompts, the first seed; whatever came out.\n"]
    for group, results in groups.items():
        parts.append(f"## {', '.join(filter(None, group))}\n")
        seed = next(iter(next(iter(results.values()))))
        prompts = experiment.prompts(seed)
        for number, prompt in enumerate(prompts[:SAMPLES]):
            parts.append(f"**{prompt}**\n")
            for method, of in results.items():
                judged = " ".join("+" if _raw(of[seed], j)[number] else "-" for j in experiment.recipe.judges)
                text = " ".join(of[seed]["responses"]["responses"][number].split())
                parts.append(f"- {experiment.recipe.titles[method]} ({judged}): {text}")
            parts.append("")
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------- weak to strong


def _weak_to_strong(recipe: LanguageRecipe, group: Group, results: Results) -> tuple[str, dict[str, Any]]:
    """The tables of accuracies, of the gap recovered and of differences as Markdown, and the numbers in them."""
    paper = recipe.networks[group[0]].paper
    right = {method: _right(of) for method, of in results.items()}
    whole = {"weak", "ceiling"} <= right.keys()
    head = ["method", "accuracy", "gap recovered (paper)", "gap recovered", "gap recovered, raw", "95 % interval"]
    rows = [[*head, "weak model's mistakes repeated", "its right answers kept"]]
    numbers: dict[str, Any] = {}
    for method, values in right.items():
        row = [recipe.titles[method], _share(values), f"{paper[method]:.2f}" if method in paper else ""]
        numbers[method] = {"accuracy": values.mean(1).tolist()}
        if whole and method not in ("weak", "ceiling"):
            means = (right[m].mean(1).tolist() for m in (method, "weak", "ceiling"))
            shares = [_recovered(*of_seed) for of_seed in zip(*means, strict=True)]
            interval = _recovered_interval(values, right["weak"], right["ceiling"])
            row += [_of_seeds(shares, least=0), _of_seeds(shares), _interval_text(interval)]
            raw = [None if math.isnan(share) else share for share in shares]
            numbers[method] |= {"gap_recovered": raw, "interval": asdict(interval)}
        if "weak" in right and method != "weak":
            repeated, kept = _heritage(values, right["weak"])
            numbers[method] |= {"mistakes_repeated": repeated, "right_answers_kept": kept}
            row += [""] * (len(head) - len(row)) + [percent(repeated), percent(kept)]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    parts = [markdown_table(rows) + "\n"]
    told: list[list[str]] = []
    for method in (m for m in right if m.startswith("bird")):
        for other in ("naive", "bird-permuted"):
            if other in right and other != method:
                text, interval = _gain(right[method], right[other])
                told.append([f"{recipe.titles[method]} minus {recipe.titles[other]}", text])
                numbers[method][f"minus {other}"] = asdict(interval)
    parts += _differences(["difference in accuracy", "points"], told, "rows")
    return "\n".join(parts), numbers


def _heritage(strong: np.ndarray, weak: np.ndarray) -> tuple[list[float], list[float]]:
    """Shares, by seed, of the weak model's mistakes that a student repeats, and of its right answers that it keeps.

    So Burns et al. (2023) ask whether a student imitates its supervisor. 0 where there are none.
    """
    repeated = ((1 - strong) * (1 - weak)).sum(1) / np.maximum(1, (1 - weak).sum(1))
    kept = (strong * weak).sum(1) / np.maximum(1, weak.sum(1))
    return repeated.tolist(), kept.tolist()


def _of_seeds(shares: Sequence[float], least: float = -math.inf) -> str:
    """The mean share in %, over the seeds that have a gap; shares below ``least`` count as ``least``."""
    known = [max(share, least) for share in shares if not math.isnan(share)]
    if not known:
        return "no gap"
    return percent(known) + ("" if len(known) == len(shares) else f" ({len(known)} of {len(shares)} seeds have a gap)")


def _right(of: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
    """``[seeds, test rows]``, 1 where the model is right."""
    return np.array([results["test"]["right"] for results in of.values()], dtype=float)


def _recovered(strong: float, weak: float, ceiling: float) -> float:
    """The share of the gap that is recovered; NaN unless the ceiling is above the weak model."""
    return pgr(strong, weak, ceiling) if ceiling > weak else math.nan


def _recovered_interval(strong: np.ndarray, weak: np.ndarray, ceiling: np.ndarray) -> Interval:
    """The gap recovered by the mean accuracies over seeds, and its interval over test rows drawn with replacement."""
    three = np.stack([values.mean(0) for values in (strong, weak, ceiling)])
    draws = np.random.default_rng(0).integers(0, three.shape[1], (2000, three.shape[1]))
    drawn = [_recovered(*means) for means in three[:, draws].mean(2).T.tolist()]
    whole = _recovered(*three.mean(1).tolist())
    if np.isnan(drawn).mean() > 0.05:
        return Interval(whole, -math.inf, math.inf)  # there may be no gap at all
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(whole, float(low), float(high))


def _interval_text(interval: Interval) -> str:
    if math.isinf(interval.low):
        return "none: there may be no gap"
    return f"{100 * interval.mean:.0f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


# ---------------------------------------------------------------------------------------------- files


def _kept(groups: Mapping[Group, Results]) -> list[dict[str, Any]]:
    """The numbers of every cell; texts and histories are left out and stay in the stages' folders."""
    left_out = ("responses", "history", "soft", "right", "verdicts", "margins")
    return [
        {"networks": group[0], "variant": group[1], "method": method, "seed": seed}
        | {name: _plain(score, left_out) for name, score in scores.items()}
        for group, results in groups.items()
        for method, of in results.items()
        for seed, scores in of.items()
    ]


def _plain(score: Mapping[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    own = {name: value for name, value in score.items() if name not in left_out}
    if "verdicts" in score:
        own["good"] = fmean(verdict or 0 for verdict in score["verdicts"])
        own["unparsable"] = sum(verdict is None for verdict in score["verdicts"])
    if "history" in score and score["history"].get("train"):
        own["second_half"] = second_half(score["history"]["train"])
    return own
