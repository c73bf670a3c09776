"""Accuracy, robustness, alignment and the recovered gap, on models whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bird.lab.vision.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bird.lab.vision.data import Images, to_float
from bird.lab.vision.evaluation import Robustness, image_accuracy, layer_alignment, robustness
from bird.teachers import Teacher
from bird_kernels import reference
from tests.bird.shipped import fashion


class Bright(nn.Module):
    """Says 1 where the mean of a picture is above a threshold, else 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training or torch.is_grad_enabled())
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([self.threshold.expand_as(mean), mean], dim=1)


def grey(values: list[int], labels: list[int]) -> Images:
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6)
    return Images(pixels, torch.tensor(labels))


DATA = grey([0, 51, 102, 204], [0, 0, 0, 1])  # 0, 0.2, 0.4, 0.8


def test_accuracy_counts() -> None:
    assert [image_accuracy(Bright(threshold), DATA) for threshold in (0.5, 0.3, 0.9)] == [1, 0.75, 0.75]
    assert image_accuracy(Bright(0.3), DATA, batch_size=3) == 0.75
    with pytest.raises(ValueError, match="no images"):
        image_accuracy(Bright(0.5), DATA.select(torch.arange(0)))


def test_robustness_follows_the_severities() -> None:
    scores = robustness(Bright(0.48), DATA, ["brightness", "contrast"])
    # brightness adds 0.05 to 0.3: 0.4 passes 0.48 from severity 2 on, 0.2 at 5; grey has no contrast
    assert scores == Robustness(1.0, {"brightness": [1.0, 0.75, 0.75, 0.75, 0.5], "contrast": [1.0] * 5})
    assert scores.robust == pytest.approx((0.75 + 1) / 2)
    assert scores.pooled == pytest.approx((1.0 + 5 * 0.875) / 6)
    assert Robustness(1.0, {"brightness": [0.5, 1.0]}).pooled == pytest.approx((1.0 + 2 * 0.75) / 3)


def test_corrupted_images_are_scored_in_8_bits() -> None:
    test = fashion([5, 9], limit_per_class=40).test
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 2))
    scores = robustness(model, test, list(CORRUPTIONS))
    assert list(scores.corrupted) == list(CORRUPTIONS)
    for severity, share in zip(SEVERITIES, scores.corrupted["fog"], strict=True):
        view = corrupt(to_float(test.images), "fog", severity, index=torch.arange(80))
        view = (view.double() * 255).round().float() / 255
        assert share == (model(view).argmax(dim=1) == test.labels).sum().item() / 80


@pytest.mark.parametrize("training", [True, False])
def test_models_are_judged_in_eval_mode_and_given_back_as_they_were(training: bool) -> None:
    model = Bright(0.5).train(training)
    image_accuracy(model, DATA, batch_size=2)
    assert model.modes == [False] * 2
    assert model.training is training
    assert torch.is_grad_enabled()


def test_one_read_from_the_device_per_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, _n=name, _r=real: reads.append(_n) or _r(self, *a))
    image_accuracy(Bright(0.5), DATA, batch_size=2)
    assert reads == ["item"]


def test_alignment_is_cka_over_all_the_images() -> None:
    torch.manual_seed(0)
    data = fashion([0, 1], limit_per_class=20).test
    first, second = (nn.Sequential(nn.Conv2d(1, c, 3, 2), nn.Dropout(), nn.Flatten()) for c in (5, 8))
    teacher = Teacher(second, ["0"])
    with torch.no_grad():
        pixels = to_float(data.images)
        x, y = (model[0](pixels).mean(dim=(2, 3)).double() for model in (first, second))
    expected = reference.cka(x, y, estimator="unbiased").item()
    for batch_size in (40, 9):
        value = layer_alignment(teacher, first, "0", "0", data, batch_size=batch_size)
        assert value == pytest.approx(expected, rel=5e-6)
    assert not first[1]._forward_hooks
    assert not first[0]._forward_hooks
