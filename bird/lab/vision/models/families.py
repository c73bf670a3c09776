"""torchvision's networks adapted to 32x32 images: other stems (first layers), and last layers as in `MODELS`.

The originals are made for 224x224 images and would reduce 32x32 images to one position, or none. As in the usual
variants for CIFAR, the stems have smaller strides. The first convolution is replaced by `Normalise` and a convolution:

- ResNet: ``conv1`` 3x3 with stride 1 for 7x7 with stride 2, and no max pool; the last stage sees 4x4 positions.
- DenseNet: ``features.conv0`` likewise, no ``pool0``; 4x4. The ReLU before the head, a function call in the original,
  is the layer ``features.relu5``, so that it can be tapped, and ``features.pool5`` averages its output.
- MobileNetV2: stride 1 for 2 in the stem ``features.0`` and in the stage of 24 channels; 4x4. No dropout at the head.
- AlexNet: ``features.0`` 3x3 with stride 2 for 11x11 with stride 4; 1x1 after the last pool, so that the classifier
  begins with 256 features for 9,216.
- ViT: patches of 4x4, 64 tokens and the class token, in the size that DeiT calls Tiny: 12 blocks, 192 wide, 3 heads.
  Of the published sizes it is the one between MobileNetV2 and ResNet18 in parameters (5.4 million) and operations.

torchvision is imported when a network is built. Heads are always replaced, see `replace_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .normalise import Normalise


def _torchvision() -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError("this network comes from torchvision: pip install 'bird-kernels[vision]'") from error
    return models


def _stem(
    channels: int,
    conv: nn.Conv2d,
    init: Callable[[Tensor], object] | None = None,
    *,
    size: int,
    stride: int,
    padding: int,
) -> nn.Sequential:
    """`Normalise` and a convolution with as many outputs as ``conv``, which it replaces; ``init`` as in torchvision."""
    normalise = Normalise(channels)
    new = nn.Conv2d(channels, conv.out_channels, size, stride, padding, bias=conv.bias is not None)
    if init is not None:
        init(new.weight)
    return nn.Sequential(normalise, new)


def _fan_out(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode="fan_out")


def _fan_in(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=weight[0].numel() ** -0.5)


def resnet(channels: int, classes: int, *, depth: int) -> nn.Module:
    """He et al. 2016; in torchvision the stride of a bottleneck is at its 3x3 convolution ("v1.5")."""
    network = getattr(_torchvision(), f"resnet{depth}")(num_classes=classes)
    network.conv1 = _stem(channels, network.conv1, _fan_out, size=3, stride=1, padding=1)
    network.maxpool = nn.Identity()
    return network


def densenet(channels: int, classes: int, *, depth: int) -> nn.Module:
    """Huang et al. 2017."""
    network = getattr(_torchvision(), f"densenet{depth}")(num_classes=classes)
    features = network.features
    features.conv0 = _stem(channels, features.conv0, nn.init.kaiming_normal_, size=3, stride=1, padding=1)
    features.pool0 = nn.Identity()
    features.add_module("relu5", nn.ReLU(inplace=True))
    features.add_module("pool5", nn.AdaptiveAvgPool2d(1))  # between this ReLU and the original's, which is in place
    return network


# Expansion, channels, blocks and stride of the first block per stage: the paper's table, except for a stride of 1 in
# the second line.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenetv2(
    channels: int,
    classes: int,
    *,
    stages: Sequence[Sequence[int]] = STAGES,
    stride: int = 1,
    width: float = 1.0,
    last: int = 1280,
) -> nn.Module:
    """Sandler et al. 2018; ``stride`` is the stem's, ``width`` multiplies all channels except the ``last``."""
    module = _torchvision().mobilenetv2
    network = module.MobileNetV2(classes, width, [list(stage) for stage in stages], dropout=0.0)
    stem, end = network.features[0], network.features[-1]
    stem[0] = _stem(channels, stem[0], _fan_out, size=3, stride=stride, padding=1)
    if last != end.out_channels:
        end = module.Conv2dNormActivation(end[0].in_channels, last, kernel_size=1, activation_layer=nn.ReLU6)
        _fan_out(end[0].weight)
        network.features[-1], network.classifier[-1] = end, nn.Linear(last, classes)
    return network


def alexnet(channels: int, classes: int) -> nn.Module:
    """Krizhevsky 2014, "one weird trick", with dropout."""
    network = _torchvision().alexnet(num_classes=classes)
    network.features[0] = _stem(channels, network.features[0], size=3, stride=2, padding=1)
    network.avgpool = nn.Identity()
    network.classifier[1] = nn.Linear(256, 4096)
    return network


def vit(channels: int, classes: int) -> nn.Module:
    """Dosovitskiy et al. 2021, in the size of DeiT-Ti (Touvron et al. 2021)."""
    network = _torchvision().VisionTransformer(
        image_size=32, patch_size=4, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=classes
    )
    network.conv_proj = _stem(channels, network.conv_proj, _fan_in, size=4, stride=4, padding=0)
    return network
