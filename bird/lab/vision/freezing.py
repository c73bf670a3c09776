"""Training a part of a network while the rest stands still."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ...features import find_layers


@contextmanager
def train_only(model: nn.Module, paths: Sequence[str] | None) -> Iterator[Callable[[], object]]:
    """Freeze all of a model but the named parts; yields what puts these in training mode, after every ``model.eval()``.

    Frozen parameters do not require gradients, and what is not named stays in eval mode: its batch normalisation uses
    its running statistics and leaves them as they are, its dropout drops nothing. Afterwards the parameters require
    gradients as they did before, and the whole model is in training mode.

    Args:
        model: the network.
        paths: module paths or globs (`bird.features.find_layers`) of what is trained; None for everything.

    Raises:
        ValueError: an unknown path (the nearest are listed), or parts without a parameter that requires gradients.
    """
    if paths is None:
        yield model.train
        return
    parts = [*find_layers(model, paths).values()]
    chosen = {parameter for part in parts for parameter in part.parameters()}
    if not any(parameter.requires_grad for parameter in chosen):
        raise ValueError(f"nothing is left to train: no parameter of {list(paths)} requires gradients")
    frozen = [p for p in model.parameters() if p.requires_grad and p not in chosen]

    def train() -> None:
        model.eval()
        for part in parts:
            part.train()

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield train
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train()
