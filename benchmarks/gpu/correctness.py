"""Is it right on this device: calls of every kind against fp64, repeated, overlapped, captured, and without a wait.

The bar is that of the tests: twice the error of plain PyTorch in the same dtype, plus a floor. The route follows from
the sizes, n <= p + q or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.context import Context, Item, Row
from benchmarks.kernels.problems import fp32_switched
from benchmarks.machine import Machine
from benchmarks.rows import message
from bird_kernels import RBF, cka_loss
from tests import accuracy
from tests.accuracy import Result

BACKENDS = ("library", "triton", "native")
REPEATS = 30
DRAWS = 5
Call = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
GRAM, CROSS = ((128, 96, 130), (37, 61, 29), (130, 65, 70)), ((520, 65, 33), (1030, 96, 40))
WIDE, MANY = (64, 12_000, 9000), (40_000, 64, 48)
TINY = {shape: (16, 9, 8) if shape[0] <= shape[1] + shape[2] else (40, 6, 5) for shape in (*GRAM, *CROSS, WIDE, MANY)}


@dataclass(frozen=True)
class Check:
    """One kind of call; ``number`` is a dtype or "tf32", ``pairs`` so many losses summed, ``mean`` in spreads."""

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

    def features(self, device: torch.device, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """As many students and teachers as there are pairs."""
        sides = [
            accuracy.features(*self.shape, self.dtype, device, self.mean, seed + 10 * pair)
            for pair in range(self.pairs)
        ]
        return [x for x, _ in sides], [y for _, y in sides]

    def mask(self, device: torch.device) -> Tensor | None:
        """Every fifth row is left out."""
        return torch.arange(self.shape[0], device=device) % 5 != 1 if self.masked else None


def every_check() -> list[Check]:
    """Some seventy, every backend in turn, the usual ones first."""
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
    return found


def chosen(rehearse: bool) -> list[Check]:
    """All of them, or at a rehearsal some, tiny ones."""
    found = every_check()
    if rehearse:  # the emulated are slow, and Triton's interpreter multiplies bf16 as integers: in fp32, each kind once
        found = [replace(c, shape=TINY[c.shape]) for c in found if c.backend == "library" or c.number == "float32"]
        found = list({replace(c, estimator="", masked=False): c for c in reversed(found)}.values())[::-1]
    return found


def check_items(context: Context) -> Sequence[Item]:
    """A check each."""
    return [Item(str(check), partial(_check, check)) for check in chosen(context.rehearse)]


def _check(check: Check, context: Context) -> Iterator[Row]:
    about = {key: value for key, value in vars(check).items() if key != "shape"}
    about |= dict(zip("npq", check.shape, strict=True), candidate=check.backend)
    device = context.machine.device
    try:
        with fp32_switched("tf32" if check.number == "tf32" else ""):
            if context.warms:
                call = partial(evaluated, check, check.mask(device), *check.features(device, seed=0))
                yield context.warmed([call] * (check.backend != "native"))  # which is being built meanwhile
                return
            found = judged(check, context.machine)
        wrong = [name for name, right in found.items() if right is False]
        yield about | found | {"status": "red" if wrong else "ok", "gate": ", ".join(wrong)}
    except ValueError as error:
        if "cannot run here" not in str(error):
            raise
        yield about | {"status": "refused", "message": message(error)}


def judged(check: Check, machine: Machine) -> Row:
    """A True or False for everything that must hold, in words what does not, and the errors of the first features."""
    xs, ys = check.features(machine.device, seed=0)
    call = partial(evaluated, check, check.mask(machine.device))
    first = call(xs, ys)
    found: Row = {"second call": same(first, call(xs, ys))}
    found["repeats"] = all(same(first, call(xs, ys)) for _ in range(REPEATS if machine.is_cuda else 1))
    draws = _drawn(check, machine, call)
    found |= {f"{name}_error": error for name, error in accuracy.errors(draws[0][0], draws[2][0]).items()}
    holds: dict[str, Callable[[], bool]] = {
        "accurate": lambda: accuracy.assert_no_worse(*draws) is None,
        "streams": partial(_overlaps, check, machine, call),
        "replay": partial(_replays, check, machine, call),
        "no wait": partial(_runs_on, check, machine, call),
    }
    for name, held in holds.items():
        try:
            found[name] = held()
        except (AssertionError, RuntimeError) as error:  # of errors, a capture, a wait: the other findings are kept
            found |= {name: False, "message": message(error)}
    return found


def _drawn(check: Check, machine: Machine, call: Call) -> tuple[list[Result], list[Result], list[Result]]:
    """Ours, plain PyTorch's in the same dtype, and the truth, for some draws of features."""
    mask, ours, plains, truths = check.mask(machine.device), [], [], []
    for draw in range(DRAWS if machine.is_cuda else 2):
        xs, ys = check.features(machine.device, 100 * draw)
        value, *gradients = call(xs, ys)
        ours.append(Result(value, torch.cat(gradients[: len(xs)], 1), torch.cat(gradients[len(xs) :], 1)))
        plains.append(_summed([_plain(check, mask, x, y) for x, y in zip(xs, ys, strict=True)]))
        truths.append(_summed([_truth(check, mask, x, y) for x, y in zip(xs, ys, strict=True)]))
    return ours, plains, truths


def _overlaps(check: Check, machine: Machine, call: Call) -> bool:
    """Two calls on two streams at once give what one gives."""
    xs, ys = check.features(machine.device, seed=0)
    expected, found = call(xs, ys), []
    machine.wait()
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()) if machine.is_cuda else contextlib.nullcontext():
            found.append(call(xs, ys))
    machine.wait()
    return all(same(expected, result) for result in found)


def _replays(check: Check, machine: Machine, call: Call) -> bool:
    """A graph captured on some features, replayed on others, gives what a call on those gives."""
    xs, ys = check.features(machine.device, seed=1)
    expected = call(xs, ys)
    others, more = check.features(machine.device, seed=2)
    inputs = [*others, *more]
    replay, result = machine.captured(lambda: call(inputs[: len(xs)], inputs[len(xs) :]))
    for place, fresh in zip(inputs, (*xs, *ys), strict=True):
        place.copy_(fresh)
    replay()
    machine.wait()
    return same(result if machine.is_cuda else call(inputs[: len(xs)], inputs[len(xs) :]), expected)


def _runs_on(check: Check, machine: Machine, call: Call) -> bool:
    """Raises where the call waits for the device."""
    xs, ys = check.features(machine.device, seed=0)
    machine.wait()
    try:
        if machine.is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        call(xs, ys)
    finally:
        if machine.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    return True


def evaluated(check: Check, mask: Tensor | None, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """The loss, and the gradients of all students and teachers."""
    kernel = RBF() if check.rbf else "linear"
    leaves = [side.detach().requires_grad_() for side in (*xs, *ys)]
    students, teachers = leaves[: len(xs)], leaves[len(xs) :]
    pair = (students, teachers) if len(xs) > 1 else (students[0], teachers[0])
    options = dict(estimator=check.estimator, mask=mask, kernel=kernel, backend=check.backend)
    value = cka_loss(*pair, **options)  # type: ignore[arg-type]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all bits are."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _plain(check: Check, mask: Tensor | None, x: Tensor, y: Tensor) -> Result:
    """What plain PyTorch gives in the same dtype."""
    n, p, q = check.shape
    rows = slice(None) if mask is None else mask
    if check.rbf:
        form = accuracy.plain_rbf(RBF(), check.estimator)
    else:
        form = accuracy.plain("gram" if n <= p + q else "cross", check.estimator)
    return accuracy.evaluate(lambda a, b: form(a[rows], b[rows]), x, y)


def _truth(check: Check, mask: Tensor | None, x: Tensor, y: Tensor) -> Result:
    """The literal formula in fp64, or where its n x n matrices are too large the closed form in fp64."""
    if check.shape[0] <= 2048:
        kernel = RBF() if check.rbf else None
        return accuracy.truth(x, y, check.estimator, mask=mask, kernel=kernel)
    return accuracy.evaluate(accuracy.plain("cross", check.estimator), x.double(), y.double())


def _summed(results: Sequence[Result]) -> Result:
    """Of the sum of several pairs' losses: its value, and the gradients of all students and all teachers."""
    values, dxs, dys = zip(*results, strict=True)
    return Result(torch.stack(values).double().sum(), torch.cat(dxs, 1), torch.cat(dys, 1))
