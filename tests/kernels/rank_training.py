"""Training on the ranks of a group: parameters' gradients under DDP, FSDP2 and accumulation against one process's.

Each function returns this rank's relative deviation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bird
import bird_kernels
from tests.kernels.ranks import ROWS, SPLITS, P, own


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, P)).double()


def samples(rows: int = 24) -> tuple[Tensor, Tensor]:
    """Inputs, and a teacher's features of them."""
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 6, dtype=torch.float64, generator=g)
    return inputs, network(2)(inputs).detach()


def criterion(group: Any, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Task and guidance. The task is a mean over rows: with as many on every rank its average is that of the batch."""
    loss = bird.BirdLoss(0.3, 0.7, [("t", "s")], group=group, **options)
    return lambda student, teacher: loss(student.square().mean(), {"t": teacher}, {"s": student})


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def deviation(model: nn.Module, reference: nn.Module) -> float:
    """Relative difference between the gradients of all parameters. (The last bias' alone is zero: no measure.)"""
    a, b = (torch.cat([g.flatten() for g in gradients(m)]) for m in (model, reference))
    return ((a - b).norm() / b.norm()).item()


def alone(backward: Callable[[nn.Module], None]) -> nn.Module:
    reference = network()
    backward(reference)
    return reference


def ddp(estimator: str) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, teacher = samples()
    model = nn.parallel.DistributedDataParallel(network())
    mine = slice(rank, None, world)
    criterion(dist.group.WORLD, estimator=estimator)(model(inputs[mine]), teacher[mine]).backward()
    whole = criterion(None, estimator=estimator)
    return deviation(model, alone(lambda m: whole(m(inputs), teacher).backward()))


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    inputs, teacher = samples()
    return [(inputs[:12], teacher[:12]), (inputs[12:], teacher[12:])]


def accumulated(model: nn.Module) -> None:
    """Both micro-steps in one process."""
    whole = criterion(None)
    for a, t in micro_batches():
        (whole(model(a), t) / 2).backward()


def accumulation() -> float:
    """Two micro-steps, each its own global batch; gradients travel in the second."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = nn.parallel.DistributedDataParallel(network())
    loss = criterion(dist.group.WORLD)
    for step, (a, t) in enumerate(micro_batches()):
        with model.no_sync() if step == 0 else contextlib.nullcontext():
            (loss(model(a[rank::world]), t[rank::world]) / 2).backward()
    return deviation(model, alone(accumulated))


def ddp_uneven() -> float:
    """The guidance alone, whose average needs no equal numbers of rows; a rank may have none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, teacher = samples(ROWS)
    split = SPLITS["uneven"][world]
    model = nn.parallel.DistributedDataParallel(network())
    student = model(own(inputs, split, rank))
    bird_kernels.cka_loss(student, own(teacher, split, rank), group=dist.group.WORLD).backward()
    return deviation(model, alone(lambda m: bird_kernels.cka_loss(m(inputs), teacher).backward()))


def sharded() -> tuple[Any, Any]:
    """The network under FSDP2, and its group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, mesh.get_group()


def fsdp() -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, teacher = samples()
    model, group = sharded()
    criterion(group)(model(inputs[rank::world]), teacher[rank::world]).backward()
    whole = criterion(None)
    return deviation(model, alone(lambda m: whole(m(inputs), teacher).backward()))


def fsdp_accumulation(silent: bool) -> float:
    """As `accumulation`; gradients travel in both micro-steps, or, ``silent``, in the second for both."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, group = sharded()
    loss = criterion(group)
    for step, (a, t) in enumerate(micro_batches()):
        model.set_requires_gradient_sync(step == 1 or not silent)
        (loss(model(a[rank::world]), t[rank::world]) / 2).backward()
    return deviation(model, alone(accumulated))


def chunked(kernel: str = "linear") -> float:
    """Uneven ranks with uneven chunks in DDP, two pairs of layers: by statistics, or, of another kernel, by rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, teacher = samples(ROWS)
    split = {1: [60], 2: [43, 17], 3: [1, 50, 9], 4: [20, 1, 32, 7]}[world]
    mine = list(zip(own(inputs, split, rank).split(8), own(teacher, split, rank).split(8), strict=True))
    options: dict[str, Any] = dict(kernel=kernel, estimator="unbiased")
    pairs = [("t", "s"), ("t", "u")]

    def rows(model: nn.Module, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = model(a)
        return found.square().sum() / ROWS, {"s": found, "u": found.sin()}

    def student(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        task, found = rows(model, chunk[0])
        return task * world, found  # DDP averages

    def at_once(m: nn.Module) -> None:
        task, found = rows(m, inputs)
        bird.BirdLoss(0.3, 0.7, pairs, **options)(task, {"t": teacher}, found).backward()

    model = nn.parallel.DistributedDataParallel(network())
    loss = bird.BirdLoss(0.3, 0.7, pairs, group=dist.group.WORLD, **options)
    bird.chunked_backward(student, lambda chunk: {"t": chunk[1]}, mine, loss, model=model)
    return deviation(model, alone(at_once))
