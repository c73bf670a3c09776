"""The same function in several processes side by side, none of which outlives the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch


def side_by_side(work: Callable[..., None], shares: Sequence[tuple[Any, ...]]) -> None:
    """Call ``work(*share)`` for each share in a process of its own, with this one's number of threads each.

    Args:
        work: a module's function; what it is given must be picklable.
        shares: its arguments in each process.

    Raises:
        ChildProcessError: one of the processes failed; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_child, args=(work, share, torch.get_num_threads()), daemon=True) for share in shares
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode != 0 for worker in workers):
        raise ChildProcessError("one of several processes failed, for the reason above; what is done stays")


def _child(work: Callable[..., None], share: tuple[Any, ...], threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # to death, at once: whoever goes on after a kill must have the files alone
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(threads)
    work(*share)
