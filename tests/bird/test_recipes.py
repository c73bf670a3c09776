"""Recipes: what ships is read_vision, what is wrong is named, and the paper's numbers are all there."""

from __future__ import annotations

from pathlib import Path

import pytest

from bird.lab.recipe import names
from bird.lab.vision.methods import METHODS
from bird.lab.vision.recipe import Budget, Networks, Source, Variant, parse_vision, read_vision

MINIMAL = """
title = "a try"
[teacher]
data = "digits"
augment = "crop"
[student]
data = "digits"
limit_per_class = 20
[pretraining]
steps = 5
[transfer]
epochs = 2
batch_size = 16
[networks.small]
teacher = "plain"
student = "resnet-tiny"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "try.toml"
    path.write_text(MINIMAL)
    return path


VISION = [name for name in names() if not name.startswith("language/")]


@pytest.mark.parametrize("name", VISION)
def test_shipped_recipes_are_whole(name: str) -> None:
    recipe = read_vision(name)
    assert recipe.name == name
    # without them no share of a gap can be told, of one variant at least
    assert any({"none", "ceiling"} <= set(v.methods or recipe.methods) for v in recipe.variants.values())
    assert recipe.networks


def test_the_papers_vision_tables() -> None:
    """Eight rows of seven numbers (FACTS), robust accuracy of DenseNet-169 and MobileNetV2; BIRD is best in each."""
    rows = [n.paper for name in VISION for n in read_vision(name).networks.values() if n.paper]
    assert len(rows) == 8
    for row in rows:
        assert list(row) == ["none", "lp", "ft", "lp-ft", "hints", "lwf", "bird"]
        assert max(row, key=row.__getitem__) == "bird"
    sums = {method: sum(row[method] for row in rows) for method in ("none", "lwf", "bird")}
    assert sums["none"] == pytest.approx(51.31 + 2 * 20.74 + 2 * 22.59 + 54.51 + 2 * 22.59)
    assert sums["lwf"] == pytest.approx(52.21 + 20.52 + 23.18 + 23.23 + 23.27 + 56.92 + 26.14 + 24.14)
    assert sums["bird"] == pytest.approx(54.77 + 24.11 + 25.03 + 23.38 + 23.68 + 59.04 + 27.46 + 25.25)
    shares = {name: dict(read_vision(name).paper_pgr) for name in VISION if read_vision(name).paper_pgr}
    assert shares == {
        "vision/c10-c100": {"bird": 31.8, "lwf": 13.5},
        "vision/c10-tin": {"bird": 22.4, "lwf": 4.9},
    }
    assert dict(read_vision("vision/weak-to-strong").networks["mobilenetv2-resnet152"].paper_pgr) == {"bird": 22.4}


def test_a_file_of_ones_own(minimal: Path) -> None:
    recipe = read_vision(str(minimal))
    assert recipe.name == "try"
    assert recipe.teacher == Source("digits", augment="crop")
    assert recipe.networks == {"small": Networks("plain", "resnet-tiny")}
    assert recipe.methods == tuple(METHODS)
    assert recipe.variants == {"": Variant()}
    settings = recipe.transfer.settings(100, seed=7)
    assert (settings.steps, settings.batch_size, settings.seed) == (14, 16, 7)  # 2 epochs: 6 whole batches, 4 images
    assert recipe.transfer.settings(99, 7).steps == 12  # of three, which are too few
    assert recipe.transfer.settings(100, 7, batch_size=4).steps == 14
    assert recipe.pretraining.settings(10**6, 0).steps == 5


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            'data = "digits"\naugment',
            'data = "digit"\naugment',
            "teacher: data: there is no 'digit'; there",
        ),
        ("steps = 5", "steps = 5\nepochs = 1", "pretraining: say epochs or steps"),
        ("steps = 5", "step = 5", "a key of pretraining: there is no 'step'; there is 'steps'"),
        ("steps = 5", "steps = 0", "pretraining: steps must be at least 1"),
        ('student = "resnet-tiny"', 'student = "resnet-tin"', "networks.small: student: there is no 'resnet-tin'"),
        ('title = "a try"', 'title = "a try"\nmethods = ["brid"]', "methods: there is no 'brid'; there is 'bird'"),
        ('title = "a try"', 'title = "a try"\ncorruptions = ["fgo"]', "there is no 'fgo'; there is 'fog'"),
        ('title = "a try"', 'title = "a try"\nseeds = 0', "seeds must be at least 1"),
        ('title = "a try"', "", "title must be there"),
        ("limit_per_class = 20", 'data2 = ""', "a key of student: there is no 'data2'"),
        (
            "[networks.small]",
            "[variants.x]\nbatch_size = 3\n[networks.small]",
            "variants.x: batch_size must be at least 4",
        ),
        (
            "[networks.small]",
            "[variants.x]\nbeta = nan\n[networks.small]",
            "variants.x: beta must be .* finite, not nan",
        ),
        ("[networks.small]", "[variants.x]\nalpha = -1.0\n[networks.small]", "variants.x: alpha must be at least 0"),
        ('title = "a try"', 'title = "a try', "recipe .*try.toml"),
        ("[teacher]", '[scoring]\ncorruptions = ["fog"]\n[teacher]', "must hold all that are held out"),
    ],
)
def test_what_is_wrong_is_named(minimal: Path, old: str, new: str, complaint: str) -> None:
    assert MINIMAL.count(old) == 1
    minimal.write_text(MINIMAL.replace(old, new))
    with pytest.raises(ValueError, match=complaint):
        read_vision(str(minimal))


def test_no_such_recipe() -> None:
    with pytest.raises(ValueError, match="there is no 'vision/c10-c10'; there is 'vision/c10-c100'"):
        read_vision("vision/c10-c10")
    with pytest.raises(ValueError, match=r"there is no file nowhere\.toml"):
        read_vision("nowhere.toml")
    with pytest.raises(ValueError, match="teacher, student, pretraining, transfer, networks must be there"):
        parse_vision("x", {"title": "x"})


def test_a_budget_is_epochs_or_steps() -> None:
    with pytest.raises(ValueError, match="one of them, got epochs=None, steps=None"):
        Budget()


def test_recipes_of_language_models_are_read_elsewhere() -> None:
    with pytest.raises(ValueError, match="of language models, not of images"):
        read_vision("language/positivity-dpo")
