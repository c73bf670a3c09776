"""What recipes say of BIRD's loss beside its weights: it reaches the runs, and names stages only where it is said."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from bird import BirdLoss, Taps, Teacher
from bird.lab.language import recipe as language
from bird.lab.vision import experiment as experiments
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.experiment import VisionExperiment
from bird.lab.vision.methods import Transfer
from bird.lab.vision.models import build
from bird.lab.vision.training import TransferGuide, fit
from tests.bird.loops import same
from tests.bird.test_recipes import LANGUAGE, VISION, WEAK, changed, parse
from tests.bird.tiny_recipes import TINY, command, experiment_of, written

SAID: dict[str, Any] = {"loss": "rsa", "schedule": "cosine", "until": 0.5, "share": 0.3, "gradients": True}
TWO: dict[str, Any] = {"teacher_layer": ["block2", "block3"], "student_layer": ["block2", "block3"]}


def varied(table: Any, change: dict[str, Any]) -> dict[str, Any]:
    return changed(table, "variants", {"": change})


def unguided(change: dict[str, Any]) -> dict[str, Any]:
    """Of methods that BIRD's loss does not guide."""
    return varied(VISION, change | {"methods": ["hints", "continued"]})


@pytest.mark.parametrize("method", ["bird", "bird-unbiased", "hints", "continued"])
def test_stages_have_other_names_only_where_bird_is_guided_otherwise(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_fingerprint", lambda *_: None)
    said = {"loss": "cosine_cka", "schedule": "linear"}
    table = VISION | {"variants": {"": {}, "other": said, "same": {}}, "methods": [method]}
    experiment = VisionExperiment(parse(table), Path("x"), torch.device("cpu"))
    plain, other, again = (experiment.cell("one", variant, method, 0).training for variant in ("", "other", "same"))
    assert plain is not None
    assert other is not None
    assert again is not None
    assert plain.key == again.key
    assert "guidance" not in plain.about
    assert (other.key != plain.key) == method.startswith("bird")
    if method.startswith("bird"):
        assert other.about == plain.about | {"guidance": said}


def test_a_transfer_is_guided_as_it_is_said(tmp_path: Path) -> None:
    settings = Settings(steps=7, batch_size=8, lr=0.05, seed=3, save_every=100, log_every=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 32, 32), generator=generator, dtype=torch.uint8)
    train = Images(images, torch.arange(40) % 4)
    torch.manual_seed(1)
    teacher, student = build("plain", 3, channels=1).eval(), build("resnet-tiny", 4, channels=1)
    transfer = Transfer(("plain", "resnet-tiny"), [("block3", "layer3")], settings, 4, guidance=SAID, folder=tmp_path)
    model, (history,), times = transfer.run("bird", teacher, student, train)
    torch.manual_seed(settings.seed)
    by_hand, options = deepcopy(student), {name: value for name, value in SAID.items() if name != "gradients"}
    loss = BirdLoss(pairs=[("block3", "layer3")], **options)
    taps = Taps(by_hand, "layer3", gradients=True)
    truth = fit(by_hand, train, settings, guide=TransferGuide(Teacher(deepcopy(teacher), "block3"), taps, loss))
    assert same(model, by_hand)
    assert history.train == truth.train
    assert {"rsa/block3/layer3", "guide_beta", "task_grad", "guide_grad"} < history.train[0].keys()
    assert [row["guide_beta"] > 0 for row in history.train] == [True] * 4 + [False] * 3
    assert times is not None
    plain = Transfer(("plain", "resnet-tiny"), [("block3", "layer3")], settings, 4, folder=tmp_path)
    with pytest.raises(ValueError, match="comes from another run"):
        plain.run("bird", teacher, student, train)


def test_what_is_measured_of_the_guidance_is_in_the_results(tmp_path: Path) -> None:
    """Means over the later half of the reports, of the runs that measure; of others nothing."""
    more = """
variants.plain = { methods = ["continued", "bird"] }
variants.linear = { methods = ["bird"], schedule = "linear" }
variants.norms = { methods = ["bird"], gradients = true }
variants.share = { methods = ["continued", "bird"], share = 0.3 }
"""
    path = written(tmp_path, TINY + more, ("transfer = { steps = 1,", "transfer = { steps = 60,"))
    assert command("run", path) == 0
    cells = json.loads((tmp_path / "runs/reports/try/results.json").read_text())["cells"]
    found = {(cell["variant"], cell["method"]): cell.get("second_half") for cell in cells}
    measured = {
        ("linear", "BIRD"): {"guide_beta"},
        ("norms", "BIRD"): {"task_grad", "guide_grad"},
        ("share", "BIRD"): {"task_grad", "guide_grad", "guide_beta"},
    }
    assert {key: {*of} for key, of in found.items() if of is not None} == measured
    assert len(found) == 6
    for cell in experiment_of(path).cells(methods=["bird"]):
        assert cell.training is not None
        (history,) = (cell.training.result(tmp_path / "runs") or {})["histories"]
        assert [row["step"] for row in history["train"]] == [20, 40, 60]
        _, second, third = history["train"]
        for name, mean in (found[cell.variant, "BIRD"] or {}).items():
            assert mean == pytest.approx((second[name] + third[name]) / 2)


def test_options_of_language_recipes_are_those_of_the_guidance() -> None:
    pytest.importorskip("trl", reason="the experiments are run by its trainers")
    from bird.lab.language.experiment import LATER
    from bird.lab.language.preference import Preferences
    from bird.language import Guidance

    defaults = {f.name: f.default for f in fields(Guidance)}
    assert {f.name: f.default for f in fields(language.Guiding)}.items() <= defaults.items()
    said = {"loss": "cka_difference", "share": 0.3, "gradients": True}
    recipe = parse(
        changed(changed(LANGUAGE, "guidance", said), "variants", {"": {}, "x": SAID | {"methods": ["dpo-bird"]}})
    )
    experiment = Preferences(recipe, Path("x"), torch.device("cpu"))
    guiding = [experiment.guiding(recipe.variants[name]) for name in ("", "x")]
    assert [{name: found[name] for name in LATER if name in found} for found in guiding] == [said, SAID]
    plain = Preferences(parse(LANGUAGE), Path("x"), torch.device("cpu"))
    assert not {*LATER} & plain.guiding(language.Change()).keys()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (varied(VISION, {"loss": "hsic"}), r"variants\.: loss must be one of 'cka'"),
        (
            varied(VISION, {"loss": "rsa"}),
            r"variants\.: the method '.*bird-unbiased' cannot be so: loss=.rsa. takes no",
        ),
        (varied(VISION, {"loss": "cka_difference"}), r"is of preferences, not of images"),
        (varied(VISION, {"until": 2.0}), "until is a share of the steps"),
        (varied(VISION, {"share": 0.5, "alpha": 0.0}), "alpha, beta and a weight must be above 0"),
        (varied(VISION, {"share": 0.5, "views": True}), "with views the two have their own"),
        (varied(VISION, TWO | {"share": 0.5}), r"one layer of the student, not at \['block2', 'block3'\]"),
        (varied(VISION, {"teacher_layer": ["block2", "block3"]}), r"variants\.: 2 layers cannot guide 1"),
        (unguided({"loss": "nonsense"}), r"variants\.: loss must be one of 'cka'"),
        (unguided({"schedule": "linaer"}), r"variants\.: schedule must be one of"),
        (unguided({"until": 0.0}), "until is a share of the steps"),
        (unguided({"share": 7.0}), "share is a share of the gradient"),
        (unguided(TWO | {"share": 0.5}), "one layer of the student"),
        (changed(LANGUAGE, "guidance/schedule", "steps"), "guidance: schedule must be one of"),
        (
            varied(LANGUAGE, {"loss": "rsa"}),
            r"variants\.: the method '.*bird-unbiased' cannot be so: loss=.rsa. takes no",
        ),
        (varied(LANGUAGE, {"loss": "cka_difference", "rows": "chosen"}), 'responses: rows = "both"'),
        (changed(WEAK, "guidance/loss", "cka_difference"), "is of preferences, not of texts that are classified"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(table: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(table)


def test_compiled_models_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "_fingerprint", lambda *_: None)
    recipe = parse(varied(VISION, {"gradients": True}))
    with pytest.raises(ValueError, match="which compiled models do not call"):
        VisionExperiment(recipe, Path("x"), torch.device("cpu"), compile=True).check()
