"""Features that break naive formulas: regimes, sides without variance, layouts in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.ways import BF16, F16, F32, NARROW, Way

UPSTREAM = 512.0  # keeps fp16 gradients in that dtype's normal range


class Regime(NamedTuple):
    """``change(x, y)`` of standard normal features, and what is asked of the result."""

    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...] = (F32,)
    looser: float = 1.0
    vanishing: bool = False
    upstream: float = UPSTREAM
    gaussian: str = "all"  # the bandwidths that are as exact: all, those of a "median", without a "flow", "none"

    def suits(self, way: Way) -> bool:
        kernel = way.kernel
        if kernel is None or self.gaussian == "all":
            return True
        # A fixed sigma makes K the identity, or constant; of equal distances any one is the median that flows.
        return {"median": kernel.sigmas is None, "no flow": not kernel.flow, "none": False}[self.gaussian]


def at(mean: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x, y: ((x.float() + mean).to(x.dtype), (y.float() + mean).to(y.dtype))


def of_size(s: float, t: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x, y: (s * x, t * y)


def large_rows(factor: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x[5] *= factor
        y[5] *= factor
        return x, y

    return change


def large_columns(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """In halves of x alone: with one in both sides the matrix that multiplies z, rounded, costs up to 1.5 %."""
    x[:, 3] *= 1000
    y[:, 11] *= 1000 if y.element_size() > 2 else 1
    return x, y


def drifting(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """CKA is all but 1, and the gradient what is left of a difference."""
    drift = torch.linspace(-30, 30, len(x), device=x.device)[:, None]
    return (x.float() + drift).to(x.dtype), (y.float() - drift).to(y.dtype)


def largest_halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squares, products and differences would leave fp16's range."""
    signs = torch.where(torch.arange(x.shape[1], device=x.device) % 2 == 0, 1.0, -1.0)
    x = ((x.float() * 500 + 60000).clamp(max=65000) * signs).half()
    return x, (y.float() * 15000).clamp(-65000, 65000).half()


def unrelated(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """C = Y^T X is exactly zero, and no side is: the biased gradient vanishes, the unbiased one has its diagonal."""
    half = len(x) // 4 * 2
    whole = torch.zeros_like(x), torch.zeros_like(y)
    for side, own, rows in ((x, whole[0], slice(0, half)), (y, whole[1], slice(half, 2 * half))):
        own[rows][::2] = side[: half // 2].round()
        own[rows][1::2] = -own[rows][::2]
    return whole


def own_means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (a + s * torch.logspace(-3, 3, a.shape[1], device=a.device) for a, s in ((x, 1), (y, -1)))  # type: ignore[return-value]


REGIMES = {
    # Some columns are shifted, some not; in bf16 a shifted entry may need a ninth bit: sums were up to 6.6e-6 off.
    "means of 4": Regime(at(4.1), NARROW, 3.0),
    "means of 1000": Regime(at(1000), NARROW, 3.0),
    "means of -1000": Regime(at(-1000), looser=3.0),
    "own means": Regime(own_means, looser=3.0),
    "tiny": Regime(of_size(1e-12, 1e-12), upstream=1e-9, gaussian="median"),
    "huge": Regime(of_size(1e12, 1e12), upstream=1e12, gaussian="median"),
    "tiny and huge": Regime(of_size(1e-12, 1e12), gaussian="median"),
    "powers of two": Regime(of_size(2.0**40, 2.0**-40), (F32, BF16), gaussian="median"),
    "large columns": Regime(large_columns, NARROW, 2.0, upstream=2.0**14, gaussian="none"),
    "large rows": Regime(large_rows(1000), looser=6.0, vanishing=True, gaussian="none"),
    "drift": Regime(drifting, NARROW, 10.0, vanishing=True, gaussian="median"),
    "rectified": Regime(lambda x, y: ((x - 1.5).relu(), (y - 1.5).relu()), NARROW, 2.0, gaussian="no flow"),
    "largest halves": Regime(largest_halves, (F16,), 2.0, upstream=1e6, gaussian="none"),
    "smallest halves": Regime(lambda x, y: (x * 6e-5, y * 6e-5), (F16,), 8.0, upstream=6e-5, gaussian="none"),
    "nearly equal": Regime(lambda x, y: (x, x + 1e-3 * x.flip(1)), vanishing=True),
    "equal": Regime(lambda x, y: (x, x.clone()), vanishing=True),
    "nearly constant": Regime(lambda x, y: (1 + 1e-4 * x, y), looser=3.0),
    "constant but for last bits": Regime(lambda x, y: (1 + 1e-6 * x, y), looser=3.0, gaussian="median"),
    "five rows, repeated": Regime(
        lambda x, y: (x[torch.arange(len(x)) % 5], y[torch.arange(len(x)) % 5]), gaussian="no flow"
    ),
    "two rows, repeated": Regime(
        lambda x, y: (x[torch.arange(len(x)) % 2], y[torch.arange(len(x)) % 2]), vanishing=True, gaussian="none"
    ),
    "one column": Regime(lambda x, y: (x[:, :1], y[:, :1])),
    "one column, expanded": Regime(lambda x, y: (x[:, :1].expand_as(x), y), looser=2.0),
    "nothing shared": Regime(unrelated, vanishing=True, gaussian="none"),
}


FLAT: dict[str, Callable[[Tensor], Tensor]] = {  # sides without variance, like a side
    "zero": torch.zeros_like,
    "0.1": lambda x: torch.full_like(x, 0.1),
    "1e-30": lambda x: torch.full_like(x, 1e-30),
    "1000.3": lambda x: torch.full_like(x, 1000.3),
    "-3e4": lambda x: torch.full_like(x, -3e4),
    "one row, repeated": lambda x: (100 * x[:1]).expand_as(x),
    "one feature": lambda x: torch.full_like(x[:, :1], 1 / 3),
    "all but one zero": lambda x: torch.cat([torch.zeros_like(x[:, 1:]), torch.full_like(x[:, :1], 7.7)], dim=1),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda a: a.t().contiguous().t(),
    "sliced columns": lambda a: torch.cat([torch.full_like(a, torch.nan), a], dim=1)[:, a.shape[1] :],
    "every second row": lambda a: torch.stack([a, torch.full_like(a, torch.nan)], dim=1).flatten(0, 1)[::2],
    "every second column": lambda a: torch.stack([a, torch.full_like(a, torch.nan)], dim=2).flatten(1)[:, ::2],
    "offset by one element": lambda a: torch.cat([a.new_zeros(1), a.flatten()])[1:].view_as(a),
}
