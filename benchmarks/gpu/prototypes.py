"""Designs as plain PyTorch, part by part, where a number decides between them: shifted operands and library products.

A half's column is shifted by its rounded mean where that is large, products of what remains are the library's with fp32
results, and centring is a correction of the small result. Asked here: one product or three, in how many parts a long
sum goes, the bias as rows of the mixing matrix or beside it, and what splitting a wide Gram product brings.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.contest import compete
from benchmarks.gpu.context import Context, Item, Row
from benchmarks.gpu.problems import QUESTIONS, SYMMETRIC, Question
from benchmarks.harness import Candidate, Verdict
from benchmarks.kernels.problems import fp32_products

CROSS = ("llm 4096x1024 bf16", "llm 65536x1024 bf16", "llm 16384x4096 bf16", "llm 4096x1024 tf32")
GRAM = ("conv 128x802816 bf16", "bird 512x2048 bf16")
PARTS = (1, 2, 4, 8, 16)  # of the rows of a long sum
SPLITS = (8, 32, 132)  # of the features of a wide Gram product
WRONG = 1e-2  # relative error from which a prototype is no prototype


class Answer(NamedTuple):
    """A tensor and the name of the truth that it is compared with, by the relative norm of the difference."""

    truth: str
    tensor: Tensor


def items(context: Context) -> Sequence[Item]:
    """A problem each."""
    by_name = {q.name: q.tiny() if context.rehearse else q for q in QUESTIONS}
    found = [Item(name, partial(_compete, by_name[name], _cross)) for name in CROSS]
    found += [Item(name, partial(_compete, by_name[name], _gram)) for name in GRAM]
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices or of batches, fp32 whatever the operands are."""
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    if a.dtype.itemsize == 4:
        return multiply(a, b)
    if not a.is_cuda:
        return multiply(a.float(), b.float())
    return multiply(a, b, out_dtype=torch.float32)


class Shifted:
    """Both sides' shifted operands side by side, ``z`` [n, q + p + 8], the last columns two ones and zeros."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.n, self.p, self.q = len(x), x.shape[1], y.shape[1]
        self.z = torch.cat([self._side(y), self._side(x), self._ones(x)], 1)
        self.sums = self.z.sum(0, dtype=torch.float32)

    @staticmethod
    def _side(x: Tensor) -> Tensor:
        mean, spread = x.float().mean(0), x.float().std(0)
        return x - torch.where(mean.abs() > 4 * spread, mean, 0.0).to(x.dtype)

    @staticmethod
    def _ones(x: Tensor) -> Tensor:
        ones = x.new_zeros(len(x), 8)
        ones[:, :2] = 1
        return ones

    def sides(self) -> tuple[Tensor, Tensor]:
        """Views of the shifted x and y."""
        return self.z[:, self.q : self.q + self.p], self.z[:, : self.q]

    def joined(self, parts: int) -> Tensor:
        """[q + p, p]: C on A, not centred, from one product."""
        wide = self.z.view(parts, self.n // parts, -1)
        zx, both = wide[:, :, self.q : self.q + self.p], wide[:, :, : self.q + self.p]
        found = product(both.mT, zx)
        return found[0] if parts == 1 else found.sum(0)

    def apart(self) -> tuple[Tensor, Tensor]:
        """C and A, not centred, from two products."""
        zx, zy = self.sides()
        return product(zy.T, zx), product(zx.T, zx)

    def own(self, parts: int) -> Tensor:
        """[q, q]: B, not centred."""
        zy = self.z.view(parts, self.n // parts, -1)[:, :, : self.q]
        found = product(zy.mT, zy)
        return found[0] if parts == 1 else found.sum(0)

    def mixing(self, c: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and W [q + p + 8, p] in the operand's dtype, the correction in its last rows."""
        sx, sy = self.sums[self.q : self.q + self.p], self.sums[: self.q]
        c, a, b = c - torch.outer(sy, sx) / self.n, a - torch.outer(sx, sx) / self.n, b - torch.outer(sy, sy) / self.n
        kl, kk, ll = (m.square().sum(dtype=torch.float64) for m in (c, a, b))
        root = (kk * ll).sqrt()
        weights = torch.cat([c * (-2 / root), a * (2 * kl / (root * kk))]).to(self.z.dtype)
        bias = -(self.sums[: self.q + self.p] / self.n) @ weights.float()
        high = bias.to(self.z.dtype)
        rows = torch.zeros_like(weights[:8])
        rows[0], rows[1] = high, (bias - high.float()).to(self.z.dtype)
        return 1 - kl / root, torch.cat([weights, rows])

    def loss(self, parts: int) -> tuple[Tensor, Tensor]:
        """The loss and the gradient for x [n, p]."""
        ca = self.joined(parts)
        value, weights = self.mixing(ca[: self.q], ca[self.q :], self.own(parts))
        return value, self.z @ weights


def _cross(x: Tensor, y: Tensor) -> tuple[dict[str, Callable[[], Answer]], dict[str, Callable[[], Tensor]]]:
    """Candidates and truths of the cross route."""
    made = Shifted(x, y)
    n, p, q = made.n, made.p, made.q
    ca = made.joined(1)
    weights = made.mixing(ca[:q], ca[q:], made.own(1))[1]
    mean = (made.sums[: q + p] / n) @ weights[: q + p].float()
    parts = [count for count in PARTS if n % count == 0 and n // count >= min(2048, n)]
    zx, zy = (side.contiguous() for side in made.sides())
    narrow = made.z[:, : q + p].contiguous()
    found: dict[str, Callable[[], Answer]] = {
        "whole": lambda: Answer("gradient", Shifted(x, y).loss(parts[-1])[1]),
        "shift": lambda: Answer("z", Shifted(x, y).z),
        "products apart": lambda: Answer("joined", torch.cat(made.apart())),
        "products of contiguous sides": lambda: Answer("joined", torch.cat([product(zy.T, zx), product(zx.T, zx)])),
        "mixing": lambda: Answer("weights", made.mixing(ca[:q], ca[q:], made.own(1))[1]),
        "backward, bias in rows": lambda: Answer("gradient", made.z @ weights),
        "backward, addmm": lambda: Answer("gradient", torch.addmm(-mean.to(x.dtype), narrow, weights[: q + p])),
    }
    for count in parts:
        found[f"products joined, {count} parts"] = partial(lambda k: Answer("joined", made.joined(k)), count)
        found[f"own product, {count} parts"] = partial(lambda k: Answer("own", made.own(k)), count)
    wide = made.z[:, : q + p].double()
    truths: dict[str, Callable[[], Tensor]] = {
        "gradient": lambda: _gradient(x, y),
        "z": lambda: made.z.double(),
        "joined": lambda: wide.T @ wide[:, q:],
        "own": lambda: wide[:, :q].T @ wide[:, :q],
        "weights": lambda: weights.double(),
    }
    return found | _symmetric(made.z[:, :q], "own", True), truths


def _gradient(x: Tensor, y: Tensor) -> Tensor:
    """In fp64, from centred features."""
    x, y = (side.double() - side.double().mean(0) for side in (x, y))
    c, a = y.T @ x, x.T @ x
    kl, kk, ll = c.square().sum(), a.square().sum(), (y.T @ y).square().sum()
    return (2 / (kk * ll).sqrt()) * ((kl / kk) * (x @ a) - y @ c)


def _gram(x: Tensor, y: Tensor) -> tuple[dict[str, Callable[[], Answer]], dict[str, Callable[[], Tensor]]]:
    """Candidates and truths of a wide Gram product and its backward."""
    n, p = x.shape

    def split(count: int) -> Answer:
        batch = x.view(n, count, p // count).transpose(0, 1)
        return Answer("gram", product(batch, batch.mT).sum(0))

    mixing = product(y, y.T).to(x.dtype)
    found: dict[str, Callable[[], Answer]] = {
        "gram": lambda: Answer("gram", product(x, x.T)),
        "gram backward": lambda: Answer("backward", mixing @ x),
    }
    for count in SPLITS:
        if p % count == 0:
            found[f"gram, {count} splits"] = partial(split, count)
    return found | _symmetric(x, "gram", False), {
        "gram": lambda: x.double() @ x.double().T,
        "backward": lambda: mixing.double() @ x.double(),
    }


def _symmetric(z: Tensor, truth: str, transposed: bool) -> dict[str, Callable[[], Answer]]:
    """The configurations of the symmetric kernel, where this version of the package has one and the rows allow it."""
    if importlib.util.find_spec(SYMMETRIC) is None or z.stride(0) * z.itemsize % 16 or z.stride(1) != 1:
        return {}
    symmetric = importlib.import_module(SYMMETRIC)
    device = torch.cuda.get_device_capability(z.device) if z.is_cuda else (0, 0)
    tf32 = z.dtype == torch.float32

    def multiply(configuration: object) -> Answer:
        return Answer(truth, symmetric.multiply(z, transposed, 1, configuration, tf32)[0])

    return {
        f"symmetric {c.rows} x {c.columns} x {c.step} bytes, {c.warps} warps, {c.stages} stages": partial(multiply, c)
        for c in symmetric.fitting(device)
    }


def _compete(question: Question, make: Callable[[Tensor, Tensor], tuple], context: Context) -> Iterator[Row]:
    with fp32_products(question.case.precision), torch.no_grad():
        x, y = question.case.features(context.machine.device)
        found, truths = make(x, y)
        kept = {name: cache(truth) for name, truth in truths.items()}

        def judge(result: object) -> Verdict:
            assert isinstance(result, Answer)
            true = kept[result.truth]()
            error = float(((result.tensor.double() - true).norm() / true.norm()).nan_to_num(torch.inf))
            return Verdict(None if error <= WRONG else f"off by {error:.1e}", error)

        candidates = [Candidate(name, run) for name, run in found.items()]
        for row in compete(context, candidates, judge, context.share()):
            yield question.about | row
