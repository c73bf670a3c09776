"""A device that has no fp64, as Apple's GPUs and some of Intel's: its tensors hold CPU tensors that do the work.

Autograd, the dispatcher and `Tensor.device` take them for tensors of that device; an operation that would make an fp64
tensor there raises `NoDoubleError`, one that mixes devices `MixedDevicesError`, as the real ones do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

WIDE = (torch.float64, torch.complex128)


class NoDoubleError(TypeError):
    """The device was asked for fp64."""


class MixedDevicesError(RuntimeError):
    """One operation got tensors of the device and of the CPU."""


class OnDevice(Tensor):
    """A tensor of the pretended device; ``held`` is its CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> OnDevice:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device,
        )  # fmt: skip

    def __init__(self, held: Tensor, device: torch.device) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:  # type: ignore[override]
        """Autograd has none for subclasses; it copies to the host, as any device's does."""
        return torch.ops.aten._to_copy(self, device=torch.device("cpu")).tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} of a pretended device outside of its mode")


class WithoutDoubles(TorchDispatchMode):
    """Runs what happens on ``device``, and what creates tensors there, on the CPU; and refuses fp64 there.

    Our operators run as the dispatcher finds them for a device of its ``key``. (The device calls itself "lazy": of the
    kinds that are neither CPU nor CUDA that is the one for which PyTorch's builds for the CPU have a backward.)
    """

    device = torch.device("lazy", 0)

    def __init__(self, key: str = "PrivateUse1") -> None:
        super().__init__()
        self.key = key
        self.reads = 0  # how often the host waited for a number

    def put(self, tensor: Tensor) -> Tensor:
        """A CPU tensor's numbers on the device."""
        self._require_narrow(tensor, "put")
        return OnDevice(tensor.detach(), self.device)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == self.device.type:
            kwargs = kwargs | {"device": torch.device("cpu")}
        elif not ours:
            return function(*args, **kwargs)
        name = str(function)
        if name.startswith("bird."):
            with self:
                return function.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, self.key)), *args)
        to_host = wanted is not None and torch.device(wanted).type == "cpu"
        self.reads += "_local_scalar_dense" in name or (to_host and bool(ours))
        copies = "_to_copy" in name or ".copy_." in name
        if ours and not copies:
            for leaf in leaves:
                if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.dim() > 0:
                    raise MixedDevicesError(f"{name} of {self.device} and {leaf.device}")
        out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        if to_host:
            return out
        known = {id(leaf.held): leaf for leaf in ours}  # what was written in place stays the tensor that it was

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            self._require_narrow(value, name)
            return known.get(id(value)) if id(value) in known else OnDevice(value, self.device)

        return tree_map(wrapped, out)

    def _require_narrow(self, tensor: Tensor, name: str) -> None:
        if tensor.dtype in WIDE:
            raise NoDoubleError(f"{name} makes {tensor.dtype} on {self.device}, which has none")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value
