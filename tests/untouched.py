"""That a call leaves its inputs as they are: their numbers, the memory around them, autograd's count of writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def untouched(*tensors: Tensor) -> Iterator[None]:
    """Around a call: the whole storage of each tensor stays the same, bit by bit, and so does its version.

    Raises:
        AssertionError: something was written to one of them.
    """
    before = [(_bytes(tensor).clone(), tensor._version) for tensor in tensors]
    yield
    for index, (tensor, (stored, version)) in enumerate(zip(tensors, before, strict=True)):
        named = f"tensor {index}, {list(tensor.shape)} {tensor.dtype}"
        assert _bytes(tensor).equal(stored), f"{named}: its numbers have changed"
        assert tensor._version == version, f"{named}: written to {tensor._version - version} times"


def _bytes(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),))
