"""What the ranks of a group do in the tests: every case of one world size, in processes that are started once.

A case runs on every rank and returns what the parent judges. Groups are gloo's, on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import bird_kernels
from bird_kernels import distributed, transport
from bird_kernels.call import across
from bird_kernels.types import Options
from tests.accuracy import features

WORLDS = (1, 2, 3, 4)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
ROWS, P, Q = 60, 7, 5
SPLITS = {
    "even": {r: [ROWS // r] * r for r in WORLDS},
    "uneven": {1: [60], 2: [43, 17], 3: [1, 0, 59], 4: [20, 0, 33, 7]},
    "one has all": {1: [60], 2: [0, 60], 3: [0, 60, 0], 4: [0, 0, 0, 60]},
}


class Case(NamedTuple):
    """One statistic of one batch; the batch is that of `batch`."""

    transport: str
    estimator: str = "biased"
    dtype: torch.dtype = torch.float64
    masked: bool = False
    split: str = "uneven"
    statistic: str = "cka_loss"
    mean: float = 3.0
    backend: str = "auto"
    width: int = P

    def __str__(self) -> str:
        return " ".join(str(value).removeprefix("torch.") for value in self)


CASES = [
    *(
        Case(name, estimator, dtype, masked)
        for name in ("merged", "gathered")
        for estimator in ("biased", "unbiased")
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        for masked in (False, True)
    ),
    *(
        Case(name, "unbiased", split=split, masked=masked)
        for name in ("merged", "gathered")
        for split in ("even", "one has all")
        for masked in (False, True)
    ),
    *(Case(name, "unbiased", statistic=s) for name in ("merged", "gathered") for s in ("cka", "hsic")),
    *(Case(name, estimator, torch.float32, mean=100.0) for name in ("merged", "gathered") for estimator in ("biased",)),
    Case("merged", "unbiased", width=300),  # more than one block of rows of X^T X
    Case("gathered", "unbiased", backend="reference"),
]


def batch(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """All rows of a case. The mask leaves out rows of the first half: later ranks have none to leave out."""
    x, y = features(ROWS, case.width, Q, case.dtype, mean=case.mean)
    rows = torch.arange(ROWS)
    return x, y, (rows >= ROWS // 2) | (rows % 3 != 1) & (rows >= 5) if case.masked else None


def own(rows: Tensor | None, split: list[int], rank: int) -> Any:
    return None if rows is None else rows.split(split)[rank].clone()


def grouped(x: Tensor, y: Tensor, mask: Tensor | None, case: Case, group: Any) -> Tensor:
    """The call under test, by what travels also on one rank."""
    options = Options(case.statistic, estimator=case.estimator, group=group, backend=case.backend)
    return across([(x, y)], mask, options)[0]


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """`transport.cheaper` chooses this one."""
    choose = transport.cheaper

    def instead(*args: Any) -> Any:
        chosen = choose(*args)
        if chosen.name != name:
            chosen = chosen._replace(name=name, bytes=chosen.other_bytes, other_bytes=chosen.bytes)
        return chosen

    with mock.patch.object(transport, "cheaper", instead):
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives that run meanwhile, and the bytes of their results."""
    seen: list[tuple[str, int]] = []

    def spy(name: str, known_as: str) -> Any:
        original = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            seen.append((known_as, args[0].nbytes))
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, collective)

    with spy("all_reduce", "all_reduce"), spy(distributed.GATHER, "all_gather_into_tensor"):
        yield seen


def statistic(case: Case) -> dict[str, Any]:
    """Value and gradients of this rank's rows, what travelled in forward and backward, and in the same call again."""
    rank, split = dist.get_rank(), SPLITS[case.split][dist.get_world_size()]
    x, y, mask = (own(rows, split, rank) for rows in batch(case))
    if mask is not None and mask.all():
        mask = None
    x.requires_grad_()
    y.requires_grad_()
    distributed._HISTORIES.clear()
    with forced(case.transport):
        with counted() as forward:
            value = grouped(x, y, mask, case, dist.group.WORLD)
        with counted() as again:
            repeated = grouped(x, y, mask, case, dist.group.WORLD)
        with counted() as backward:
            dx, dy = torch.autograd.grad(value, (x, y), torch.full_like(value, 3.0))
            same = torch.autograd.grad(repeated, (x, y), torch.full_like(value, 3.0))
    equal = all(map(torch.equal, (value, dx, dy), (repeated, *same)))
    return dict(value=value.detach(), dx=dx, dy=dy, forward=forward, again=again, backward=backward, equal=equal)


# ---------------------------------------------------------------------------------------------- errors and the rest


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of the error, on this rank."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def whole_again() -> float:
    """After all those errors the group still works."""
    x, y = features(6, 4, 3)
    return bird_kernels.cka_loss(x, y, group=dist.group.WORLD).item()


def one_rank() -> dict[str, Any]:
    """A group of this rank alone: no communication, and the bits of a call without a group."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    x, y = features(20, 6, 5)
    with counted() as seen:
        value = bird_kernels.cka_loss(x, y, group=groups[dist.get_rank()])
    return dict(equal=value.equal(bird_kernels.cka_loss(x, y)), seen=seen)


def explained() -> Any:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for rows, d in ((20000, 8), (4, 64)):
        x, y = torch.zeros(rows + rank, d), torch.zeros(rows + rank, d + 1)
        plan = bird_kernels.explain(x, y, group=dist.group.WORLD)
        assert plan.transport is not None
        assert plan.transport.world == world
        found.append((plan.transport, plan.route, str(plan).splitlines()[1]))
    return found


def refusals() -> dict[str, tuple[str, str]]:
    """What does not go with a group, and what is no group."""
    x, y = features(12, 4, 3)
    world = dist.group.WORLD

    def twice() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(bird_kernels.cka_loss(leaf, y, group=world), leaf, create_graph=True)

    found = {}
    for name in ("merged", "gathered"):
        with forced(name):
            found[f"double backward, {name}"] = raised(twice)
    found["torch.func"] = raised(lambda: torch.func.grad(lambda a: bird_kernels.cka_loss(a, y, group=world))(x))
    found["no group"] = raised(lambda: bird_kernels.cka_loss(x, y, group=True))  # type: ignore[arg-type]
    return found


def some_gradients() -> list[Any]:
    """Each transport: value, value under autocast, and which sides got no gradient. Ranks want different sides'."""
    rank = dist.get_rank()
    x, y = features(12, 4, 3, seed=rank)
    found = []
    for name in ("merged", "gathered"):
        with forced(name):
            sides = x.clone().requires_grad_(rank == 0), y.clone().requires_grad_(rank != 0)
            value = bird_kernels.cka_loss(*sides, group=dist.group.WORLD)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = bird_kernels.cka_loss(*sides, group=dist.group.WORLD)
                loss.backward()
            found.append((value.item(), loss.item(), [side.grad is None for side in sides]))
    return found


def last_bits() -> list[float]:
    """Rows whose fp32 CKA, in one process, differs in the last bit by whether y wants a gradient (on a Zen 5 CPU)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for seed in (9, 11, 15, 33, 34):
        x, y = (side.tensor_split(world)[rank].clone() for side in features(280, 4, 260, seed=seed))
        x.requires_grad_(rank == 0)
        y.requires_grad_(rank != 0)
        with forced("gathered"):
            found.append(bird_kernels.cka(x, y, group=dist.group.WORLD).item())
    return found


def compiled() -> dict[str, Any]:
    x, y = features(12, 4, 3, torch.float64, seed=dist.get_rank())

    def function(a: Tensor, b: Tensor) -> Tensor:
        return bird_kernels.cka_loss(2 * a, b, group=dist.group.WORLD) * 3

    found = []
    for run in (function, torch.compile(function, backend="eager")):
        leaf = x.clone().requires_grad_()
        value = run(leaf, y)
        found.append((value.item(), torch.autograd.grad(value, leaf)[0]))
    (eager, dx), (value, compiled_dx) = found
    whole = torch.compile(function, backend="eager", fullgraph=True)
    return dict(
        value=value - eager, gradient=(compiled_dx - dx).norm().item(), fullgraph=raised(lambda: whole(x, y))
    )  # fmt: skip


def constants() -> float:
    """A side without variance, of fp64 constants on ranks of different sizes: the largest |1 - loss| or gradient."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for constant in torch.randn(24, dtype=torch.float64, generator=generator).tolist():
        x, _ = features(11 + 9 * rank, 4, 3, torch.float64, seed=rank)
        y = torch.full((len(x), 3), constant, dtype=torch.float64)
        x.requires_grad_()
        y.requires_grad_()
        with forced("merged"):
            loss = bird_kernels.cka_loss(x, y, group=dist.group.WORLD, estimator="unbiased")
        gradients = torch.autograd.grad(loss, (x, y))
        worst = max(worst, abs(1.0 - loss.item()), *(g.abs().max().item() for g in gradients))
    return worst


def triton() -> float:
    """A backend that is asked for gets the rows, whatever is fewer bytes."""
    x, y = features(20, 3, 2, seed=dist.get_rank())
    ours = bird_kernels.cka_loss(x, y, group=dist.group.WORLD, backend="triton")
    return (ours - bird_kernels.cka_loss(x, y, group=dist.group.WORLD)).abs().item()


def silence() -> tuple[str, str] | None:
    """The last rank never makes the call: the group's timeout ends the waiting of the others."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    x, y = features(6, 4, 3)
    if dist.get_rank() == dist.get_world_size() - 1:
        return None
    return raised(lambda: bird_kernels.cka_loss(x, y, group=group))


def cases(world: int) -> dict[str, Callable[[], Any]]:
    """Every case of a world size, in order."""
    from tests.kernels import rank_calls as calls
    from tests.kernels import rank_errors as errors
    from tests.kernels import rank_rides as rides
    from tests.kernels import rank_training as training

    found: dict[str, Callable[[], Any]] = {str(case): lambda case=case: statistic(case) for case in CASES}
    found |= {
        "ddp biased": lambda: training.ddp("biased"),
        "ddp unbiased": lambda: training.ddp("unbiased"),
        "accumulation": training.accumulation,
        "ddp uneven": training.ddp_uneven,
        "fsdp": training.fsdp,
        "fsdp accumulation": lambda: training.fsdp_accumulation(False),
        "fsdp accumulation, silent": lambda: training.fsdp_accumulation(True),
        "one rank": one_rank,
    }
    if world > 1:
        found |= {f"complaint {what}": lambda what=what: errors.complaint(what) for what in errors.COMPLAINTS}
        found |= {
            "whole again": whole_again, "explained": explained, "refusals": refusals,
            "some gradients": some_gradients, "last bits": last_bits, "constants": constants, "others": calls.others,
            "lists": calls.lists, "tokens": calls.tokens, "reduced": calls.reduced, "chunks": training.chunked,
            "chunks rbf": lambda: training.chunked("rbf"),
        }  # fmt: skip
        found |= rides.cases()
    if world > 2:
        found |= {"subgroup": calls.subgroup}
    if world == 2:
        found |= {"silence": silence, "compiled": compiled}
        if INTERPRETED:
            found |= {"triton": triton}
    return found


def work(rank: int, world: int, folder: str) -> None:
    """One rank: all cases, their results in a file; in the world of 3 the last rank then dies, before a call."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for name, case in cases(world).items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
            break  # the ranks are out of step
    if world == 3:
        results["death"] = None
        if rank == 2:
            torch.save(results, Path(folder) / f"{world}-{rank}.pt")
            os._exit(0)
        start = time.monotonic()
        results["death"] = *raised(whole_again), time.monotonic() - start
    torch.save(results, Path(folder) / f"{world}-{rank}.pt")
    os._exit(0)  # groups that cannot be let go of (one is broken, device meshes keep others) may abort: tests/groups.py
