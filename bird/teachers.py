"""Teacher: a frozen network that gives the features of a few layers and runs no further than it must."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .features import Passes, Pools, find_layers, rows_of, shapes_of, unwrap


class Teacher(nn.Module):
    """``teacher(x) -> {layer: rows [N, D]}``: frozen, always in eval mode, no graph, cut after its last tap.

    ::

        teacher = Teacher(resnet18, ["layer4"]).to("cuda")
        guides = teacher(images)       # {"layer4": [N, 512]}; what comes after layer4 does not run

    The teacher takes the model over: its parameters stop requiring gradients, and it goes to eval mode, which
    no ``.train()``, here or on a parent, undoes. To go on training a model, give the teacher a
    `copy.deepcopy` of it.

    Inside a parent module the teacher is cargo, not a part: it shows no parameters, buffers or state.
    Optimizers, DDP, ``parent.apply(init)`` and ``parent.requires_grad_()`` pass it by, and the parent's
    ``state_dict`` is the same with and without it: checkpoints stay the size of the student, and the teacher
    comes from its own file, the same in every process of a distributed run. Only what moves or casts reaches
    it: ``.to()``, ``.cuda()``, ``.half()``, on the teacher or on a parent. ``parent.to_empty()`` leaves its weights as
    they are, and a network that accelerate has placed (``device_map``, ``cpu_offload``) stays where it is.

    DDP and `torch.compile` wrappers around the model are taken off: there are no gradients to reduce, and a
    compiled graph cannot be cut. Compile the teacher instead, or what calls it; a compiler leaves out the
    layers after the last tap as dead code.

    Args:
        model: the network.
        taps: module paths or globs, see `bird.features.find_layers`. Of a layer that runs several times in
            one forward, the first output counts.
        pool: ``"mean"``, ``"flatten"``, ``"none"`` (unpooled), a layout or a callable, see `bird.features.pool_rows`,
            or ``{layer: pool}``.

    Attributes:
        names: the bare paths of the tapped layers, globs written out.
        pool: as given.
        rows: how each layer's output becomes rows, `bird.features.Rows`.
    """

    def __init__(self, model: nn.Module, taps: str | Sequence[str], *, pool: Pools = "mean") -> None:
        super().__init__()
        model = unwrap(model)
        layers = find_layers(model, taps)
        self.names = tuple(layers)
        self.pool = pool
        self.rows = rows_of(model, layers, pool)
        self._passes = Passes()
        self._cargo = [model.requires_grad_(False).eval()]  # nn.Module does not look into a list
        for name, layer in layers.items():
            layer.register_forward_hook(functools.partial(self._record, name))
        self.eval()

    @property
    def model(self) -> nn.Module:
        """The frozen network."""
        return self._cargo[0]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Pooled features ``{name: [N, D]}``, in the order of `names`, for the model's own inputs.

        They keep the dtype they come out with (bf16 under autocast) and never require gradients.

        Raises:
            RuntimeError: the model's forward ended without running one of the layers.
        """
        if self.model.training:  # whoever made the model may hold it too
            self.model.eval()
        features = self._passes.now.features = {}
        self._passes.now.inputs, self._passes.now.running = shapes_of(args, kwargs), True
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        except _AllSeen:
            pass
        finally:
            self._passes.now.features, self._passes.now.running = {}, False
        missing = [name for name in self.names if name not in features]
        if missing:
            raise RuntimeError(f"the teacher's forward did not run {missing}: tap layers that its input reaches")
        return {name: features[name] for name in self.names}

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{type(self.model).__name__}, taps={list(self.names)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        # The one way that .to(), .cuda(), .half() and the like take, from here and from a parent. What accelerate has
        # placed on several devices, or off them, has hooks that move it.
        if not any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            self.model._apply(functools.partial(_moved, fn), recurse)
        return super()._apply(fn, recurse)

    def _record(self, name: str, _layer: nn.Module, _args: Any, output: Any) -> None:
        features = self._passes.now.features
        if not self._passes.now.running or name in features:
            return
        features[name] = self.rows[name](output, self._passes.now.inputs)
        if len(features) == len(self.names) and not torch.compiler.is_compiling():
            raise _AllSeen


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """A weight where, and as what, ``fn`` puts it; its values stay, though ``parent.to_empty()`` would lose them."""
    moved = fn(tensor)
    if tensor.is_meta and not moved.is_meta:
        raise RuntimeError("the teacher has no weights yet (meta tensors): load them before a parent is made real")
    of_its_own_kind = type(tensor) not in (Tensor, nn.Parameter)  # quantized weights, which know how to move
    return moved if moved is tensor or moved.is_meta or of_its_own_kind else moved.copy_(tensor)


class _AllSeen(BaseException):
    """Leaves the model's forward once every tap has fired; no Exception, lest the model's code catch it."""
