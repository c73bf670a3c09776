"""Taps: forward hooks that record the features of named layers in one forward pass of a network in training."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .features import Passes, Pools, find_layers, first_tensor, input_shapes, own_mask, poolers_of, unwrap


class Measured(dict[str, Tensor]):
    """The features that `Taps.pop` returns with ``gradients=True``.

    Attributes:
        norms: [2], the norms of two gradients at the outputs of all tapped layers together: of what the layers' outputs
            are for in the network itself (the task, and at a layer before another tapped one also the guidance of that
            one, which comes back through the network), and of what their own features are for (the guidance). The
            backward pass fills it in. None: no layer's output requires a gradient.
    """

    norms: Tensor | None = None


class Taps:
    """Records the features of named layers, pooled to rows ``[N, D]``, while the model runs.

    ::

        with Taps(model, ["layer3", "layer4"]) as taps:
            logits = model(images)
            features = taps.pop()      # {"layer3": [N, 256], "layer4": [N, 512]}

    Features belong to the graph of the forward pass, keep the dtype of the layer's output (bf16 under autocast), and
    are those of one forward only: `pop` clears them, and so does the next call of the model. Each thread has its own.
    Of a layer that returns a tuple, list, mapping or dataclass the first tensor is recorded.

    Args:
        model: the network, bare or in DDP, `torch.compile` or one-device DataParallel.
        names: module paths or globs, see `bird.features.find_layers`.
        pool: ``"mean"``, ``"flatten"``, ``"none"`` (unpooled), a layout or a callable, see `bird.features.pool_rows`,
            or ``{layer: pool}``. A mean raises if the layout is ambiguous or there is not one row per sample.
        gradients: measure in the backward pass how large the gradients of the task and of the features are at the
            layers' outputs: `pop` returns a `Measured`. Not in compiled models. (With a `torch.amp.GradScaler` both are
            multiplied by its scale.)

    Compiled models: create the taps before the first call, else `pop` raises and says what to do. Once
    `torch.compile` has compiled a model, it does not look for new hooks on inner layers.

    Checkpointing: ``use_reentrant=False`` works; the recomputation in the backward pass records nothing. Remove the
    taps only after backward, because the recomputation must save the same tensors as the first run.
    Reentrant checkpointing runs layers without a graph, so it raises, as does `torch.no_grad` around a tapped
    layer in a forward pass that otherwise builds a graph.

    Attributes:
        names: the paths of the tapped layers in the unwrapped model, globs expanded.
        masks: ``{layer: [N, T]}``, to be set before a forward: tokens with 0 are left out of means of ``[N, T, D]``.
            The others leave out what the call of the layer itself has as ``src_key_padding_mask``.
    """

    def __init__(
        self, model: nn.Module, names: str | Sequence[str], *, pool: Pools = "mean", gradients: bool = False
    ) -> None:
        layers = find_layers(model, names)
        self.gradients = gradients
        self.names = tuple(layers)
        self.masks: dict[str, Tensor] = {}
        self._rows = poolers_of(model, layers, pool)
        self._passes, self._called = Passes(), False
        root = unwrap(model)
        self._handles = [root.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._handles.append(root.register_forward_hook(self._end))
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_hook(functools.partial(self._record, name), with_kwargs=True))

    def pop(self) -> dict[str, Tensor]:
        """Return the features of the last forward, ``{name: [N, D]}`` in the order of `names`, and clear them.

        Raises:
            RuntimeError: a tapped layer has not run since the last `pop`, or the taps were removed.
        """
        features, self._passes.now.features, self._passes.now.builds_graph = self._passes.now.features, {}, False
        norms, self._passes.now.norms = self._passes.now.norms, None
        if missing := [name for name in self.names if name not in features]:
            raise RuntimeError(
                f"no features from {missing}: these layers have not run since the last pop(). Call the model "
                "once before each pop(), with the taps in place. A model that was compiled and called before "
                "the taps were made does not see them: call torch.compiler.reset() first"
            )
        popped = {name: features[name] for name in self.names}
        if self.gradients:
            popped = Measured(popped)
            popped.norms = norms
        return popped

    def remove(self) -> None:
        """Remove the hooks from the model and clear what they recorded; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes = Passes()

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, _model: nn.Module, args: Any, kwargs: Any) -> None:
        """Start a forward: features are cleared, so that a skipped branch does not leave those of the last one."""
        if torch.compiler.is_compiling() or not _in_backward():
            self._passes.now.features, self._passes.now.norms = {}, None
            self._passes.now.inputs = input_shapes(args, kwargs)
            self._passes.now.builds_graph = torch.is_grad_enabled()
            self._passes.now.running = self._called = True

    def _end(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self._passes.now.running, self._passes.now.inputs = False, []

    def _record(self, name: str, layer: nn.Module, _args: Any, call: Any, output: Any) -> None:
        # Pooled at once, before a later in-place layer can overwrite the output; and in a recomputation too,
        # which must save the same tensors for backward as the first run did.
        whole = output
        if self.gradients:
            if torch.compiler.is_compiling():
                raise RuntimeError(_NOT_COMPILED)
            whole = first_tensor(output)
            if whole.is_nested:
                raise ValueError(f"gradients=True: layer {name!r} returns sequences of many lengths, not one tensor")
            output = whole.view_as(whole)  # a node of its own, through which the gradient of the features comes alone
        rows = self._rows[name](output, self._passes.now.inputs, self.masks.get(name, own_mask(layer, call)))
        if torch.compiler.is_compiling():
            # Traced code cannot call `_in_backward`. Checkpoints inside the graph are handled by the compiler; a
            # compiled block inside a checkpoint is recomputed outside of any forward, on a GPU in one of autograd's
            # threads.
            if self._called and not self._passes.now.running:
                return
        elif _in_backward():
            if _called_from(CheckpointFunction.backward.__code__):  # the whole model was checkpointed
                raise RuntimeError(_NO_GRAPH.format(name))
            return
        if self._passes.now.builds_graph and not torch.is_grad_enabled():
            raise RuntimeError(_NO_GRAPH.format(name))
        if getattr(layer, "_is_replica", False):
            raise RuntimeError(
                f"DataParallel runs layer {name!r} once per device, each on a part of the batch: "
                "use DistributedDataParallel, or one device"
            )
        if name in self._passes.now.features:
            raise RuntimeError(
                f"layer {name!r} ran twice since the last pop() or call of the model, so its features are "
                "ambiguous: tap the layer around it, or a later one"
            )
        self._passes.now.features[name] = rows
        if self.gradients and whole.requires_grad:
            self._measure(whole, output)

    def _measure(self, whole: Tensor, tapped: Tensor) -> None:
        """Add to the norms of this pass, once backward comes to the layer's output, ``whole``, of which ``tapped`` is
        what the features are made of."""
        if (norms := self._passes.now.norms) is None:
            wide = torch.promote_types(whole.dtype, torch.float32)
            norms = self._passes.now.norms = torch.zeros(2, dtype=wide, device=whole.device)
        features: list[Tensor] = []

        def add(gradient: Tensor) -> None:
            guide = features.pop() if features else torch.zeros_like(gradient)
            task = gradient.to(norms.dtype) - guide
            size = torch.linalg.vector_norm
            norms.copy_(norms.hypot(torch.stack([size(task), size(guide, dtype=norms.dtype)])))

        tapped.register_hook(features.append)
        whole.register_hook(add)


class FirstPass(Taps):
    """Taps for a step in which the model runs more than once, as DPO's trainer does: the first pass is recorded.

    `listen` begins a step. Later passes, and passes under `torch.no_grad` in a step with gradients, are ignored. It
    does not rely on hooks of the model itself, which PEFT bypasses by calling ``forward``. Arguments as of `Taps`.
    """

    def listen(self) -> None:
        """Clear the features and record the next forward, with a graph if gradients are enabled now."""
        self._passes.now.features, self._passes.now.norms = {}, None
        self._passes.now.builds_graph = torch.is_grad_enabled()

    def _begin(self, _model: nn.Module, _args: Any, _kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not _in_backward():
            self._passes.now.running = self._called = True

    def _record(self, name: str, layer: nn.Module, args: Any, call: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not _in_backward():
            passed = self._passes.now.builds_graph and not torch.is_grad_enabled()
            if passed and not torch.compiler.is_compiling() and _called_from(CheckpointFunction.forward.__code__):
                raise RuntimeError(_NO_GRAPH.format(name))
            if passed or name in self._passes.now.features:
                return
        super()._record(name, layer, args, call, output)


_NOT_COMPILED = (
    "gradients=True measures in hooks of the backward pass, which a compiled model does not call: tap it uncompiled"
)
_NO_GRAPH = (
    "layer {!r} ran without a graph in a training step, so its features would carry no gradient: use "
    "checkpoint(..., use_reentrant=False) if it is checkpointed, and no torch.no_grad() around it"
)


def _in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread, in which checkpointed layers are recomputed."""
    return torch._C._current_graph_task_id() != -1


def _called_from(code: CodeType) -> bool:
    """Whether a function with this code is on the call stack."""
    return any(frame.f_code is code for frame, _ in traceback.walk_stack(sys._getframe()))
