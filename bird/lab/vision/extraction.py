"""Features of a frozen layer for clean images, and their statistics over all corrupted versions of each image.

Features of single versions are not stored, only each feature's minimum, maximum and mean over the versions of a sample,
so that memory and disk space do not depend on the number of corruptions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ...features import Pool, evaluating, unwrap
from ...files import atomic
from ...taps import Taps
from ...teachers import Teacher
from ..tensors import load_array
from .corruptions import CORRUPTIONS, SEVERITIES, corrupt
from .data import Images, to_float

Array = NDArray[np.float32]

FORMAT = 1  # of the cached files; to be increased when their content changes for the same images and weights


class Views(NamedTuple):
    """Features of clean images, and statistics over all versions (the clean one included); float32 ``[n, d]`` each."""

    clean: Array
    lowest: Array
    highest: Array
    mean: Array


@dataclass(frozen=True)
class Layer:
    """One layer of a frozen network.

    Args:
        network: the network, whose weights and buffers are part of the cache's key.
        name: the layer's path.
        pool: how its output becomes rows, see `bird.features.pool_rows`.
        run: images ``[n, c, h, w]`` in 0-1 to rows ``[n, d]``.
    """

    network: nn.Module
    name: str
    pool: Pool
    run: Callable[[Tensor], Tensor]


def teacher_layer(teacher: Teacher) -> Layer:
    """The `Layer` of a teacher that taps only one.

    Raises:
        ValueError: it taps several.
    """
    name = _only(teacher.names)
    return Layer(teacher.model, name, teacher.rows[name].pool, lambda x: teacher(x)[name])


@contextmanager
def student_layer(student: nn.Module, name: str) -> Iterator[Layer]:
    """Yield a `Layer` of a network in use elsewhere, which is in eval mode meanwhile and restored afterwards."""
    student = unwrap(student)
    with evaluating(student), Taps(student, name) as taps:
        only = _only(taps.names)

        def run(x: Tensor) -> Tensor:
            student(x)
            return taps.pop()[only]

        yield Layer(student, only, "mean", run)


@dataclass(frozen=True)
class Extractor:
    """Extracts features of layers.

    Args:
        corruptions: keys of `bird.lab.vision.corruptions.CORRUPTIONS`.
        severities: 1 to 5; each corruption at each of them is one version of an image.
        seed: of the corruptions.
        batch_size: images at a time; affects speed and memory only.
        device: where to run; networks are moved back afterwards. None: where they are.
        cache: a folder to keep features in, as ``.npy``. A file's name is a hash of all that its content depends on
            (weights, buffers and structure of the network, layer, images, corruptions, severities, seed; also of the
            first image corrupted, to detect changed implementations of corruptions), so that no file is ever out of
            date; unneeded files may be deleted. Layers pooled by a callable are not cached, since it has no hash.
            None: no cache.
        progress: show a progress bar; None to show it on a terminal only.

    Raises:
        ValueError: an unknown corruption or severity.
    """

    corruptions: Sequence[str]
    severities: Sequence[int]
    seed: int = 0
    batch_size: int = 500
    device: torch.device | str | None = None
    cache: Path | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.corruptions if name not in CORRUPTIONS]:
            raise ValueError(f"unknown corruptions {unknown}; known are {', '.join(CORRUPTIONS)}")
        if not set(self.severities) <= set(SEVERITIES):
            raise ValueError(f"severities must be of 1 to 5, got {list(self.severities)}")

    def clean(self, layer: Layer, images: Images, *, label: str) -> Array:
        """Features of clean images, float32 ``[n, d]``; raises as `views`."""
        return self._get(layer, images, [], label)[0]

    def views(self, layer: Layer, images: Images, *, label: str) -> Views:
        """Features of clean images, and their statistics over all versions.

        Raises:
            ValueError: features are not ``[n, d]`` or not finite, or a cached file is damaged.
        """
        versions = [(name, severity) for name in self.corruptions for severity in self.severities]
        found = self._get(layer, images, versions, label)
        return Views(*(found if versions else found[[0, 0, 0, 0]]))

    def _get(self, layer: Layer, images: Images, versions: list[tuple[str, int]], label: str) -> Array:
        """``[1, n, d]`` without versions, else ``[4, n, d]`` in the order of `Views`."""
        if self.cache is None or callable(layer.pool):
            return self._extract(layer, images, versions, label)
        path = Path(self.cache) / f"{self._key(layer, images, versions)}.npy"
        if not path.exists():
            found = self._extract(layer, images, versions, label)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as partial:
                np.save(partial, found, allow_pickle=False)
            return found
        try:
            found = load_array(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} does not hold features ({error}): delete it") from error
        if found.dtype != np.float32 or found.ndim != 3 or found.shape[:2] != (4 if versions else 1, len(images)):
            raise ValueError(f"{path} does not hold these features, but {found.dtype} {found.shape}: delete it")
        return found

    @torch.no_grad()
    def _extract(self, layer: Layer, images: Images, versions: list[tuple[str, int]], label: str) -> Array:
        parts: list[Array] = []
        total, hidden = len(images) * (1 + len(versions)), None if self.progress is None else not self.progress
        with (
            _on(layer.network, self.device) as device,
            tqdm(total=total, desc=label, unit="image", leave=False, disable=hidden) as bar,
        ):

            def rows(x: Tensor) -> Tensor:
                found = layer.run(x.contiguous(memory_format=torch.channels_last)).float()
                if found.ndim != 2 or len(found) != len(x):
                    raise ValueError(f"layer {layer.name!r} gives {list(found.shape)}, not rows [{len(x)}, d]: pool it")
                bar.update(len(x))
                return found

            for index in torch.arange(len(images)).split(self.batch_size):
                x = to_float(images.images[index.to(images.images.device)].to(device))
                clean = lowest = highest = mean = rows(x)
                for done, (name, severity) in enumerate(versions, start=1):
                    new = rows(corrupt(x, name, severity, index=index, seed=self.seed))
                    lowest, highest = torch.minimum(lowest, new), torch.maximum(highest, new)
                    mean = mean + (new - mean) / (done + 1)
                kept = [clean, lowest, highest, mean] if versions else [clean]
                parts.append(torch.stack(kept).cpu().numpy())
        found = np.concatenate(parts, axis=1)
        if not np.isfinite(found).all():
            raise ValueError(f"{label}: layer {layer.name!r} gives features that are not finite")
        return found

    def _key(self, layer: Layer, images: Images, versions: list[tuple[str, int]]) -> str:
        network = layer.network
        about = [FORMAT, f"{type(network).__module__}.{type(network).__qualname__}", repr(network), layer.name]
        about += [layer.pool, versions, self.seed if versions else None]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name, tensor in chain(network.named_parameters(), network.named_buffers(), [("images", images.images)]):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        first, index = to_float(images.images[:1].cpu()), torch.zeros(1, dtype=torch.int64)
        for name, severity in versions:
            digest.update(corrupt(first, name, severity, index=index, seed=self.seed).numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def _on(network: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Move a network to a device and afterwards back; yields the device."""
    first = next(chain(network.parameters(), network.buffers()), None)
    home = first.device if first is not None else torch.device("cpu")
    there = home if device is None else torch.device(device)
    try:
        network.to(there)
        yield there
    finally:
        network.to(home)


def _only(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ValueError(f"features of one layer are compared, but {len(names)} are tapped ({', '.join(names)})")
    return names[0]
