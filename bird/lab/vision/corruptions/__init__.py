"""The 19 common corruptions of CIFAR-10-C in batched PyTorch: seeded per sample, on any device, without files.

Kinds, order and strengths are those of Hendrycks and Dietterich (2019), "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", with the parameters that made CIFAR-10-C (``make_cifar_c.py`` in
hendrycks/robustness), for images around 32 x 32. Lengths that are fractions of 32 pixels there are fractions of the
image's side here. It truncates its results to bytes; here they are not rounded. Frost textures are drawn by code.

A sample's corruption is bitwise equal in any batch and any order: random numbers are hashes (`random`), and no
sum depends on how a batch is divided (`filters`). Nothing synchronises with the device. A corruption takes a batch
``x`` ``[n, channels, height, width]``, every sample's `Level` and a source of noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from .digital import brightness, contrast, elastic_transform, pixelate, saturate
from .drops import spatter
from .filters import Level
from .jpeg import jpeg_compression
from .noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from .random import Noise, keys
from .weather import fog, frost, snow

Corruption = Callable[[Tensor, Level, Noise], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
        spatter,
        saturate,
        speckle_noise,
        gaussian_blur,
    )
}
TEACHER_CORRUPTIONS = tuple(CORRUPTIONS)[:15]
HELD_OUT_CORRUPTIONS = tuple(CORRUPTIONS)[15:]
SEVERITIES = (1, 2, 3, 4, 5)
STRONGEST = 7  # 6 is severity 5 applied twice, 7 three times, with rounding to 8 bits between and noise of their own
_CHUNK = 100  # images at a time on a CPU, so that intermediate results stay in its cache


def corrupt(
    x: Tensor, name: str, severity: int | Tensor, *, index: Tensor, seed: int = 0, strongest: int = 5
) -> Tensor:
    """Corrupt a batch of images.

    Args:
        x: float32 ``[n, channels, height, width]`` in 0-1, 1 or 3 channels, at least 4 x 4, any device.
        name: a key of `CORRUPTIONS`.
        severity: 1 (mild) to 5 (strong), 0 for none: one for all, or int64 ``[n]`` on the device of ``x``
            (values outside 0-5 are then clamped, since checking them would synchronise). Beyond the published ones
            6 is the picture of severity 5, rounded to 8 bits and corrupted so again, and 7 once more.
        index: int64 ``[n]``, the number of each image's sample. Equal seed, name, severity and index give equal
            noise, in any batch.
        seed: any integer.
        strongest: of the severities, if they are a tensor: what is above is clamped.

    Returns:
        float32 ``[n, channels, height, width]`` in 0-1, a new tensor.

    Raises:
        ValueError: unknown name, severity out of range, a shape or dtype other than the above.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}; known are {', '.join(CORRUPTIONS)}")
    if x.ndim != 4 or x.dtype != torch.float32 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 4:
        raise ValueError(
            "x must be float32 [n, 1 or 3 channels, height, width] in 0-1, at least 4 x 4, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if index.shape != x.shape[:1]:
        raise ValueError(f"index must hold one number per image, [{len(x)}], got {list(index.shape)}")
    if isinstance(severity, int) and not 0 <= severity <= STRONGEST:
        raise ValueError(f"severity must be 0 to {STRONGEST}, got {severity}")
    if len(x) == 0 or (isinstance(severity, int) and severity == 0):
        return x.clone()
    x, index = x.contiguous(), index.to(x.device)
    if isinstance(severity, int):
        y = _once(x, name, min(severity, 5), index, seed)
        for again in range(6, 1 + severity):
            y = _once(_eight_bits(y), name, again, index, seed)
        return y
    y = _once(x, name, severity.clamp(0, 5), index, seed)
    for again in range(6, 1 + strongest):
        rows = severity >= again
        if x.device.type == "cpu":
            y[rows] = _once(_eight_bits(y[rows]), name, again, index[rows], seed)
        else:  # would wait for the number of rows
            y = torch.where(rows.view(-1, 1, 1, 1), _once(_eight_bits(y), name, again, index, seed), y)
    return y


def _eight_bits(x: Tensor) -> Tensor:
    return x.mul(255).round_().div_(255)


def _once(x: Tensor, name: str, severity: int | Tensor, index: Tensor, seed: int) -> Tensor:
    """Above 5 as strong as 5, with other noise."""
    only = min(severity, 5) - 1 if isinstance(severity, int) else None
    severity = index.new_full((len(x),), severity) if isinstance(severity, int) else severity
    level = (severity - 1).clamp(0, 4)
    key = keys(index, seed, zlib.crc32(name.encode()), severity)
    result = torch.empty_like(x)
    chunk = _CHUNK if x.device.type == "cpu" else len(x)
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        corrupted = CORRUPTIONS[name](x[part], Level(level[part], only), Noise(key[part]))
        torch.clamp(corrupted, 0, 1, out=result[part])
    return result if only is not None else torch.where(severity.view(-1, 1, 1, 1) == 0, x, result)


class Mixture:
    """An augmentation: every sample gets one of several corruptions, at a random severity from 0 to the strongest.

    The corruptions are assigned in turn along the batch, whose order is random already, so that each gets an equal
    share and nothing synchronises with the device. Of small batches several at once take far less time: fifteen calls
    for four images each are mostly overhead.

    Args:
        names: keys of `CORRUPTIONS`.
        seed: of severities and noise, which are different for a sample in every epoch.
        strongest: 5, or up to `STRONGEST`.
        batch_size: of several batches at once, in which the turns begin anew; None: one batch.
    """

    def __init__(
        self,
        names: Sequence[str] = TEACHER_CORRUPTIONS,
        *,
        seed: int = 0,
        strongest: int = 5,
        batch_size: int | None = None,
    ) -> None:
        self.names, self.seed, self.strongest, self.batch_size = tuple(names), seed, strongest, batch_size

    def __call__(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Corrupt a batch; ``x``, ``index`` and the result as in `corrupt`."""
        index = index.to(x.device)
        seed = 1_000_003 * self.seed + epoch
        severity = ((1 + self.strongest) * Noise(keys(index, seed)).uniform()).long()
        mixed, size, turns = torch.empty_like(x), self.batch_size or len(x), len(self.names)
        starts = range(0, len(x), size or 1)
        for turn, name in enumerate(self.names):
            count = sum(len(range(start + turn, min(start + size, len(x)), turns)) for start in starts)
            if count:
                first = torch.arange(0, len(x), size, device=x.device)[:, None]
                mine = (first + torch.arange(turn, size, turns, device=x.device)).flatten()[:count]
                mixed[mine] = corrupt(
                    x[mine], name, severity[mine], index=index[mine], seed=seed, strongest=self.strongest
                )
        return mixed
