"""Networks by name: images ``[n, c, 32, 32]`` in 0-1 to logits.

    network = build("resnet18", classes=10)
    taps = Taps(network, MODELS["resnet18"].guide)

The paper's are torchvision's with stems for 32x32 images (`bird.lab.vision.models.families` says what differs),
installed with ``pip install 'bird-kernels[vision]'``. The small ones are for CPUs: forward, backward and SGD of a
batch of 64 grey images take one core of an EPYC server 13 ms (resnet-tiny), 16 to 17 (mobilenetv2-tiny, resnet-small)
or 20 to 22.

The paper chose its one guiding and one guided layer heuristically. Here both are `ImageModel.guide`: the output of
the last stage before the head, whose average over space is the head's input, the "penultimate" features.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from . import families
from .normalise import Normalise
from .small import PlainNet, ResNet

__all__ = ["MODELS", "ImageModel", "Normalise", "PlainNet", "ResNet", "build", "replace_head"]


@dataclass(frozen=True)
class ImageModel:
    """Description of a network that `build` can make.

    Args:
        name: its name.
        layers: ``{module path: width}``, from the first to the last: layers worth tapping (the ends of its stages) and
            how many features each has after `bird.Taps`' default pooling.
        head: path of the classifier, an `nn.Linear`.
        parameters: how many a network for colour images and 10 classes has.
        make: channels and classes to the network.
    """

    name: str
    layers: Mapping[str, int]
    head: str
    parameters: int
    make: Callable[[int, int], nn.Module] = field(repr=False)

    @property
    def guide(self) -> str:
        """The default guiding or guided layer: the last one.

        Its average over space is the input of the head, except in ViT, whose head reads the class token: that is one
        of the 65 tokens of this average.
        """
        return list(self.layers)[-1]


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
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
        hint = f"the nearest are {nearest}" if nearest else f"there are {list(MODELS)}"
        raise ValueError(f"no network is called {name!r}; {hint}")
    return MODELS[name]


def _resnet(depth: int, width: int, parameters: int) -> ImageModel:
    layers = {f"layer{i + 1}": width << i for i in range(4)}
    return ImageModel(f"resnet{depth}", layers, "fc", parameters, partial(families.resnet, depth=depth))


def _densenet(depth: int, widths: tuple[int, int, int, int], parameters: int) -> ImageModel:
    names = *(f"features.denseblock{i}" for i in (1, 2, 3)), "features.relu5"
    layers = dict(zip(names, widths, strict=True))
    return ImageModel(f"densenet{depth}", layers, "classifier", parameters, partial(families.densenet, depth=depth))


def _mobilenetv2(
    name: str, layers: dict[int, int], parameters: int, make: Callable[[int, int], nn.Module]
) -> ImageModel:
    return ImageModel(name, {f"features.{i}": width for i, width in layers.items()}, "classifier.1", parameters, make)


def _small_mobilenetv2(name: str, width: int, last: int, parameters: int) -> ImageModel:
    # torchvision multiplies all channels by 0.5, those of the stem, too.
    stages = (1, 16, 1, 1), (3, 32, 1, 2), (6, 2 * width, 2, 2)
    make = partial(families.mobilenetv2, stages=stages, stride=2, width=0.5, last=last)
    return _mobilenetv2(name, {1: 8, 2: 16, 4: width, 5: last}, parameters, make)


def _small_resnet(name: str, widths: tuple[int, int, int], parameters: int) -> ImageModel:
    layers = {f"layer{i + 1}": width for i, width in enumerate(widths)}
    return ImageModel(name, layers, "head", parameters, lambda c, classes: ResNet(classes, channels=c, widths=widths))


MODELS: dict[str, ImageModel] = {
    model.name: model
    for model in (
        _mobilenetv2(
            "mobilenetv2",
            {1: 16, 3: 24, 6: 32, 10: 64, 13: 96, 16: 160, 17: 320, 18: 1280},
            2_236_682,
            families.mobilenetv2,
        ),
        _resnet(18, 64, 11_173_962),
        _resnet(34, 64, 21_282_122),
        _resnet(50, 256, 23_520_842),
        _resnet(101, 256, 42_512_970),
        _resnet(152, 256, 58_156_618),
        _densenet(121, (256, 512, 1024, 1024), 6_956_426),
        _densenet(169, (256, 512, 1280, 1664), 12_493_450),
        _densenet(201, (256, 512, 1792, 1920), 18_104_458),
        ImageModel(
            "vit",
            {f"encoder.layers.encoder_layer_{i}": 192 for i in (2, 5, 8, 11)} | {"encoder": 192},
            "heads.head",
            5_362_762,
            families.vit,
        ),
        ImageModel(
            "alexnet",
            {"features.2": 64, "features.5": 192, "features.12": 256, "classifier.5": 4096},
            "classifier.6",
            20_323_146,
            families.alexnet,
        ),
        _small_mobilenetv2("mobilenetv2-small", 64, 256, 84_498),
        _small_mobilenetv2("mobilenetv2-tiny", 48, 192, 52_210),
        _small_resnet("resnet-small", (16, 32, 96), 134_874),
        _small_resnet("resnet-tiny", (16, 24, 48), 47_338),
        ImageModel(
            "plain",
            {"block1": 32, "block2": 64, "block3": 96},
            "head",
            80_154,
            lambda channels, classes: PlainNet(classes, channels=channels),
        ),
    )
}
