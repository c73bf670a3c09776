"""The eleven problems whose targets DESIGN.md names, with all that may compete for them, at full and at tiny sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.harness import Contestant, Judge
from benchmarks.kernels import estimates, gate, providers
from benchmarks.kernels.gate import Result
from benchmarks.kernels.layers import NETWORKS, TOLERANCE, Call, LayersQuestion, literal_matrix, our_matrix
from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import PROVIDERS
from benchmarks.kernels.versus import judge_of
from benchmarks.machine import Machine
from bird_kernels import plan

AFFORDABLE = 15  # times the operations of the best hand-written form: what another one may need to be worth a try


@dataclass(frozen=True)
class TargetQuestion:
    """A problem with its sizes in ``case``; ``target`` in seconds: what the design hopes for on an H200 (an estimate).

    ``network`` is there for a matrix of layers, whose case counts the layers' widths together.
    """

    name: str
    case: Case
    target: float
    network: str = ""

    @property
    def about(self) -> dict[str, object]:
        """What a row says of the question."""
        c = self.case
        return dict(
            problem=self.name, n=c.n, p=c.p, q=c.q, dtype=c.dtype, precision=c.precision, estimator=c.estimator,
            mode=c.mode, target=self.target,
        )  # fmt: skip

    def tiny(self) -> TargetQuestion:
        """The same at a rehearsal: a size for each route."""
        c = self.case
        if self.network:
            return replace(self, case=replace(c, n=12))
        n, p, q = (12, 9, 7) if c.n <= c.p + c.q or c.problem == "rbf" else (40, 8, 4)
        return replace(self, case=replace(c, n=n, p=p, q=q))

    def ask(self, machine: Machine, names: Sequence[str] = ()) -> tuple[list[Contestant], Judge]:
        """All candidates, or those whose names begin with these words, and who judges what they return."""
        chosen, judge = _matrix(self, machine) if self.network else _pair(self.case, machine)
        return [one for one in chosen if not names or one.name.split()[0] in names], judge


def _case(problem: str, n: int, p: int, dtype: str = "bfloat16", precision: str = "") -> Case:
    return Case(problem, n, p, p, dtype, precision)


FP32 = dict(dtype="float32", precision="ieee")
WIDTHS = sum(NETWORKS["ResNet18"])
# Smallest claim first: what a run that is cut short should have.
QUESTIONS = (
    TargetQuestion("bird 128x512 fp32", _case("bird", 128, 512, **FP32), 7e-6),
    TargetQuestion("llm 4096x1024 bf16", _case("llm", 4096, 1024), 90e-6),
    TargetQuestion("llm 65536x1024 bf16", _case("llm", 65_536, 1024), 1.05e-3),
    TargetQuestion("conv 128x802816 bf16", _case("conv", 128, 802_816), 0.27e-3),
    TargetQuestion("bird 512x2048 bf16", _case("bird", 512, 2048), 20e-6),
    TargetQuestion("llm 4096x1024 tf32", _case("llm", 4096, 1024, "float32", "tf32"), 130e-6),
    TargetQuestion("llm 16384x4096 bf16", _case("llm", 16_384, 4096), 3.6e-3),
    TargetQuestion("rbf 1024x512 fp32", _case("rbf", 1024, 512, **FP32), 0.2e-3),
    TargetQuestion(
        "matrix 18x18 n=1000 fp32",
        Case("matrix", 1000, WIDTHS, WIDTHS, estimator="unbiased", mode="forward"),
        0.4e-3,
        network="ResNet18",
    ),
    TargetQuestion("llm 4096x1024 fp32", _case("llm", 4096, 1024, **FP32), 0.9e-3),
    TargetQuestion("rbf 8192x512 fp32", _case("rbf", 8192, 512, **FP32), 6e-3),
)


def questions_of(rehearse: bool) -> list[TargetQuestion]:
    """All of them, at the sizes of this run."""
    return [question.tiny() if rehearse else question for question in QUESTIONS]


def _pair(case: Case, machine: Machine) -> tuple[list[Contestant], Judge]:
    x, y = case.features(machine.device)
    most = AFFORDABLE * estimates.flops(providers.better_form(case), case)
    chosen = {
        p.name: p.build(case)
        for p in PROVIDERS
        if p.ours or (p.why_not(case, machine.device) is None and estimates.flops(p.name, case) <= most)
    }
    if not machine.is_cuda and (case.dtype != "float32" or case.n > case.p + case.q):
        for name in ("triton", "native"):  # emulated they are slow, and the interpreter multiplies bf16 as integers
            del chosen[name]
    waits = {"gram", "naive"} if case.problem == "rbf" else set()  # the median of those that are not zero
    candidates = [
        Contestant(name, gate.call(loss, x, y, case.backward), captured=name not in waits)
        for name, loss in chosen.items()
    ]
    return candidates + _symmetric(case, x, y), gate.judge(case, x, y)


def _symmetric(case: Case, x: Tensor, y: Tensor) -> list[Contestant]:
    """The library backend with our own kernel for a side's product with itself, a candidate a configuration.

    Without autograd's share of the host's time. At a rehearsal one, in fp32.
    """
    exact = case.dtype == "float32" and case.precision == "ieee"
    if case.problem == "rbf" or exact or not (x.is_cuda or case.dtype == "float32"):
        return []
    from bird_kernels.backends import shifted
    from bird_kernels.backends.triton import symmetric

    problem, route = case.spec(x.device), plan.choose_route(case.n, case.p, case.q)

    def run(configuration: symmetric.Configuration) -> Result:
        with torch.no_grad():
            value, stash = shifted.forward(x, y, None, problem, route, configuration)
            gradient, _ = shifted.backward(torch.ones_like(value), x, y, None, stash, problem, route=route)
        return Result(value, gradient)

    device = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    found = [Contestant(f"symmetric {' '.join(map(str, c))}", partial(run, c)) for c in symmetric.fitting(device)]
    return found if x.is_cuda else found[:1]


def _matrix(question: TargetQuestion, machine: Machine) -> tuple[list[Contestant], Judge]:
    network = LayersQuestion("matrix", question.network, question.case.n)
    xs, ys = (network.layers(seed, machine.device) for seed in (1, 2))
    true = cache(lambda: literal_matrix([x.double() for x in xs], [y.double() for y in ys]))

    def candidate(name: str, matrix: Call) -> Contestant:
        return Contestant(name, torch.no_grad()(partial(matrix, xs, ys)))

    return [candidate("auto", our_matrix), candidate("gram", literal_matrix)], judge_of(true, TOLERANCE)
