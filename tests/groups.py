"""Several processes in one process group over gloo, for the tests that need them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn


def run_ranks(work: Callable[..., None], world: int, folder: Path, *arguments: object) -> None:
    """Call ``work(rank, *arguments)`` in so many processes of one group; an error of any of them is raised here."""
    spawn(_rank, (work, world, folder, arguments), nprocs=world)


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
