"""Networks by name: images ``[n, c, 32, 32]`` in 0-1 to logits.

    network = build("resnet18", classes=10)
    taps = Taps(network, MODELS["resnet18"].guide)

The paper's are torchvision's with stems for 32x32 images (`bird.lab.vision.models.families` says what differs),
installed with ``pip install 'bird-kernels[vision]'``. The small ones are for CPUs: forward, backward and SGD of a
batch of 64 grey images take one core of an idle EPYC server 13 ms (resnet-tiny), 16 to 17 (mobilenetv2-tiny,
resnet-small) or 20 to 22.

The paper chose its one guiding and one guided layer heuristically. Here both are `ImageModel.guide`: the output of
the last stage before the head, whose average over space is the head's input, the "penultimate" features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from ...recipe import require_known
from . import families
from .normalise import Normalise
from .small import PlainNet, ResNet

__all__ = ["MODELS", "ImageModel", "Normalise", "PlainNet", "ResNet", "build", "replace_head"]


@dataclass(frozen=True)
class ImageModel:
    """Description of a network that `build` can make.

    Args:
        guide: path of the default guiding or guided layer. Its average over space is the input of the head, except in
            ViT, whose head reads the class token: that is one of the 65 tokens of this average.
        head: path of the classifier, an `nn.Linear`.
        make: channels and classes to the network.
    """

    guide: str
    head: str
    make: Callable[[int, int], nn.Module] = field(repr=False)


def build(name: str, classes: int, *, channels: int = 3) -> nn.Module:
    """A network with fresh weights, drawn from PyTorch's generator.

    Args:
        name: one of `MODELS`.
        classes: how many logits.
        channels: 3 (colour) or 1 (grey). The network itself subtracts the mean of CIFAR-10, or of Fashion-MNIST, and
            divides by the standard deviation.

    Returns:
        A module, float32 ``[n, channels, 32, 32]`` in 0-1 to logits ``[n, classes]``.

    Raises:
        ValueError: an unknown name (the nearest are listed), fewer than 2 classes, channels other than 1 or 3.
        ImportError: the network is torchvision's, and that is not installed.
    """
    network = _model(name).make(channels, classes)
    replace_head(network, name, classes)
    return network


def replace_head(model: nn.Module, name: str, classes: int) -> nn.Linear:
    """Give a network a new head, in place, and return it: PyTorch's own initialisation of `nn.Linear`, like `build`'s.

    Args:
        model: made by ``build(name, ...)``, with any weights.
        name: one of `MODELS`.
        classes: how many logits the new head has.

    Raises:
        ValueError: an unknown name; fewer than 2 classes; ``model`` has no such head.
    """
    path = _model(name).head
    if classes < 2:
        raise ValueError(f"classes must be at least 2, not {classes}")
    try:
        old = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"a {type(model).__name__} without a layer {path!r} is not the network {name!r}") from error
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, classes, device=old.weight.device, dtype=old.weight.dtype)
    model.set_submodule(path, new)
    return new


def _model(name: str) -> ImageModel:
    require_known("network", name, MODELS)
    return MODELS[name]


def _small_mobilenetv2(width: int, last: int) -> ImageModel:
    # torchvision multiplies all channels by 0.5, those of the stem, too.
    stages = (1, 16, 1, 1), (3, 32, 1, 2), (6, 2 * width, 2, 2)
    make = partial(families.mobilenetv2, stages=stages, stride=2, width=0.5, last=last)
    return ImageModel("features.5", "classifier.1", make)


def _small_resnet(*widths: int, own: bool = False) -> ImageModel:
    def make(channels: int, classes: int) -> nn.Module:
        return ResNet(classes, channels=channels, widths=widths, own=own)

    return ImageModel("layer3", "head", make)


MODELS: dict[str, ImageModel] = {
    "mobilenetv2": ImageModel("features.18", "classifier.1", families.mobilenetv2),
    **{
        f"resnet{depth}": ImageModel("layer4", "fc", partial(families.resnet, depth=depth))
        for depth in (18, 34, 50, 101, 152)
    },
    **{
        f"densenet{depth}": ImageModel("features.relu5", "classifier", partial(families.densenet, depth=depth))
        for depth in (121, 169, 201)
    },
    "vit": ImageModel("encoder", "heads.head", families.vit),
    "alexnet": ImageModel("classifier.5", "classifier.6", families.alexnet),
    "mobilenetv2-small": _small_mobilenetv2(64, 256),
    "mobilenetv2-tiny": _small_mobilenetv2(48, 192),
    "resnet-small": _small_resnet(16, 32, 96),
    "resnet-tiny": _small_resnet(16, 24, 48),
    "resnet-tiny-standardised": _small_resnet(16, 24, 48, own=True),
    "plain": ImageModel("block3", "head", lambda channels, classes: PlainNet(classes, channels=channels)),
}
