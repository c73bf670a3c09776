"""What a question is: sizes, numbers, mode, and features to ask it with; and those that ``./dev bench`` asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor

from bird_kernels import types

FORWARD = ("forward",)
BACKWARD = ("forward+backward",)
BOTH = FORWARD + BACKWARD


@dataclass(frozen=True)
class Case:
    """One question: student ``x [n, p]``, which needs a gradient unless the mode is "forward", and frozen ``y [n, q]``.

    ``problem`` names a family of sizes; that of "rbf" has Gaussian kernels, their bandwidths the median, constant.
    ``precision`` is that of fp32 products, and empty for other dtypes. ``compiled``: torch.compile is asked too, which
    takes long; no part of the case's identity.
    """

    problem: str
    n: int
    p: int
    q: int
    dtype: str = "float32"
    precision: str = "ieee"
    estimator: str = "biased"
    mode: str = "forward+backward"
    compiled: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        numbers = "-".join(filter(None, (self.dtype, self.precision)))
        return f"{self.problem}-{self.n}x{self.p}x{self.q}-{numbers}-{self.estimator}-{self.mode}"

    @property
    def backward(self) -> bool:
        """Whether the gradient of the student is part of the call."""
        return self.mode != "forward"

    @property
    def options(self) -> dict[str, str]:
        """What `bird_kernels.cka_loss` and the hand-written forms are told of the question."""
        return {"estimator": self.estimator} | ({"kernel": "rbf"} if self.problem == "rbf" else {})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the features."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def spec(self, device: torch.device) -> types.Problem:
        """The case as the package's planner sees it."""
        return types.Problem(
            self.n, self.p, self.q, self.torch_dtype, device,
            estimator=self.estimator, precision=self.precision or None, x_grad=self.backward,  # type: ignore[arg-type]
            kernel=types.RBF() if "kernel" in self.options else None,
        )  # fmt: skip

    def features(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Student and teacher features that share part of their geometry and look like pooled activations.

        A common signal of 32 directions plus noise of each side's own, through a ReLU: not negative, with a mean of
        about the spread, so that a provider which centres badly is caught by the gate.
        """
        generator = torch.Generator(device).manual_seed(self.n)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        signal = normal(self.n, 32)

        def side(width: int) -> Tensor:
            entries = normal(self.n, width).addmm_(signal, normal(32, width), alpha=32**-0.5)
            return entries.add_(0.5).relu_().to(self.torch_dtype)

        return side(self.p), side(self.q)


@contextlib.contextmanager
def fp32_switched(precision: str) -> Iterator[None]:
    """PyTorch's own switch for fp32 products, set as a user would."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cases(
    problem: str,
    sizes: tuple[tuple[int, ...], ...],
    *numbers: str,
    estimators: tuple[str, ...] = ("biased",),
    modes: tuple[str, ...] = BACKWARD,
    compiled: bool = False,
) -> list[Case]:
    """Every combination; a size (n, d) means equal widths, numbers are a dtype and, for fp32, a precision."""
    return [
        Case(problem, n, widths[0], widths[-1], dtype, precision, estimator, mode, compiled)
        for dtype, _, precision in (text.partition(" ") for text in numbers)
        for estimator in estimators
        for n, *widths in sizes
        for mode in modes
    ]


FP32, BF16 = "float32 ieee", "bfloat16"
PAPER = ((128, 512), (128, 512, 1280))  # ResNet18 learns from ResNet18, and from MobileNetV2
WIDTHS = ((128, 64), (128, 128), (128, 256), *PAPER, (128, 128, 768), (128, 1024), (128, 2048, 512), (128, 2048))

# Not the full product: each block asks one question. What the README claims comes first, while time is left.
CASES = tuple(
    dict.fromkeys(
        _cases("bird", PAPER, FP32, modes=FORWARD, compiled=True)
        + _cases("bird", WIDTHS, FP32, compiled=True)
        + _cases("bird", PAPER[:1], FP32, estimators=("unbiased",), modes=BOTH)
        + _cases("conv", ((128, 25_088),), FP32, modes=BOTH, compiled=True)
        + _cases("batch", ((16, 64), *((2**i, 512) for i in (5, 6, 8, 9, 10, 11, 12))), FP32)
        + _cases("llm", ((1024, 2048), (2048, 1024), (4096, 1024), (4096, 576, 1024), (8192, 2048)), FP32)
        + _cases("llm", ((2048, 576),), FP32, estimators=("unbiased",))
        + _cases("bird", PAPER[:1], BF16)
        + _cases("llm", ((1024, 1024),), BF16)
        + _cases("conv", ((128, 100_352),), FP32)
        + _cases("rbf", ((128, 512), (512, 512), (1024, 512)), FP32)
    )
)


def cases(pattern: str | None = None) -> list[Case]:
    """Those whose name holds ``pattern`` or matches it as a glob: "bird", "llm*bfloat16*"."""
    return [case for case in CASES if pattern is None or pattern in str(case) or fnmatch(str(case), pattern)]
