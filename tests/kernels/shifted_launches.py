"""Every launch of `backends.shifted`, for whoever catches them: compiles them for other GPUs, or counts."""

from __future__ import annotations

import itertools

import torch

from bird_kernels.backends import shifted
from bird_kernels.types import Problem

# n, p, q: padded widths; a sum in one part and one in several.
SHAPES = [("gram", 128, 512, 320), ("cross", 2048, 64, 128), ("cross", 32768, 64, 128)]
DTYPES = [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, None), (torch.float16, None)]
# statistic, estimator, masked, gradients of x and y
VARIANTS = [("cka_loss", "biased", False, (True, True)), ("hsic", "biased", True, (False, False))]
VARIANTS += [("cka", "unbiased", True, (True, True)), ("sqrt_cka_loss", "biased", False, (True, False))]


def launch_all() -> None:
    """Runs forwards and backwards on CPU tensors that nobody wrote, as a GPU would; launches are up to the caller."""
    for (route, n, p, q), (dtype, precision), variant in itertools.product(SHAPES, DTYPES, VARIANTS):
        statistic, estimator, masked, sides = variant
        if route == "cross" and estimator == "unbiased":
            continue
        x, y = torch.zeros(n, p, dtype=dtype), torch.zeros(n, q, dtype=dtype)
        mask = torch.ones(n, dtype=torch.bool) if masked else None
        problem = Problem(n, p, q, dtype, x.device, statistic, estimator, precision, masked, *sides)  # type: ignore[arg-type]
        value, stash = shifted.forward(x, y, mask, problem, route)  # type: ignore[arg-type]
        shifted.backward(value, x, y, mask, stash, problem, route)  # type: ignore[arg-type]
