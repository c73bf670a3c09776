"""Calls that the ranks of a group have agreed on before: what they send then, and what happens if one is not in it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bird
import bird_kernels
from bird.structure import named_loss
from bird_kernels import distributed, global_batch, sums
from bird_kernels.functional import cka_losses
from tests.accuracy import features
from tests.kernels.ranks import counted, forced, raised

Seen = list[tuple[str, int]]
WIDTHS = [(7, 5), (3, 9), (4, 4), (2, 6), (5, 3), (6, 2)]


def last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def mine(n: int, p: int = 7, q: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """This rank's n rows, of its own seed."""
    x, y = features(n, p, q, dtype, mean=2.0, seed=10 * seed + dist.get_rank())
    return x.requires_grad_(), y


def whole(n: list[int], p: int = 7, q: int = 5, seed: int = 0, **options: Any) -> float:
    """The loss of all ranks' rows in this process, in fp64."""
    parts = [features(rows, p, q, torch.float64, mean=2.0, seed=10 * seed + rank) for rank, rows in enumerate(n)]
    x, y = (torch.cat(sides) for sides in zip(*parts, strict=True))
    if len(x) < 1000:
        return bird_kernels.cka_loss(x, y, backend="reference", **options).item()
    x, y = x - x.mean(0), y - y.mean(0)  # of so many rows the reference has no memory
    return 1 - ((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def sent(call: Callable[[], Any]) -> Seen:
    with counted() as seen:
        call()
    return seen


def lists(dtypes: list[torch.dtype], n: int = 20) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [mine(n, *WIDTHS[i], dtype, seed=i) for i, dtype in enumerate(dtypes)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def guided(group: Any) -> Tensor:
    """BIRD's loss of two pairs of layers."""
    (a, b), (c, d) = lists([torch.float32] * 2)
    loss = bird.BirdLoss(pairs=[("t", "s"), ("u", "v")], group=group)
    return loss(torch.zeros(()), {"t": c, "u": d}, {"s": a, "v": b})


CALLS: dict[str, Callable[[Any], Any]] = {
    "biased": lambda group: bird_kernels.cka_loss(*mine(20, dtype=torch.float32), group=group),
    "unbiased": lambda group: bird_kernels.cka_loss(*mine(20), estimator="unbiased", group=group),
    "two pairs": lambda group: cka_losses(*lists([torch.float32] * 2), group=group),
    "layers": guided,
    "six pairs": lambda group: cka_losses(*lists([torch.float32] * 6), group=group),
    "two dtypes": lambda group: cka_losses(*lists([torch.float32, torch.float64]), group=group),
    "cosines": lambda group: named_loss("cosine_cka", group=group).each(*lists([torch.float32] * 2)),
}  # fmt: skip


def traffic() -> dict[tuple[str, str], list[Seen]]:
    """Of each call and transport: what travels at first, again, in another call after it, and in that one again."""
    found = {}
    for name, call in CALLS.items():
        for transport in ("merged", "gathered"):
            distributed._HISTORIES.clear()
            with forced(transport):
                other = lambda: bird_kernels.cka_loss(*mine(20, 4, 3), group=dist.group.WORLD)  # noqa: E731
                found[name, transport] = [
                    sent(step) for step in (*[lambda c=call: c(dist.group.WORLD)] * 2, other, other)
                ]
    return found


def mixed() -> tuple[list[Seen], list[float]]:
    """A list of which the first pair is merged and the second gathered: what travels twice, and the values."""
    distributed._HISTORIES.clear()
    x, y = mine(20000, 2, 1)
    u, v = mine(20, *WIDTHS[1], seed=1)
    with counted() as first:
        cka_losses([x, u], [y, v], group=dist.group.WORLD)
    with counted() as again:
        values = cka_losses([x, u], [y, v], group=dist.group.WORLD)
    return [first, again], values.tolist()


def values_of_lists() -> list[list[float]]:
    """Six pairs of two dtypes by either transport, first and again."""
    found = []
    for transport in ("merged", "gathered"):
        with forced(transport):
            both = lists([torch.float64, torch.float32] * 3)
            found += [cka_losses(*both, group=dist.group.WORLD).tolist() for _ in range(2)]
    return found


def alternating() -> list[tuple[Seen, float]]:
    """Two losses of other widths and estimators in turns."""
    distributed._HISTORIES.clear()
    found = []
    for step in range(8):
        p, q = WIDTHS[step % 2]
        x, y = mine(20, p, q, seed=step % 2)
        with counted() as seen:
            value = bird_kernels.cka_loss(x, y, estimator=("biased", "unbiased")[step % 2], group=dist.group.WORLD)
        found.append((seen, value.item()))
    return found


# Rows of the last rank (the others have 20 or as many) and whether it has a mask, call by call.
GATHERED = [
    (20, False),
    (20, False),
    (7, False),
    (0, False),
    (21, False),
    (20, False),
    (20, True),
    (20, True),
    (20, False),
]
CHANGING = [40000, 40000, 39000, 50, 50, 40000]  # from merged sums to gathered rows and back


def last_batches() -> list[tuple[Seen, float, float]]:
    """The last rank's rows change: collectives, loss, and the norm of its gradient."""
    distributed._HISTORIES.clear()
    found = []
    for n, masked in GATHERED:
        x, y = mine(n if last_rank() else 20)
        mask = torch.arange(n) != 3 if masked and last_rank() else None
        with counted() as seen:
            value = bird_kernels.cka_loss(x, y, mask=mask, group=dist.group.WORLD)
        (dx,) = torch.autograd.grad(value, x)
        found.append((seen, value.item(), dx.norm().item()))
    return found


def changing() -> list[tuple[Seen, float]]:
    distributed._HISTORIES.clear()
    found = []
    for n in CHANGING:
        x, y = mine(n, 2, 1)
        with counted() as seen:
            value = bird_kernels.cka_loss(x, y, group=dist.group.WORLD)
        found.append((seen, value.item()))
    return found


@contextlib.contextmanager
def failing(module: Any, name: str) -> Iterator[None]:
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for this")

    with mock.patch.object(module, name, fails) if last_rank() else contextlib.nullcontext():
        yield


def failures() -> dict[tuple[str, str], list[Any]]:
    """An error in the midst of one rank's work, in the first call and in an agreed one; and the next call's value."""
    found = {}
    for transport, module, name in (("merged", sums, "sums_of"), ("gathered", global_batch, "_write")):
        for before in (0, 2):
            distributed._HISTORIES.clear()
            with forced(transport):
                for _ in range(before):
                    bird_kernels.cka_loss(*mine(20), group=dist.group.WORLD)
                with failing(module, name):
                    error = raised(lambda: bird_kernels.cka_loss(*mine(20), group=dist.group.WORLD))
                found[transport, f"after {before}"] = [
                    *error,
                    bird_kernels.cka_loss(*mine(20), group=dist.group.WORLD).item(),
                ]
    return found


def another_history() -> list[Any]:
    """The last rank has counted otherwise, then expects nothing, of a call whose size is the same: values, errors."""
    distributed._HISTORIES.clear()
    group, found = dist.group.WORLD, []
    with forced("merged"):
        for step in range(5):
            if step == 2 and last_rank():
                distributed._HISTORIES[group].count += 1
            with counted() as seen:
                found.append((bird_kernels.cka_loss(*mine(20), group=group).item(), len(seen)))
    return found


def nan_rides() -> list[Any]:
    """Features of one rank with NaN, in an agreed call, by either transport: value, collectives."""
    found = []
    for transport in ("merged", "gathered"):
        with forced(transport):
            for spoilt in (False, False, True, False):
                x, y = mine(20)
                x = x.detach().index_fill(0, torch.tensor([3]), torch.nan) if spoilt and last_rank() else x
                with counted() as seen:
                    value = bird_kernels.cka_loss(x, y, group=dist.group.WORLD)
                found.append((value.item(), len(seen)))
    return found


def new_groups() -> list[Any]:
    """Two groups of the same ranks have histories of their own; one that is let go of takes its history with it."""
    distributed._HISTORIES.clear()
    groups = [dist.new_group(), dist.new_group()]
    found = [len(sent(lambda g=g: bird_kernels.cka_loss(*mine(20), group=g))) for g in (*groups, *groups)]
    dist.destroy_process_group(groups[1])
    again = dist.new_group()
    found.append(len(sent(lambda: bird_kernels.cka_loss(*mine(20), group=again))))
    return found


def explained_beside() -> tuple[str, str]:
    """The last rank explains what the others compute."""
    function: Any = bird_kernels.explain if last_rank() else bird_kernels.cka_loss
    return raised(lambda: function(*mine(20), group=dist.group.WORLD))


class Drawn(NamedTuple):
    """A call that all ranks draw alike: each rank's rows, whether it leaves out its second, and which rank fails."""

    pairs: int
    estimator: str
    transport: str
    statistics: bool
    rows: list[int]
    masked: list[bool]
    failing: int | None

    def parts(self, rank: int) -> tuple[list[list[Tensor]], Tensor]:
        """Both sides of a rank's pairs, and its mask."""
        seeds = [features(self.rows[rank], *WIDTHS[i], torch.float64, seed=4 * i + rank) for i in range(self.pairs)]
        mask = (torch.arange(self.rows[rank]) != 1) | (not self.masked[rank])
        return [[pair[side] for pair in seeds] for side in (0, 1)], mask

    def grouped(self, rank: int) -> list[float]:
        """This rank's call."""
        (xs, ys), mask = self.parts(rank)
        xs = [*xs[:-1], xs[-1].long()] if rank == self.failing else xs
        if self.statistics:
            found = bird_kernels.Statistics()
            found.update(xs[-1], ys[-1])
            found.all_reduce()
            return [1 - found.cka(self.estimator).item()]
        options = dict[str, Any](estimator=self.estimator, group=dist.group.WORLD)
        with forced(self.transport):
            return cka_losses(xs, ys, mask=mask if self.masked[rank] else None, **options).tolist()

    def true(self, world: int) -> list[float]:
        """The losses of all rows, in this process."""
        sides, masks = zip(*map(self.parts, range(world)), strict=True)
        found = []
        for i in range(self.pairs)[-1:] if self.statistics else range(self.pairs):
            x, y = (torch.cat([own[side][i] for own in sides]) for side in (0, 1))
            mask = None if self.statistics else torch.cat(masks)
            found.append(bird_kernels.cka_loss(x, y, mask=mask, estimator=self.estimator).item())
        return found


def drawn(draw: random.Random, world: int) -> Drawn:
    statistics, fails = draw.random() < 0.1, draw.random() < 0.1
    return Drawn(
        draw.choice([1, 1, 1, 1, 6]), draw.choice(["biased"] * 5 + ["unbiased"]),
        draw.choice(["merged", "gathered"]), statistics, [*(draw.choice([0, 3, 8, 20]) for _ in range(world - 1)), 8],
        [draw.random() < 0.2 for _ in range(world)], draw.randrange(world) if fails and not statistics else None,
    )  # fmt: skip


def random_calls() -> list[str]:
    """Known and new calls in any order, in a tenth of which a rank fails: what was wrong, of values and errors."""
    distributed._HISTORIES.clear()
    rank, world, draw, wrong = dist.get_rank(), dist.get_world_size(), random.Random(0), list[str]()
    for step in range(100):
        call = drawn(draw, world)
        for _ in range(draw.choice([1, 1, 3])):
            if call.failing is not None:
                kind, text = raised(lambda call=call: call.grouped(rank))  # type: ignore[misc]
                if kind != ("TypeError" if call.failing == rank else "RuntimeError") or "must be float64" not in text:
                    wrong.append(f"{step}: {kind}: {text}")
            elif call.grouped(rank) != pytest.approx(call.true(world), rel=0, abs=1e-9):
                wrong.append(f"{step}: {call}")
    return wrong


def cases() -> dict[str, Callable[[], Any]]:
    return {
        function.__name__: function
        for function in (
            traffic, mixed, values_of_lists, alternating, last_batches, changing, failures, another_history, nan_rides,
            new_groups, explained_beside, random_calls,
        )
    }  # fmt: skip
