"""BIRD's loss over the batch of all processes, with DDP.

    torchrun --nproc-per-node 2 examples/distributed.py

Any number of processes trains the same student: each takes its share of a batch of 64, and the loss is that of the 64.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bird

BATCH, STEPS = 64, 20


def train(device: str) -> None:
    """Train a small student; the first process prints the CKA."""
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same networks and the same data everywhere
    teacher = nn.Sequential(nn.Linear(10, 48), nn.Tanh()).to(device).eval()
    student = DistributedDataParallel(nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 16)).to(device))
    criterion = bird.BirdLoss(0.1, 0.9, [("teacher", "student")], group=dist.group.WORLD)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for step in range(STEPS):
        inputs = torch.randn(BATCH, 10, device=device)[rank::world]
        features = student(inputs)
        with torch.no_grad():
            target = teacher(inputs)
        task = features.square().mean()
        loss = criterion(task, {"teacher": target}, {"student": features})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step in (0, STEPS - 1):
            cka = criterion.last["cka/teacher/student"].item()
            print(f"step {step}: CKA {cka:.6f} of {BATCH} rows on {world} processes")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group()  # gloo for the CPU, and NCCL beside it where there are GPUs
    train(device)
    gc.collect()  # DDP keeps the group in a cycle, and one that outlives the interpreter may abort the process
    dist.destroy_process_group()
