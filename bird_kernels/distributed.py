"""Collectives between the ranks of a process group, and the check before them that all ranks make the same call.

A collective that only some ranks enter, or that they enter with different shapes, never returns or returns garbage. So
every rank first sends a header of a few numbers (`agree`): whether it has failed already, and a hash of what it is
about to do. If a rank has failed, or if the hashes differ, every rank raises. The header always has the same size, so
a rank that fails earlier (`Reported`) can send its own and match the header that the others are waiting for. A rank
that never calls is left to the group: its timeout or its broken connection is an error on the others.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

NUMBERS = 4  # the most that a rank can add to its header
Result = TypeVar("Result")


def uncompiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """``function`` as torch.compile must call it: uncompiled, behind a graph break. torch.compiler.disable does the
    same, but imports Dynamo (1.5 s) as soon as a function is decorated."""

    disabled: list[Callable[..., Result]] = []

    def run(*args: Any, **options: Any) -> Result:
        if not disabled and "torch._dynamo" in sys.modules:
            disabled.append(torch.compiler.disable(function))
        return (disabled[0] if disabled else function)(*args, **options)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = "the ranks of a group agree on the host"  # type: ignore[attr-defined]
    return run


def world_size(group: object) -> int:
    """How many ranks ``group`` has.

    Raises:
        TypeError: ``group`` is no process group, or one that this rank does not belong to.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup that this rank belongs to (torch.distributed.group.WORLD after "
            f"init_process_group(), or what new_group() and DeviceMesh.get_group() return) or None, got {group!r}"
        )
    return group.size()


def group_named(name: str) -> dist.ProcessGroup:
    """This process's group with this ``group_name``.

    Raises:
        RuntimeError: there is none.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, KeyError, ValueError) as error:
        raise RuntimeError(
            f"this was pickled with the process group {name!r}, which this process does not have: call "
            "init_process_group() (and new_group()) before loading it, or pickle it without group="
        ) from error


def devices(group: dist.ProcessGroup) -> list[str]:
    """The device types that the group has a backend for, the CPU first: ["cpu", "cuda"] of "cpu:gloo,cuda:nccl"."""
    named = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return sorted(named, key=lambda kind: kind != "cpu")


def require_device(device: torch.device, group: dist.ProcessGroup) -> None:
    """Raise a ValueError unless the group has a backend for tensors on this device."""
    carried = devices(group)
    if device.type not in carried:
        raise ValueError(
            f"the group's backend ({dist.get_backend_config(group)}) carries tensors on {' and '.join(carried)}, "
            f"the features are on {device.type}"
        )


def agree(
    group: dist.ProcessGroup, error: Exception | None, terms: Mapping[str, object], numbers: Sequence[int]
) -> list[list[int]]:
    """The ``numbers`` (up to `NUMBERS`) of every rank, if no rank passes an ``error`` and all pass equal ``terms``.

    Of terms a 64-bit hash of their ``repr`` is compared. The headers are one all-gather of six 64-bit integers per
    rank, over the CPU if the group has a backend for it (gloo); with NCCL alone it waits for the GPU.

    Raises:
        Exception: ``error``, on the rank that passed it.
        RuntimeError: on the other ranks, with that rank's number and message. Also inside a torch.func transform or the
            capture of a CUDA graph.
        ValueError: on every rank, if terms differ; with the ranks and their values.
    """
    _require_no_capture()
    error = error or _refused()
    with torch._C._DisableFuncTorch():  # what ranks send is no part of a transform, which would wrap it
        shown = {name: repr(value) for name, value in terms.items()}
        digest = hashlib.blake2b(repr(shown).encode(), digest_size=8).digest()
        unused = [0] * (NUMBERS - len(numbers))
        mine = [int(error is not None), int.from_bytes(digest, "big", signed=True), *numbers, *unused]
        header = torch.tensor(mine, dtype=torch.int64, device=devices(group)[0])
        everyone = header.new_empty(group.size() * len(mine))
        dist.all_gather_into_tensor(everyone, header, group=group)
        headers = everyone.view(-1, len(mine)).tolist()
        if any(failed for failed, *_ in headers):
            _raise_failure(group, error)
        if len({header[1] for header in headers}) > 1:
            _raise_difference(group, shown)
    return [header[2 : 2 + len(numbers)] for header in headers]


class Reported:
    """A context for a rank's own checks: an exception inside makes the other ranks raise in their next `agree`.

    Without an exception nothing is sent, nor for a ``group`` of one rank or None. Collectives must not run inside.
    (It is a class, and not a generator, so that torch.compile can trace through it where there is no group.)
    """

    def __init__(self, group: object) -> None:
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, Exception):
            report(self.group, error)


def report(group: object, error: Exception) -> None:
    """Send ``error`` to the other ranks, as `Reported` does; for an ``except``, where a ``with`` would cost time."""
    if group is not None:
        _report(group, error)


@uncompiled
def _report(group: Any, error: Exception) -> None:
    if world_size(group) > 1:
        agree(group, error, {}, ())


def all_reduce(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' ``values``, equal to the bit on each rank; written into ``values``."""
    dist.all_reduce(values, group=group)
    return values


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows [n_r, d] of all ranks in the order of ranks, [sum(counts), d]; ``counts`` are the n_r of all ranks."""
    longest = max(counts)
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
    everyone = rows.new_empty(len(counts) * longest, rows.shape[1])
    dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
    if min(counts) == longest:
        return everyone
    return torch.cat([part[:count] for part, count in zip(everyone.split(longest), counts, strict=True)])


def _refused() -> RuntimeError | None:
    """An error for the other ranks to hear of, where gradients are asked for that merged sums do not have."""
    if torch._C._are_functorch_transforms_active():
        return RuntimeError("group= does not work inside torch.func transforms: use autograd")
    if forward_ad._current_level >= 0:
        return RuntimeError("group= has no forward-mode derivative: use reverse mode")
    return None


def _require_no_capture() -> None:
    """Raise a RuntimeError in the capture of a CUDA graph: the host could not read what ranks send."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "group= does not work in the capture of a CUDA graph, the ranks agree on the host: leave it out"
        )


def _raise_failure(group: dist.ProcessGroup, error: Exception | None) -> None:
    messages: list[str] = [""] * group.size()
    mine = "" if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(messages, mine, group=group)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message]
    raise RuntimeError(f"no rank of the group went on, because this failed. {'; '.join(failed)}")


def _raise_difference(group: dist.ProcessGroup, shown: dict[str, str]) -> None:
    everyone: list[dict[str, str]] = [{}] * group.size()
    dist.all_gather_object(everyone, shown, group=group)
    parts = []
    for name in shown:
        ranks: dict[str, list[str]] = {}
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(theirs.get(name, "missing"), []).append(str(rank))
        if len(ranks) > 1:
            parts.append(f"{name} is " + ", ".join(f"{value} on rank {' '.join(r)}" for value, r in ranks.items()))
    raise ValueError(f"the ranks of the group must agree: {'; '.join(parts)}")
