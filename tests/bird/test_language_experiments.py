"""Recipes of language models: what files may say, and whole runs of tiny networks from the command line."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib
import torch

pytest.importorskip("trl", reason="the experiments are run by its trainers")

from bird.lab import cli
from bird.lab.language import recipe as language_recipes
from bird.lab.language import report
from bird.lab.language.preference import Preferences
from bird.lab.tables import second_half
from tests.bird.test_language_data import write_snippets
from tests.bird.tiny import saved

TEACHER, STUDENT = saved("encoder"), saved("decoder")
PREFERENCE = f"""
kind = "preference"
title = "Tiny preferences"
seeds = 2
methods = ["none", "dpo", "dpo-bird"]
data = {{ source = "positivity", limit = 6, held_out = 5, words = 12 }}
teacher = {{ epochs = 1, batch_size = 32, max_length = 100 }}
transfer = {{ epochs = 1, batch_size = 4, micro_batch = 2, lr = 1e-3, max_length = 120 }}
generation = {{ max_new_tokens = 6 }}
networks.tiny = {{ teacher = "{TEACHER}", student = "{STUDENT}", paper = {{ dpo = 50.0 }} }}
judges.bag = {{ kind = "bag-of-words" }}
judges.lexicon = {{ kind = "lexicon" }}
variants.plain = {{}}
variants.heavy = {{ methods = ["none", "dpo-bird"], beta = 5.0, rows = "chosen" }}
"""
WEAK = f"""
kind = "weak-to-strong"
title = "Tiny weak to strong"
seeds = 2
data = {{ source = "sentiment", limit = 24, held_out = 30 }}
teacher = {{ epochs = 1, batch_size = 16, lr = 1e-3, max_length = 100 }}
transfer = {{ epochs = 1, batch_size = 16, micro_batch = 8, lr = 1e-3, max_length = 100 }}
networks.tiny = {{ teacher = "{TEACHER}", student = "{STUDENT}", paper = {{ naive = 10.0, bird = 20.0 }} }}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sentences with an opening of their group's, scored by the word that they hold."""
    draw = random.Random(0)
    rows = []
    for k in range(240):
        good = k % 2 == 0
        words = " ".join(draw.choices(["plot", "cast", "scene", "music", "end"], k=3))
        opening = f"Kind{k // 2 % 30} of"
        rows.append(f"{k}\t{2 if good else -2}\t{opening} {'good great' if good else 'bad awful'} {words} {k}.\n")
    folder = tmp_path / "data"
    folder.mkdir()
    write_snippets(folder, "".join(rows))
    return folder


def run(text: str, name: str, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, Path]:
    recipe, out = data.parent / f"{name}.toml", data.parent / "out"
    recipe.write_text(text, encoding="utf-8")
    status = cli.main(["run", str(recipe), "--out", str(out), "--data", str(data), "--jobs", "1", *more])
    said = capsys.readouterr()
    return status, said.out + said.err, out / "reports" / name


# ---------------------------------------------------------------------------------------------- what files may say


def parse(text: str, **changes: Any) -> language_recipes.Recipe:
    return language_recipes.parse("mine", tomllib.loads(text) | changes)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["select", "language/positivity-dpo"], "select is for the recipes of images"),
        (["run", "language/positivity-dpo", "--compile"], "--compile is for the recipes of images"),
        (["run", "language/positivity-dpo", "--method", "bird"], "has no 'bird' among its methods: 'none', 'dpo'"),
        (["run", "language/positivity"], "there is no 'language/positivity'; there is 'language/positivity-dpo'"),
    ],
)
def test_commands_that_cannot_be(command: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command) == 2
    assert why in capsys.readouterr().err


def test_nothing_is_trained_where_data_or_a_key_is_missing(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    endpoint = 'judges.api = { kind = "endpoint", model = "m", url = "http://127.0.0.1:9", key_variable = "MY_KEY" }'
    for name, text, words in (
        ("keyless", PREFERENCE + endpoint, "environment variable MY_KEY"),
        ("nowhere", WEAK.replace(STUDENT, "no/such folder"), "no/such folder"),
        ("empty", PREFERENCE.replace("held_out = 5", "held_out = 6"), "pip download"),
    ):
        if name == "empty":
            (data / "vaderSentiment-3.3.2.tar.gz").unlink()
        status, said, _ = run(text, name, data, capsys)
        assert (status, words in said) == (2, True), said
    assert not list((data.parent / "out").rglob("result.json"))


# ---------------------------------------------------------------------------------------------- whole runs


def test_a_preference_recipe_from_the_command_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, folder = run(PREFERENCE, "prefer", data, capsys)
    assert status == 0, said
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page in said
    for part in ("## tiny, plain", "| DPO + BIRD ", "50.00", "good, bag", "DPO + BIRD minus DPO", "95 %"):
        assert part in page, part
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    root = data.parent / "out"
    cells = [cell for cell in found["cells"] if cell["variant"] == "plain"]
    assert {(cell["method"], cell["seed"]) for cell in cells} == {
        (m, s) for m in ("none", "dpo", "dpo-bird") for s in (0, 1)
    }
    # The page's share is the mean of the stages' verdicts.
    verdicts = [read(path) for path in root.glob("verdicts-*/result.json")]
    assert len(verdicts) == 2 * (2 + 2 + 2 + 2)  # judges; none of both variants, DPO, DPO + BIRD twice, two seeds
    assert all(len(v["verdicts"]) == 5 and set(v["verdicts"]) <= {0, 1} for v in verdicts)
    shares = [cell["judge bag"]["good"] for cell in cells if cell["method"] == "none"]
    assert found["results"]["tiny, plain"]["none"]["bag"]["mean"] == pytest.approx(np.mean(shares))
    guided = next(cell for cell in cells if cell["method"] == "dpo-bird")
    late = guided["training"]["second_half"]
    assert late["loss"] == pytest.approx(0.1 * late["task_loss"] + 0.9 * late["cka_loss"], rel=1e-5)
    samples = (folder / "samples.md").read_text(encoding="utf-8")
    assert samples.count("- DPO + BIRD (") == 10
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    # Once more: all is there, nothing is made again.
    times = {path: path.stat().st_mtime_ns for path in root.rglob("result.json")}
    status, said, _ = run(PREFERENCE, "prefer", data, capsys)
    assert status == 0
    assert "[" not in said.split("\n\n")[0].split("\n", 1)[-1]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("result.json")} == times


def test_any_preferences_in_trls_format(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of conversations: the teacher learns what was chosen, from pairs that the student does not get."""

    def say(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": say("user", f"and {i}?"), "chosen": say("assistant", f"yes {i}"), "rejected": say("assistant", "no")}
        for i in range(24)
    ]
    for split, part in (("train", rows[:20]), ("test", rows[20:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    text = PREFERENCE.replace('source = "positivity", limit = 6, held_out = 5, words = 12', f'source = "{data}"')
    text = text.replace("seeds = 2", "seeds = 1")
    options = ("--variant", "plain", "--method", "none", "dpo-bird")
    status, said, _ = run(text, "own", data, capsys, *options)
    assert status == 0, said
    root = data.parent / "out"
    (policy,) = root.glob("policy-*/result.json")
    assert len(read(policy)["history"]["train"]) == 3  # ten pairs by four
    assert {len(read(path)["responses"]) for path in root.glob("responses-*/result.json")} == {4}


def test_a_weak_to_strong_recipe_from_the_command_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, folder = run(WEAK, "weak", data, capsys)
    assert status == 0, said
    page = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("| Weak model ", "| Soft labels + BIRD, unbiased ", "20.00", "Soft labels + BIRD minus Soft labels"):
        assert part in page, part
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    numbers = found["results"]["tiny"]
    accuracy = {m: [c["test"]["accuracy"] for c in found["cells"] if c["method"] == m] for m in numbers}
    for method in numbers:
        assert numbers[method]["accuracy"] == pytest.approx(accuracy[method])
    for seed, recovered in enumerate(numbers["naive"]["gap_recovered"]):
        strong, weak, ceiling = (accuracy[m][seed] for m in ("naive", "weak", "ceiling"))
        wanted = (strong - weak) / (ceiling - weak) if ceiling > weak else float("nan")
        assert (recovered if recovered is not None else float("nan")) == pytest.approx(wanted, nan_ok=True)
    root = data.parent / "out"
    weak = [read(path) for path in root.glob("weak-*/result.json")]
    assert len(weak) == 2
    assert all(len(each["soft"]) == 24 for each in weak)
    labels = torch.tensor(weak[0]["soft"])
    torch.testing.assert_close(labels.sum(1), torch.ones(24))


def test_the_gap_recovered_and_its_interval() -> None:
    """Against the shares by hand, and the interval of a plain loop over resamples."""
    draw = np.random.default_rng(1)
    right = {
        m: draw.random((3, 400)) < p for m, p in {"weak": 0.6, "naive": 0.68, "bird": 0.72, "ceiling": 0.8}.items()
    }
    results = {
        method: {seed: {"test": {"right": row.astype(int).tolist()}} for seed, row in enumerate(rows)}
        for method, rows in right.items()
    }
    recipe = parse(WEAK, methods=("weak", "naive", "bird", "ceiling"))
    page, numbers = report._weak_to_strong(recipe, ("tiny", ""), results)
    acc = {method: rows.mean(1) for method, rows in right.items()}
    wanted = (acc["bird"] - acc["weak"]) / (acc["ceiling"] - acc["weak"])
    assert numbers["bird"]["gap_recovered"] == pytest.approx(wanted.tolist())
    assert f"{100 * wanted.mean():.1f} ± {100 * wanted.std(ddof=1):.1f}" in page
    pooled = {method: rows.mean(0) for method, rows in right.items()}
    shares = []
    for _ in range(4000):
        rows = draw.integers(0, 400, 400)
        strong, weak, ceiling = (pooled[m][rows].mean() for m in ("bird", "weak", "ceiling"))
        shares.append((strong - weak) / (ceiling - weak))
    interval = numbers["bird"]["interval"]
    assert [interval["low"], interval["high"]] == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.04)
    wrong = ~right["weak"]
    repeated = [(w & ~s).sum() / w.sum() for s, w in zip(right["bird"], wrong, strict=True)]
    kept = [(~w & s).sum() / (~w).sum() for s, w in zip(right["bird"], wrong, strict=True)]
    assert numbers["bird"]["mistakes_repeated"] == pytest.approx(repeated)
    assert numbers["bird"]["right_answers_kept"] == pytest.approx(kept)
    row = next(line for line in page.splitlines() if "Soft labels + BIRD" in line)
    assert row.split("|")[-3].strip().startswith(f"{100 * np.mean(repeated):.1f} ±")
    gain = numbers["bird"]["minus naive"]
    assert gain["mean"] == pytest.approx((acc["bird"] - acc["naive"]).mean())
    assert gain["low"] < gain["mean"] < gain["high"]


def test_the_second_half_of_training_may_end_without_cka() -> None:
    steps = [{"step": i, "loss": float(i)} | ({"cka": i / 10} if i < 4 else {}) for i in range(1, 5)]
    found = report._plain({"history": {"train": steps}, "accuracy": 0.5}, ("history",))
    assert found == {"accuracy": 0.5, "second_half": {"loss": pytest.approx(3.5), "cka": pytest.approx(0.3)}}


def test_a_guidance_that_is_off_at_the_end_is_told_of_while_it_is_on() -> None:
    on = [0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 0.0]
    steps = [{"step": i, "loss": i, "guide_beta": beta, "guide_grad": 20 * beta} for i, beta in enumerate(on, start=1)]
    assert second_half(steps) == pytest.approx({"loss": 6.5, "guide_beta": 0.35, "guide_grad": 7.0})
    assert second_half([{"step": 1, "guide_beta": 0.0}] * 2) == {"guide_beta": 0.0}


@pytest.mark.parametrize(
    ("naive", "ceiling", "cells", "recovered"),
    [
        ([1, 0, 0, 0], [1, 1, 1, 1], ["0.0", "-50.0"], [-0.5]),  # below zero counts as none beside the published one
        ([1, 1, 0, 0], [1, 1, 0, 0], None, [None]),
        ([1, 1, 0, 0], [0, 1, 0, 0], None, [None]),  # a ceiling below the weak model
    ],
)
def test_shares_of_a_gap_that_is_none_or_overshot(naive: Any, ceiling: Any, cells: Any, recovered: Any) -> None:
    rows = {"weak": [1, 1, 0, 0], "naive": naive, "ceiling": ceiling}
    results = {method: {0: {"test": {"right": right}}} for method, right in rows.items()}
    page, numbers = report._weak_to_strong(parse(WEAK, methods=tuple(rows)), ("tiny", ""), results)
    line = next(line for line in page.splitlines() if line.startswith("| Soft labels"))
    found = [cell.strip() for cell in line.split("|")]
    assert cells is None or found[4:6] == cells
    assert ("no gap" in found) == (cells is None)
    assert numbers["naive"]["gap_recovered"] == recovered


def test_what_bird_adds_to_preferences() -> None:
    """Shares, the difference on the same prompts, and answers of the judge that nobody could read."""
    draw = np.random.default_rng(0)
    good = {method: draw.random((2, 50)) < p for method, p in {"none": 0.4, "dpo": 0.5, "dpo-bird": 0.7}.items()}

    def of(row: Any) -> dict[str, Any]:
        verdicts: list[int | None] = row.astype(int).tolist()
        verdicts[3] = None
        judged = {"verdicts": verdicts, "name": "x"}
        health = {"responses": [], "perplexity": 20.0, "distinct": 0.5}
        judges = {"judge bag": judged, "judge lexicon": judged}
        return {"teacher": {"accuracy": 0.875}, "responses": health, "alignment": {"cka": 0.25}} | judges

    results = {method: {seed: of(row) for seed, row in enumerate(rows)} for method, rows in good.items()}
    page, numbers = report._preferences(parse(PREFERENCE), ("tiny", "plain"), results)
    for rows in good.values():
        rows[:, 3] = False  # not parsed is not good
    for method, rows in good.items():
        assert numbers[method]["bag"]["mean"] == pytest.approx(rows.mean())
    gain = numbers["dpo-bird minus dpo"]["lexicon"]
    assert gain["mean"] == pytest.approx(good["dpo-bird"].mean() - good["dpo"].mean())
    assert gain["low"] < gain["mean"] < gain["high"]
    assert "12 answers of judges could not be parsed" in page
    assert "right on 87.5 to 87.5 % of rows" in page
    assert "| DPO ".ljust(8) in page
    assert "50.00" in page


def read(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        # What is held out leaves the teacher's texts and the pairs, so nothing of another choice may be taken up.
        (
            {"data": {"source": "positivity", "limit": 6, "held_out": 4, "words": 12}},
            {"teacher", "policy", "bird", "responses", "tuned", "alignment"},
        ),
        (
            {"data": {"source": "positivity", "limit": 6, "held_out": 5, "words": 11}},
            {"policy", "bird", "tuned"},
        ),
        ({"transfer": {"epochs": 1, "batch_size": 4, "lr": 2e-3}}, {"policy", "bird", "tuned"}),
        ({"teacher": {"epochs": 2, "batch_size": 32, "max_length": 100}}, {"teacher", "bird", "alignment"}),
        ({"guidance": {"layer": "model.layers.0"}}, {"bird", "alignment"}),
        ({"generation": {"max_new_tokens": 7}}, {"responses", "tuned"}),
        ({"generation": {"max_new_tokens": 6, "temperature": 0.5}}, {"responses", "tuned"}),
        ({"title": "Another"}, set()),
    ],
)
def test_what_decides_a_stage_names_it(changes: dict[str, Any], moved: set[str], tmp_path: Path) -> None:
    def keys(**own: Any) -> dict[str, str]:
        found = Preferences(parse(PREFERENCE, **own), tmp_path, torch.device("cpu"))
        cells = {c.method: c for c in found.cells(variants=["plain"], seeds=1)}
        teacher = cells["none"].scores["alignment"].parents[0]
        return {
            "teacher": teacher.key,
            "policy": cells["dpo"].training.key,
            "bird": cells["dpo-bird"].training.key,
            "responses": cells["none"].scores["responses"].key,
            "tuned": cells["dpo"].scores["responses"].key,
            "alignment": cells["none"].scores["alignment"].key,
        }

    before, after = keys(), keys(**changes)
    assert {name for name in before if before[name] != after[name]} == moved
