"""Backend 2: fused Triton kernels, in the files beside this one. Same interface as `bird_kernels.backends.library`.

Launches: up to 512 rows on the Gram route two forward and one backward; else column statistics (one; two above 2048
rows), moments (one; two where tiles are few), and backward (one; on the cross route one for each side that needs a
gradient). The unbiased estimator adds the row norms and column sums on the cross route.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs

from ...types import Problem, Route, Stash
from .group import GroupStash, group_of
from .launch import capability, device_of, precision_of
from .routes import launches_of, stash_shapes

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


def forward(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem, route: Route) -> tuple[Tensor, Stash]:
    """Value (0-d, fp32) and stash for x [n, p], y [n, q] of one dtype and mask [n] or None."""
    with device_of(x):
        return launches_of(problem, route, precision_of(problem)).forward(x, y, mask)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, stash: Stash, problem: Problem, route: Route
) -> tuple[Tensor, Tensor]:
    """dX [n, p] and dY [n, q] in the inputs' dtype times the upstream ``grad`` (0-d); an unwanted one is empty."""
    with device_of(x):
        return launches_of(problem, route, precision_of(problem)).backward(grad, x, y, mask, stash)


def forward_together(
    tensors: Sequence[Tensor], mask: Tensor | None, problems: tuple[Problem, ...]
) -> tuple[Tensor, GroupStash]:
    """Values [pairs] (fp32) and stash of pairs that `plan.together` accepts, in two launches.

    ``tensors`` are x and y of the first pair, of the second, ..., all dense.
    """
    with device_of(tensors[0]):
        return group_of(problems, precision_of(problems[0])).forward(tensors, mask)


def backward_together(
    grad: Tensor, tensors: Sequence[Tensor], mask: Tensor | None, stash: GroupStash, problems: tuple[Problem, ...]
) -> list[Tensor | None]:
    """The gradients of the tensors times the upstream ``grad`` [pairs], in one launch; None where unwanted."""
    with device_of(tensors[0]):
        return group_of(problems, precision_of(problems[0])).backward(grad, tensors, mask, stash)
