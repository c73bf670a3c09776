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


def accumulation() -> float:
    """Two micro-steps, each its own global batch; gradients travel in the second."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, teacher = samples()
    halves = [(inputs[:12], teacher[:12]), (inputs[12:], teacher[12:])]
    model = nn.parallel.DistributedDataParallel(network())
    loss, whole = criterion(dist.group.WORLD), criterion(None)
    for step, (a, t) in enumerate(halves):
        with model.no_sync() if step == 0 else contextlib.nullcontext():
            (loss(model(a[rank::world]), t[rank::world]) / 2).backward()

    def both(m: nn.Module) -> None:
        for a, t in halves:
            (whole(m(a), t) / 2).backward()

    return deviation(model, alone(both))


def ddp_uneven() -> float:
    """The guidance alone, whose average needs no equal numbers of rows; a rank may have none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, teacher = samples(ROWS)
    split = SPLITS["uneven"][world]
    model = nn.parallel.DistributedDataParallel(network())
    student = model(own(inputs, split, rank))
    bird_kernels.cka_loss(student, own(teacher, split, rank), group=dist.group.WORLD).backward()
    return deviation(model, alone(lambda m: bird_kernels.cka_loss(m(inputs), teacher).backward()))


def fsdp() -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, teacher = samples()
    model = network()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    criterion(mesh.get_group())(model(inputs[rank::world]), teacher[rank::world]).backward()
    whole = criterion(None)
    return deviation(model, alone(lambda m: whole(m(inputs), teacher).backward()))
