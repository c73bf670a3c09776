"""Is it right on this device: calls of every kind against fp64, repeated, overlapped, captured, and without a wait.

For test_cuda.py, and for ``./dev gpu`` on machines that have no pytest. The bar is that of the tests: twice the error
of plain PyTorch in the same dtype, plus a floor. The route follows from the sizes, n <= p + q or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.limits import fp32_switched
from benchmarks.machine import Machine
from benchmarks.rows import message
from bird_kernels import RBF, cka_loss
from tests import accuracy
from tests.accuracy import Result

BACKENDS = ("library", "triton", "native")
WEIGHTS = (1.0, 0.5, 2.0)  # of a list of pairs
REPEATS = 100
DRAWS = 5
Sides = tuple[list[Tensor], list[Tensor]]
GRAM, CROSS = ((128, 96, 130), (37, 61, 29), (130, 65, 70)), ((520, 65, 33), (1030, 96, 40))
WIDE, MANY = (64, 12_000, 9000), (40_000, 64, 48)
TINY = {shape: (16, 9, 8) if shape[0] <= shape[1] + shape[2] else (40, 6, 5) for shape in (*GRAM, *CROSS, WIDE, MANY)}


@dataclass(frozen=True)
class Check:
    """One kind of call; ``number`` is a dtype or "tf32", ``pairs`` so many weighted losses, ``mean`` in spreads."""

    backend: str
    shape: tuple[int, int, int]
    number: str = "float32"
    estimator: str = "biased"
    masked: bool = False
    pairs: int = 1
    rbf: bool = False
    mean: float = 0.0

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        more = (f"{self.pairs} pairs" * (self.pairs > 1), "rbf" * self.rbf, "masked" * self.masked)
        mean = f"mean {self.mean:g}" if self.mean else ""
        return " ".join(filter(None, (self.backend, sizes, self.number, self.estimator, *more, mean)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features."""
        dtype: torch.dtype = torch.float32 if self.number == "tf32" else getattr(torch, self.number)
        return dtype

    def features(self, device: torch.device, seed: int = 0) -> Sides:
        """As many students and teachers as there are pairs."""
        sides = [
            accuracy.features(*self.shape, self.dtype, device, self.mean, seed + 10 * pair)
            for pair in range(self.pairs)
        ]
        return [x for x, _ in sides], [y for _, y in sides]

    def mask(self, device: torch.device) -> Tensor | None:
        """Every fifth row is left out."""
        return torch.arange(self.shape[0], device=device) % 5 != 1 if self.masked else None

    def evaluated(self, device: torch.device, sides: Sides | None = None) -> list[Tensor]:
        """The loss, and the gradients of all students and teachers."""
        xs, ys = sides or self.features(device)
        leaves = [side.detach().requires_grad_() for side in (*xs, *ys)]
        students, teachers = leaves[: len(xs)], leaves[len(xs) :]
        options: dict[str, Any] = dict(kernel=RBF() if self.rbf else "linear", weights=WEIGHTS[: self.pairs])
        if self.pairs == 1:
            (students,), (teachers,), options["weights"] = students, teachers, None
        options |= dict(estimator=self.estimator, mask=self.mask(device), backend=self.backend)
        with fp32_switched(self.number):
            value = cka_loss(students, teachers, **options)
            return [value.detach(), *torch.autograd.grad(value, leaves)]


def every_check(tiny: bool = False) -> list[Check]:
    """Some seventy, every backend in turn, the usual ones first; ``tiny``: one of each kind, small."""
    found = []
    numbers = ("float32", "bfloat16", "tf32", "float16")
    for i, (number, estimator, masked) in enumerate(product(numbers, ("biased", "unbiased"), (False, True))):
        found += [Check(backend, GRAM[i % 3], number, estimator, masked) for backend in BACKENDS]
    for i, (number, estimator) in enumerate(product(numbers, ("biased", "unbiased"))):
        found += [Check(backend, CROSS[i % 2], number, estimator, i % 3 == 1) for backend in BACKENDS[:2]]
    for number, estimator in product(numbers[:2], ("biased", "unbiased")):
        found += [Check(backend, GRAM[0], number, estimator, pairs=3) for backend in BACKENDS]
    found += [
        Check(backend, GRAM[i], estimator=estimator, rbf=True)
        for i, estimator in enumerate(("biased", "unbiased"))
        for backend in BACKENDS[:2]
    ]
    found += [
        Check("library", shape, number, mean=mean)
        for shape, number, mean in product((GRAM[0], CROSS[1]), ("bfloat16", "tf32"), (16.0, 300.0))
    ]
    found += [Check("library", shape, "bfloat16") for shape in (WIDE, MANY)]
    if tiny:  # the emulated are slow, and Triton's interpreter multiplies bf16 as integers: in fp32, each kind once
        found = [replace(c, shape=TINY[c.shape]) for c in found if c.backend == "library" or c.number == "float32"]
        found = list({replace(c, estimator="", masked=False): c for c in reversed(found)}.values())[::-1]
    return found


def judged(check: Check, machine: Machine) -> dict[str, Any]:
    """A True or False for everything that must hold, in words what does not, and the errors of the first features."""
    sides = [check.features(machine.device, seed) for seed in range(3)]
    alone = [check.evaluated(machine.device, pair) for pair in sides]

    def again() -> bool:
        return same(alone[0], check.evaluated(machine.device, sides[0]))

    found: dict[str, Any] = {"second call": again()}
    found["repeats"] = all(again() for _ in range(REPEATS if machine.is_cuda else 1))
    draws = _drawn(check, machine)
    found |= {f"{name}_error": error for name, error in accuracy.errors(draws[0][0], draws[2][0]).items()}
    holds: dict[str, Callable[[], bool]] = {
        "accurate": lambda: accuracy.assert_no_worse(*draws) is None,
        "streams": lambda: _overlaps(check, machine, sides, alone),
        "replay": lambda: _replays(check, machine, sides, alone[1]),
        "no wait": lambda: _runs_on(check, machine, sides[0]),
    }
    for name, held in holds.items():
        try:
            found[name] = held()
        except (AssertionError, RuntimeError) as error:  # of errors, a capture, a wait: the other findings are kept
            found |= {name: False, "message": message(error)}
    return found


def _drawn(check: Check, machine: Machine) -> tuple[list[Result], list[Result], list[Result]]:
    """Ours, plain PyTorch's in the same dtype, and the truth, for some draws of features."""
    ours, plains, truths = [], [], []
    for draw in range(DRAWS if machine.is_cuda else 2):
        xs, ys = check.features(machine.device, 100 * draw)
        value, *gradients = check.evaluated(machine.device, (xs, ys))
        ours.append(Result(value, torch.cat(gradients[: len(xs)], 1), torch.cat(gradients[len(xs) :], 1)))
        with fp32_switched(check.number):
            plains.append(_summed([_plain(check, *pair) for pair in zip(xs, ys, strict=True)]))
        truths.append(_summed([_truth(check, *pair) for pair in zip(xs, ys, strict=True)]))
    return ours, plains, truths


def _overlaps(check: Check, machine: Machine, sides: list[Sides], alone: list[list[Tensor]]) -> bool:
    """Calls on many streams at once give what they give alone."""
    machine.wait()
    together = []
    for i in range(8 if machine.is_cuda else 1):
        with torch.cuda.stream(torch.cuda.Stream()) if machine.is_cuda else contextlib.nullcontext():
            together.append((i % 3, check.evaluated(machine.device, sides[i % 3])))
    machine.wait()
    return all(same(alone[i], result) for i, result in together)


def _replays(check: Check, machine: Machine, sides: list[Sides], expected: list[Tensor]) -> bool:
    """A graph captured on the last features, replayed on the second ones, gives what a call on those gives."""
    place = sides[2]
    replay, result = machine.captured(lambda: check.evaluated(machine.device, place))
    for old, fresh in zip((*place[0], *place[1]), (*sides[1][0], *sides[1][1]), strict=True):
        old.copy_(fresh)
    replay()
    machine.wait()
    return same(result if machine.is_cuda else check.evaluated(machine.device, place), expected)


def _runs_on(check: Check, machine: Machine, sides: Sides) -> bool:
    """Raises where the call waits for the device."""
    machine.wait()
    try:
        if machine.is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        check.evaluated(machine.device, sides)
    finally:
        if machine.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    return True


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all bits are."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _plain(check: Check, x: Tensor, y: Tensor) -> Result:
    """What plain PyTorch gives in the same dtype."""
    n, p, q = check.shape
    mask = check.mask(x.device)
    rows = slice(None) if mask is None else mask
    if check.rbf:
        form = accuracy.plain_rbf(RBF(), check.estimator)
    else:
        form = accuracy.plain("gram" if n <= p + q else "cross", check.estimator)
    return accuracy.evaluate(lambda a, b: form(a[rows], b[rows]), x, y)


def _truth(check: Check, x: Tensor, y: Tensor) -> Result:
    """The literal formula in fp64, or where its n x n matrices are too large the closed form in fp64."""
    if check.shape[0] <= 2048:
        return accuracy.truth(x, y, check.estimator, mask=check.mask(x.device), kernel=RBF() if check.rbf else None)
    return accuracy.evaluate(accuracy.plain("cross", check.estimator), x.double(), y.double())


def _summed(results: Sequence[Result]) -> Result:
    """Of the weighted sum of pairs' losses: its value, and the gradients of all students and all teachers."""
    weighted = [[w * part for part in result] for w, result in zip(WEIGHTS, results)]  # noqa: B905 - fewer results
    values, dxs, dys = zip(*weighted, strict=True)
    return Result(torch.stack(values).double().sum(), torch.cat(dxs, 1), torch.cat(dys, 1))
