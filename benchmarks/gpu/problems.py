"""The eleven problems whose targets DESIGN.md names, with all that may compete for them, at full and at tiny sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Contestant, Evaluated, Gate, calling
from benchmarks.kernels import forms, layers
from benchmarks.kernels.layers import LayersQuestion
from benchmarks.kernels.loss import PROVIDERS, Case
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
        return vars(self.case) | {"problem": self.name, "target": self.target}

    def tiny(self) -> TargetQuestion:
        """The same at a rehearsal: a size for each route."""
        c = self.case
        if self.network:
            return replace(self, case=replace(c, n=12))
        n, p, q = (12, 9, 7) if c.n <= c.p + c.q or c.problem == "rbf" else (40, 8, 4)
        return replace(self, case=replace(c, n=n, p=p, q=q))

    def ask(self, machine: Machine, names: Sequence[str] = ()) -> tuple[list[Contestant], Gate]:
        """All candidates, or those whose names begin with these words, and the gate for what they return."""
        chosen, gate = _matrix(self, machine) if self.network else _pair(self.case, machine)
        return [one for one in chosen if not names or one.name.split()[0] in names], gate


NUMBERS = {"fp32": ("float32", "ieee"), "tf32": ("float32", "tf32"), "bf16": ("bfloat16", "")}
WIDTHS = sum(layers.NETWORKS["ResNet18"])
MATRIX = Case("matrix", 1000, WIDTHS, WIDTHS, estimator="unbiased", mode="forward")
# Smallest claim first: what a run that is cut short should have. Rows, both widths, number, target.
QUESTIONS = tuple(
    TargetQuestion(f"{problem} {n}x{d} {number}", Case(problem, n, d, d, *NUMBERS[number]), target)
    if problem != "matrix"
    else TargetQuestion("matrix 18x18 n=1000 fp32", MATRIX, target, network="ResNet18")
    for problem, n, d, number, target in (
        ("bird", 128, 512, "fp32", 7e-6),
        ("llm", 4096, 1024, "bf16", 90e-6),
        ("llm", 65_536, 1024, "bf16", 1.05e-3),
        ("conv", 128, 802_816, "bf16", 0.27e-3),
        ("bird", 512, 2048, "bf16", 20e-6),
        ("llm", 4096, 1024, "tf32", 130e-6),
        ("llm", 16_384, 4096, "bf16", 3.6e-3),
        ("rbf", 1024, 512, "fp32", 0.2e-3),
        ("matrix", 1000, WIDTHS, "fp32", 0.4e-3),
        ("llm", 4096, 1024, "fp32", 0.9e-3),
        ("rbf", 8192, 512, "fp32", 6e-3),
    )
)


def questions_of(rehearse: bool) -> list[TargetQuestion]:
    """All of them, at the sizes of this run."""
    return [question.tiny() if rehearse else question for question in QUESTIONS]


def _pair(case: Case, machine: Machine) -> tuple[list[Contestant], Gate]:
    x, y = case.features(machine.device)
    most = AFFORDABLE * forms.flops(case.better_form, case.n, case.p, case.q, case.backward)
    chosen = {
        p.name: p.build(case)
        for p in PROVIDERS
        if p.ours or not (p.compiles or p.why_not(case, machine.device) or p.flops(case) > most)
    }
    if not machine.is_cuda and (case.dtype != "float32" or case.n > case.p + case.q):
        for name in ("triton", "native"):  # emulated they are slow, and the interpreter multiplies bf16 as integers
            del chosen[name]
    waits = {"gram", "naive"} if case.problem == "rbf" else set()  # the median of those that are not zero
    candidates = [Contestant(name, case.call(loss, x, y), captured=name not in waits) for name, loss in chosen.items()]
    return candidates + _symmetric(case, x, y), case.gate(x, y)


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

    def run(configuration: symmetric.Configuration) -> Evaluated:
        with torch.no_grad():
            value, stash = shifted.forward(x, y, None, problem, route, configuration)
            gradient, _ = shifted.backward(torch.ones_like(value), x, y, None, stash, problem, route=route)
        return Evaluated(value, [gradient])

    device = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    found = [Contestant(f"symmetric {' '.join(map(str, c))}", partial(run, c)) for c in symmetric.fitting(device)]
    return found if x.is_cuda else found[:1]


def _matrix(question: TargetQuestion, machine: Machine) -> tuple[list[Contestant], Gate]:
    network = LayersQuestion("matrix", question.network, question.case.n)
    (ours, *_), gate, *_ = network.contest(machine.device)
    xs, ys = (network.layers(seed, machine.device) for seed in (1, 2))
    literal = Contestant("gram", calling(lambda: layers.literal_matrix(xs, ys), backward=False))
    return [ours._replace(name="auto"), literal], gate
