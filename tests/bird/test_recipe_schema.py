"""What recipes may say: types, ranges and names of every key, found before anything is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from bird.lab.language import recipe as language
from bird.lab.recipe import made, names, parsed
from bird.lab.vision import recipe as vision

SIDE = {"data": "fashion-mnist-subset"}
VISION: dict[str, Any] = {
    "title": "Tiny",
    "teacher": SIDE,
    "student": SIDE,
    "pretraining": {"steps": 2},
    "transfer": {"epochs": 2},
    "scoring": {},
    "networks": {"one": {"teacher": "plain", "student": "plain"}},
    "variants": {"": {}},
}
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


def changed(table: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A recipe's table with one key, ``part/part/key``, said otherwise."""
    first, _, rest = path.partition("/")
    return dict(table) | {first: changed(table.get(first, {}), rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("seeds", 0, "seeds must be at least 1, not 0"),
        ("seeds", True, "seeds must be a whole number, not True"),
        ("seeds", "3", "seeds must be a whole number, not '3'"),
        ("title", 3, "title must be a string"),
        ("held_out", [], "held_out must not be empty"),
        ("corruptions", [], "corruptions must not be empty"),
        ("methods", [], "methods must not be empty"),
        ("methods", "bird", "methods must be a list of strings"),
        ("methods", [1], "methods must be a list of strings"),
        ("networks", {}, "networks must not be empty"),
        ("variants", {}, "variants must not be empty"),
        ("networks", 3, "networks must be a table"),
        ("networks/one", 3, r"networks\.one must be a table"),
        ("teacher", "cifar10", "teacher must be a table"),
        ("teacher", {}, "teacher: data must be there"),
        ("paper_pgr", {"birdd": 1.0}, "paper_pgr: there is no 'birdd'; there is 'bird'"),
        ("teacher/limit_per_class", -1, "limit_per_class must be at least 1, not -1"),
        ("teacher/limit_per_class", 1.5, "limit_per_class must be a whole number, not 1.5"),
        ("teacher/classes", [], "at least two, each once"),
        ("teacher/classes", [1, 1], "at least two, each once"),
        ("teacher/classes", [1, 99], "are 0 to 9"),
        ("teacher/classes", [0, 1.5], "classes must be a list of whole numbers"),
        ("teacher/augmnt", "none", "there is no 'augmnt'; there is 'augment'"),
        ("transfer/epochs", 1.5, "epochs must be a whole number, not 1.5"),
        ("transfer/epochs", 0, "epochs must be at least 1, not 0"),
        ("pretraining/steps", 0, "steps must be at least 1, not 0"),
        ("transfer/lr", -1, "lr must be at least 0, not -1"),
        ("transfer/lr", float("nan"), "lr must be at least 0, and finite, not nan"),
        ("transfer/lr", "fast", "lr must be a number, not 'fast'"),
        ("transfer/momentum", -0.5, "momentum must be at least 0"),
        ("transfer/weight_decay", -1.0, "weight_decay must be at least 0"),
        ("transfer/batch_size", 1, "batch_size must be at least 4, not 1"),
        ("transfer/amp", "int8", "amp must be None"),
        ("scoring/images", -1, "images must be at least 4, not -1"),
        ("scoring/images", 2, "images must be at least 4, not 2"),
        ("networks/one/paper", {"bird": "x"}, "paper must be a table"),
        ("variants//teacher_steps", 0, "teacher_steps must be at least 1"),
        ("variants//alpha", float("inf"), "alpha must be at least 0, and finite"),
        ("variants//beta", -1, "beta must be at least 0"),
        ("variants//teacher_layer", 3, "teacher_layer must be a string or a list of strings, not 3"),
    ],
)
def test_of_images(path: str, value: Any, said: str) -> None:
    vision.parse_vision("x", VISION)
    with pytest.raises(ValueError, match=said):
        vision.parse_vision("x", changed(VISION, path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("seeds", 0, "seeds must be at least 1"),
        ("networks", {}, "networks must not be empty"),
        ("variants", {}, "variants must not be empty"),
        ("judges", 3, "judges must be a table"),
        ("data", {}, "data: source must be there"),
        ("data/held_out", 1, "held_out must be at least 2"),
        ("data/words", "x", "words must be a whole number"),
        ("transfer/bf16", "x", "bf16 must be true or false, not 'x'"),
        ("transfer/bf16", 1, "bf16 must be true or false, not 1"),
        ("transfer/epochs", 1.5, "epochs must be a whole number, not 1.5"),
        ("transfer/lr", -1, "lr must be positive"),
        ("transfer/micro_batch", 5, "micro_batch 5 must divide"),
        ("teacher/adapters", 8, "adapters are for students"),
        ("guidance/rows", "chosn", "rows: there is no 'chosn'; there is 'chosen'"),
        ("guidance/pooling", "lst", "pooling: there is no 'lst'; there is 'last'"),
        ("guidance/pooling", "all", "pooling: there is no 'all'"),
        ("guidance/teacher_pooling", "all", "teacher_pooling: there is no 'all'"),
        ("guidance/completion_only", "x", "completion_only must be true or false, not 'x'"),
        ("guidance/alpha", -1, "alpha must be at least 0"),
        ("guidance/layer", 3, "layer must be a string, not 3"),
        ("generation/max_new_tokens", 0, "max_new_tokens must be at least 1, not 0"),
        ("generation/max_new_tokens", 1.5, "max_new_tokens must be a whole number"),
        ("generation/temperature", 0, "temperature and top_p must be above 0"),
        ("generation/temperature", -1, "temperature must be at least 0"),
        ("generation/top_p", 2, "top_p must be 0 to 1, not 2"),
        ("networks/one/pooling", "all", "pooling: there is no 'all'"),
        ("networks/one/lr", -1, "lr must be at least 0"),
        ("networks/one/paper", {"dpoo": 1.0}, "paper: there is no 'dpoo'; there is 'dpo'"),
        ("judges/it/kind", "lexcon", "kind: there is no 'lexcon'; there is 'lexicon'"),
        ("judges/it/max_tokens", 0, "max_tokens must be at least 1"),
        ("judges/it/timeout", -1, "timeout must be at least 0"),
        ("variants//rows", "x", "rows: there is no 'x'"),
        ("variants//limit", 1, "limit must be at least 2"),
        ("variants//epochs", 1.5, "epochs must be a whole number"),
        ("variants//alpha", -1, "alpha must be at least 0"),
    ],
)
def test_of_language_models(path: str, value: Any, said: str) -> None:
    language.parse("x", LANGUAGE)
    with pytest.raises(ValueError, match=said):
        language.parse("x", changed(LANGUAGE, path, value))


def test_parts_of_a_recipe_that_exclude_each_other() -> None:
    language.parse("x", WEAK)
    for table, said in (
        (changed(WEAK, "transfer/adapters", 8), "adapters are for students"),
        (changed(WEAK, "guidance/rows", "chosen"), "rows and completion_only are of preferences"),
        (changed(WEAK, "variants//completion_only", True), "rows and completion_only are of preferences"),
        (
            changed(changed(LANGUAGE, "guidance/completion_only", True), "variants//rows", "prompt"),
            r'variants\.: rows = "prompt" leaves no completion',
        ),
        (
            changed(changed(LANGUAGE, "transfer/micro_batch", 16), "variants//batch_size", 24),
            r"variants\.: micro_batch 16 must divide batch_size 24",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            language.parse("x", table)


@pytest.mark.parametrize("table", [VISION, LANGUAGE], ids=["vision", "language"])
def test_no_key_of_any_part_takes_what_is_of_another_type(table: dict[str, Any]) -> None:
    """A value that nothing takes, at every key there is."""
    parse = language.parse if "kind" in table else vision.parse_vision
    parts = {
        "Source": "teacher", "Budget": "transfer", "Scoring": "scoring", "Networks": "networks/one",
        "Variant": "variants/", "Training": "transfer", "Guiding": "guidance", "Data": "data",
        "Generation": "generation", "Pair": "networks/one", "Judging": "judges/it", "Change": "variants/",
    }  # fmt: skip
    module: Any = language if "kind" in table else vision
    tried = 0
    for kind, where in parts.items():
        for f in fields(getattr(module, kind)) if hasattr(module, kind) else ():
            if f.name not in (("teacher",) if kind == "Variant" else ()):
                with pytest.raises(ValueError, match=f"{f.name} must be a.*|{f.name} must be true or false"):
                    parse("x", changed(table, f"{where}/{f.name}", [{}]))
                tried += 1
    assert tried > 25


def test_a_setting_that_is_new_leaves_a_judges_name_as_it_was() -> None:
    plain = {"kind": "endpoint", "model": "m", "url": "http://localhost/v1", "key_variable": None}
    judge = made("judge", language.Judging, {k: v for k, v in plain.items() if v is not None})
    assert judge.about == plain
    more = {"max_tokens": 400, "key_header": "api-key", "timeout": 300}
    other = made("judge", language.Judging, {"kind": "endpoint", "model": "m", "url": "http://localhost/v1"} | more)
    assert other.about == plain | {"max_tokens": 400}
    assert get_type_hints(language.Judging)["timeout"] is float


def test_all_that_ship_are_right() -> None:
    from bird.lab.cli import _parse

    assert len([parsed(name, _parse) for name in names()]) > 15


# ---------------------------------------------------------------------------------------------- what must be there


@pytest.fixture
def preferences(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An experiment whose data are there and whose networks are tiny."""
    pytest.importorskip("trl", reason="the experiments are run by its trainers")
    from bird.lab.language import preference
    from bird.lab.language.data import Labelled
    from tests.bird.tiny import saved

    material = preference.Material([], [], [], [], [Labelled("a", 0), Labelled("b", 1)])
    monkeypatch.setattr(preference, "_material", lambda *_: material)
    table = changed(LANGUAGE, "networks/one", {"teacher": saved("encoder"), "student": saved("decoder")})

    def check(*changes: tuple[str, Any], material: Any = material) -> None:
        told = dict(table)
        for path, value in changes:
            told = changed(told, path, value)
        monkeypatch.setattr(preference, "_material", lambda *_: material)
        recipe = language.parse("x", told)
        preference.Preferences(recipe, Path("nowhere"), torch.device("cpu"), progress=False).check()

    return check


def test_judges_are_looked_at_before_anything_is_trained(preferences: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bird.lab.language.preference import Material

    preferences()
    endpoint = {"kind": "endpoint", "model": "m", "url": "http://localhost:1/v1/chat/completions"}
    preferences(("judges/it", endpoint | {"max_tokens": 100, "key_header": "api-key", "timeout": 5}))
    for judge, said in (
        (endpoint | {"url": "localhost"}, r"judges\.it: url must start with http"),
        (endpoint | {"timeout": 0}, r"judges\.it: .*timeout"),
        (endpoint | {"key_variable": "NOBODY_SETS_THIS"}, "NOBODY_SETS_THIS"),
        ({"kind": "language-model", "model": "minilm"}, r"judges\.it: minilm is an encoder"),
    ):
        with pytest.raises(ValueError, match=said):
            preferences(("judges/it", judge))
    for kind in ("classifier", "language-model"):
        with pytest.raises(FileNotFoundError, match=r"judges\.it: there is no folder \./no/such"):
            preferences(("judges/it", {"kind": kind, "model": "./no/such"}))
    with pytest.raises(ValueError, match="no texts to train a bag of words on"):
        preferences(("judges/it", {"kind": "bag-of-words"}), material=Material([], [], [], [], []))
    with pytest.raises(ValueError, match="minilm is an encoder, which cannot be a student"):
        preferences(("networks/one", {"teacher": "minilm", "student": "minilm"}))
    real = importlib.util.find_spec
    gone = ("vaderSentiment", "peft")
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


def test_guided_layers_are_looked_at_before_anything_is_trained(preferences: Any) -> None:
    preferences(("guidance/layer", "model.layers.1"), ("guidance/teacher_layer", "backbone.encoder.layer.1"))
    with pytest.raises(ValueError, match=r"guidance\.layer of .*model\.layers\.1"):
        preferences(("guidance/layer", "model.layers.7"))
    with pytest.raises(ValueError, match=r"guidance\.teacher_layer of "):
        preferences(("guidance/teacher_layer", "nonsense"))
