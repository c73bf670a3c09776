"""Collectives between the ranks of a process group, and the check before them that all ranks make the same call.

A collective that only some ranks enter, or that they enter with different shapes, never returns or returns garbage. So
ranks first make sure of each other, in one of two ways.

*Agreement* (`agree`): every rank sends a header of a few numbers, whether it has failed already and a hash of what it
is about to do. If a rank has failed, or if the hashes differ, every rank raises. The header always has the same size,
so a rank that fails earlier (`Reported`) can send its own and match the header that the others are waiting for.

*A ride* (`take`): a call that the ranks have agreed on before is not agreed on again. Its numbers ride in slots, one of
each rank for each pair, at the front of its first collective. It is safe for four reasons:

1. A rank's history (what was agreed on, and which call came after which) is written only from what all ranks received
   alike, so it is the same on each. All expect the same call next, and with it the same first collective, or none.
2. A rank that makes another call than the expected one, or has failed, enters the expected collective nevertheless,
   with zeros. A slot of zero (numbers and zeros add up exactly) shows this to all ranks before anything else is sent,
   and together they go on to the agreement, which knows what differs or failed.
3. What a call sends depends on the numbers of all ranks (`transport`), which the slots bring. If they lead to something
   else than was agreed on, all ranks see it, and agree anew. So no result depends on the calls before it.
4. A slot holds 18 bits of a hash of the expected call and of a count of rides. If histories differ in spite of 1, say
   since a member was replaced in a group that lived on, all ranks forget theirs and agree. (If sizes differ as well,
   the backend ends in its error or timeout.)

A history belongs to a `ProcessGroup` object, and ends with it. The host reads the slots: on a GPU it waits for the
device once in each call, until the first collective is done. If it raised in the next call instead, a rank that failed
would leave the others alone in the collectives of the backward, which would hang. A rank that never calls is left to
the group: its timeout or its broken connection is an error on the others.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

NUMBERS = 4  # as many of a rank fit into its header; more take an all-gather of their own
BITS, TAGS = 35, (1 << 18) - 1  # of a number, at most; of a slot 53 bits are exact in fp64
CALLS = 64  # a longer history is forgotten
# PyTorch renamed it, and warns of the old name, which is the only one of 2.10.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
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


class Ride(NamedTuple):
    """The first collective of a call that the ranks of a group have agreed on.

    Each rank sends ``slots`` numbers and ``size`` more: fp64 numbers to be summed, or bytes if they are ``gathered``.
    ``call`` is what the caller keeps with it.
    """

    key: bytes
    slots: int
    size: int
    gathered: bool
    device: torch.device
    call: Any


class _History:
    """What the ranks of a group have agreed on, equal on each: the rides by call, and which call came ``after`` one."""

    def __init__(self) -> None:
        self.last, self.count = b"", 0
        self.after: dict[bytes, bytes] = {}
        self.rides: dict[bytes, Ride] = {}


_HISTORIES: WeakKeyDictionary[dist.ProcessGroup, _History] = WeakKeyDictionary()


def _history(group: dist.ProcessGroup) -> _History:
    return _HISTORIES.setdefault(group, _History())


def expected(group: dist.ProcessGroup) -> Ride | None:
    """The call that follows the last one: what followed it before, or the same again; None if it must be agreed on."""
    history = _history(group)
    return history.rides.get(history.after.get(history.last, history.last))


def expect(group: dist.ProcessGroup, slots: int, size: int, gathered: bool, device: torch.device, call: Any) -> Ride:
    """Remember the `Ride` of the call that the ranks have just agreed on."""
    history = _history(group)
    ride = history.rides[history.last] = Ride(history.last, slots, size, gathered, device, call)
    return ride


def blank(ride: Ride, group: dist.ProcessGroup, zero: bool = False) -> tuple[Tensor, Tensor]:
    """What a rank sends in a ride, and the part behind the slots: zeros, or, of rows, memory that is to be written."""
    front = 8 * ride.slots if ride.gathered else group.size() * ride.slots
    make = torch.empty if ride.gathered and not zero else torch.zeros
    dtype = torch.uint8 if ride.gathered else torch.float64
    sent = make(front + ride.size, dtype=dtype, device=ride.device)
    return sent, sent[front:]


def take(
    group: dist.ProcessGroup, ride: Ride, numbers: Sequence[int], sent: Tensor | None
) -> tuple[list[list[int]], Tensor]:
    """The ``numbers`` (one for each slot, of `BITS` bits) of every rank, and what lies behind the slots: the sums
    [size], or the bytes [ranks, size]. ``sent`` is a filled `blank`; None on a rank that makes another call.

    The list is empty if any rank makes another call.
    """
    history, world = _history(group), group.size()
    history.count += 1
    tag = (int.from_bytes(ride.key, "big") + history.count) % TAGS + 1
    with torch._C._DisableFuncTorch():
        buffer = blank(ride, group, zero=True)[0] if sent is None else sent
        front = buffer[: len(buffer) - ride.size]
        own = front.view(torch.int64) if ride.gathered else front.view(world, -1)[group.rank()]
        for i, number in enumerate(numbers if sent is not None else ()):
            own[i].fill_(tag << BITS | number)  # a launch on a GPU, where a copied list would wait for the device
        if ride.gathered:
            data = all_gather(buffer, group)
            slots = data[:, : len(front)].contiguous().view(torch.int64).tolist()
            data = data[:, len(front) :]
        else:
            slots, data = all_reduce(buffer, group)[: len(front)].view(world, -1).tolist(), buffer[len(front) :]
    tags = {slot // (1 << BITS) for numbers in slots for slot in numbers}
    if tags - {0, tag}:
        _HISTORIES.pop(group)
    if tags != {tag}:
        return [], data
    history.last = ride.key
    return [[int(slot) % (1 << BITS) for slot in numbers] for numbers in slots], data


def agree(
    group: dist.ProcessGroup,
    error: Exception | None,
    terms: Mapping[str, object],
    numbers: Sequence[int],
    declined: bool = False,
) -> list[list[int]]:
    """The ``numbers`` of every rank, if no rank passes an ``error`` and all pass equal ``terms``.

    Of terms a 64-bit hash of their ``repr`` is compared. The headers are one all-gather of six 64-bit integers per
    rank, over the CPU if the group has a backend for it (gloo); with NCCL alone it waits for the GPU. Before them goes
    the ride that the other ranks may be in, unless this call has ``declined`` it.

    Raises:
        Exception: ``error``, on the rank that passed it.
        RuntimeError: on the other ranks, with that rank's number and message. Also inside a torch.func transform or the
            capture of a CUDA graph.
        ValueError: on every rank, if terms differ; with the ranks and their values.
    """
    refusal = refused()
    error = error or refusal
    if not declined and (ride := expected(group)) is not None:
        take(group, ride, (), None)
    with torch._C._DisableFuncTorch():  # what ranks send is no part of a transform, which would wrap it
        shown = {name: repr(value) for name, value in terms.items()}
        key = hashlib.blake2b(repr(shown).encode(), digest_size=8).digest()
        mine = [int(error is not None), int.from_bytes(key, "big", signed=True), *numbers, *[0] * NUMBERS]
        headers = _of_all(mine[: 2 + NUMBERS], group)
        failed, differ = any(header[0] for header in headers), len({header[1] for header in headers}) > 1
        if failed or differ:
            _HISTORIES.pop(group, None)
            _raise_failure(group, error) if failed else _raise_difference(group, shown)
        many = len(numbers) > NUMBERS
        found = _of_all(numbers, group) if many else [header[2 : 2 + len(numbers)] for header in headers]
    if len(_history(group).after) >= CALLS:
        _HISTORIES.pop(group)
    history = _history(group)
    history.after[history.last] = key
    history.last = key
    return found


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


def all_gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ``own`` [size] of all ranks, [ranks, size]."""
    everyone = own.new_empty(group.size() * len(own))
    getattr(dist, GATHER)(everyone, own, group=group)
    return everyone.view(group.size(), -1)


def _of_all(numbers: Sequence[int], group: dist.ProcessGroup) -> list[list[int]]:
    found: list[list[int]] = all_gather(torch.tensor(numbers, device=devices(group)[0]), group).tolist()
    return found


def refused() -> RuntimeError | None:
    """An error for the other ranks to hear of, where gradients are asked for that merged sums do not have.

    Raises:
        RuntimeError: in the capture of a CUDA graph, where nothing can be sent that the host could read.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "group= does not work in the capture of a CUDA graph, the ranks agree on the host: leave it out"
        )
    if torch._C._are_functorch_transforms_active():
        return RuntimeError("group= does not work inside torch.func transforms: use autograd")
    if forward_ad._current_level >= 0:
        return RuntimeError("group= has no forward-mode derivative: use reverse mode")
    return None


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
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        ranks: dict[str, list[str]] = {}
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(theirs.get(name, "missing"), []).append(str(rank))
        if len(ranks) > 1:
            parts.append(f"{name} is " + ", ".join(f"{value} on rank {' '.join(r)}" for value, r in ranks.items()))
    raise ValueError(f"the ranks of the group must agree: {'; '.join(parts)}")
