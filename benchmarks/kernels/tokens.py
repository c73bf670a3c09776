"""Token features with an attention mask: `token_cka_loss` beside what users could write instead.

python -m benchmarks.kernels.tokens            measures and prints (two minutes on two CPU cores)
python -m benchmarks.kernels.tokens --save     and keeps the rows in results/<device>-tokens.csv and .md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import bird_kernels
from benchmarks.kernels import providers
from benchmarks.kernels.versus import Answer, Answered, Benchmark, Calls
from benchmarks.rows import Origin

TOLERANCE = 1e-4
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student [B, T, p], teacher [B, T, q], mask [B, T]


@dataclass(frozen=True)
class TokensQuestion:
    """Which ``tokens`` of a batch of ``B`` sequences of up to ``T`` tokens are compared."""

    tokens: str
    B: int
    T: int
    p: int
    q: int

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Features that share 16 directions, and a mask of lengths from a half of T to T, padding on the right."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        signal = normal(self.B, self.T, 16)
        x, y = (normal(self.B, self.T, d) + 0.5 * signal @ normal(16, d) + 0.3 for d in (self.p, self.q))
        lengths = torch.randint(self.T // 2, self.T + 1, (self.B, 1), generator=generator, device=device)
        return x, y, torch.arange(self.T, device=device) < lengths

    def contest(self, device: torch.device) -> tuple[Calls, Answer]:
        """The calls by provider, forward and backward, and the truth: the hand-written form in fp64."""
        x, y, mask = self.batch(device)

        def answer(loss: Loss, x: Tensor, y: Tensor) -> Answer:
            student = x.detach().requires_grad_()
            value = loss(student, y, mask)
            return value.detach(), *torch.autograd.grad(value, student)

        calls = CALLS[self.tokens]
        literal = next(loss for name, loss in calls.items() if name.startswith("hand-written"))
        truth = answer(literal, x.double(), y.double())
        return {name: partial(answer, loss, x, y) for name, loss in calls.items()}, truth


@dataclass(frozen=True, kw_only=True)
class TokensRow(Answered, TokensQuestion, Origin):
    """One measurement."""


def _rows(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda x, y, mask: loss(x[mask], y[mask])


def _last(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def call(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        rows, last = torch.arange(len(x), device=x.device), mask.sum(1) - 1
        return loss(x[rows, last], y[rows, last])

    return call


def _loop(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """One sequence after the other."""
    return lambda x, y, mask: torch.stack([loss(a[m], b[m]) for a, b, m in zip(x, y, mask, strict=True)]).mean()


def _ours(tokens: str) -> Loss:
    return lambda x, y, mask: bird_kernels.token_cka_loss(x, y, mask=mask, tokens=tokens)


CALLS: dict[str, dict[str, Loss]] = {
    "all": {
        "token_cka_loss": _ours("all"),
        "cka_loss of x[mask]": _rows(bird_kernels.cka_loss),
        "hand-written, x[mask]": _rows(providers.by_features),
    },
    "last": {
        "token_cka_loss": _ours("last"),
        "cka_loss of the last": _last(bird_kernels.cka_loss),
        "hand-written, the last": _last(providers.by_grams),
    },
    "sequence": {
        "token_cka_loss": _ours("sequence"),
        "loop of cka_loss": _loop(bird_kernels.cka_loss),
        "hand-written loop": _loop(providers.by_grams),
    },
}
QUESTIONS = [
    TokensQuestion("all", 16, 256, 576, 384),
    TokensQuestion("all", 32, 128, 256, 384),
    TokensQuestion("last", 256, 32, 576, 384),
    TokensQuestion("sequence", 32, 128, 256, 256),
    TokensQuestion("sequence", 64, 64, 576, 384),
    TokensQuestion("sequence", 8, 512, 256, 384),
]


TOKENS = Benchmark("tokens", QUESTIONS, TokensRow, TOLERANCE, """\
Median of forward and backward, and in brackets how many times that of `token_cka_loss`; fp32, biased, half to all of T
tokens valid. Errors of value and gradient against fp64; memory beyond the inputs, result included.
""")  # fmt: skip


if __name__ == "__main__":
    TOKENS.main(__doc__)
