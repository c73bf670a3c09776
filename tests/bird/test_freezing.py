"""Training a part: what stands still, bit by bit, what does not, and what is as before when it is over."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bird import Taps, Teacher
from bird.lab.tensors import load_tensors
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.freezing import train_only
from bird.lab.vision.models import build, replace_head
from bird.lab.vision.steps import TransferGuide, epoch_order, learning_rate
from bird.lab.vision.training import fit
from tests.bird.loops import Cut, changes, cut_after, images, losses, same, state, train


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        nn.init.uniform_(self.body[1].running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def train_part(model: nn.Module, trained: list[str] | None, folder: Path | None = None, **options: Any) -> Any:
    return train(model=model, folder=folder, **{"trained": trained, "steps": 12, "save_every": 4} | options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_what_is_named_changes(tmp_path: Path, optimizer: str) -> None:
    model = Net()
    before = state(model)
    train_part(model, ["head"], tmp_path, optimizer=optimizer, validate=lambda model: 1.0)
    head = {name for name in before if name.startswith("head")}
    assert changes(model, before) == head  # with the running statistics in it, and none of the body's
    kept = load_tensors(tmp_path / "last.pt")["optimizer"]
    shapes = [tuple(parameter.shape) for parameter in model.head.parameters()]
    moments = [entry["momentum_buffer" if optimizer == "sgd" else "exp_avg"] for entry in kept["state"].values()]
    assert [tuple(moment.shape) for moment in moments] == shapes
    assert kept["param_groups"][0]["params"] == list(range(len(shapes)))


def test_modes_in_every_step_and_afterwards() -> None:
    model = Net()
    model.body[0].bias.requires_grad_(False)  # the user's own
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    seen: list[tuple[bool, ...]] = []
    layers = [model, model.body, model.body[1], model.body[3], model.head, model.head[2]]
    model.body[0].register_forward_hook(lambda *_: seen.append(tuple(layer.training for layer in layers)))
    train_part(model, ["head"], validate=lambda model: model(images().images.float()).mean().item())
    steps, validation = (False, False, False, False, True, True), (False,) * 6
    assert seen == [*[steps] * 4, validation] * 3
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    seen.clear()
    train_part(model, None, steps=1)
    assert seen == [(True,) * 6]
    with pytest.raises(FloatingPointError):
        train_part(model, ["head"], augment=lambda x, index, epoch: x * float("nan"))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.body.training


def test_a_linear_probe_is_the_regression_on_fixed_features() -> None:
    model = build("resnet-tiny", 3, channels=1)
    settings = Settings(steps=9, batch_size=16, lr=0.05)
    truth = copy.deepcopy(model).eval()
    features: list[Tensor] = []
    truth.head.register_forward_pre_hook(lambda _layer, args: features.append(args[0].detach().double()))
    truth(images().images.float() / 255)
    weight, bias = (p.detach().double().requires_grad_() for p in truth.head.parameters())
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(9):
        index = epoch_order(48, 0, step // 3)[16 * (step % 3) : 16 * (step % 3 + 1)]
        loss = F.cross_entropy(features[0][index] @ weight.T + bias, images().labels[index])
        for p, m, gradient in zip((weight, bias), momentum, torch.autograd.grad(loss, (weight, bias)), strict=True):
            m.mul_(0.9).add_(gradient + 5e-4 * p.detach())
            p.data -= learning_rate(step, settings) * m
    fit(model, images(), settings, trained=["head"], progress=False)
    torch.testing.assert_close(model.head.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head.bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_resumed_it_ends_with_the_same_bits_and_is_not_mistaken(tmp_path: Path) -> None:
    whole = train_part(Net(), ["head"]).model
    with pytest.raises(Cut):
        train_part(Net(), ["head"], tmp_path, augment=cut_after(6))
    assert load_tensors(tmp_path / "last.pt")["step"] == 4
    for other, text in ((None, "None"), (["body"], r"\['body'\]")):
        with pytest.raises(ValueError, match=rf"trained was \['head'\], is {text}"):
            train_part(Net(), other, tmp_path, resume=True)
    assert same(train_part(Net(), ["head"], tmp_path, resume=True).model, whole)


def test_shared_parameters_and_globs() -> None:
    model = Net()
    model.tied = nn.Linear(144, 5)
    model.tied.weight = model.head[1].weight
    with train_only(model, ["body.*", "tied"]):
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"head.1.bias", "head.2.weight", "head.2.bias", "head.3.weight", "head.3.bias"}


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("method", ["bird", "hints", "lwf"])
def test_a_guide_pulls_what_is_trained_and_no_more(method: str, chunk_size: int | None) -> None:
    """LwF's two stages: the head alone, which no pull on the body can reach, then everything."""
    source, layer = Net(), "body.1"
    student = copy.deepcopy(source)
    loss = losses([(layer, layer)], 4, 4)[method]
    guide = TransferGuide(Teacher(source, layer), Taps(student, layer), loss)
    before, maps = state(student), state(loss)
    first = train_part(student, ["head"], guide=guide, chunk_size=chunk_size).history
    assert changes(student, before) == {name for name in before if name.startswith("head")}
    assert changes(loss, maps) == set(maps)  # the regressor learns; it is no part of the student
    second = train_part(student, None, guide=guide, chunk_size=chunk_size).history
    assert changes(student, before) == set(before)
    if method == "lwf":
        assert {row["l1/body.1/body.1"] for row in first.train} == {0.0}
        assert second.train[-1]["l1/body.1/body.1"] > 0
        for row in second.train:
            assert row["loss"] == pytest.approx(row["task"] + 0.005 * row["l1/body.1/body.1"], rel=1e-5)


def test_a_new_head_is_probed_by_its_path() -> None:
    model = build("mobilenetv2-tiny", 10, channels=1)
    replace_head(model, "mobilenetv2-tiny", 3)
    before = state(model)
    train_part(model, ["classifier.1"], steps=2)
    assert changes(model, before) == {"classifier.1.weight", "classifier.1.bias"}


def test_bad_paths_are_named() -> None:
    model = Net()
    for trained, said in (
        (["haed"], r"no layer is called, or matches, 'haed'; of 10 layers the nearest are \['head'"),
        (["body.2"], r"nothing is left to train: no parameter of \['body.2'\]"),
        ([], "no layer named"),
    ):
        with pytest.raises(ValueError, match=said):
            train_part(model, trained)
    with pytest.raises(ValueError, match="nothing to train: no parameter of the model requires gradients"):
        train_part(model.requires_grad_(False), None)
