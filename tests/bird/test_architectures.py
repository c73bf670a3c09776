"""What experiments make of networks: every method on one of them, teachers in two stages, taps beside an activation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bird.features import find_layers
from bird.lab.recipe import names
from bird.lab.stages import complete, lineage
from bird.lab.vision import experiment as experiments
from bird.lab.vision.augment import CropFlip
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.corruptions import Mixture
from bird.lab.vision.experiment import Made, VisionExperiment
from bird.lab.vision.methods import METHODS
from bird.lab.vision.models import MODELS, build
from bird.lab.vision.recipe import read_vision
from bird.lab.vision.training import fit
from tests.bird.loops import changes, same, state
from tests.bird.tiny_recipes import TINY, experiment_of, written

CPU = torch.device("cpu")
ONE = ("networks.one = { teacher", "networks.plain = {}\nnetworks.one = { teacher")
TAPPED = [name for name in names() if name.startswith("vision/") and len(read_vision(name).variants) == 3]


def test_every_method_runs_on_one_architecture(tmp_path: Path) -> None:
    """A network's name alone is teacher and student, so LP, FT, LP-FT and LwF are the network that the others are."""
    methods = ", ".join(f'"{name}"' for name in METHODS)
    both = "transfer = { steps = 1", "transfer = { steps = 2"  # a step for each half of LP-FT and LwF
    other = (
        'teacher = { data = "fashion-mnist-subset",',
        'teacher = { data = "fashion-mnist-subset", classes = [0, 1, 2],',
    )
    changed = ('methods = ["none"]', f"methods = [{methods}]"), ONE, both, other
    experiment = experiment_of(written(tmp_path, TINY, *changed))
    cells = {cell.method: cell for cell in experiment.cells(networks=["plain"])}
    assert [*cells] == [*METHODS]
    complete([stage for cell in cells.values() for stage in cell.wanted], experiment.root)
    teacher, student, pairs = experiment._pair("plain", "", 0)
    assert (teacher.network, student.network, pairs) == ("plain", "plain", (("block3", "block3"),))
    begin = {made.stage.kind: state(made.model(experiment.root, CPU)) for made in (teacher, student)}
    for name, cell in cells.items():
        assert cell.results(experiment.root) is not None
        made = Made("plain", experiment.recipe.student, cell.training or student.stage)
        model, start = made.model(experiment.root, CPU), METHODS[name].start
        assert (
            model.get_parameter("head.weight").shape[0] == 10
        )  # the student's classes, also where a teacher of three moves
        moved = changes(model, begin[start])
        if name in ("none", "lp"):
            assert moved == ({*()} if name == "none" else {"head.weight", "head.bias"})
        else:
            assert {"stem.0.weight", "head.weight"} <= moved, name


# ---------------------------------------------------------------------------------------------- teachers in two stages


def test_a_teacher_in_two_stages_is_one_trained_clean_and_then_under_corruptions(tmp_path: Path) -> None:
    crop = TINY.replace('augment = "none"', 'augment = "crop-flip"')
    told = crop + "teacher_tuning = { steps = 3, batch_size = 8, lr = 0.05 }\nvariants.clean.teacher_corruptions = []\n"
    experiment = experiment_of(written(tmp_path, told))
    teacher, student, _ = experiment._pair("one", "clean", 0)
    assert teacher.stage.about["corruptions"] == ()  # the same steps, on clean images
    experiment = experiment_of(written(tmp_path, told.replace("variants.clean.teacher_corruptions = []\n", "")))
    teacher, student, _ = experiment._pair("one", "", 0)
    (clean,) = teacher.stage.parents
    assert (clean.about["corruptions"], teacher.stage.about["corruptions"]) == ((), ("contrast",))
    assert (clean.about["budget"]["steps"], teacher.stage.about["budget"]["steps"]) == (1, 3)
    assert (student.stage.about["budget"]["steps"], student.stage.parents) == (1, ())
    complete([teacher.stage], experiment.root)

    source = experiment.recipe.teacher
    by_hand, train = (
        Made("plain", source, clean).model(experiment.root, CPU),
        experiments._splits(source, 0, None).train,
    )
    mixture, crops = Mixture(("contrast",), seed=0), CropFlip(0)

    def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        return crops(mixture(x, index, epoch), index, epoch)

    fit(by_hand, train, Settings(steps=3, batch_size=8, lr=0.05), augment=augment)
    assert same(teacher.model(experiment.root, CPU), by_hand)


OLD = ["none", "continued", "lp", "ft", "lp-ft", "hints", "lwf", "ceiling"]
OLD += ["bird", "bird-unbiased", "bird-rbf", "bird-rbf-unbiased"]
NAMES_OF_STAGES = {  # all that are trained and scored, as when the committed results were made
    "fashion/batch-size": "c7af075d35024808",
    "fashion/classes": "9e4563b078cac0a2",
    "fashion/demo": "7ed4b87081fe5331",
    "fashion/digits": "bb03bb3757218878",
    "fashion/layer": "382fa9e2a2926793",
    "fashion/teachers": "9a44f2060c6aa250",
    "fashion/weight": "0879e32fffe5379d",
}


@pytest.mark.parametrize("name", NAMES_OF_STAGES)
def test_a_setting_that_is_new_leaves_the_names_of_stages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "_fingerprint", lambda *_: "files")
    experiment = VisionExperiment(read_vision(name), Path("nowhere"), CPU)
    stages = lineage(stage for cell in experiment.cells(methods=OLD) for stage in cell.wanted)
    text = " ".join(sorted(stage.key for stage in stages))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == NAMES_OF_STAGES[name]


# ---------------------------------------------------------------------------------------------- beside an activation


def activated(network: nn.Module, path: str) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layer of a path, and what it gives for a batch, before a layer in place can overwrite it."""
    found: list[Tensor] = []
    (layer,) = find_layers(network, path).values()
    with torch.no_grad(), layer.register_forward_hook(lambda *call: found.append(call[-1].clone())):
        network(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    yield layer, found[0]


@pytest.mark.parametrize(("name", "before"), [("mobilenetv2", "features.18.1"), ("densenet169", "features.norm5")])
def test_a_tap_before_the_activation_is_what_the_activation_gets(name: str, before: str) -> None:
    pytest.importorskip("torchvision", reason="the paper's networks are torchvision's")
    torch.manual_seed(0)
    network = build(name, 10).eval()
    ((layer, given),), ((_, made),) = activated(network, before), activated(network, MODELS[name].guide)
    assert isinstance(layer, nn.BatchNorm2d)
    assert given.min() < 0 <= made.min()
    assert torch.equal(given.clamp(0, 6 if name == "mobilenetv2" else None), made)


def test_the_recipes_of_the_papers_pairs_have_both_taps_for_networks_that_have_both() -> None:
    assert TAPPED == ["vision/c10-c100", "vision/c10-in", "vision/c10-tin", "vision/c100-in", "vision/c100-tin"]
    for name in TAPPED:
        recipe = read_vision(name)
        assert recipe.teacher_tuning is not None
        tapped = {
            (cell, variant): recipe.variants[variant].pairs(recipe.networks[cell])
            for cell, variant, *_ in experiments.grid(recipe, seeds=1, methods=["bird"])
        }
        after = {(n, "after the activation"): ((MODELS[n].guide,) * 2,) for n in recipe.networks}
        assert [*recipe.networks] == ["mobilenetv2", "resnet18", "densenet169", "vit"]
        assert tapped == after | {
            ("mobilenetv2", "before the activation, mobilenetv2"): (("features.18.1",) * 2,),
            ("densenet169", "before the activation, densenet169"): (("features.norm5",) * 2,),
        }
    weak = read_vision("vision/weak-to-strong")
    pairs = [v.pairs(weak.networks["mobilenetv2-resnet152"]) for v in weak.variants.values()]
    assert pairs == [(("features.18", "layer4"),), (("features.18.1", "layer4"),)]
