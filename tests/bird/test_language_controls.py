"""DPO where preferences are scarce: its arms on tiny networks, how pairs are ranked, and names that stay."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="the experiments are run by its trainers")

from bird.lab.claims import Claim
from bird.lab.language import recipe as language
from bird.lab.language import report
from bird.lab.language.alignment import text_alignment
from bird.lab.language.models import load_network
from bird.lab.language.preference import Preferences
from bird.lab.language.training import restore
from bird.lab.language.weak_to_strong import WeakToStrong
from bird.lab.recipe import parsed
from bird.lab.stages import complete, lineage
from bird.language.guidance import Guide
from tests.bird.test_language_experiments import STUDENT, TEACHER, WEAK, data, parse  # noqa: F401 -- a fixture
from tests.bird.tiny import bytes_tokenizer, guidance, student, teacher
from tests.bird.trainers import states

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind", "count", "digest"),
    [
        ("positivity-dpo", Preferences, 120, "c5d36c6b9c5044cf"),
        ("weak-to-strong-sentiment", WeakToStrong, 15, "8c1a25dd874daca3"),
    ],
)
def test_stages_of_results_in_the_repository_keep_their_names(name: str, kind: Any, count: int, digest: str) -> None:
    """As they were when the results were made, so that a setting that is new asks for no new run."""
    experiment = kind(parsed(f"language/{name}", language.parse), Path("x"), CPU)
    old = [cell for cell in experiment.cells() if not cell.method.endswith("permuted")]
    names = sorted(f"{stage.kind}-{stage.key}" for stage in lineage([s for cell in old for s in cell.wanted]))
    assert len(names) == count
    assert hashlib.sha256(" ".join(names).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "name", ["safety-dpo", "weak-to-strong-sciq", "weak-to-strong-cosmos-qa", "weak-to-strong-boolq"]
)
def test_the_papers_language_recipes_weigh_both_terms_equally(name: str) -> None:
    """And each has a layer in the upper half that all of its students have, beside the last token's final state."""
    blocks = {"SmolLM2-135M-Instruct": 30, "smollm2-360m": 32, "gpt2-medium": 24, "gpt2-large": 36}
    recipe = parsed(f"language/{name}", language.parse)
    found = [recipe.changed(recipe.guidance, change) for change in recipe.variants.values()]
    assert {(guiding.alpha, guiding.beta) for guiding in found} == {(1, 1)}
    last = [guiding.layer in (None, "model") and guiding.pooling == "last" for guiding in found]
    assert sorted(last) == [False, True]
    assert [guiding.share for guiding in found] == [None if final else 0.5 for final in last]
    path, _, number = str(found[last.index(False)].layer).rpartition(".")
    assert path == ("model.layers" if name == "safety-dpo" else "backbone.h")
    for pair in recipe.networks.values():
        assert 1 / 2 < (int(number) + 1) / blocks[pair.student.rpartition("/")[2]] < 1


def tiny() -> Any:
    """The recipe with tiny networks, few texts and one seed."""
    whole = parsed("language/scarce-dpo", language.parse)
    (pair,) = whole.networks.values()
    few = replace(whole.data, limit=6, held_out=5, ranked=4, words=12)
    return replace(
        whole,
        seeds=1,
        first_seed=0,
        data=few,
        teacher=replace(whole.teacher, epochs=1),
        transfer=replace(whole.transfer, epochs=2, batch_size=4, micro_batch=2, lr=1e-3, max_length=120),
        guidance=replace(whole.guidance, layer="model.layers.0"),
        generation=replace(whole.generation, max_new_tokens=6),
        networks={"tiny": replace(pair, teacher=TEACHER, student=STUDENT)},
        variants=dict(whole.variants) | {"lr x 0.65": replace(whole.variants["lr x 0.65"], lr=6.5e-4)},
    )


def margins_of(experiment: Preferences, cell: Any) -> list[float]:
    """DPO's implicit rewards, chosen less rejected, from the weights on the disk, a text at a time."""
    (tuned, tokenizer), (before, _) = (load_network(STUDENT, "causal") for _ in range(2))
    restore(tuned, cell.training.folder(experiment.root) / "training" / "policy.safetensors")

    @torch.no_grad()
    def reward(prompt: str, response: str) -> float:
        ids = torch.tensor([tokenizer(f"{prompt}{response}<end>")["input_ids"]])
        gain = [net(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None]) for net in (tuned, before)]
        return 0.1 * (gain[0] - gain[1])[len(tokenizer(prompt)["input_ids"]) - 1 :].sum().item()

    return [
        reward(str(pair.prompt), str(pair.chosen)) - reward(str(pair.prompt), str(pair.rejected))
        for pair in experiment._pairs(0)[1]
    ]


def test_every_arm_of_scarce_preferences(data: Path, tmp_path: Path) -> None:  # noqa: F811
    experiment = Preferences(tiny(), tmp_path / "out", CPU, data, progress=False)
    experiment.check()
    cells = experiment.cells()
    complete([stage for cell in cells for stage in cell.wanted], experiment.root)
    page = report.write_language_report(experiment, cells, tmp_path / "page")
    found = {(cell.variant, cell.method): cell for cell in cells}
    arms = [key for key in found if key[1] != "none"]
    assert len({found[key].training.key for key in arms}) == 5, "DPO, with less of a step, and three guided"
    history = {key: found[key].training.result(experiment.root)["history"]["train"] for key in arms}
    base, guided = ("completion, layer 20", "dpo"), ("completion, layer 20", "dpo-bird")
    for less, more in zip(history["lr x 0.65", "dpo"], history[base], strict=True):
        assert less["learning_rate"] == pytest.approx(0.65 * more["learning_rate"])
    first = {key: history[key][0]["cka"] for key in arms if "bird" in key[1]}
    assert len(set(first.values())) == 3, "another token, another layer, and rows of other texts"
    assert history[guided][0]["loss"] == pytest.approx(
        history[guided][0]["task_loss"] + history[guided][0]["cka_loss"], rel=1e-5
    )

    # What nobody was trained on is ranked.
    trained, ranked = experiment._pairs(0)
    texts = [str(text) for pair in ranked for text in (pair.prompt + pair.chosen, pair.prompt + pair.rejected)]
    assert len(ranked) == 4
    seen = {str(text) for pair in trained for text in (pair.prompt + pair.chosen, pair.prompt + pair.rejected)}
    assert not seen & set(texts)
    taught = {str(text) for _, text, _ in experiment.material(0).taught}
    assert not [text for text in texts if text.split(": ")[1] in taught]
    kept = json.loads((tmp_path / "page/results.json").read_text(encoding="utf-8"))["cells"]
    kept = {(cell["variant"], cell["method"]): cell for cell in kept}
    for key in arms:
        margins = margins_of(experiment, found[key])
        result = found[key].scores["ranking"].result(experiment.root)
        assert result["margins"] == pytest.approx(margins, abs=2e-4)
        assert kept[key]["ranking"]["margin"] == pytest.approx(np.mean(margins), abs=2e-4)
        assert kept[key]["ranking"]["accuracy"] == np.mean([margin > 0 for margin in result["margins"]])
    assert {cell["teacher's ranking"]["accuracy"] for cell in kept.values()} <= {0, 0.25, 0.5, 0.75, 1}
    assert "ranking" not in kept["end token", "none"], "what has not moved prefers nothing"
    for part in (
        "pairs ranked rightly",
        "margin",
        "DPO + BIRD minus DPO + BIRD, teacher permuted",
        "the teacher ranks",
    ):
        assert part in page, part


def test_how_rankings_are_told() -> None:
    """Shares and margins by hand, and differences over seeds of the same pairs."""
    draw = np.random.default_rng(0)
    margins = {m: draw.normal(by, 1, (3, 60)) for m, by in {"dpo": 0.1, "dpo-bird": 0.4}.items()}

    def of(row: Any) -> dict[str, Any]:
        told = {"verdicts": [1, 0], "name": "x"}
        health = {"responses": [], "perplexity": 20.0, "distinct": 0.5}
        scores = {"teacher": {"accuracy": 0.9}, "responses": health, "alignment": {"cka": 0.1}, "judge lexicon": told}
        own = {} if row is None else {"ranking": {"margins": row.tolist(), "accuracy": 0, "margin": 0}}
        return scores | {"teacher's ranking": {"accuracy": 0.925}} | own

    results = {"none": {seed: of(None) for seed in range(3)}}
    results |= {method: {seed: of(row) for seed, row in enumerate(rows)} for method, rows in margins.items()}
    page, numbers = report._preferences(tiny(), ("tiny", "end token"), results)
    right = {method: (rows > 0).mean() for method, rows in margins.items()}
    for method, rows in margins.items():
        assert numbers[method]["pairs ranked rightly"]["mean"] == pytest.approx(right[method])
        means = rows.mean(1)
        assert f"| {means.mean():.2f} ± {means.std(ddof=1):.2f} |" in page
    gain = numbers["dpo-bird minus dpo"]["pairs ranked rightly"]["mean"]
    assert gain == pytest.approx(right["dpo-bird"] - right["dpo"])
    assert f"{(margins['dpo-bird'] - margins['dpo']).mean():+.2f} (p " in page
    assert "ranks 92.5 to 92.5 %" in page
    assert "pairs ranked rightly" not in numbers["none"]
    lead = 92.5 - 100 * (margins["dpo"] > 0).mean(1)
    assert f"leads DPO by {lead.min():.1f} to {lead.max():.1f} points" in page


def test_claims_of_language_recipes() -> None:
    """Differences by seed of every measure, also over another variant; of what has been run."""
    recipe, draw = parsed("language/scarce-dpo", language.parse), np.random.default_rng(0)
    numbers = draw.random((2, 3, 3))  # method, seed, measure

    def of(row: Any) -> dict[str, Any]:
        verdicts = {"verdicts": [1] * round(10 * row[2]) + [None] * (10 - round(10 * row[2]))}
        return {"ranking": {"accuracy": row[0], "margin": row[1]}, "judge lexicon": verdicts}

    (networks,) = recipe.networks
    ran = {method: {seed: of(row) for seed, row in enumerate(rows)} for method, rows in zip("ab", numbers, strict=True)}
    whole = {"dpo": ran["a"], "dpo-bird": ran["b"]}
    groups = {(networks, "completion, layer 20"): whole, (networks, "lr x 0.65"): {"dpo": ran["b"]}}
    page, rows = report._claims(recipe, groups)
    found = {row["claim"]: row["differences"] for row in rows}
    first, second, third = (numbers[1] - numbers[0]).T
    wanted = {
        "BIRD above DPO, pairs ranked rightly": first,
        "BIRD above DPO, margin": second,
        "BIRD above DPO of a smaller step, pairs ranked rightly": 0 * first,
        "DPO of a smaller step above DPO, margin": second,
        "BIRD above DPO, positive responses by the lexicon": third,
    }
    assert found.keys() == wanted.keys(), "no permuted teacher has been run, and no end token"
    for name, differences in wanted.items():
        assert found[name] == pytest.approx(differences, abs=0.1 if "lexicon" in name else 1e-12)
    assert f"{100 * second.mean():+.2f} [" in "".join(page)
    with pytest.raises(ValueError, match=r"a measure of the claim 'x'.*no 'margin'"):
        replace(recipe, claims={"x": Claim("dpo", "none", ("end token",), measure="margin")}, data=language.Data("p"))


def test_layers_pooling_and_learning_rates_of_variants(tmp_path: Path) -> None:
    """A variant's own name the student's stage and reach it; they win over those of a pair."""
    recipe = tiny()
    changes = {
        "": language.Change(),
        "layer": language.Change(layer="model.layers.1"),
        "pooling": language.Change(pooling="first"),
        "lr": language.Change(lr=2e-3),
    }
    pair = replace(recipe.networks["tiny"], lr=5e-4)
    recipe = replace(recipe, networks={"tiny": pair}, variants=changes, methods=("dpo-bird",), claims={})
    experiment = Preferences(recipe, tmp_path, CPU)
    keys = {cell.variant: cell.training.key for cell in experiment.cells() if cell.training}
    assert len(set(keys.values())) == 4
    assert experiment.change(pair, "lr")[1].lr == 2e-3
    assert experiment.change(pair, "layer")[1].lr == 5e-4
    assert experiment.guiding(changes["layer"])["layer"] == "model.layers.1"
    assert experiment.guiding(changes["pooling"])["pooling"] == "first"


@pytest.mark.parametrize(("pooling", "permuted"), [("last", False), ("mean", False), ("last", True)])
def test_how_a_weak_model_guides(pooling: str, permuted: bool, data: Path, monkeypatch: Any) -> None:  # noqa: F811
    """The student's pooling and layer are the variant's, and a permuted weak model is one of the methods."""
    from bird.lab.language import classifiers

    made: list[Any] = []

    def trained(model: Any, *_: Any, guidance: Any = None, **__: Any) -> dict[str, Any]:
        made.append(guidance)
        return {"train": []}

    method = "bird-permuted" if permuted else "bird"
    variant = {"layer": "backbone.layers.0", "pooling": pooling}
    recipe = parse(WEAK, seeds=1, methods=[method], variants={"": variant})
    experiment = WeakToStrong(recipe, data.parent / "out", CPU, data, progress=False)
    experiment.check()
    (cell,) = experiment.cells()
    complete(cell.scores["test"].parents, experiment.root)
    monkeypatch.setattr(classifiers, "train_classifier", trained)
    complete(cell.wanted, experiment.root)
    (guidance,) = made
    assert (guidance.pooling, guidance.layer, guidance.permuted) == (pooling, "backbone.layers.0", permuted)
    assert "bird-permuted" not in parse(WEAK).methods, "a control is asked for by name"


@pytest.mark.parametrize("guiding", [{}, {"teacher_layer": "backbone.encoder.layer.0"}])
def test_an_anchor_is_tapped_where_its_student_is(guiding: dict[str, str], data: Path) -> None:  # noqa: F811
    """At its start a student is what the anchor stays, at an inner block, too; the weak model's layer is another."""
    recipe = parse(
        WEAK,
        seeds=1,
        methods=["bird-anchored", "bird"],
        guidance=guiding,
        variants={"": {"layer": "backbone.layers.0"}},
    )
    experiment = WeakToStrong(recipe, data.parent / "out", CPU, data, progress=False)
    experiment.check()
    alike = {}
    for cell in experiment.cells():
        complete(cell.wanted, experiment.root)
        alike[cell.method] = (cell.wanted[0].result(experiment.root) or {})["history"]["train"][0]["cka"]
    assert alike["bird-anchored"] == pytest.approx(1, abs=1e-5)
    assert alike["bird"] < 0.99


def test_the_weak_models_layer_names_no_anchored_stage(tmp_path: Path) -> None:
    """But the student's own does, as it always did."""
    named = {"backbone.layers.0", "backbone.encoder.layer.0", None}
    keys = {}
    for layer, theirs in ((a, b) for a in named for b in named):
        guiding = {name: of for name, of in (("layer", layer), ("teacher_layer", theirs)) if of}
        recipe = parse(WEAK, methods=["bird-anchored", "bird"], guidance=guiding)
        for cell in WeakToStrong(recipe, tmp_path, CPU).cells(seeds=1):
            keys[cell.method, layer, theirs] = cell.wanted[0].key
    assert len({key for (method, *_), key in keys.items() if method == "bird"}) == 9
    anchored = {layer: {keys["bird-anchored", layer, theirs] for theirs in named} for layer in named}
    assert len({*map(tuple, anchored.values())}) == 3
    assert all(len(of) == 1 for of in anchored.values())


def test_a_guided_layer_is_one(tmp_path: Path) -> None:
    """A glob would match several, and the run would look for one of that name."""
    recipe = parse(WEAK, guidance={"layer": "backbone.layers.*"})
    with pytest.raises(ValueError, match=r"guidance\.layer of .*'backbone\.layers\.\*' is a glob: name one layer"):
        WeakToStrong(recipe, tmp_path, CPU, tmp_path).check()


def test_alignment_of_completions_leaves_out_the_first_token() -> None:
    texts, model, encoder = [f"{a} film {b}s" for a in "abc" for b in "de"], student(), teacher()
    chosen = {"layer": "model.layers.0", "pooling": "mean", "completion_only": True}
    guide = Guide(guidance(teacher=encoder, **chosen), model, bytes_tokenizer())
    found = text_alignment(guide, model, bytes_tokenizer(), texts, size=4)
    with torch.no_grad():
        inner = [
            model(torch.tensor([bytes_tokenizer()(f"{text}<end>")["input_ids"]]), output_hidden_states=True)
            for text in texts
        ]
        ours = torch.stack([each.hidden_states[1][0, 1:].mean(0) for each in inner]).double()
        theirs = torch.stack([states(text, encoder.bert)[1:].mean(0) for text in texts]).double()
    k, other = ((x @ x.T).fill_diagonal_(0) for x in (ours, theirs))

    def hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Song et al. (2012), unbiased, but for a factor."""
        n = len(x)
        return (x * y).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (x @ y).sum()

    assert found == pytest.approx((hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt()).item(), abs=1e-4)
