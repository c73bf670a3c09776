"""Many layers at once, beside what users could do instead: `cka_matrix`, and `cka_loss` of a list of pairs.

Two ResNets' pooled activations: a layer is as wide as a convolution has channels, the last one as there are classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import bird_kernels
from benchmarks.harness import Contestant, Evaluated, calling, gate_of
from benchmarks.kernels import forms
from benchmarks.run import CPU, Benchmark, Contest

NETWORKS = {
    "ResNet18": [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4 + [1000],
    "ResNet50": [64]
    + [width for base, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)) for width in blocks * [base, base, 4 * base]]
    + [1000],
}
TOLERANCE = 1e-3  # of a value, and of the gradients relative to their norm: a heat map is read to three digits

Layers = list[Tensor]
LayerLoss = Callable[[Layers, Layers], Tensor]


@dataclass(frozen=True)
class LayersQuestion:
    """``what`` of a network's layers on ``n`` samples; ``mean``: of the features, in units of their spread, added."""

    what: str
    network: str
    n: int
    mean: float = 0.0

    def layers(self, seed: int, device: torch.device) -> Layers:
        """ReLU activations that share 32 directions with those of any other seed, the more the deeper they lie."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        signal, widths = normal(self.n, 32), NETWORKS[self.network]
        generator.manual_seed(seed)
        layers = []
        for depth, width in enumerate(widths, start=1):
            entries = normal(self.n, width).addmm_(signal, normal(32, width), alpha=(depth / len(widths) / 32) ** 0.5)
            layer = entries.add_(0.5).relu_()
            layers.append(layer.add_(self.mean * layer.std()))
        return layers

    def contest(self, device: torch.device = CPU) -> Contest:
        """The calls by provider, and the truth: what is best written by hand, in fp64."""
        xs = self.layers(1, device)
        ys = xs if self.what == "matrix, itself" else self.layers(2, device)
        pairs = self.what == "pairs"
        calls, literal = (PAIRS, each(forms.by_grams)) if pairs else (MATRIX, literal_matrix)
        if self.network == "ResNet50":
            calls = {name: call for name, call in calls.items() if name != "loop of cka"}  # 2500 calls

        def asked(call: LayerLoss, xs: Layers, ys: Layers) -> Callable[[], Evaluated]:
            # One network's students are its layers; a matrix of a network with itself must see that they are.
            students = xs if pairs else ()
            return calling(lambda *leaves: call(list(leaves) or xs, ys), *students, backward=pairs)

        exact = [x.double() for x in xs]
        truth = asked(literal, exact, exact if ys is xs else [y.double() for y in ys])
        candidates = [Contestant(name, asked(c, xs, ys)) for name, c in calls.items()]
        return Contest(candidates, gate_of(truth, TOLERANCE, TOLERANCE))


def our_matrix(xs: Layers, ys: Layers) -> Tensor:
    return bird_kernels.cka_matrix(xs, None if ys is xs else ys, estimator="unbiased")


def _pytorch_cka(xs: Layers, ys: Layers) -> Tensor:
    from cka import cka_from_features  # loads matplotlib, and is not everywhere: late

    return cka_from_features(xs, ys)


def loop_of_cka(xs: Layers, ys: Layers) -> Tensor:
    return torch.stack([torch.stack([bird_kernels.cka(x, y, estimator="unbiased") for y in ys]) for x in xs])


def literal_matrix(xs: Layers, ys: Layers) -> Tensor:
    """Best written by hand, and in fp64 the truth: Gram matrices of centred features, hollow, all of them at once."""

    def grams(side: Layers) -> tuple[Tensor, Tensor]:
        centred = [x - x.mean(0) for x in side]
        hollow = torch.stack([x @ x.T for x in centred])
        hollow.diagonal(dim1=1, dim2=2).zero_()
        return hollow, hollow.sum(1)

    (k, k_rows), (l, l_rows) = grams(xs), grams(ys)
    n = k.shape[1]

    def hsic(trace: Tensor, rows: Tensor, totals: Tensor) -> Tensor:  # up to the factor that cancels
        return trace + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows

    own = [hsic(a.square().sum((1, 2)), r.square().sum(1), r.sum(1).square()) for a, r in ((k, k_rows), (l, l_rows))]
    totals = torch.outer(k_rows.sum(1), l_rows.sum(1))
    return hsic(k.flatten(1) @ l.flatten(1).T, k_rows @ l_rows.T, totals) / torch.outer(*own).sqrt()


def each(loss: forms.Loss) -> LayerLoss:
    """The sum of the pairs' losses, one after the other."""
    return lambda xs, ys: torch.stack([loss(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


MATRIX: dict[str, LayerLoss] = {"cka_matrix": our_matrix, "pytorch-cka": _pytorch_cka, "loop of cka": loop_of_cka}
PAIRS: dict[str, LayerLoss] = {
    "cka_loss of lists": bird_kernels.cka_loss,
    "loop of cka_loss": each(bird_kernels.cka_loss),
    "hand-written Grams": each(forms.by_grams),
}
QUESTIONS = [
    *(LayersQuestion(what, name, n) for name in NETWORKS for n in (512, 1000) for what in ("matrix, itself", "matrix")),
    LayersQuestion("matrix", "ResNet18", 512, mean=10.0),
    *(LayersQuestion("pairs", name, 128) for name in NETWORKS),
]
BENCHMARK = Benchmark(
    "Layers", "layers", Path(__file__).parent / "results", QUESTIONS, """\
Median of a call, and in brackets how many times the first provider's; fp32, unbiased (pairs: biased, forward and
backward). The mean is in units of the spread. Memory is beyond the inputs, result included. `pytorch-cka` is 1.1.3.
""",
    ours={"cka_matrix", "cka_loss of lists"},
    sections=("what",),
)  # fmt: skip
