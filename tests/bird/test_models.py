"""Networks by name: sizes against published counts, shapes, taps, heads, gradients."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models as published
from torchvision.transforms.v2 import functional as transforms

from bird import Taps, Teacher
from bird.lab.vision.models import MODELS, Normalise, PlainNet, ResNet, build, replace_head

NAMES = list(MODELS)
LARGE = ("mobilenetv2", "resnet18", "densenet121", "vit", "alexnet")  # one of each family
SMALL = ("mobilenetv2-small", "mobilenetv2-tiny", "resnet-small", "resnet-tiny", "plain")


@functools.cache
def network(name: str, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build(name, 10, channels=channels).eval()


def images(n: int = 1, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Sizes


def test_the_names_of_the_paper_are_there() -> None:
    resnets, densenets = (f"resnet{d}" for d in (18, 34, 50, 101, 152)), (f"densenet{d}" for d in (121, 169, 201))
    assert {*NAMES} == {"mobilenetv2", *resnets, *densenets, "vit", "alexnet", *SMALL, "resnet-tiny-standardised"}


def published_count(name: str) -> int:
    """Of the original with ImageNet's 1000 classes, as its documentation says."""
    aliases = {"mobilenetv2": "mobilenet_v2"}
    return published.get_model_weights(aliases.get(name, name)).IMAGENET1K_V1.meta["num_params"]


def body(name: str, stem: int, features: int) -> int:
    return published_count(name) - stem - (features + 1) * 1000


def conv(size: int, inputs: int, outputs: int) -> int:
    """Of a convolution without bias and its batch normalisation."""
    return (size * size * inputs + 2) * outputs


def residual(inputs: int, outputs: int) -> int:
    return conv(3, inputs, outputs) + conv(3, outputs, outputs) + (inputs != outputs) * conv(1, inputs, outputs)


def inverted(inputs: int, outputs: int, expansion: int) -> int:
    wide = expansion * inputs
    return (expansion > 1) * conv(1, inputs, wide) + conv(3, 1, wide) + conv(1, wide, outputs)


def small_resnet(a: int, b: int, c: int) -> int:
    return conv(3, 3, a) + residual(a, a) + residual(a, b) + residual(b, c) + 10 * (c + 1)


def small_mobilenet(c: int, last: int) -> int:
    stages = inverted(16, 8, 1) + inverted(8, 16, 3) + inverted(16, c, 6) + inverted(c, c, 6)
    return conv(3, 3, 16) + stages + conv(1, c, last) + 10 * (last + 1)


SIZES = {
    "mobilenetv2": lambda: body("mobilenetv2", 0, 1280) + 1281 * 10,
    **{
        f"resnet{depth}": lambda d=depth, f=features: body(f"resnet{d}", 49 * 3 * 64, f) + 9 * 3 * 64 + (f + 1) * 10
        for depth, features in {18: 512, 34: 512, 50: 2048, 101: 2048, 152: 2048}.items()
    },
    **{
        f"densenet{depth}": lambda d=depth, f=features: body(f"densenet{d}", 49 * 3 * 64, f) + 9 * 3 * 64 + (f + 1) * 10
        for depth, features in {121: 1024, 169: 1664, 201: 1920}.items()
    },
    # DeiT-Ti's 5,717,416 has 196 tokens of 16x16 pixels and 1000 classes; here 64 of 4x4 and 10.
    "vit": lambda: 5_717_416 - (196 - 64) * 192 - 3 * (16 * 16 - 4 * 4) * 192 - 990 * 193,
    "alexnet": lambda: body("alexnet", 121 * 3 * 64 + 9216 * 4096, 4096) + 9 * 3 * 64 + 256 * 4096 + 4097 * 10,
    "mobilenetv2-small": lambda: small_mobilenet(64, 256),
    "mobilenetv2-tiny": lambda: small_mobilenet(48, 192),
    "resnet-small": lambda: small_resnet(16, 32, 96),
    "resnet-tiny": lambda: small_resnet(16, 24, 48),
    "resnet-tiny-standardised": lambda: small_resnet(16, 24, 48),
    "plain": lambda: conv(3, 3, 16) + conv(3, 16, 32) + conv(3, 32, 64) + conv(3, 64, 96) + 97 * 10,
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_published_ones_but_for_stem_and_head(name: str) -> None:
    with torch.device("meta"):
        model = build(name, 10)
    assert count(model) == SIZES[name]()


def test_the_small_networks_are_those_of_the_table() -> None:
    assert count(ResNet(5)) == 47_050 - 5 * 49  # for 5 classes instead of 10
    assert count(PlainNet(5)) == 79_866 - 5 * 97
    assert {name for name, _ in ResNet(5).named_parameters()} == {
        n for n, _ in network("resnet-tiny").named_parameters()
    }
    assert not any("normalise" in name for name in ResNet(5).state_dict())  # older checkpoints still fit


# What they compute


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_what_a_network_computes(name: str, channels: int) -> None:
    """It normalises the image before anything else; its guide feeds the head."""
    model, x, entry = network(name, channels), images(2, channels), MODELS[name]
    seen: dict[str, Any] = {}
    (layer,) = (module for module in model.modules() if isinstance(module, Normalise))
    handles = [layer.register_forward_hook(lambda _layer, args, output: seen.update(x=args[0], normalised=output))]
    head = model.get_submodule(entry.head)
    handles += [head.register_forward_pre_hook(lambda _layer, args: seen.update(read=args[0]))]
    if name == "vit":
        handles += [model.encoder.register_forward_hook(lambda _layer, _args, output: seen.update(tokens=output))]
    with torch.no_grad(), Taps(model, entry.guide) as taps:
        logits, rows = model(x), taps.pop()[entry.guide]
    for handle in handles:
        handle.remove()
    assert (logits.shape, logits.dtype) == ((2, 10), torch.float32)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])
    assert seen["x"] is x
    statistics = {1: ([0.286], [0.353]), 3: ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])}
    torch.testing.assert_close(seen["normalised"], transforms.normalize(x, *statistics[channels]))
    if name == "vit":
        assert seen["tokens"].shape == (2, 65, 192)
        torch.testing.assert_close(rows, seen["tokens"].sum(1) / 65)
        torch.testing.assert_close(seen["read"], seen["tokens"][:, 0])
    else:
        torch.testing.assert_close(seen["read"], rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_has_the_width_of_the_head(name: str) -> None:
    with torch.device("meta"):
        model, entry = build(name, 10).eval(), MODELS[name]
    with Taps(model, entry.guide) as taps:
        model(images().to("meta"))
        assert taps.pop()[entry.guide].shape == (1, model.get_submodule(entry.head).in_features)


@pytest.mark.parametrize(
    ("name", "positions"), [("resnet18", 4), ("mobilenetv2", 4), ("densenet121", 4), ("alexnet", 1)]
)
def test_stems_leave_positions_to_average(name: str, positions: int) -> None:
    layer = {"alexnet": "features.12"}.get(name, MODELS[name].guide)
    with torch.no_grad(), Taps(network(name), layer, pool="none") as taps:
        network(name)(images())
        assert taps.pop()[layer].shape[2:] == (positions, positions)


@pytest.mark.parametrize("name", [*LARGE, "resnet50", *SMALL])
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 10).train()
    nn.functional.cross_entropy(model(images()), torch.tensor([3])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# Heads


@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_a_new_head_changes_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 10).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad(), Taps(model, MODELS[name].guide) as taps:
        model(images())
        rows = taps.pop()[MODELS[name].guide]
        head = replace_head(model, name, 7)
        assert model(images()).shape == (1, 7)
        assert torch.equal(taps.pop()[MODELS[name].guide], rows)
    after, path = model.state_dict(), MODELS[name].head
    assert model.get_submodule(path) is head
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{path}.weight", f"{path}.bias"}
    bound = head.in_features**-0.5  # nn.Linear's own: uniform within it
    assert 0.9 * bound < head.weight.abs().max() <= bound
    assert replace_head(model.double(), name, 7).weight.dtype == torch.float64
    assert not torch.equal(replace_head(model, name, 7).weight, replace_head(model, name, 7).weight)


def test_a_seed_makes_the_same_network_again() -> None:
    first, second, third = (torch.manual_seed(seed) and build("resnet-tiny", 10) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, third.head.weight)


def test_a_teacher_stops_after_its_guide() -> None:
    for name in ("resnet-small", "mobilenetv2-small", "vit"):
        teacher = Teacher(build(name, 10), MODELS[name].guide)
        rows = teacher(images(3))[MODELS[name].guide]
        assert rows.shape == (3, {"resnet-small": 96, "mobilenetv2-small": 256, "vit": 192}[name])


@pytest.mark.parametrize(
    ("name", "classes", "channels", "message"),
    [
        ("resnet17", 10, 3, "network: there is no 'resnet17'; there is 'resnet18'"),
        ("quux", 10, 3, "there is no 'quux'; there is 'mobilenetv2', 'resnet18'"),
        ("resnet-tiny", 1, 3, "classes must be at least 2, not 1"),
        ("resnet-tiny", 10, 4, r"channels must be 1 \(grey\) or 3 \(colour\), not 4"),
    ],
)
def test_bad_arguments_are_named(name: str, classes: int, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, classes, channels=channels)


def test_a_head_belongs_to_its_network() -> None:
    with pytest.raises(ValueError, match=r"a ResNet without a layer 'classifier\.1' is not the network 'mobilenetv2'"):
        replace_head(build("resnet-tiny", 10), "mobilenetv2", 5)
    with pytest.raises(ValueError, match="there is 'resnet-tiny'"):
        replace_head(build("resnet-tiny", 10), "resnet-tin", 5)


def test_without_torchvision_the_small_resnets_work_and_the_rest_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert build("resnet-tiny", 10)(images()).shape == (1, 10)
    for name in ("resnet18", "vit", "mobilenetv2-tiny"):
        with pytest.raises(ImportError, match=r"pip install 'bird-kernels\[vision\]'"):
            build(name, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_standardised_by_itself(channels: int) -> None:
    torch.manual_seed(0)
    model, x = build("resnet-tiny-standardised", 5, channels=channels).eval(), images(4, channels)
    alone = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(model.normalise(x), alone)
    torch.testing.assert_close(model(0.3 * x + 0.4), model(x), rtol=1e-4, atol=1e-4)  # less contrast, more light
    assert model.normalise(torch.full_like(x, 0.7)).abs().max() < 1e-4
