"""What judging and generating need of a network: its quiet mode, and whether its weights are another's."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and bytes of all that is in the state: any change of a weight changes it."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):  # modules may keep other things there too
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def shared(model: nn.Module, other: nn.Module) -> float:
    """The share of a network's matrices, by elements, that are matrices of another one too.

    Compared are values in bf16, whatever their names: the same weights in another precision, in a wrapper, or under
    another head are the same weights. Vectors, and matrices all of one value, do not count: independent networks
    start with the same ones.

    Raises:
        ValueError: one of them shows no matrices, as a `bird.teachers.Teacher` does not: pass the network in it.
    """
    ours, theirs = (
        [p.detach() for p in network.parameters() if p.ndim > 1 and p.numel()] for network in (model, other)
    )
    if not ours or not theirs:
        raise ValueError("a network shows no weights to compare: pass the network itself, not what holds it")
    shapes = {p.shape for p in ours} & {p.shape for p in theirs}  # nothing else needs to be hashed
    known = {_digest(p) for p in theirs if p.shape in shapes}
    same = sum(p.numel() for p in ours if p.shape in shapes and _varies(p) and _digest(p) in known)
    return same / sum(p.numel() for p in ours)


def _varies(matrix: Tensor) -> bool:
    return bool((matrix != matrix.flatten()[0]).any())


def _digest(matrix: Tensor) -> bytes:
    return hashlib.sha256(_bytes(matrix.bfloat16() if matrix.is_floating_point() else matrix)).digest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
