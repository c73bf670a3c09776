"""Several processes in one process group over gloo, for the tests that need them."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

# Ranks are forked from a server that has imported these: a rank that imports them itself takes seconds to start.
multiprocessing.set_forkserver_preload(["tests.kernels.rank_training", "torch._dynamo", "torch.distributed.fsdp"])


def start(work: Callable[..., None], arguments: tuple[object, ...], world: int) -> None:
    """Call ``work(rank, *arguments)`` in so many processes; an error of any of them is raised here."""
    start_processes(work, arguments, nprocs=world, start_method="forkserver")


def run_ranks(work: Callable[..., None], world: int, folder: Path, *arguments: object) -> None:
    """Call ``work(rank, *arguments)`` in so many processes of one group."""
    start(_rank, (work, world, folder, arguments), world)


def _rank(rank: int, work: Callable[..., None], world: int, folder: Path, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    work(rank, *arguments)
    # Destroyed once nothing holds on to it: only the last reference ends gloo's threads, and DDP has one, in a cycle.
    # A thread that outlives the interpreter may free a tensor, which aborts the process (pytorch/pytorch#190489):
    # 10 of 40 runs that destroyed the group before they let go of their DDP model, 0 of 40 in this order.
    gc.collect()
    dist.destroy_process_group()
