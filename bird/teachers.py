"""Teacher: a frozen network that returns the features of named layers and stops after the last of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .features import Passes, Pools, find_layers, input_shapes, masks_of, own_mask, poolers_of, unwrap


class Teacher(nn.Module):
    """``teacher(x) -> {layer: rows [N, D]}``: frozen, always in eval mode, without a graph, stopped after its last tap.

    ::

        teacher = Teacher(resnet18, ["layer4"]).to("cuda")
        guides = teacher(images)       # {"layer4": [N, 512]}; what comes after layer4 does not run

    The model itself is changed: its parameters stop requiring gradients, and it is set to eval mode, which
    ``.train()`` on the teacher or on a parent does not undo. To go on training a model, give the teacher a
    `copy.deepcopy` of it.

    The network is not registered as a submodule: inside a parent module it adds no parameters, buffers or state.
    Optimizers, DDP, ``parent.apply(init)`` and ``parent.requires_grad_()`` do not see it, and the parent's
    ``state_dict`` is the same with and without it: checkpoints stay the size of the student, and the teacher
    is loaded from its own file, the same in every process of a distributed run. Only moves and casts apply to
    it: ``.to()``, ``.cuda()``, ``.half()``, on the teacher or on a parent. ``parent.to_empty()`` leaves its weights as
    they are, and a network that accelerate has placed (``device_map``, ``cpu_offload``) is not moved.

    DDP and `torch.compile` wrappers around the model are removed: there are no gradients to reduce, and a
    compiled graph cannot be stopped early. Compile the teacher instead, or the code that calls it; the compiler
    removes the layers after the last tap as dead code.

    Args:
        model: the network.
        taps: module paths or globs, see `bird.features.find_layers`. Of a layer that runs several times in
            one forward, the first output is used.
        pool: ``"mean"``, ``"flatten"``, ``"none"`` (unpooled), a layout or a callable, see `bird.features.pool_rows`,
            or ``{layer: pool}``.

    Attributes:
        names: the paths of the tapped layers in the unwrapped model, globs expanded.
        pool: the argument.
        rows: a `bird.features.Pooler` for each layer, which pools its output.
    """

    def __init__(self, model: nn.Module, taps: str | Sequence[str], *, pool: Pools = "mean") -> None:
        super().__init__()
        model = unwrap(model)
        layers = find_layers(model, taps)
        self.names = tuple(layers)
        self.pool = pool
        self.rows = poolers_of(model, layers, pool)
        self._passes = Passes()
        self._cargo = [model.requires_grad_(False).eval()]  # in a list nn.Module does not register it as a submodule
        for name, layer in layers.items():
            layer.register_forward_hook(functools.partial(self._record, name), with_kwargs=True)
        self.eval()

    @property
    def model(self) -> nn.Module:
        """The frozen network."""
        return self._cargo[0]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the model; return pooled features ``{name: [N, D]}`` in the order of `names`.

        They keep the dtype of the layer's output (bf16 under autocast) and never require gradients. Means over tokens
        leave out the padding of masks that are given by keyword, as ``attention_mask``, see `bird.features.masks_of`.

        Raises:
            RuntimeError: the model's forward ended without running one of the layers.
        """
        if self.model.training:  # other code may hold the model and have called train()
            self.model.eval()
        features = self._passes.now.features = {}
        self._passes.now.inputs, self._passes.now.running = input_shapes(args, kwargs), True
        self._passes.now.masks = masks_of(self.model, self.names, kwargs)
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        except _AllSeen:
            pass
        finally:
            self._passes.now.features, self._passes.now.masks, self._passes.now.running = {}, {}, False
        if missing := [name for name in self.names if name not in features]:
            raise RuntimeError(f"the teacher's forward did not run {missing}: tap layers that its input reaches")
        return {name: features[name] for name in self.names}

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows."""
        return f"{type(self.model).__name__}, taps={list(self.names)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        # nn.Module implements .to(), .cuda(), .half() and the like by _apply, on this module or on a parent. A network
        # that accelerate has placed is left alone: its hooks move the weights.
        if not any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            self.model._apply(functools.partial(_moved, fn), recurse)
        return super()._apply(fn, recurse)

    def _record(self, name: str, layer: nn.Module, _args: Any, call: Any, output: Any) -> None:
        features = self._passes.now.features
        if not self._passes.now.running or name in features:
            return
        mask = self._passes.now.masks.get(name, own_mask(layer, call))
        features[name] = self.rows[name](output, self._passes.now.inputs, mask)
        if len(features) == len(self.names) and not torch.compiler.is_compiling():
            raise _AllSeen


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn(tensor)`` with the values of ``tensor``, which ``parent.to_empty()`` would lose."""
    moved = fn(tensor)
    if tensor.is_meta and not moved.is_meta:
        raise RuntimeError("the teacher has no weights yet (meta tensors): load them before a parent is made real")
    of_its_own_kind = type(tensor) not in (Tensor, nn.Parameter)  # quantized weights implement their own moves
    return moved if moved is tensor or moved.is_meta or of_its_own_kind else moved.copy_(tensor)


class _AllSeen(BaseException):
    """Ends the model's forward once every tap has fired; a BaseException, lest the model's code catch it."""
