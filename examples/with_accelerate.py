"""The same as distributed.py with Hugging Face's Accelerate, which wraps the model and splits the batches.

    accelerate launch --multi_gpu --num_processes 2 examples/with_accelerate.py

``--multi_gpu`` starts the processes, which meet over gloo where there is no GPU; with ``--cpu`` Accelerate (1.15)
starts a single one unless MPI is installed.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bird

BATCH, STEPS = 64, 20


def train(accelerator: Accelerator) -> None:
    """Train a small student; the first process prints the CKA."""
    torch.manual_seed(0)  # the same networks and the same data everywhere
    teacher = nn.Sequential(nn.Linear(10, 48), nn.Tanh()).to(accelerator.device).eval()
    student = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 16))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    batches = DataLoader(TensorDataset(torch.randn(STEPS * BATCH, 10)), BATCH // accelerator.num_processes)
    student, optimizer, batches = accelerator.prepare(student, optimizer, batches)

    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    criterion = bird.BirdLoss(0.1, 0.9, [("teacher", "student")], group=group)
    for step, (inputs,) in enumerate(batches):
        features = student(inputs)
        with torch.no_grad():
            target = teacher(inputs)
        task = features.square().mean()
        loss = criterion(task, {"teacher": target}, {"student": features})
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step in (0, STEPS - 1):
            cka = criterion.last["cka/teacher/student"].item()
            accelerator.print(f"step {step}: CKA {cka:.6f} of {BATCH} rows on {accelerator.num_processes} processes")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    train(accelerator)
    accelerator.free_memory()  # what it prepared keeps the group: see distributed.py
    accelerator.end_training()
