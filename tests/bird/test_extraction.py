"""Features over corruptions against one view at a time, and the folder that keeps them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bird.features import Pool
from bird.lab.vision import extraction
from bird.lab.vision.corruptions import corrupt
from bird.lab.vision.data import Images, to_float
from bird.lab.vision.extraction import Extractor, Layer, Views, student_layer, teacher_layer
from bird.teachers import Teacher
from tests.bird.shipped import fashion

NAMES, SEVERITIES = ("gaussian_noise", "contrast"), (2, 5)
EXTRACTOR = Extractor(NAMES, SEVERITIES, seed=3)
IMAGES = fashion([2, 4], limit_per_class=15).validation


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.GELU(), nn.BatchNorm2d(4))


def tapped(model: nn.Module, name: str = "2", pool: Pool = "mean") -> Layer:
    return teacher_layer(Teacher(deepcopy(model), name, pool=pool))


def literal(model: nn.Module, images: Images, seed: int = 3) -> list[Tensor]:
    """Rows of the clean images and of each version, one whole batch each."""
    x = to_float(images.images)
    index = torch.arange(len(x))
    views = [x, *(corrupt(x, name, severity, index=index, seed=seed) for name in NAMES for severity in SEVERITIES)]
    with torch.no_grad():
        return [deepcopy(model).eval()(view).mean(dim=(2, 3)) for view in views]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of versions of each pass over images."""
    seen, real = [], Extractor._extract

    def extract(self: Extractor, layer: Layer, images: Images, versions: list, label: str) -> np.ndarray:
        seen.append(len(versions))
        return real(self, layer, images, versions, label)

    monkeypatch.setattr(Extractor, "_extract", extract)
    return seen


@pytest.mark.parametrize("batch_size", [500, 7])
def test_views_are_reduced_sample_by_sample(batch_size: int) -> None:
    model = network()
    stack = torch.stack(literal(model, IMAGES))
    found = replace(EXTRACTOR, batch_size=batch_size).views(tapped(model), IMAGES, label="")
    truth = Views(*(part.numpy() for part in (stack[0], stack.amin(dim=0), stack.amax(dim=0), stack.mean(dim=0))))
    for values, expected in zip(found, truth, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, atol=2e-6)
    np.testing.assert_array_equal(found.clean, EXTRACTOR.clean(tapped(model), IMAGES, label="")[:])
    assert (found.lowest < found.clean).any()
    assert (found.highest > found.clean).any()
    bare = replace(EXTRACTOR, corruptions=()).views(tapped(model), IMAGES, label="")
    assert all(np.array_equal(values, found.clean) for values in bare)


def test_a_student_runs_in_eval_mode_and_gets_its_modes_back() -> None:
    student = nn.Sequential(network(), nn.Flatten())
    student[1].eval()
    truth = literal(student[0], IMAGES)[0]
    with student_layer(student, "0.2") as own:
        found = EXTRACTOR.clean(own, IMAGES, label="")
    np.testing.assert_allclose(found, truth.numpy(), atol=2e-6)
    assert [module.training for module in (student, student[0][2], student[1])] == [True, True, False]
    assert not student[0][2]._forward_hooks
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(ValueError, match=r"2 are tapped \(0.0, 0.1\)"), student_layer(student, "0.[01]"):
        pass
    with pytest.raises(ValueError, match="2 are tapped"):
        teacher_layer(Teacher(network(), ["0", "1"]))


def test_networks_go_to_the_device_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(str(device)))
    with extraction._on(network(), "cuda:1") as device:
        assert device == torch.device("cuda:1")
        assert moves == ["cuda:1"]
    assert moves == ["cuda:1", "cpu"]
    with extraction._on(network(), None) as device:
        assert device == torch.device("cpu")


def test_kept_features_are_read_and_not_made_again(tmp_path: Path, passes: list[int]) -> None:
    keeping = replace(EXTRACTOR, cache=tmp_path / "new" / "folder")
    first = keeping.views(tapped(network()), IMAGES, label=""), keeping.clean(tapped(network()), IMAGES, label="")
    assert passes == [4, 0]
    for options in ({}, {"batch_size": 7}, {"progress": False}, {"device": "cpu"}):
        again = replace(keeping, **options)
        views, clean = (read(tapped(network()), IMAGES, label="") for read in (again.views, again.clean))
        assert all(np.array_equal(a, b) for a, b in zip((*views, clean), (*first[0], first[1]), strict=True))
    assert passes == [4, 0]
    files = list((tmp_path / "new" / "folder").iterdir())
    assert [path.suffix for path in files] == [".npy"] * 2
    kept = sorted((np.load(path, allow_pickle=False) for path in files), key=len)
    np.testing.assert_array_equal(kept[1], np.stack(first[0]))
    np.testing.assert_array_equal(kept[0][0], first[1])


@pytest.mark.parametrize("part", ["0.weight", "0.bias", "2.running_var", "2.num_batches_tracked"])
def test_any_weight_or_buffer_makes_other_features(tmp_path: Path, passes: list[int], part: str) -> None:
    keeping, model = replace(EXTRACTOR, cache=tmp_path), network()
    keeping.clean(tapped(model), IMAGES, label="")
    keeping.clean(tapped(model), IMAGES, label="")
    model.state_dict()[part].view(-1)[0] += 1
    keeping.clean(tapped(model), IMAGES, label="")
    assert passes == [0, 0]


def test_structure_layer_and_pool_make_other_features(tmp_path: Path, passes: list[int]) -> None:
    keeping, model, other = replace(EXTRACTOR, cache=tmp_path), network(), network()
    other[1] = nn.ReLU()
    layers = [tapped(model), tapped(other), tapped(model, "1"), tapped(model, "2", "flatten")]
    found = [keeping.views(layer, IMAGES, label="") for layer in (*layers, *layers)]
    assert passes == [4] * 4
    assert len({views.clean.tobytes() for views in found}) == 4
    keeping.views(tapped(model, pool=lambda t: t.amax(dim=(2, 3))), IMAGES, label="")
    keeping.views(tapped(model, pool=lambda t: t.amin(dim=(2, 3))), IMAGES, label="")
    assert passes == [4] * 6
    assert len(list(tmp_path.iterdir())) == 4  # a callable has no hash


def test_images_and_corruptions_make_other_features(
    tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping, layer = replace(EXTRACTOR, cache=tmp_path), tapped(network())
    keeping.views(layer, IMAGES, label="")
    for options in ({"corruptions": NAMES[:1]}, {"severities": (2, 4)}, {"seed": 4}):
        replace(keeping, **options).views(layer, IMAGES, label="")
    one_pixel = IMAGES.images.clone()
    one_pixel[-1, 0, 14, 14] ^= 1
    keeping.views(layer, Images(one_pixel, IMAGES.labels), label="")
    keeping.views(layer, Images(IMAGES.images, IMAGES.labels.flip(0)), label="")  # labels do not matter
    assert passes == [4, 2, 4, 4, 4]
    monkeypatch.setattr(extraction, "corrupt", lambda x, *a, **k: (corrupt(x, *a, **k) + 0.01).clamp(0, 1))
    keeping.views(layer, IMAGES, label="")  # another implementation
    assert passes == [4, 2, 4, 4, 4, 4]
    keeping.clean(layer, IMAGES, label="")
    replace(keeping, seed=5, severities=(1,)).clean(layer, IMAGES, label="")  # clean features have neither
    assert passes == [4, 2, 4, 4, 4, 4, 0]


def test_seeds_are_told_apart_even_where_the_first_image_is_black(tmp_path: Path, passes: list[int]) -> None:
    """Noise that multiplies leaves it black under every seed."""
    black = Images(IMAGES.images * (torch.arange(len(IMAGES)) > 0).view(-1, 1, 1, 1), IMAGES.labels)
    keeping = replace(EXTRACTOR, corruptions=["speckle_noise"], severities=[5], cache=tmp_path)
    found = [replace(keeping, seed=seed).views(tapped(network()), black, label="").mean for seed in (3, 4)]
    assert passes == [1, 1]
    np.testing.assert_array_equal(*(mean[0] for mean in found))
    assert not np.array_equal(*found)


@pytest.mark.parametrize("damage", ["garbage", "cut", "shape"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    keeping, layer = replace(EXTRACTOR, cache=tmp_path), tapped(network())
    keeping.views(layer, IMAGES, label="")
    (path,) = tmp_path.iterdir()
    if damage == "shape":
        np.save(path, np.zeros((1, 3, 4), np.float32))
    else:
        path.write_bytes(b"not an array" if damage == "garbage" else path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"{path.name} does not hold .*: delete it"):
        keeping.views(layer, IMAGES, label="")


def test_an_interrupted_pass_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    layer = replace(tapped(network()), run=interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace(EXTRACTOR, cache=tmp_path).views(layer, IMAGES, label="")
    assert list(tmp_path.iterdir()) == []


def test_features_must_be_finite_rows() -> None:
    with pytest.raises(ValueError, match=r"layer '2' gives \[30, 4, 10, 10\], not rows \[30, d\]"):
        EXTRACTOR.clean(tapped(network(), pool="none"), IMAGES, label="")
    broken = network()
    with torch.no_grad():
        broken[0].bias[0] = float("inf")
    with pytest.raises(ValueError, match="mine: layer '2' gives features that are not finite"):
        EXTRACTOR.clean(tapped(broken), IMAGES, label="mine")


def test_unknown_corruptions_and_severities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown corruptions \['rain'\]; known are "):
        Extractor(["fog", "rain"], SEVERITIES)
    with pytest.raises(ValueError, match=r"severities must be of 1 to 5, got \[0, 2\]"):
        Extractor(NAMES, [0, 2])
