"""From layer names to modules, and from a layer's output to one row of features per sample.

`bird.Taps` and `bird.Teacher` share this. A layer is named by its path in the unwrapped model.
"""

from __future__ import annotations

import dataclasses
import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

Layout: TypeAlias = Literal["channels_first", "channels_last", "time_first"]
Pool: TypeAlias = Literal["mean", "flatten", "none"] | Layout | Callable[[Tensor], Tensor]
Pools: TypeAlias = Pool | Mapping[str, Pool]  # one for all layers, or by name; "mean" for those that are not named

# torch.compile and torch.distributed's activation-checkpoint wrapper are recognised by the name of their only child,
# so that torch._dynamo need not be imported.
_WRAPPED_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DDP, DataParallel and checkpoint wrappers, in any order."""
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        return unwrap(model.module)
    for name in _WRAPPED_CHILDREN:
        if inner := model._modules.get(name):
            return unwrap(inner)
    return model


def find_layers(model: nn.Module, names: str | Sequence[str]) -> dict[str, nn.Module]:
    """The named layers of a model, in the order asked for.

    Args:
        model: the model, wrapped or not (see `unwrap`). Paths leave out wrappers inside the model, too; of a wrapped
            layer the outermost wrapper is returned, since its output lies outside the compiled or checkpointed region.
        names: bare module paths (``"layer4"``, ``"features.3"``) or globs. In a glob ``*`` stops at a dot:
            ``"blocks.*"`` matches each block, ``"blocks.*.attn"`` the attention in each; neither matches submodules.

    Raises:
        ValueError: a model without layers, no names, a name that no layer has (the nearest are listed), or a glob
            without a match. Containers without a forward of their own (ModuleList, ModuleDict) do not count as layers.
        TypeError: a name is not a string.
    """
    patterns = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"layers go by their module paths, not by {patterns}: the outermost are {[*top_layers(model)]}")
    if not patterns:
        raise ValueError("no layer named: give at least one module path such as 'layer4' or 'blocks.*'")
    layers = _layers(model)
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = [pattern] if pattern in layers else [name for name in layers if _matches(name, pattern)]
        if not matches:
            raise ValueError(_unknown(pattern, list(layers)))
        found.update((name, layers[name]) for name in matches)
    return found


def top_layers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's outermost layers by name: its children, and in place of a ModuleList its items; as `find_layers`."""
    return _layers(model, deep=False)


def _layers(model: nn.Module, deep: bool = True) -> dict[str, nn.Module]:
    layers = dict(_walk(model, deep=deep))
    if not layers:  # `bird.Teacher` hides its network, so that no checkpoint holds it
        name = type(model).__name__
        raise ValueError(f"{name} has no layers inside; of a bird.Teacher give the network that it was made of")
    return layers


def first_tensor(output: Any) -> Tensor:
    """The first tensor, depth first, of a module's output.

    The output may be a tensor, tuple, list, mapping, dataclass or object with a ``last_hidden_state``, nested in any
    way: ``(hidden, weights)`` gives ``hidden``, a transformers output its first field that is not None. A
    PackedSequence, as recurrent networks return it, becomes a nested tensor.

    Raises:
        TypeError: the output contains no tensor.
    """
    for tensor in _tensors(output):
        return tensor
    raise TypeError(f"a tapped layer returned {type(output).__name__} without a tensor: tap one inside it")


def pool_rows(features: Tensor, pool: Pool = "mean") -> Tensor:
    """One row of features per sample, ``[N, D]``, in the dtype of ``features`` and differentiable.

    Args:
        features: floating point, samples first: ``[N, C, H, W]`` (or more spatial dimensions), ``[N, T, D]``
            (tokens) or ``[N, D]``; or a nested tensor with ``[t, D]`` per sample, which has no padding.
        pool: ``"mean"``: over space (``[N, C]``), over tokens (``[N, D]``), or unchanged where they are ``[N, D]``;
            accumulated in fp32 (fp64 for fp64), so that sums in fp16 cannot overflow. `Pooler` finds out from the
            layer which dimension is which; these state it, and are means, too: ``"channels_first"``,
            ``[N, C, ...]``; ``"channels_last"``, ``[N, ..., C]``; ``"time_first"``, ``[T, N, D]``.
            ``"flatten"``: ``[N, product of the other sizes]``.
            ``"none"``: the features unchanged, for losses over tokens: ``[N, T, D]``.
            A callable ``Tensor -> [N, D]`` for everything else, e.g. the first token (``lambda t: t[:, 0]``).

    Returns:
        A new tensor, never a view: a later in-place layer (``ReLU(inplace=True)``) cannot change it.

    Raises:
        ValueError: an unknown ``pool``, a shape it cannot pool, or (except for ``"none"``) a result that is not
            ``[N, D]`` with D > 1.
        TypeError: ``features`` are not floating point.
    """
    if not features.is_floating_point():
        raise TypeError(f"a tapped layer returned {features.dtype}: tap one with floating-point output")
    if features.is_nested:
        if pool == "mean":
            return torch.stack([sample.mean(0) for sample in features.unbind()])
        features = torch.nested.to_padded_tensor(features, 0.0)
    if pool == "none":
        return features.clone()
    if callable(pool):
        rows = pool(features).clone()
    elif pool == "flatten":
        rows = features.clone(memory_format=torch.contiguous_format).flatten(1)
    elif pool != "mean" and pool not in get_args(Layout):
        names = ", ".join(map(repr, get_args(Layout)))
        raise ValueError(
            f"pool must be 'mean', 'flatten', 'none' or a callable Tensor -> [N, D], or {names}: not {pool!r}"
        )
    elif features.ndim > 2:
        last = pool == "channels_last" or (pool == "mean" and features.ndim == 3)
        over = range(1, features.ndim - 1) if last else range(2, features.ndim)
        # PyTorch sums half precision in fp32 and rounds once.
        rows = features.mean(0 if pool == "time_first" else tuple(over))
    else:
        rows = features.clone()
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(
            f"pool={pool!r} made {list(rows.shape)} of features {list(features.shape)}, but [N, D] with D > 1"
            " is needed: tap another layer, or give as pool= a callable that returns [N, D]"
        )
    return rows


class Pooler:
    """Turns the outputs of one layer into rows; for ``"mean"`` the layout is inferred from the model.

    The layout is ``[T, N, D]`` in PyTorch's recurrent layers and transformers that are not ``batch_first``, and in
    their submodules; in a block around a `torch.nn.MultiheadAttention` of that kind where the model's inputs tell which
    size is the samples', else `pool` is asked for. Otherwise it is ``[N, C, ...]`` or ``[N, ..., C]``, depending on
    whose C is a size of the layer's weights, else of those of the enclosing modules; if both are, C of a convolution is
    first and C of a matrix last.
    """

    def __init__(self, model: nn.Module, name: str, layer: nn.Module, pool: Pools) -> None:
        self.name = name
        self.pool = pool.get(name, "mean") if isinstance(pool, Mapping) else pool
        inner = unwrap(layer)
        around = [module for module in model.modules() if any(inner is part for part in module.modules())]
        self.time_first = any(map(_is_time_first, around))
        self.holds_time_first = not self.time_first and any(
            isinstance(part, nn.MultiheadAttention) and _is_time_first(part) for part in inner.children()
        )
        self.sizes = [*map(_sizes, reversed(around))]  # from the layer itself outwards

    def __call__(self, output: Any, inputs: Sequence[torch.Size] = (), mask: Tensor | None = None) -> Tensor:
        """The rows ``[N, D]`` of the layer's output, in a forward whose input tensors have the shapes ``inputs``.

        A mean over tokens ``[N, T, D]`` or ``[T, N, D]`` leaves out those where ``mask`` ``[N, T]`` is 0.

        Raises:
            ValueError: the layout is ambiguous, or there is not one row per sample; also as `pool_rows`.
        """
        features, pool = first_tensor(output), self.pool
        if pool == "mean" and not features.is_nested and features.ndim > 2:
            pool = self._layout(features, inputs)
            tokens = features.transpose(0, 1) if pool == "time_first" else features
            if mask is not None and pool != "channels_first" and tokens.shape[:-1] == mask.shape:
                wide = torch.promote_types(tokens.dtype, torch.float32)
                counts = mask.to(tokens.device) != 0
                total = torch.where(counts[:, :, None], tokens, 0.0).sum(1, dtype=wide)
                return (total / counts.sum(1, keepdim=True)).to(tokens.dtype)
        rows = pool_rows(features, pool)
        if inputs and not callable(pool) and pool != "none":
            batch = [size for shape in inputs for size in shape[: 1 + (pool == "time_first")]]
            if len(rows) not in batch:
                raise ValueError(
                    f"layer {self.name!r} has {len(rows)} rows of features in a batch of {batch[0]}: {_ASK}"
                )
        return rows

    def _layout(self, features: Tensor, inputs: Sequence[torch.Size]) -> Layout:
        if features.ndim == 3 and self.time_first:
            return "time_first"
        if features.ndim == 3 and self.holds_time_first:  # a block may transpose around its attention, or not at all
            starts = [shape[0] for shape in inputs]
            if _among(features.shape[1], starts) and not _among(features.shape[0], starts):
                return "time_first"
            if any(len(shape) == 3 and shape[:2] == features.shape[:2] for shape in inputs):
                raise ValueError(
                    f"layer {self.name!r} holds an attention that is not batch_first, so whether its output "
                    f"{list(features.shape)} has time or samples first is unclear: {_ASK}"
                )
        second, final = features.shape[1], features.shape[-1]
        for convolutions, matrices, everything in self.sizes:
            first, last = _among(second, everything), _among(final, everything)
            if first == last:
                first, last = _among(second, convolutions), _among(final, matrices)
            if last and not first:  # a dense block's growth may equal its width in pixels: its channels stand elsewhere
                first = _among(second, self.sizes[-1][2]) and not _among(final, self.sizes[-1][1])
                last = not first
            if first != last:
                return "channels_first" if first else "channels_last"
        if features.ndim == 3:
            return "channels_last"
        raise ValueError(
            f"whether {list(features.shape)} of layer {self.name!r} has its channels first is unclear: {_ASK}"
        )


_ASK = (
    "say as pool= how its output is laid out, 'channels_first', 'channels_last' or 'time_first' ([T, N, D]), or give a "
    "callable that returns [N, D]; {'layer': ...} is for this layer alone"
)


def poolers_of(model: nn.Module, layers: Mapping[str, nn.Module], pool: Pools) -> dict[str, Pooler]:
    """A `Pooler` for each layer by name; raises a ValueError if ``pool`` names other layers."""
    if isinstance(pool, Mapping) and not pool.keys() <= layers.keys():
        raise ValueError(f"pool names {[*pool]}, but the layers are {[*layers]}")
    return {name: Pooler(model, name, layer, pool) for name, layer in layers.items()}


def masks_of(model: nn.Module, names: Sequence[str], call: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mask ``[N, T]`` of each layer's tokens, 0 for padding, where the arguments ``call`` of the model have one.

    It is ``attention_mask``; in the ``decoder`` of an encoder-decoder network it is ``decoder_attention_mask``, else
    ``labels`` that are not -100. Without a ``config`` a network is one if ``call`` has ``decoder_attention_mask``.
    """
    theirs = call.get("decoder_attention_mask")
    config = getattr(unwrap(model), "config", None)
    has_both = getattr(config, "is_encoder_decoder", theirs is not None)
    if theirs is None and isinstance(labels := call.get("labels"), Tensor):
        theirs = labels != -100
    ours = call.get("attention_mask")
    masks = {name: theirs if has_both and "decoder" in name.split(".") else ours for name in names}
    return {name: mask for name, mask in masks.items() if isinstance(mask, Tensor)}


def own_mask(layer: nn.Module, call: Mapping[str, Any]) -> Tensor | None:
    """The mask ``[N, T]``, 0 for padding, from the ``src_key_padding_mask`` (True or -inf there) of a layer's call.

    Of PyTorch's decoders, and of `torch.nn.Transformer`, which ends in one, it is ``tgt_key_padding_mask``.
    """
    decodes = isinstance(unwrap(layer), (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer))
    padding = call.get(f"{'tgt' if decodes else 'src'}_key_padding_mask")
    return padding == 0 if isinstance(padding, Tensor) else None


def _is_time_first(module: nn.Module) -> bool:
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return len(module.layers) > 0 and _is_time_first(module.layers[0])
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _is_time_first(module.self_attn)
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.Transformer)) and not module.batch_first


def _sizes(module: nn.Module) -> tuple[list[int], list[int], list[int]]:
    """The first two sizes of a module's weights: of convolutions, of matrices, of all."""
    shapes = [parameter.shape for parameter in module.parameters() if not is_lazy(parameter)]
    kinds = [s for s in shapes if len(s) > 2], [s for s in shapes if len(s) == 2], shapes
    convolutions, matrices, everything = (sorted({size for s in kind for size in s[:2]} - {1}) for kind in kinds)
    return convolutions, matrices, everything


def _among(size: int, sizes: list[int]) -> bool:
    return any(size == known for known in sizes)  # torch.compile does not support `in` for symbolic sizes


class Pass:
    """The record of one forward pass of a model."""

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}
        self.norms: Tensor | None = None  # [2], of the gradients at the layers' outputs: `bird.taps.Measured`
        self.inputs: list[torch.Size] = []  # the shapes of the model's input tensors
        self.masks: dict[str, Tensor] = {}  # `masks_of` its call
        self.builds_graph = False  # whether gradients were enabled when the forward began
        self.running = False  # whether the forward is in progress


class Passes(threading.local):
    """Holds each thread's `Pass` as ``now``; copies and pickles are empty. (torch.compile sets no attributes here.)"""

    def __init__(self) -> None:
        self.now = Pass()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def input_shapes(*inputs: Any) -> list[torch.Size]:
    """The shapes of the tensors among a model's arguments, without nested and 0-d ones."""
    return [tensor.shape for tensor in _tensors(inputs) if not tensor.is_nested and tensor.ndim > 0]


def _walk(module: nn.Module, path: str = "", *, deep: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, layer) of all submodules with a forward of their own; unless ``deep``, only of the outermost ones.

    Paths leave out wrappers. A shared module is yielded under each of its names.
    """
    inner = unwrap(module)
    if path and type(inner).forward is not nn.Module.forward:
        yield path, module
        if not deep:
            return
    for name, child in inner._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, deep=deep)


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a glob; they are compared part by part, so that ``*`` does not cross a dot."""
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))


def _unknown(pattern: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(pattern, known, n=5, cutoff=0.5)
    hint = f"the nearest are {nearest}" if nearest else f"the first are {known[:10]}"
    return f"no layer is called, or matches, {pattern!r}; of {len(known)} layers {hint}"


def _tensors(output: Any) -> Iterator[Tensor]:
    parts: Iterable[Any] = ()
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, PackedSequence):
        yield torch.nested.as_nested_tensor(unpack_sequence(output))
    elif isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif hasattr(output, "last_hidden_state"):
        parts = [output.last_hidden_state]
    for part in parts:
        yield from _tensors(part)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Switch to eval mode and no gradients, and restore each module's mode afterwards; yields the model's device."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    finally:
        for module, mode in modes:
            module.training = mode
