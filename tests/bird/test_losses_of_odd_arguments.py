"""What `BirdLoss`, `Hints` and `LwF` are given by mistake: an error that says what to give."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from bird import BirdLoss, Hints, LwF, Taps, Teacher, compare

FEATURES = {"t": torch.randn(8, 4)}, {"s": torch.randn(8, 4)}
PAIRS = [("t", "s")]
LOSSES = [BirdLoss(pairs=PAIRS), Hints(pairs=PAIRS, teacher_widths={"t": 4}, student_widths={"s": 4}), LwF(pairs=PAIRS)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(("task", "came"), [(torch.ones(8), r"of shape \[8\]"), (1.0, "1.0")])
def test_a_task_loss_is_one_number(loss: Any, task: Any, came: str) -> None:
    """With one for each of 8 samples, the sum of what comes out would have 8 times the guidance."""
    with pytest.raises(ValueError, match=f"task_loss must be a 0-d tensor, got {came}: average it"):
        loss(task, *FEATURES)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_features_come_by_name(loss: Any) -> None:
    with pytest.raises(TypeError, match="teacher_features must be a dict of layers, got Tensor"):
        loss(torch.ones(()), FEATURES[0]["t"], FEATURES[1])
    with pytest.raises(TypeError, match="student_features must be a dict of layers, got list"):
        loss(torch.ones(()), FEATURES[0], [FEATURES[1]["s"]])


@pytest.mark.parametrize("pairs", [("l1", "l2"), ["ab"], {"l3": "f8"}])
def test_a_pair_is_no_text(pairs: Any) -> None:
    """Two letters would be taken for two layers."""
    with pytest.raises(ValueError, match="pairs must list one or more"):
        BirdLoss(pairs=pairs)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_weight_is_no_text(name: str) -> None:
    with pytest.raises(TypeError, match=r"a weight must be a number or a 0-d tensor, got '0\.1'"):
        BirdLoss(pairs=PAIRS, **{name: "0.1"})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_features_without_a_gradient_are_told(loss: Any) -> None:
    """Such a pair would train nothing in silence; in an evaluation it need not."""
    with pytest.warns(RuntimeWarning, match="t/s: the student's features carry no gradient, so this pair trains"):
        loss(torch.ones((), requires_grad=True), *FEATURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            loss(torch.ones(()), *FEATURES)
        loss(torch.ones(()), FEATURES[0], {"s": FEATURES[1]["s"].clone().requires_grad_()})


def test_a_teacher_s_layers_are_its_network_s() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    teacher = Teacher(net, ["0"])
    words = "Teacher has no layers inside; of a bird.Teacher give the network that it was made of"
    with pytest.raises(ValueError, match=words):
        Taps(teacher, ["0"])
    with pytest.raises(ValueError, match=words):
        compare(net, teacher, [torch.randn(8, 4)], progress=False)
