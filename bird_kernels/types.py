"""The types that the other files share; this file imports none of them."""

from __future__ import annotations

import math
import numbers
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
    'RBF(median="average")',
    "RBF kernels too large to be kept",
    "gram_mse",
    "center=False",
]
Route = Literal["gram", "cross"]
TransportName = Literal["merged", "gathered"]
Precision = Literal["ieee", "tf32", "tf32x3"]


PLAIN = (torch.Tensor, torch.nn.Parameter)  # the exact types of ordinary tensors, without subclasses


@dataclass(frozen=True)
class RBF:
    r"""The Gaussian kernel ``K_ij = exp(-|x_i - x_j|^2 / (2 sigma^2))``, and how each side finds its own sigma.

    ``RBF()``: sigma^2 is the median of the batch's squared distances that are not zero (the rule of the much-copied
    ``kernel_CKA``). ``RBF(threshold=t)``: sigma^2 = t^2 times the median of all squared distances, the diagonal
    included (Kornblith et al. 2019's colab). ``RBF(sigma=s)``: fixed, in units of the features; a pair gives x and y
    their own.

    A median of zero (rows that are all equal; a threshold with two rows) leaves the side without variance.

    Args:
        sigma: a positive number, or one for x and one for y.
        threshold: a positive number.
        flow: whether the gradient flows through the median, to the two rows whose distance it is. False, as published:
            sigma is a constant of the batch.
        median: of an even number of distances "lower" takes the lower one of the two in the middle, as `torch.median`
            does, "average" the average of both, as `numpy.median` and Kornblith's colab do; not with ``flow``.

    Raises:
        TypeError: a sigma or threshold that is a tensor, or no number.
        ValueError: a sigma or threshold that is not positive and finite, both of them, ``flow`` with a fixed sigma
            or an average; a ``median`` of another name.
    """

    sigma: float | tuple[float, float] | None = None
    threshold: float | None = None
    flow: bool = False
    median: str = "lower"

    def __post_init__(self) -> None:
        if isinstance(self.sigma, tuple) and len(self.sigma) != 2:
            raise ValueError(f"sigma is one number, or one for x and one for y, got {self.sigma!r}")
        if any(isinstance(number, torch.Tensor) for number in (*(self.sigmas or ()), self.threshold)):
            raise TypeError(
                "sigma and threshold are Python numbers, without gradients: convert them with float(); for a sigma "
                "that is learned divide the features by it and take RBF(sigma=1.0)"
            )
        given = (*(self.sigmas or ()), *(() if self.threshold is None else (self.threshold,)))
        if not all(isinstance(number, numbers.Real) and not isinstance(number, bool) for number in given):
            raise TypeError(f"sigma and threshold are numbers, or a tuple of two sigmas, got {self!r}")
        if not all(math.isfinite(number) and number > 0 for number in given):
            raise ValueError(f"sigma and threshold must be positive and finite, got {self!r}")
        if self.sigma is not None and (self.threshold is not None or self.flow):
            raise ValueError(f"a fixed sigma has neither a threshold nor a gradient, got {self!r}")
        if self.median not in ("lower", "average"):
            raise ValueError(f'median must be "lower" or "average", got {self.median!r}')
        if self.flow and self.median != "lower":
            raise ValueError(f'a gradient flows to the rows whose distance is the median: median="lower", got {self!r}')

    @property
    def sigmas(self) -> tuple[float, float] | None:
        """The fixed sigmas of x and of y; None: from the batch."""
        return self.sigma if self.sigma is None or isinstance(self.sigma, tuple) else (self.sigma, self.sigma)


class Options(NamedTuple):
    """The arguments of a public call besides its tensors, not checked yet: `inputs.prepare` does that.

    ``statistic`` is the function that was called; the other fields are arguments of `cka_loss`. csrc/at_once.h reads
    the fields by position.
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
    """One checked call without its data: everything that a plan may depend on.

    ``n`` rows, ``p`` student and ``q`` teacher features; ``dtype`` is the common dtype of both sides after promotion.
    ``precision`` None means PyTorch's own switch for fp32 products. ``kernel`` None is the linear kernel. ``masked``:
    there is a mask. ``x_grad``, ``y_grad``: a gradient of that side is wanted. ``center`` False leaves out centring.
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
    """What a forward saves for its backward; entries that a backend does not use have no elements.

    Contents and shapes are the backend's own (its ``stash_shapes``), but of a linear kernel ``coefficients`` is a
    `moments.Coefficients`, fp64 [11]. In `library`, ``xs`` and ``ys`` are the centred or shifted sides; ``xx``, ``yy``
    and ``xy`` are K, L and nothing on the gram route, A = X^T X, Y^T Y and C = Y^T X on the cross route; ``rows``
    [3, n] is for the unbiased estimator (`sides.Sides`). Of an RBF kernel see `library_rbf.stash_shapes`.
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
    """What the ranks of a group send each other in one call: merged sums or gathered rows (`transport`).

    ``world`` ranks have ``rows`` rows in all. Each sends at least ``bytes``; by the other transport ``other_bytes``.
    """

    name: TransportName
    world: int
    rows: int
    bytes: int
    other_bytes: int


class Sheet(NamedTuple):
    """The figures of a GPU's data sheet: dense TFLOP/s by dtype, memory in TB/s, cache in MB, clock in GHz."""

    name: str
    fp32: float
    tf32: float
    half: float  # fp16 and bf16, fp32 accumulation
    memory: float
    cache: float  # L2
    multiprocessors: int
    clock: float


class Cost(NamedTuple):
    """Microseconds of the host and of the device for forward and wanted backward, and the number of launches."""

    host: float
    device: float
    launches: int

    @property
    def us(self) -> float:
        """What a call takes in a stream of such calls: the slower of the two."""
        return max(self.host, self.device)


class Choice(NamedTuple):
    """Which backend computes a problem, and why.

    ``rejected`` has the reasons why better backends cannot run, by name. ``predicted`` has the cost model's figures,
    ``measured`` measured microseconds, by candidate: a backend, or "symmetric ..." (`tuning.Measurement`).
    """

    backend: str
    reason: str
    rejected: Mapping[str, str] = {}
    predicted: Mapping[str, Cost] = {}
    measured: Mapping[str, float] = {}


@dataclass(frozen=True)
class Plan:
    """How a problem will be computed, and why. ``print`` it.

    ``choice`` has the reason for the backend and the times of all candidates. ``flops``, ``bytes`` and ``workspace``
    are for one forward and the backward of the sides that need a gradient: floating-point operations, of a symmetric
    product those of one half; the least memory traffic in bytes; and bytes allocated beyond inputs and gradients.
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
        """The reasons why better backends cannot run, by name."""
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
    """A line for each candidate with its predicted and its measured time."""
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
