"""The values that the other files pass around. No imports of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Estimator = Literal["biased", "unbiased"]
Statistic = Literal["cka_loss", "cka", "hsic", "sqrt_cka_loss", "gram_mse"]
Variant = Literal[
    "linear",
    "sqrt=True",
    'kernel="rbf"',
    "RBF(flow=True)",
    "RBF kernels too large to be kept",
    "gram_mse",
    "center=False",
]
Route = Literal["gram", "cross"]
TransportName = Literal["merged", "gathered"]
Precision = Literal["ieee", "tf32", "tf32x3"]


PLAIN = (torch.Tensor, torch.nn.Parameter)  # types of tensors that are numbers in memory and nothing more


@dataclass(frozen=True)
class RBF:
    r"""The Gaussian kernel ``K_ij = exp(-|x_i - x_j|^2 / (2 sigma^2))``, and how each side finds its own sigma.

    ``RBF()``: sigma^2 is the median of the batch's squared distances that are not zero (the rule of the much-copied
    ``kernel_CKA``). ``RBF(threshold=t)``: sigma^2 = t^2 times the median of all squared distances, the diagonal
    included (Kornblith et al. 2019's colab). ``RBF(sigma=s)``: fixed, in units of the features; a pair gives x and y
    their own. Of an even number the lower of the two middle distances is the median, as `torch.median` has it.

    A median of zero (rows that are all equal; a threshold with two rows) leaves the side without variance.

    Args:
        sigma: a positive number, or one for x and one for y.
        threshold: a positive number.
        flow: whether the gradient flows through the median, to the two rows whose distance it is. False, as published:
            sigma is a constant of the batch.

    Raises:
        ValueError: a sigma or threshold that is not positive and finite, both of them, or ``flow`` with a fixed sigma.
    """

    sigma: float | tuple[float, float] | None = None
    threshold: float | None = None
    flow: bool = False

    def __post_init__(self) -> None:
        if any(isinstance(number, torch.Tensor) for number in (*(self.sigmas or ()), self.threshold)):
            raise TypeError(
                "sigma and threshold are Python numbers, without gradients: convert them with float(); for a sigma "
                "that is learned divide the features by it and take RBF(sigma=1.0)"
            )
        numbers = (*(self.sigmas or ()), *(() if self.threshold is None else (self.threshold,)))
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"sigma and threshold must be positive and finite, got {self!r}")
        if self.sigma is not None and (self.threshold is not None or self.flow):
            raise ValueError(f"a fixed sigma has neither a threshold nor a gradient, got {self!r}")

    @property
    def sigmas(self) -> tuple[float, float] | None:
        """The fixed sigmas of x and of y; None: from the batch."""
        return self.sigma if self.sigma is None or isinstance(self.sigma, tuple) else (self.sigma, self.sigma)


class Options(NamedTuple):
    """What a public call says besides its tensors, as the user wrote it: `inputs.prepare` checks it.

    ``statistic`` is the function that was called; the others are arguments of `cka_loss`. csrc/at_once.h reads the
    fields by their places.
    """

    statistic: Statistic
    kernel: str | RBF = "linear"
    estimator: str = "biased"
    row_dims: int = 1
    group: ProcessGroup | None = None
    center: bool = True
    backend: str = "auto"
    precision: str | None = None


class Problem(NamedTuple):
    """What one call asks for: everything a plan may depend on, and nothing that needs the data.

    ``n`` rows, ``p`` student and ``q`` teacher features; ``dtype`` is the common dtype of both sides after promotion.
    ``precision`` None means PyTorch's own switch for fp32 products. ``kernel`` None is the linear one. ``center`` False
    leaves out the centring.
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
    kernel: RBF | None = None
    center: bool = True


class Stash(NamedTuple):
    """What a forward leaves for its backward; unused entries have no elements.

    ``coefficients`` is an `moments.Coefficients` as fp64 [11]. ``xs`` and ``ys`` are the backend's own view of the
    centred sides. ``xx``, ``yy``, ``xy`` are K, L and nothing on the gram route, A = X^T X, Y^T Y and C = Y^T X on the
    cross route. ``rows`` [2, n] holds the squared row norms kappa and lambda (unbiased only). Of an RBF kernel: see
    `rbf.stash_shapes`.
    """

    coefficients: torch.Tensor
    xs: torch.Tensor
    ys: torch.Tensor
    xx: torch.Tensor
    yy: torch.Tensor
    xy: torch.Tensor
    rows: torch.Tensor


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # of a Stash, by field


class Transport(NamedTuple):
    """What travels between the ranks of a group in one call: merged sums or gathered rows (`transport`).

    ``rows`` are those of all ranks; ``bytes`` each rank sends at the least, ``other_bytes`` with the other transport.
    """

    name: TransportName
    world: int
    rows: int
    bytes: int
    other_bytes: int


class Sheet(NamedTuple):
    """A GPU as its data sheet has it: dense TFLOP/s, TB/s, MB, GHz."""

    name: str
    fp32: float
    tf32: float
    half: float  # fp16 and bf16, fp32 accumulation
    memory: float
    cache: float  # L2
    multiprocessors: int
    clock: float


class Cost(NamedTuple):
    """Microseconds of forward and wanted backward: the host's, the device's; and how many kernels are launched."""

    host: float
    device: float
    launches: int

    @property
    def us(self) -> float:
        """What a call takes in a stream of such calls: the slower of the two."""
        return max(self.host, self.device)


class Choice(NamedTuple):
    """Which backend computes a problem, and why.

    ``predicted`` by the cost model and ``measured`` in microseconds, by candidate; ``rejected`` says of better backends
    why they cannot run.
    """

    backend: str
    reason: str
    rejected: Mapping[str, str] = {}
    predicted: Mapping[str, Cost] = {}
    measured: Mapping[str, float] = {}


@dataclass(frozen=True)
class Plan:
    """How a problem will be computed, and why. ``print`` it.

    ``choice`` has the backend's reason and the times of its rivals. ``flops``, ``bytes`` and ``workspace`` are for one
    forward and the backward of the sides that need a gradient: floating-point operations with symmetric products
    counted once, bytes that must cross memory at the least, and bytes allocated beyond inputs and gradients.
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
    choice: Choice
    transport: Transport | None = None

    @property
    def rejected(self) -> Mapping[str, str]:
        """Why better backends were not taken, by name."""
        return self.choice.rejected

    def __str__(self) -> str:
        p = self.problem
        sides = " and ".join(side for side, wanted in (("x", p.x_grad), ("y", p.y_grad)) if wanted)
        lines = [
            f"{p.statistic} ({p.estimator}, {p.kernel or 'linear'}{'' if p.center else ', not centred'}) "
            f"of x [{p.n}, {p.p}] and y [{p.n}, {p.q}], "
            f"{str(p.dtype).removeprefix('torch.')} on {p.device}{', masked' if p.masked else ''}",
            f"  gradient   {sides or 'none'}",
            f"  route      {self.route}: {self.why}",
            f"  backend    {self.backend}, {self.tile}",
            f"  because    {self.choice.reason}",
            *_times(self.choice),
            f"  work       {_si(self.flops)}flop, {_si(self.bytes)}B read and written at the least",
            f"  workspace  {_si(self.workspace)}B beyond inputs and gradients",
            f"  floor      {self.floor}",
        ]
        if self.transport is not None:
            t = self.transport
            other = "merged" if t.name == "gathered" else "gathered"
            lines.insert(
                1,
                f"  group      {t.world} ranks, {t.rows} rows: {t.name}, {_si(t.bytes)}B sent by each rank, "
                f"{other} would need {_si(t.other_bytes)}B",
            )
        lines += [f"  not {name:<8} {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


def _times(choice: Choice) -> list[str]:
    """A line for every candidate: predicted, of which on the device, and measured."""
    lines = []
    for name in dict.fromkeys((*choice.predicted, *choice.measured)):
        parts = []
        if name in choice.predicted:
            cost = choice.predicted[name]
            parts.append(f"predicted {cost.us:.3g} us ({cost.device:.3g} on the device, {cost.launches} launches)")
        if name in choice.measured:
            parts.append(f"measured {choice.measured[name]:.3g} us")
        lines.append(f"  time       {name}: {', '.join(parts)}")
    return lines


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"
