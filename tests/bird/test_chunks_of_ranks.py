"""Chunks in several processes: one batch of all ranks, by statistics and by gathered features, under DDP."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.bird.test_chunks import WEIGHTS, Setup, distance
from tests.groups import run_ranks


def _rank(rank: int) -> None:
    for kernel in ("linear", "rbf"):  # by statistics, by gathered features
        _compare(rank, kernel)


def _compare(rank: int, kernel: str) -> None:
    truth = Setup(kernel=kernel, weights=WEIGHTS)
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    # Each rank has the dropout of its own seed; both start from rank 0's buffers, by which DDP begins.
    tasks, ours, theirs = [], [], []
    start = copy.deepcopy(truth.model.state_dict())
    for other, part in ((0, slice(0, 3)), (1, slice(3, 4))):
        torch.manual_seed(other)
        for name, buffer in truth.model.named_buffers():
            buffer.data = start[name].clone()
        for chunk in truth.chunks[part]:
            task, rows = truth.student(chunk)
            tasks.append(task)
            ours.append(rows)
            theirs.append(truth.guides(chunk))
    rows = [{k: torch.cat([a[k] for a in side]) for k in side[0]} for side in (theirs, ours)]
    truth.loss(torch.stack(tasks).sum() / 2, *rows).backward()  # DDP averages the ranks' tasks

    setup = Setup(kernel=kernel, weights=WEIGHTS, group=distributed.group.WORLD)
    setup.chunks = setup.chunks[mine]
    if rank == 1:
        setup.model[1][1].state.fill_(5.0)
    setup.run = DistributedDataParallel(setup.model)
    with torch.no_grad():
        setup.run(setup.chunks[0][0])  # DDP has taken rank 0's buffers now, so undo
    if rank == 1:
        setup.model[1][1].state.fill_(5.0)
    else:
        setup.model.load_state_dict(start)
    setup.run.require_forward_param_sync = True  # as after a step
    messages: list[int] = []

    def average(state, bucket):  # DDP reads annotations, and would not know ours, which are strings
        messages.append(bucket.index())
        distributed.all_reduce(bucket.buffer().div_(2))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    setup.run.register_comm_hook(None, average)
    torch.manual_seed(rank)
    setup.chunked()
    assert distance(setup.gradients(), truth.gradients()) < 1e-10
    assert len(messages) == len(set(messages))
    for pair in setup.loss.pairs:
        name = "cka/{}/{}".format(*pair)
        assert abs(setup.loss.last[name] - truth.loss.last[name]) < 1e-12


def test_ranks_compare_all_their_samples(tmp_path: Path) -> None:
    run_ranks(_rank, 2, tmp_path)
