"""Recipes: what ships is read, the paper's numbers are there, and what is wrong with any key is named at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from bird.lab.language import recipe as language
from bird.lab.recipe import made, names, parsed, require_name
from bird.lab.vision import recipe as vision
from bird.lab.vision.methods import METHODS
from bird.lab.vision.recipe import Budget, Networks, RecipeVariant, Source, read_vision

SIDE = {"data": "fashion-mnist-subset"}
VISION: dict[str, Any] = {
    "title": "Tiny",
    "teacher": SIDE,
    "student": SIDE,
    "pretraining": {"steps": 2}, "transfer": {"epochs": 2},
    "scoring": {},
    "networks": {"one": {"teacher": "plain", "student": "plain"}},
    "variants": {"": {}},
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "kind": "preference",
    "title": "Tiny",
    "data": {"source": "positivity"},
    "teacher": {},
    "transfer": {},
    "guidance": {},
    "generation": {},
    "networks": {"one": {"teacher": "minilm", "student": "smollm2-135m"}},
    "judges": {"it": {"kind": "lexicon"}},
    "variants": {"": {}},
}
WEAK = {k: v for k, v in LANGUAGE.items() if k not in ("judges", "generation")} | {"kind": "weak-to-strong"}
IMAGES = [name for name in names() if not name.startswith("language/")]
PAPER = {  # shared/paper/FACTS.md, from the paper's tables
    "safety-dpo": {
        "smollm2-135m": {"none": 43.88, "dpo": 65.48, "dpo-bird": 71.28},
        "smollm2-360m": {"none": 47.63, "dpo": 86.57, "dpo-bird": 88.37},
    },
    "weak-to-strong-sciq": {
        "gpt2-medium": {"naive": 7.79, "bird": 16.14},
        "gpt2-large": {"naive": 17.70, "bird": 24.19},
    },
    "weak-to-strong-cosmos-qa": {"gpt2-medium": {}, "gpt2-large": {"naive": 65.51, "bird": 68.02}},
    "weak-to-strong-boolq": {"gpt2-medium": {"naive": 0, "bird": 0}, "gpt2-large": {"naive": 0, "bird": 0}},
    "positivity-dpo": {"smollm2-135m": {}},
    "scarce-dpo": {"smollm2-135m": {}},
    "weak-to-strong-sentiment": {"minilm-smollm2": {}},
    "weak-to-strong-glosses": {"minilm-smollm2": {}},
}


def changed(table: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A recipe's table with one key, ``part/part/key``, said otherwise."""
    first, _, rest = path.partition("/")
    return dict(table) | {first: changed(table.get(first, {}), rest, value) if rest else value}


def parse(table: Mapping[str, Any]) -> Any:
    return (language.parse if "kind" in table else vision.parse_vision)("x", table)


# ------------------------------------------------------------------------------------------- what ships


@pytest.mark.parametrize("name", IMAGES)
def test_shipped_recipes_are_whole(name: str) -> None:
    recipe = read_vision(name)
    assert recipe.name == name
    # without them no share of a gap can be told, of one variant at least
    assert any({"none", "ceiling"} <= set(v.methods or recipe.methods) for v in recipe.variants.values())
    assert recipe.networks


def test_the_papers_vision_tables() -> None:
    """Eight rows of seven numbers (FACTS), robust accuracy of DenseNet-169 and MobileNetV2; BIRD is best in each."""
    rows = [n.paper for name in IMAGES for n in read_vision(name).networks.values() if n.paper]
    assert len(rows) == 8
    for row in rows:
        assert list(row) == ["none", "lp", "ft", "lp-ft", "hints", "lwf", "bird"]
        assert max(row, key=row.__getitem__) == "bird"
    sums = {method: sum(row[method] for row in rows) for method in ("none", "lwf", "bird")}
    assert sums["none"] == pytest.approx(51.31 + 2 * 20.74 + 2 * 22.59 + 54.51 + 2 * 22.59)
    assert sums["lwf"] == pytest.approx(52.21 + 20.52 + 23.18 + 23.23 + 23.27 + 56.92 + 26.14 + 24.14)
    assert sums["bird"] == pytest.approx(54.77 + 24.11 + 25.03 + 23.38 + 23.68 + 59.04 + 27.46 + 25.25)
    shares = {name: dict(read_vision(name).paper_pgr) for name in IMAGES if read_vision(name).paper_pgr}
    assert shares == {
        "vision/c10-c100": {"bird": 31.8, "lwf": 13.5},
        "vision/c10-tin": {"bird": 22.4, "lwf": 4.9},
    }
    assert dict(read_vision("vision/weak-to-strong").networks["mobilenetv2-resnet152"].paper_pgr) == {"bird": 22.4}


def test_the_papers_figures_of_language_models() -> None:
    found = {name: parsed(name, language.parse).networks for name in names() if name.startswith("language/")}
    assert {
        name.removeprefix("language/"): {key: dict(pair.paper) for key, pair in networks.items()}
        for name, networks in found.items()
    } == PAPER
    with pytest.raises(ValueError, match="of language models, not of images"):
        read_vision("language/positivity-dpo")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "try.toml"
    path.write_text("""
title = "a try"
teacher = { data = "digits", augment = "crop" }
student = { data = "digits", limit_per_class = 20 }
pretraining = { steps = 5 }
transfer = { epochs = 2, batch_size = 16 }
networks.small = { teacher = "plain", student = "resnet-tiny" }
""")
    recipe = read_vision(str(path))
    assert recipe.name == "try"
    assert recipe.teacher == Source("digits", augment="crop")
    assert recipe.networks == {"small": Networks("plain", "resnet-tiny")}
    assert recipe.methods == tuple(METHODS)
    assert recipe.variants == {"": RecipeVariant()}
    settings = recipe.transfer.settings(100, seed=7)
    assert (settings.steps, settings.batch_size, settings.seed) == (14, 16, 7)  # 2 epochs: 6 whole batches, 4 images
    assert recipe.transfer.settings(99, 7).steps == 12  # of three, which are too few
    assert recipe.transfer.settings(100, 7, batch_size=4).steps == 14
    assert recipe.pretraining.settings(10**6, 0).steps == 5
    for text in (b'title = "a try', b'title = "\xff"', b"a = " + b"[" * 20_000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"recipe .*try.toml"):
            read_vision(str(path))


# ---------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("seeds", 0, "seeds must be at least 1, not 0"),
        ("seeds", 10**30, "seeds must be at most 1e\\+09"),
        ("title", "a\0b", "title must not hold"),
        ("networks", {"": {"teacher": "plain"}}, "names files: .* 1 to 60 characters"),
        ("networks/one/paper", {"bird": float("nan")}, r"networks\.one: paper: bird must be 0 to 100, in %, not nan"),
        ("paper_pgr", {"bird": -1}, "paper_pgr: bird must be 0 to 100, in %, not -1"),
        ("transfer/lr", 1e308, "lr must be at most"),
        ("transfer/lr", 0, "lr must be positive"),
        ("variants//teacher_layer", [], "teacher_layer and student_layer must not be empty"),
        ("data", {"source": "positivity"}, 'kind = "preference" or "weak-to-strong" must be there'),
        ("seeds", True, "seeds must be a whole number, not True"),
        ("title", 3, "title must be a string"),
        ("held_out", [], "held_out must not be empty"),
        ("methods", "bird", "methods must be a list of strings"),
        ("methods", [1], "methods must be a list of strings"),
        ("methods", ["brid"], "methods: there is no 'brid'; there is 'bird'"),
        ("corruptions", ["fgo"], "there is no 'fgo'; there is 'fog'"),
        ("networks", {}, "networks must not be empty"),
        ("networks", 3, "networks must be a table"),
        ("networks/one", 3, r"networks\.one must be a table"),
        ("networks/one/student", "resnet-tin", r"networks\.one: student: there is no 'resnet-tin'"),
        ("networks/one/paper", {"bird": "x"}, "paper must be a table"),
        ("paper_pgr", {"birdd": 1.0}, "paper_pgr: there is no 'birdd'; there is 'bird'"),
        ("teacher", {}, "teacher: data must be there"),
        ("teacher/data", "digit", "teacher: data: there is no 'digit'; there"),
        ("teacher/limit_per_class", -1, "limit_per_class must be at least 1, not -1"),
        ("teacher/classes", [], "at least two, each once"),
        ("teacher/classes", [1, 1], "at least two, each once"),
        ("teacher/classes", [1, 99], "are 0 to 9"),
        ("teacher/classes", [0, 1.5], "classes must be a list of whole numbers"),
        ("teacher/augmnt", "none", "a key of teacher: there is no 'augmnt'; there is 'augment'"),
        ("pretraining/epochs", 1, "pretraining: say epochs or steps"),
        ("transfer/epochs", 1.5, "epochs must be a whole number, not 1.5"),
        ("transfer/epochs", 0, "epochs must be at least 1, not 0"),
        ("transfer/lr", float("nan"), "lr must be at least 0, and finite, not nan"),
        ("transfer/momentum", -0.5, "momentum must be at least 0"),
        ("transfer/weight_decay", -1.0, "weight_decay must be at least 0"),
        ("transfer/batch_size", 1, "batch_size must be at least 4, not 1"),
        ("transfer/amp", "int8", "amp must be None"),
        ("scoring/images", 2, "images must be at least 4, not 2"),
        ("scoring/corruptions", ["fog"], "must hold all that are held out"),
        ("teacher_tuning", {"steps": 1, "epochs": 1}, "teacher_tuning: say epochs or steps"),
        ("variants//teacher_steps", 0, r"variants\.: teacher_steps must be at least 1"),
        ("variants//networks", ["on"], "networks of a variant: there is no 'on'; there is 'one'"),
        ("variants//batch_size", 3, "batch_size must be at least 4"),
        ("variants//alpha", float("inf"), "alpha must be at least 0, and finite"),
        ("variants//beta", -1, "beta must be at least 0"),
        ("variants//teacher_layer", 3, "teacher_layer must be a string or a list of strings, not 3"),
        ("variants//teacher_corruptions", ["fgo"], "there is no 'fgo'; there is 'fog'"),
        ("variants//teacher", {"data": "digit"}, r"variants\.\.teacher: data: there is no 'digit'"),
    ],
)
def test_of_images(path: str, value: Any, said: str) -> None:
    parse(VISION)
    with pytest.raises(ValueError, match=said):
        parse(changed(VISION, path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("kind", "preferences", "kind: there is no 'preferences'; there is 'preference'"),
        ("seeds", 0, "seeds must be at least 1"),
        ("judges", {"": {"kind": "lexicon"}}, "names files: .* 1 to 60 characters"),
        ("networks/one/paper", {"dpo": float("inf")}, "paper: dpo must be 0 to 100, in %, not inf"),
        ("networks/one/lr", 0, "lr must be positive"),
        ("transfer/lr", 1e308, "lr must be at most"),
        ("methods", ["dpo-brid"], "methods: there is no 'dpo-brid'; there is 'dpo-bird'"),
        ("variants", {}, "variants must not be empty"),
        ("judges", 3, "judges must be a table"),
        ("judges", {}, "who judges the responses"),
        ("data", {}, "data: source must be there"),
        ("data/held_out", 1, "held_out must be at least 2"),
        ("data/limit", 1, "data: limit must be at least 2"),
        ("data/words", "x", "words must be a whole number"),
        ("data/ranked", -1, "ranked must be at least 0"),
        ("data/taught", 0.9, "taught 0.9 and judged 0.18 must leave sentences"),
        ("data", {"source": "own.jsonl", "judged": 0.0}, "shares of positivity's sentences, not of own.jsonl"),
        ("transfer/batch", 3, "a key of transfer: there is no 'batch'"),
        ("transfer/epochs", 0, "epochs must be at least 1"),
        ("transfer/adapters", -1, "adapters not negative"),
        ("transfer/bf16", 1, "bf16 must be true or false, not 1"),
        ("transfer/lr", 0.0, "transfer: lr must be positive"),
        ("transfer/max_grad_norm", -1, "max_grad_norm must be at least 0"),
        ("transfer/warmup", 1.0, r"transfer: warmup must be in \[0, 1\)"),
        ("transfer/micro_batch", 5, "micro_batch 5 must divide"),
        ("teacher/adapters", 8, "adapters are for students"),
        ("guidance/rows", "chosn", "rows: there is no 'chosn'; there is 'chosen'"),
        ("guidance/pooling", "all", "pooling: there is no 'all'"),
        ("guidance/teacher_pooling", "all", "teacher_pooling: there is no 'all'"),
        ("guidance/alpha", -1, "alpha must be at least 0"),
        ("generation/max_new_tokens", 0, "max_new_tokens must be at least 1, not 0"),
        ("generation/temperature", 0, "temperature and top_p must be above 0"),
        ("generation/top_p", 2, "top_p must be 0 to 1, not 2"),
        ("networks/one/pooling", "all", "pooling: there is no 'all'"),
        ("networks/one/lr", -1, "lr must be at least 0"),
        ("networks/one/paper", {"dpoo": 1.0}, "paper: there is no 'dpoo'; there is 'dpo'"),
        ("judges/it/kind", "lexcon", r"judges\.it: kind: there is no 'lexcon'; there is 'lexicon'"),
        ("judges/it", {"kind": "endpoint", "model": "m"}, r"judges\.it: .*needs a url"),
        ("judges/it", {"kind": "classifier"}, r"judges\.it: .*needs a model"),
        ("judges/it/max_tokens", 0, "max_tokens must be at least 1"),
        ("judges/it/timeout", -1, "timeout must be at least 0"),
        ("variants//rows", "x", "rows: there is no 'x'"),
        ("variants//limit", 1, "limit must be at least 2"),
        ("variants//pooling", "all", r"variants\.: pooling: there is no 'all'"),
        ("variants//lr", 0, r"variants\.: lr must be positive"),
    ],
)
def test_of_language_models(path: str, value: Any, said: str) -> None:
    parse(LANGUAGE)
    with pytest.raises(ValueError, match=said):
        parse(changed(LANGUAGE, path, value))


def test_parts_of_a_recipe_that_exclude_each_other() -> None:
    parse(WEAK)
    prompts = changed(changed(LANGUAGE, "guidance/completion_only", True), "variants//rows", "prompt")
    batches = changed(changed(LANGUAGE, "transfer/micro_batch", 16), "variants//batch_size", 24)
    for table, said in (
        (changed(WEAK, "transfer/adapters", 8), "adapters are for students"),
        (changed(WEAK, "data/ranked", 5), "ranked is of preferences"),
        (changed(WEAK, "guidance/rows", "chosen"), "rows and completion_only are of preferences"),
        (changed(WEAK, "variants//completion_only", True), "rows and completion_only are of preferences"),
        (prompts, r'variants\.: rows = "prompt" leaves no completion'),
        (batches, r"variants\.: micro_batch 16 must divide batch_size 24"),
        ({"title": "x"}, "teacher, student, pretraining, transfer, networks must be there"),
        ({"kind": "preference", "title": "x", "networks": {}, "teacher": {}}, "data, transfer must be there"),
        ({k: v for k, v in VISION.items() if k != "title"}, "title must be there"),
    ):
        with pytest.raises(ValueError, match=said):
            parse(table)
    with pytest.raises(ValueError, match="one of them, got epochs=None, steps=None"):
        Budget()
    for name, said in (
        ("vision/c10-c10", "there is no 'vision/c10-c10'; there is 'vision/c10-c100'"),
        ("nowhere.toml", r"there is no file nowhere\.toml"),
    ):
        with pytest.raises(ValueError, match=said):
            read_vision(name)


@pytest.mark.parametrize("name", ["../../../x", "a/b", "a\\b", ".hidden", "..", "a\nb", "x" * 61])
def test_names_that_begin_files_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names files: no slashes"):
        require_name("it", name)
    for table in (VISION, LANGUAGE):
        for part in {"networks", "judges", "variants"} & {*table}:
            with pytest.raises(ValueError, match=rf"(?s){part}.* of a recipe: .* names files: no slashes"):
                parse(table | {part: {name: next(iter(table[part].values()))}})
    (tmp_path / "..toml").write_text('title = "Tiny"')
    with pytest.raises(ValueError, match=r"the recipe '\.' names files"):
        read_vision(str(tmp_path / "..toml"))


@pytest.mark.parametrize("table", [VISION, LANGUAGE], ids=["vision", "language"])
def test_no_key_of_any_part_takes_what_is_of_another_type(table: dict[str, Any]) -> None:
    """A value that nothing takes, at every key there is."""
    parts = {
        "Source": "teacher", "Budget": "transfer", "Scoring": "scoring", "Networks": "networks/one",
        "RecipeVariant": "variants/", "Training": "transfer", "Guiding": "guidance", "Data": "data",
        "Generation": "generation", "Pair": "networks/one", "Judging": "judges/it", "Change": "variants/",
    }  # fmt: skip
    module: Any = language if "kind" in table else vision
    tried = 0
    for kind, where in parts.items():
        for f in fields(getattr(module, kind)) if hasattr(module, kind) else ():
            if f.name not in (("teacher",) if kind == "RecipeVariant" else ()):
                with pytest.raises(ValueError, match=f"{f.name} must be a.*|{f.name} must be true or false"):
                    parse(changed(table, f"{where}/{f.name}", [{}]))
                tried += 1
    assert tried > 25


def test_a_setting_that_is_new_leaves_a_judges_name_as_it_was() -> None:
    plain = {"kind": "endpoint", "model": "m", "url": "http://localhost/v1"}
    assert made("judge", language.Judging, plain).about == plain | {"key_variable": None}
    other = made("judge", language.Judging, plain | {"max_tokens": 400, "key_header": "api-key", "timeout": 300})
    assert other.about == plain | {"key_variable": None, "max_tokens": 400}
    assert get_type_hints(language.Judging)["timeout"] is float


# ---------------------------------------------------------------------------------------------- what must be there


@pytest.fixture
def preferences(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An experiment whose data are there and whose networks are tiny."""
    pytest.importorskip("trl", reason="the experiments are run by its trainers")
    from bird.lab.language import preference
    from bird.lab.language.data import Labelled, Material
    from tests.bird.tiny import saved

    table = changed(LANGUAGE, "networks/one", {"teacher": saved("encoder"), "student": saved("decoder")})

    judged = [Labelled("a", 0), Labelled("b", 1)]

    def check(*changes: tuple[str, Any], material: Material = Material([], [], [], [], judged)) -> None:  # noqa: B008
        told = dict(table)
        for path, value in changes:
            told = changed(told, path, value)
        monkeypatch.setattr(preference, "_material", lambda *_: material)
        preference.Preferences(parse(told), Path("nowhere"), torch.device("cpu"), progress=False).check()

    return check


def test_judges_and_layers_are_looked_at_before_anything_is_trained(
    preferences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bird.lab.language.data import Material

    endpoint = {"kind": "endpoint", "model": "m", "url": "http://localhost:1/v1/chat/completions"}
    preferences(("guidance/layer", "model.layers.1"), ("guidance/teacher_layer", "backbone.encoder.layer.1"))
    preferences(("judges/it", endpoint | {"max_tokens": 100, "key_header": "api-key", "timeout": 5}))
    for path, value, said in (
        ("judges/it", endpoint | {"url": "localhost"}, r"judges\.it: url must start with http"),
        ("judges/it", endpoint | {"timeout": 0}, r"judges\.it: .*timeout"),
        ("judges/it", endpoint | {"key_variable": "NOBODY_SETS_THIS"}, "NOBODY_SETS_THIS"),
        ("judges/it", {"kind": "language-model", "model": "minilm"}, r"judges\.it: minilm is an encoder"),
        ("networks/one", {"teacher": "minilm", "student": "minilm"}, "minilm is an encoder, which cannot be a student"),
        ("guidance/layer", "model.layers.7", r"guidance\.layer of .*model\.layers\.1"),
        ("variants//layer", "model.layers.7", r"guidance\.layer of .*model\.layers\.1"),
        ("data/ranked", 3, "ranked asks for 3 pairs, and of seed 0 there are 0"),
        ("guidance/teacher_layer", "nonsense", r"guidance\.teacher_layer of "),
    ):
        with pytest.raises(ValueError, match=said):
            preferences((path, value))
    for kind in ("classifier", "language-model"):
        with pytest.raises(FileNotFoundError, match=r"judges\.it: there is no folder \./no/such"):
            preferences(("judges/it", {"kind": kind, "model": "./no/such"}))
    with pytest.raises(ValueError, match="no texts to train a bag of words on"):
        preferences(("judges/it", {"kind": "bag-of-words"}), material=Material([], [], [], [], []))
    real, gone = importlib.util.find_spec, ("vaderSentiment", "peft")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    with pytest.raises(ImportError, match="vaderSentiment is not installed"):
        preferences()
    with pytest.raises(ImportError, match="peft is not installed"):
        preferences(("judges/it", endpoint), ("transfer/adapters", 4))


def test_prompts_and_responses_have_room_in_the_students_window(preferences: Any) -> None:
    from bird.lab.language.data import Labelled, Material

    whole = Material([], ["p", "a prompt"], ["t"], [], [Labelled("a", 0), Labelled("b", 1)])
    preferences(material=whole)
    with pytest.raises(ValueError, match=r"student .*: prompt 1 has (\d+) tokens with 99999 new ones, .* positions"):
        preferences(("generation/max_new_tokens", 99_999), material=whole)
    with pytest.raises(ValueError, match=r"at most \d+ be generated \(max_new_tokens\)") as error:
        preferences(("generation/max_new_tokens", 99_999), material=whole)
    fits = int(str(error.value).split("at most ")[1].split()[0])
    preferences(("generation/max_new_tokens", fits), material=whole)
    with pytest.raises(ValueError, match=f"let at most {fits} be generated"):
        preferences(("generation/max_new_tokens", fits + 1), material=whole)
    with pytest.raises(ValueError, match=r"student .*: held-out text 0 has \d+ tokens, and the model has"):
        preferences(material=replace(whole, texts=["word " * 20_000]))
