"""Backend 2: fused Triton kernels."""

from __future__ import annotations

import torch
from triton import knobs

from ..types import Problem


def why_not(problem: Problem) -> str | None:
    """None if these kernels can run ``problem``, else the reason."""
    if problem.dtype == torch.float64:
        return "has no fp64 kernels"
    if problem.device.type == "cpu":
        return None if knobs.runtime.interpret else "needs CUDA tensors, these are on the CPU"
    if problem.device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, these tensors are on {problem.device}"
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


def why_not_best(problem: Problem) -> str | None:
    """None if these kernels should be preferred to library products where both can run."""
    if problem.device.type == "cpu":
        return "runs in the interpreter here, for tests only"
    return None
