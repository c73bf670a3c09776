"""`cka_loss` beside what its users could write instead: the questions, and who answers them.

Red is a loss whose value, or gradient relative to its norm, is further from fp64's than `TOLERANCE`. What would take
far too long is not called at all; there is no end to the patience with ours and with the better hand-written form.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import bird_kernels
from benchmarks.harness import Contestant, Evaluated, Gate, calling, gate_of
from benchmarks.kernels import forms, limits, plots
from benchmarks.kernels.forms import Loss
from benchmarks.kernels.limits import fp32_switched
from benchmarks.rows import Row, beside, duration, version_of
from benchmarks.run import CPU, Benchmark, Contest, Line, any_row
from bird_kernels import backends, plan, types

FORWARD = ("forward",)
BACKWARD = ("forward+backward",)
BOTH = FORWARD + BACKWARD
# The largest error of the value, and of the gradient relative to its norm, that still counts as right.
TOLERANCE = {
    "float32 ieee": (2e-5, 2e-4),
    "float32 tf32": (3e-3, 1e-2),
    "float16": (3e-3, 1e-2),
    "bfloat16": (2e-2, 5e-2),
}
SHARE, PATIENCE = 0.25, 1.5  # seconds of measuring for one provider; of few rounds, and of the slowest lost cause
README = 20  # times the patience with the usual formula, which the README compares with


@dataclass(frozen=True)
class Case:
    """One question: student ``x [n, p]``, which needs a gradient unless the mode is "forward", and frozen ``y [n, q]``.

    ``problem`` names a family of sizes; that of "rbf" has Gaussian kernels, their bandwidths the median, constant.
    ``precision`` is that of fp32 products, and empty for other dtypes.
    """

    problem: str
    n: int
    p: int
    q: int
    dtype: str = "float32"
    precision: str = "ieee"
    estimator: str = "biased"
    mode: str = "forward+backward"

    def __str__(self) -> str:
        numbers = "-".join(filter(None, (self.dtype, self.precision)))
        return f"{self.problem}-{self.n}x{self.p}x{self.q}-{numbers}-{self.estimator}-{self.mode}"

    @property
    def backward(self) -> bool:
        """Whether the gradient of the student is part of the call."""
        return self.mode != "forward"

    @property
    def number(self) -> str:
        """What the rate of products depends on: the dtype and, for fp32, the precision."""
        return f"{self.dtype} {self.precision}".strip()

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is asked too, which takes long: a batch of the paper's, as it trains."""
        plain = self.number == "float32 ieee" and self.estimator == "biased" and self.problem in ("bird", "conv")
        return plain and self.n == 128 and self.p < 10**5

    @property
    def better_form(self) -> Callable[..., Tensor]:
        """The hand-written form with fewer products."""
        return forms.better_form(self.n, self.p, self.q, self.options.get("kernel", "linear"))

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

    def gate(self, x: Tensor, y: Tensor) -> Gate:
        """By the same features in float64: a hand-written form under autograd."""
        truth = partial(self.better_form, **self.options)
        return gate_of(calling(lambda student: truth(student, y.double()), x.double()), *TOLERANCE[self.number])

    def call(self, loss: Loss, x: Tensor, y: Tensor) -> Callable[[], Evaluated]:
        """The call to check and to time, with the gradient for ``x`` where the mode has it; ``y`` is frozen."""
        return calling(lambda student: loss(student, y), x, backward=self.backward)

    def contest(self) -> Contest:
        """Everybody who takes part on this CPU; who would take too long says so."""
        x, y = self.features(CPU)
        ceilings = limits.ceilings(self.number)
        floor = limits.floor(self.spec(CPU), ceilings)
        candidates = []
        for one in PROVIDERS:
            if one.why_not(self, CPU):
                continue
            seconds = one.flops(self) / ceilings.rate("float64" if one.name == "fp64" else self.number)
            patience = PATIENCE * (README if one.name == "naive" else 1)
            slow = seconds > patience and not one.ours and one.form is not self.better_form
            why = f"too slow (at least {seconds:.0f} s a call)" * slow
            candidates.append(Contestant(one.name, self.call(one.build(self), x, y), True, one.compiles, why))
        more = {name: floor | {"version": version_of(package)} for name, package in PEERS.items()}
        return Contest(candidates, self.gate(x, y), lambda name: more.get(name, floor), fp32_switched(self.precision))


@dataclass(frozen=True)
class Provider:
    """A way to the loss: a ``form``, for ours a backend's name, or if it ``compiles`` the compiled better form."""

    name: str
    form: Callable[..., Tensor] | None = None
    compiles: bool = False

    @property
    def ours(self) -> bool:
        """Whether it may never be wrong."""
        return self.form is None and not self.compiles

    def build(self, case: Case) -> Loss:
        """The function of ``x`` and ``y``, whose first calls may compile."""
        if self.ours:
            return partial(bird_kernels.cka_loss, backend=self.name, **case.options)  # type: ignore[arg-type]
        form = partial(self.form or case.better_form, **case.options)
        if not self.compiles:
            return form
        torch.compiler.reset()  # one compilation per case: static shapes, no limit on recompilations
        return torch.compile(form, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")

    def flops(self, case: Case) -> int:
        """Operations of a call's products; of ours, whose patience has no end, those of the better form."""
        return forms.flops(self.form or case.better_form, case.n, case.p, case.q, case.backward)

    def why_not(self, case: Case, device: torch.device) -> str | None:
        """The reason that this provider has no part in a case, or None."""
        if self.ours:
            if self.name == "triton" and device.type == "cpu":
                return "Triton kernels are timed by ./dev gpu"
            asked, few = plan.variant(case.spec(device)), plan.are_few(case.n)
            return (self.name != "auto" and backends.why_not(self.name, case.torch_dtype, device, few, asked)) or None
        only = {"naive": "biased", "anatome": "biased", "pytorch-cka": "unbiased"}.get(self.name, case.estimator)
        if case.problem == "rbf" and self.name not in ("naive", "gram"):
            return "it computes the linear kernel only"
        if case.estimator != only:
            return f"it computes the {only} estimator only"
        if self.name == "anatome" and case.backward:
            return "it is called to compare, not to train"
        if self.name == "pytorch-cka" and importlib.util.find_spec("cka") is None:
            return "not installed (pip install pytorch-cka)"
        return "compiled for some of the cases only: it takes long" if self.compiles and not case.compiled else None


PROVIDERS = (
    Provider("naive", forms.naive),
    Provider("fp64", forms.fp64),
    Provider("gram", forms.by_grams),
    Provider("feature", forms.by_features),
    Provider("compiled", compiles=True),
    Provider("anatome", forms.anatome),
    Provider("pytorch-cka", forms.pytorch_cka),
    *map(Provider, ("library", "triton", "native", "auto")),
)
PEERS = {"pytorch-cka": "pytorch-cka"}  # providers that are packages; anatome's form is written out
OURS = {provider.name for provider in PROVIDERS if provider.ours}
HAND_WRITTEN = ("gram", "feature")  # the faster of the two is what a careful user would have


def _cases(
    problem: str,
    sizes: tuple[tuple[int, ...], ...],
    *numbers: str,
    estimators: tuple[str, ...] = ("biased",),
    modes: tuple[str, ...] = BACKWARD,
) -> list[Case]:
    """Every combination; a size (n, d) means equal widths, numbers are a dtype and, for fp32, a precision."""
    return [
        Case(problem, n, widths[0], widths[-1], dtype, precision, estimator, mode)
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
        _cases("bird", PAPER, FP32, modes=FORWARD)
        + _cases("batch", ((128, 64), (512, 64), (2048, 64)), FP32, modes=FORWARD)
        + _cases("bird", WIDTHS, FP32)
        + _cases("bird", PAPER[:1], FP32, estimators=("unbiased",), modes=BOTH)
        + _cases("conv", ((128, 25_088),), FP32, modes=BOTH)
        + _cases("batch", ((16, 64), *((2**i, 512) for i in (5, 6, 8, 9, 10, 11, 12))), FP32)
        + _cases("llm", ((1024, 2048), (2048, 1024), (4096, 1024), (4096, 576, 1024), (8192, 2048)), FP32)
        + _cases("llm", ((2048, 576),), FP32, estimators=("unbiased",))
        + _cases("bird", PAPER[:1], BF16)
        + _cases("llm", ((1024, 1024),), BF16)
        + _cases("conv", ((128, 100_352),), FP32)
        + _cases("rbf", ((128, 512),), FP32, modes=BOTH)
        + _cases("rbf", ((512, 512), (1024, 512)), FP32)
    )
)


def hand_written(line: Line) -> float | None:
    """Seconds of the faster of the two hand-written forms."""
    return min((row["p50"] for name, row in line.items() if name in HAND_WRITTEN and row["p50"]), default=None)


def _ours(line: Line) -> Row | None:
    """What a user of the package gets; everything is compared with it."""
    return line.get("auto")


BENCHMARK = Benchmark(
    "Kernel benchmarks", "", Path(__file__).parent / "results", CASES, """\
Median of a call, and how many times that of `auto` it is. *Hand-written* is the faster of the two forms that a user
would write, *floor* what no call can beat: the cheaper route's products at the rate of a big product on this device, or
the bytes that must move at the rate of a copy of as many. A call's memory includes the gradient.
""",
    ours=OURS,
    sections=("mode", "dtype", "precision", "estimator"),
    base=_ours,
    columns={
        "hand-written": lambda line: beside(hand_written(line), (_ours(line) or {}).get("p50")),
        "floor": lambda line: duration(any_row(line)["floor"]),
    },
    order=[provider.name for provider in PROVIDERS],
    draw=partial(plots.draw_plots, ours=OURS, order=[provider.name for provider in PROVIDERS]),
    share=SHARE,
    patience=PATIENCE,
)  # fmt: skip
