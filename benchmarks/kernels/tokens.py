"""Token features with an attention mask: `token_cka_loss` beside what users could write instead."""

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

TOLERANCE = 1e-4
MaskedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student [B, T, p], teacher [B, T, q], mask [B, T]


@dataclass(frozen=True)
class TokensQuestion:
    """Which ``tokens`` of a batch of ``B`` sequences of up to ``T`` tokens are compared."""

    tokens: str
    B: int
    T: int
    p: int
    q: int

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features that share 16 directions, and a mask of lengths from a half of T to T, padding on the right."""
        generator = torch.Generator(CPU).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        signal = normal(self.B, self.T, 16)
        x, y = (normal(self.B, self.T, d) + 0.5 * signal @ normal(16, d) + 0.3 for d in (self.p, self.q))
        lengths = torch.randint(self.T // 2, self.T + 1, (self.B, 1), generator=generator)
        return x, y, torch.arange(self.T) < lengths

    def contest(self) -> Contest:
        """The calls by provider, forward and backward, and the truth: the hand-written form in fp64."""
        x, y, mask = self.batch()

        def asked(loss: MaskedLoss, x: Tensor, y: Tensor) -> Callable[[], Evaluated]:
            return calling(lambda student: loss(student, y, mask), x)

        *_, literal = CALLS[self.tokens].values()
        candidates = [Contestant(name, asked(call, x, y)) for name, call in CALLS[self.tokens].items()]
        return Contest(candidates, gate_of(asked(literal, x.double(), y.double()), TOLERANCE, TOLERANCE))


def _rows(loss: forms.Loss) -> MaskedLoss:
    return lambda x, y, mask: loss(x[mask], y[mask])


def _last(loss: forms.Loss) -> MaskedLoss:
    def call(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        rows, last = torch.arange(len(x)), mask.sum(1) - 1
        return loss(x[rows, last], y[rows, last])

    return call


def _loop(loss: forms.Loss) -> MaskedLoss:
    """One sequence after the other."""
    return lambda x, y, mask: torch.stack([loss(a[m], b[m]) for a, b, m in zip(x, y, mask, strict=True)]).mean()


def _ours(tokens: str) -> MaskedLoss:
    return lambda x, y, mask: bird_kernels.token_cka_loss(x, y, mask=mask, tokens=tokens)


# By the tokens that are compared; the last one of each is the truth, in fp64.
CALLS: dict[str, dict[str, MaskedLoss]] = {
    "all": {
        "token_cka_loss": _ours("all"),
        "cka_loss of x[mask]": _rows(bird_kernels.cka_loss),
        "hand-written, x[mask]": _rows(forms.by_features),
    },
    "last": {
        "token_cka_loss": _ours("last"),
        "cka_loss of the last": _last(bird_kernels.cka_loss),
        "hand-written, the last": _last(forms.by_grams),
    },
    "sequence": {
        "token_cka_loss": _ours("sequence"),
        "loop of cka_loss": _loop(bird_kernels.cka_loss),
        "hand-written loop": _loop(forms.by_grams),
    },
}
BENCHMARK = Benchmark(
    "Tokens", "tokens", Path(__file__).parent / "results",
    [
        TokensQuestion("all", 16, 256, 576, 384),
        TokensQuestion("all", 32, 128, 256, 384),
        TokensQuestion("last", 256, 32, 576, 384),
        TokensQuestion("sequence", 32, 128, 256, 256),
        TokensQuestion("sequence", 64, 64, 576, 384),
        TokensQuestion("sequence", 8, 512, 256, 384),
    ],
    """\
Median of forward and backward, and in brackets how many times that of `token_cka_loss`; fp32, biased, half to all of T
tokens valid. Memory is beyond the inputs, result included.
""",
    ours={"token_cka_loss"},
    sections=("tokens",),
)  # fmt: skip
