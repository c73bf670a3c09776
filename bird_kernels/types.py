"""The two values that planning passes around. No imports of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

Estimator = Literal["biased", "unbiased"]
Statistic = Literal["cka_loss", "cka", "hsic"]
Route = Literal["gram", "cross"]
Precision = Literal["ieee", "tf32", "tf32x3"]


class Problem(NamedTuple):
    """What one call asks for: everything a plan may depend on, and nothing that needs the data.

    ``n`` rows, ``p`` student and ``q`` teacher features; ``dtype`` is the common dtype of both sides after promotion.
    ``precision`` None means PyTorch's own switch for fp32 products.
    """

    n: int
    p: int
    q: int
    dtype: torch.dtype
    device: torch.device
    statistic: Statistic = "cka_loss"
    estimator: Estimator = "biased"
    precision: Precision | None = None
    masked: bool = False
    x_grad: bool = True
    y_grad: bool = False


class Stash(NamedTuple):
    """What a forward leaves for its backward; unused entries have no elements.

    ``coefficients`` is an `estimators.Coefficients` as fp64 [11]. ``xs`` and ``ys`` are the backend's own view of the
    centred sides. ``xx``, ``yy``, ``xy`` are K, L and nothing on the gram route, A = X^T X, Y^T Y and C = Y^T X on the
    cross route. ``rows`` [2, n] holds the squared row norms kappa and lambda (unbiased only).
    """

    coefficients: torch.Tensor
    xs: torch.Tensor
    ys: torch.Tensor
    xx: torch.Tensor
    yy: torch.Tensor
    xy: torch.Tensor
    rows: torch.Tensor


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # of a Stash, by field


@dataclass(frozen=True)
class Plan:
    """How a problem will be computed, and why. ``print`` it.

    ``flops``, ``bytes`` and ``workspace`` are for one forward and the backward of the sides that need a gradient:
    floating-point operations with symmetric products counted once, bytes that must cross memory at the least, and
    bytes allocated beyond inputs and gradients.
    """

    problem: Problem
    route: Route
    backend: str
    tile: str
    flops: int
    bytes: int
    workspace: int
    why: str
    floor: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        p = self.problem
        sides = " and ".join(side for side, wanted in (("x", p.x_grad), ("y", p.y_grad)) if wanted)
        lines = [
            f"{p.statistic} ({p.estimator}, linear) of x [{p.n}, {p.p}] and y [{p.n}, {p.q}], "
            f"{str(p.dtype).removeprefix('torch.')} on {p.device}{', masked' if p.masked else ''}",
            f"  gradient   {sides or 'none'}",
            f"  route      {self.route}: {self.why}",
            f"  backend    {self.backend}, {self.tile}",
            f"  work       {_si(self.flops)}flop, {_si(self.bytes)}B read and written at the least",
            f"  workspace  {_si(self.workspace)}B beyond inputs and gradients",
            f"  floor      {self.floor}",
        ]
        lines += [f"  not {name:<8} {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"
