"""From layer names to modules, and from a layer's output to one row of features per sample.

What taps and teachers share. Users write the bare path of a layer, whatever the model is wrapped in.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Pool: TypeAlias = Literal["mean", "flatten", "none"] | Callable[[Tensor], Tensor]

# Wrappers recognised by the child they hold, which spares importing torch.compile's machinery:
# torch.compile, and torch.distributed's activation-checkpoint wrapper.
_WRAPPED_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DDP, DataParallel and checkpoint wrappers, in whatever order."""
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        return unwrap(model.module)
    for name in _WRAPPED_CHILDREN:
        if inner := model._modules.get(name):
            return unwrap(inner)
    return model


def find_layers(model: nn.Module, names: str | Sequence[str]) -> dict[str, nn.Module]:
    """The named layers of a model, in the order asked for.

    Args:
        model: the model, wrapped or not (see `unwrap`). Wrappers inside it are seen through as well; the
            outermost one is returned, since its output lies outside the compiled or checkpointed region.
        names: bare module paths (``"layer4"``, ``"features.3"``) or globs. In a glob ``*`` stops at a dot:
            ``"blocks.*"`` is each block, ``"blocks.*.attn"`` the attention in each, neither what is below.

    Raises:
        ValueError: no names, a name that no layer has (the nearest are listed), or a glob without a match.
            Containers without an output of their own (ModuleList, ModuleDict) do not count as layers.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    if not patterns:
        raise ValueError("no layer named: give at least one module path such as 'layer4' or 'blocks.*'")
    layers = dict(_walk(model))
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = [pattern] if pattern in layers else [name for name in layers if _matches(name, pattern)]
        if not matches:
            raise ValueError(_unknown(pattern, list(layers)))
        found.update((name, layers[name]) for name in matches)
    return found


def top_layers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's outermost layers by name: its children, and instead of a ModuleList what is in it."""
    return dict(_walk(model, deep=False))


def first_tensor(output: Any) -> Tensor:
    """The first tensor, depth first, of what a module returned.

    A tensor, tuple, list, mapping or dataclass, nested as they like: ``(hidden, weights)`` gives ``hidden``,
    a transformers output its first field that is not None.

    Raises:
        TypeError: there is none.
    """
    for tensor in _tensors(output):
        return tensor
    raise TypeError(f"a tapped layer returned {type(output).__name__} without a tensor: tap one inside it")


def pool_rows(features: Tensor, pool: Pool = "mean") -> Tensor:
    """One row of features per sample, ``[N, D]``, in the dtype of ``features`` and differentiable.

    Args:
        features: floating point, samples first: ``[N, C, H, W]`` (or more spatial dimensions), ``[N, T, D]``
            (tokens) or ``[N, D]``.
        pool: ``"mean"``: over space (``[N, C]``), over tokens (``[N, D]``), or the rows as they are;
            accumulated in fp32 (fp64 for fp64), so that fp16 cannot overflow on the way.
            ``"flatten"``: ``[N, everything else]``.
            ``"none"``: the features as they are, for losses that know tokens: ``[N, T, D]``.
            A callable ``Tensor -> [N, D]``, for what shapes do not tell: the first token
            (``lambda t: t[:, 0]``), channels-last maps, 1-d convolutions (``[N, C, L]`` looks like tokens).

    Returns:
        A tensor of its own, never a view: a later in-place layer (``ReLU(inplace=True)``) cannot change it.

    Raises:
        ValueError: an unknown ``pool``, a shape it cannot pool, or (``"none"`` apart) a result that is not
            ``[N, D]``, D > 1.
        TypeError: ``features`` are not floating point.
    """
    if not features.is_floating_point():
        raise TypeError(f"a tapped layer returned {features.dtype}: tap one with floating-point output")
    if pool == "none":
        return features.clone()
    if callable(pool):
        rows = pool(features).clone()
    elif pool == "flatten":
        rows = features.clone(memory_format=torch.contiguous_format).flatten(1)
    elif pool != "mean":
        raise ValueError(f"pool must be 'mean', 'flatten', 'none' or a callable Tensor -> [N, D], not {pool!r}")
    elif features.ndim > 2:
        over = (1,) if features.ndim == 3 else tuple(range(2, features.ndim))
        rows = features.mean(over)  # PyTorch sums half precision in fp32 and rounds once
    else:
        rows = features.clone()
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(
            f"pool={pool!r} made {list(rows.shape)} of features {list(features.shape)}, but [N, D] with D > 1"
            " is needed: tap another layer, or give as pool= a callable that returns [N, D]"
        )
    return rows


def _walk(module: nn.Module, path: str = "", *, deep: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """(bare path, layer) of all that has a forward below a module, or of the outermost of these alone.

    A shared one comes under each of its names.
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
    """A glob compared part by part, so that ``*`` does not cross a dot."""
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
    elif isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    for part in parts:
        yield from _tensors(part)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode and no gradients inside, and each module's own mode afterwards; yields the model's device."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    finally:
        for module, mode in modes:
            module.training = mode
