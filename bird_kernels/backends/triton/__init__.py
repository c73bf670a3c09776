"""Backend 2: fused Triton kernels where launches count: few rows (`small`), and Gaussian kernels (`gaussian`).

Same interface as `bird_kernels.backends.library`; linear kernels take the Gram route and at most `plan.FEW_ROWS` rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs

from ...types import Problem, Route, Shapes, Stash
from .launch import capability, device_of, precision_of
from .small import GroupStash, shapes_of, small_of

__all__ = ["GroupStash", "backward", "backward_together", "forward", "forward_together", "stash_shapes", "why_not"]


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
    """Shape and dtype of every tensor of the stash: a `GroupStash` of one pair, without that dimension."""
    shapes = shapes_of((problem,))
    none = (0,), torch.float32
    coefficients, locations, grams, shifts = (
        (shape[1:] if len(shape) > 1 else shape, dtype) for shape, dtype in shapes.values()
    )
    return dict(coefficients=coefficients, xs=locations, ys=none, xx=grams, yy=none, xy=none, rows=shifts)


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    stash = Stash(*(x.new_empty(shape, dtype=dtype) for shape, dtype in stash_shapes(problem, route).values()))
    with device_of(x):
        return small_of((problem,), precision_of(problem)).forward((x, y), mask, _as_group(stash)), stash


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    with device_of(x):
        dx, dy = small_of((problem,), precision_of(problem)).backward(grad, (x, y), mask, _as_group(stash))
    return x.new_empty(0) if dx is None else dx, y.new_empty(0) if dy is None else dy


def _as_group(stash: Stash) -> GroupStash:
    return GroupStash(stash.coefficients, stash.xs, stash.xx, stash.rows)


def forward_together(
    tensors: Sequence[Tensor], mask: Tensor | None, problems: tuple[Problem, ...]
) -> tuple[Tensor, GroupStash]:
    """Values [pairs] (fp32) and stash of pairs that `plan.together` accepts: x and y of the first, of the second, ..."""
    stash = GroupStash(*(tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in shapes_of(problems).values()))
    with device_of(tensors[0]):
        return small_of(problems, precision_of(problems[0])).forward(tensors, mask, stash), stash


def backward_together(
    grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: GroupStash, problems: tuple[Problem, ...]
) -> list[Tensor | None]:
    """The gradients of the tensors times the upstream ``grad`` [pairs], in one launch; None where unwanted."""
    with device_of(tensors[0]):
        return small_of(problems, precision_of(problems[0])).backward(grad, tensors, mask, stash)
