"""Token features with an attention mask: `token_cka_loss` beside what users could write instead.

python -m benchmarks.kernels.tokens            measures and prints (two minutes on two CPU cores)
python -m benchmarks.kernels.tokens --save     and keeps the rows in results/<device>-tokens.csv and .md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

import bird_kernels
from benchmarks.kernels import providers, results, versus
from benchmarks.kernels.results import Origin
from benchmarks.kernels.versus import Answer

TOLERANCE = 1e-4
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student [B, T, p], teacher [B, T, q], mask [B, T]


@dataclass(frozen=True)
class Question:
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


@dataclass(frozen=True)
class Row(Origin):
    """One measurement, see `versus.Finish`."""

    tokens: str
    B: int
    T: int
    p: int
    q: int
    provider: str
    red: str
    error: float
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int | None
    peak_memory: int


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
        "hand-written, x[mask]": _rows(providers.feature),
    },
    "last": {
        "token_cka_loss": _ours("last"),
        "cka_loss of the last": _last(bird_kernels.cka_loss),
        "hand-written, the last": _last(providers.gram),
    },
    "sequence": {
        "token_cka_loss": _ours("sequence"),
        "loop of cka_loss": _loop(bird_kernels.cka_loss),
        "hand-written loop": _loop(providers.gram),
    },
}
QUESTIONS = [
    Question("all", 16, 256, 576, 384),
    Question("all", 32, 128, 256, 384),
    Question("last", 256, 32, 576, 384),
    Question("sequence", 32, 128, 256, 256),
    Question("sequence", 64, 64, 576, 384),
    Question("sequence", 8, 512, 256, 384),
]


def ask(question: Question, device: torch.device, origin: Origin) -> list[Row]:
    """Every provider past the gate, then timed in turns, forward and backward."""
    x, y, mask = question.batch(device)

    def answer(loss: Loss, x: Tensor, y: Tensor) -> Answer:
        student = x.detach().requires_grad_()
        value = loss(student, y, mask)
        return value.detach(), *torch.autograd.grad(value, student)

    calls = CALLS[question.tokens]
    literal = next(loss for name, loss in calls.items() if name.startswith("hand-written"))
    truth = answer(literal, x.double(), y.double())
    competing = {name: partial(answer, loss, x, y) for name, loss in calls.items()}
    finishes = versus.compete(competing, truth, device, TOLERANCE)
    about = asdict(origin) | asdict(question)
    return [Row(**about, provider=name, **asdict(finish)) for name, finish in finishes.items()]


def page(rows: Sequence[Row]) -> str:
    """Markdown: the origin, then a line for each row."""
    text = versus.heading("Tokens", rows[0]) + (
        "Median of forward and backward, and in brackets how many times that of `token_cka_loss`; fp32, biased, half\n"
        "to all of T tokens valid. Errors of value and gradient against fp64; memory beyond the inputs, result in.\n\n"
        "| tokens | B | T | p, q | provider | time | error | memory, MiB |\n|---|---|---|---|---|---|---|---|\n"
    )
    first = {(row.tokens, row.B, row.T): row for row in reversed(rows)}
    for row in rows:
        time = versus.time_beside(row.p50, row.red, first[row.tokens, row.B, row.T].p50)
        text += (
            f"| {row.tokens} | {row.B} | {row.T} | {row.p}, {row.q} | {row.provider} | {time} | {row.error:.1e} "
            f"| {row.peak_memory / 2**20:.0f} |\n"
        )
    return text


def main() -> None:
    """Ask everything, print the page, and keep it if asked to."""
    parser = argparse.ArgumentParser(description="token_cka_loss beside what users could write instead")
    parser.add_argument("--save", action="store_true", help="keep the rows in benchmarks/kernels/results/")
    parser.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = results.origin(device)
    rows = [row for question in QUESTIONS for row in ask(question, device, origin)]
    print(page(rows))
    if options.save:
        versus.save("tokens", rows, page(rows))


if __name__ == "__main__":
    main()
