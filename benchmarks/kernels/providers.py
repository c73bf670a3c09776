"""What computes the loss: the package, and the best that its users could write or find instead.

Each provider is a function of ``x [n, p]`` and ``y [n, q]`` that returns ``1 - CKA``, linear and biased, as a
scalar with autograd behind it. All are written here from the published formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bird_kernels
from benchmarks.kernels.problems import Problem

Loss = Callable[[Tensor, Tensor], Tensor]


def naive(x: Tensor, y: Tensor) -> Tensor:
    """The formula as it is usually written: three HSICs, each of two Grams that are centred as ``H K H``."""

    def centred_gram(features: Tensor) -> Tensor:
        n = features.shape[0]
        identity = torch.eye(n, dtype=features.dtype, device=features.device)
        centring = identity - torch.ones_like(identity) / n
        return centring @ (features @ features.T) @ centring

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        return (centred_gram(one) * centred_gram(other)).sum()

    return 1 - hsic(x, y) / (hsic(x, x).sqrt() * hsic(y, y).sqrt())


def gram(x: Tensor, y: Tensor) -> Tensor:
    """Centre the columns, two Grams, three sums: ``n^2 (p + q)`` products, the best plain form at small n."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, l = x @ x.T, y @ y.T
    return 1 - (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()


def feature(x: Tensor, y: Tensor) -> Tensor:
    """Centre the columns, three cross-products: ``n (p^2 + q^2 + p q)``, the best plain form at large n."""
    # Sums of squares and not norms: as fast, and torch's norm of 4096^2 numbers in fp32 is off by 4e-4.
    x, y = x - x.mean(0), y - y.mean(0)
    cross, own, other = ((a.T @ b).square().sum() for a, b in ((y, x), (x, x), (y, y)))
    return 1 - cross / (own * other).sqrt()


def better_form(problem: Problem) -> Loss:
    """The hand-written form with fewer products for this problem."""
    n, p, q = problem.n, problem.p, problem.q
    return gram if n * n * (p + q) <= n * (p * p + q * q + p * q) else feature


def _backend(name: str) -> Loss:
    return lambda x, y: bird_kernels.cka_loss(x, y, backend=name)


def _compiled(problem: Problem, device: torch.device) -> Loss:
    torch.compiler.reset()  # one compilation per problem: static shapes, no limit on recompilations
    mode = "reduce-overhead" if device.type == "cuda" else "default"  # the first means CUDA graphs
    return torch.compile(better_form(problem), fullgraph=True, dynamic=False, mode=mode)


@dataclass(frozen=True)
class Provider:
    """A way to the loss: ``build(problem, device)`` gives the function.

    ``ours`` must never be wrong; one that ``compiles`` does so in its first call, which is not counted.
    """

    name: str
    build: Callable[[Problem, torch.device], Loss]
    ours: bool = False
    compiles: bool = False

    def why_not(self, problem: Problem, device: torch.device, backward: bool) -> str | None:
        """The reason not to measure this provider here, or None."""
        n, p, q = problem.n, problem.p, problem.q
        on_cpu = device.type == "cpu"
        if self.name == "triton" and on_cpu:
            return "Triton kernels are timed on CUDA devices only"
        if self.name == "feature" and p * p + q * q + p * q > 2**29:
            return "its matrices of width x width would take gigabytes"
        if self.name == "naive" and on_cpu and (n > 4096 or (n > 2048 and not backward)):
            return "a call takes a minute and more; n = 4096 is measured once, forward and backward together"
        if self.name == "compiled" and on_cpu and n > 512:
            return "the time is spent in the library's products, which compiling does not change"
        return None


PROVIDERS = (
    Provider("naive", lambda problem, device: naive),
    Provider("gram", lambda problem, device: gram),
    Provider("feature", lambda problem, device: feature),
    Provider("compiled", _compiled, compiles=True),
    Provider("eager", lambda problem, device: _backend("eager"), ours=True),
    Provider("triton", lambda problem, device: _backend("triton"), ours=True, compiles=True),
    Provider("auto", lambda problem, device: _backend("auto"), ours=True, compiles=True),
)
