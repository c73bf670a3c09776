"""The Triton backend: fused kernels where launches or reads take longest, few rows (`small`), and Gaussian kernels.

Same interface as `bird_kernels.backends.library`; linear kernels take the Gram route and at most `plan.FEW_ROWS` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton import knobs

from ...types import Precision, Problem, Route, Shapes, Stash
from . import gaussian, small
from .launch import capability, device_of, precision_of
from .layers import LayerTiles

__all__ = [
    "backward",
    "backward_together",
    "forward",
    "forward_together",
    "layer_products",
    "stash_shapes",
    "why_not",
]


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None if these kernels can run products of ``dtype`` on ``device``, else the reason."""
    if dtype == torch.float64:
        return "has no fp64 kernels"
    if device.type == "cpu":
        return None if knobs.runtime.interpret else "needs CUDA tensors, these are on the CPU"
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, these tensors are on {device}"
    if capability(device) < (8, 0):
        return f"needs compute capability 8.0 or newer, this GPU has {'.'.join(map(str, capability(device)))}"
    return None


def stash_shapes(problem: Problem, route: Route) -> Shapes:
    """Shape and dtype of every tensor of the stash."""
    return gaussian.gaussian_shapes(problem) if problem.kernel else small.small_shapes((problem,))


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    return forward_together((x, y), mask, (problem,))


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, *, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    dx, dy = backward_together(grad, (x, y), mask, stash, (problem,))
    return x.new_empty(0) if dx is None else dx, y.new_empty(0) if dy is None else dy


def forward_together(
    tensors: Sequence[Tensor], mask: Tensor | None, problems: tuple[Problem, ...]
) -> tuple[Tensor, Stash]:
    """Values [pairs] (0-d for one), fp32, and stash; ``tensors`` are x and y of each pair (see `plan.together`)."""
    with device_of(tensors[0]):
        return _launches_of(problems, precision_of(problems[0])).forward(tensors, mask)


def backward_together(
    grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: Stash, problems: tuple[Problem, ...]
) -> list[Tensor | None]:
    """The gradients of the tensors times the upstream ``grad`` [pairs], by one launch; None where not wanted."""
    with device_of(tensors[0]):
        return _launches_of(problems, precision_of(problems[0])).backward(grad, tensors, mask, stash)


def layer_products(
    layers: Sequence[Tensor], mask: Tensor | None, problem: Problem, room: int = 1 << 20
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `layers.LayerTiles` computes of layers [n, width] of one dtype; ``room``: the most numbers in tiles."""
    with device_of(layers[0]):
        return _layers_of(problem, tuple(layer.shape[1] for layer in layers), room, precision_of(problem))(layers, mask)


_layers_of = lru_cache(maxsize=64)(LayerTiles)


@lru_cache(maxsize=1024)
def _launches_of(problems: tuple[Problem, ...], precision: Precision) -> gaussian.Gaussian | small.Small:
    exact = tuple(problem._replace(precision=precision) for problem in problems)
    return (gaussian.Gaussian if problems[0].kernel else small.Small)(exact, precision)
