"""What the tests of Gaussian kernels share: rules, sizes, and the formulas as they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bird_kernels import RBF, plan
from bird_kernels.backends.library_rbf import median

N, P, Q = 37, 21, 30
RULES = {
    "median": RBF(),
    "threshold": RBF(threshold=0.6),
    "fixed": RBF(sigma=(5.0, 3.0)),
    "median, flowing": RBF(flow=True),
    "threshold, flowing": RBF(threshold=1.5, flow=True),
}


def distances(x: Tensor) -> Tensor:
    """As they are written: zero exactly where two rows are equal."""
    return (x.double()[:, None] - x.double()[None]).square().sum(-1)


def bandwidth(x: Tensor, kernel: RBF, side: int = 0) -> float:
    """sigma^2 from the literal rules, with torch.median and all that it waits for."""
    if kernel.sigmas is not None:
        return kernel.sigmas[side] ** 2
    d = distances(x)
    if kernel.threshold is None:
        return d[d != 0].median().item()
    return d.median().item() * kernel.threshold**2


def centred(x: Tensor, kernel: RBF, side: int = 0) -> Tensor:
    k = torch.exp(-distances(x) / (2 * bandwidth(x, kernel, side)))
    h = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    return h @ k @ h


@contextlib.contextmanager
def in_strips(kept: int | None = None) -> Iterator[None]:
    """Distances in strips of few rows, and the median of any device; of so many bytes that are ``kept``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "STRIP", {"cpu": 16, "cuda": 16})
        patch.setattr(median, "FEW", 0)
        if kept is not None:
            patch.setattr(plan, "KEPT", kept)
        yield


# One strip, several, and several that nobody keeps.
MEMORIES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "kept": contextlib.nullcontext,
    "in parts": in_strips,
    "streamed": partial(in_strips, 0),
}
