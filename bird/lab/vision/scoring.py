"""The test images that models are scored on: a fixed choice, clean and under every corruption, in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .corruptions import SEVERITIES, corrupt
from .data import Images, to_float
from .recipe import Scoring

KEPT = 4 << 30  # bytes of corrupted test images that a process keeps; more are made anew for each model


def first(data: Images, count: int | None) -> Images:
    """A fixed choice of so many images."""
    if count is None or count >= len(data):
        return data
    return data.select(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count])


_kept: dict[tuple[Any, ...], list[tuple[str, Images]]] = {}


def corrupted(data: Images, scoring: Scoring, key: tuple[Any, ...]) -> Iterator[tuple[str, Images]]:
    """Each corruption at each severity, in 8 bits as published ones are. What ``key`` names is kept if it fits."""
    if key in _kept:
        yield from _kept[key]
        return
    _kept.clear()
    keeps = data.images.numel() * len(scoring.corruptions) * len(SEVERITIES) <= KEPT
    views: list[tuple[str, Images]] = []
    for name in scoring.corruptions:
        for severity in SEVERITIES:
            view = name, _quantised(data, name, severity)
            if keeps:
                views.append(view)
            yield view
    if keeps:
        _kept[key] = views


def _quantised(data: Images, name: str, severity: int) -> Images:
    parts = []
    for index in torch.arange(len(data), device=data.images.device).split(500):
        view = corrupt(to_float(data.images[index]), name, severity, index=index)
        parts.append(view.mul_(255).round_().to(torch.uint8))
    return Images(torch.cat(parts), data.labels)
