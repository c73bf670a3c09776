"""Weather: snow, frost, fog. Spatter is in `drops`."""

from __future__ import annotations

import torch
from torch import Tensor

from .blur import ANGLES, streak
from .filters import Level, separable, zoom_matrix
from .ice import SIDE, textures
from .random import Noise

LUMA = (0.299, 0.587, 0.114)
_FROST_TINT = (0.9, 0.98, 1.06)  # bluish


def luma(x: Tensor) -> Tensor:
    """The luminance ``[n, 1, height, width]`` of images with 1 or 3 channels."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def fog(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Adds the light of a fractal, and dims the sum to the image's brightness."""
    height, width = x.shape[-2:]
    thick = level.pick(0.2, 0.5, 0.75, 1, 1.5)
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    side = 1 << (max(height, width) - 1).bit_length()
    light = plasma(side, level.pick(3, 3, 2.5, 2, 1.75).view(-1, 1, 1), noise)[:, None, :height, :width]
    return (x + thick * light) * (brightest / (brightest + thick))


def plasma(side: int, decay: Tensor, noise: Noise) -> Tensor:
    """Fractal clouds in 0-1, ``[n, side, side]``, by the diamond-square algorithm on a torus.

    Args:
        side: a power of two.
        decay: ``[n or 1, 1, 1]``: the factor by which every finer grid varies less.
        noise: one number is drawn per pixel, except the first.
    """
    wibble = torch.full_like(decay, 100.0)

    def middle(total: Tensor) -> Tensor:
        uniform = noise.uniform(*total.shape[1:]).mul_(2).sub_(1)
        return total / 4 + wibble * (wibble * uniform)

    # Each coarse grid is a contiguous tensor, so that every pass reads and writes adjacent memory.
    corner = decay.new_zeros(len(noise), 1, 1)
    while corner.shape[1] < side:
        step = corner.shape[1]
        square = corner + corner.roll(-1, 1)
        centre = middle(square + square.roll(-1, 2))
        top = middle(centre + centre.roll(1, 1) + (corner + corner.roll(-1, 2)))
        left = middle(centre + centre.roll(1, 2) + (corner + corner.roll(-1, 1)))
        rows = torch.stack([torch.stack([corner, top], 3), torch.stack([left, centre], 3)], 2)
        corner = rows.view(-1, 2 * step, 2 * step)
        wibble = wibble / decay
    corner = corner - corner.amin(dim=(1, 2), keepdim=True)
    return corner / corner.amax(dim=(1, 2), keepdim=True)


def frost(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Ice on glass: adds a random part of one of five frost textures, drawn by code
    (`bird.lab.vision.corruptions.ice`) where the original has photographs, with the published weights."""
    height, width = x.shape[-2:]
    which, top, left = noise.integers(5), noise.integers(SIDE), noise.integers(SIDE)
    rows = (top[:, None] + torch.arange(height, device=x.device)) % SIDE + which[:, None] * SIDE
    columns = (left[:, None] + torch.arange(width, device=x.device)) % SIDE
    ice = textures(x.device).take(rows[:, :, None] * SIDE + columns[:, None, :]).unsqueeze(1)
    if x.shape[1] == 3:
        ice = torch.cat([ice * tint for tint in _FROST_TINT], dim=1).clamp_(max=1)
    return x * level.pick(1, 1, 0.9, 0.85, 0.75) + ice * level.pick(0.2, 0.3, 0.4, 0.4, 0.45)


def snow(x: Tensor, level: Level, noise: Noise) -> Tensor:
    """Flakes (the peaks of magnified noise, blurred downwards) over an image with paler colours."""
    zooms = (1.0, 1.0, 1.75, 2.25, 1.25)
    height, width = x.shape[-2:]
    layer = noise.normal(1, height, width) * level.pick(0.2, 0.2, 0.3, 0.3, 0.3)
    layer = separable(layer + level.pick(0.1, 0.1, 0.15, 0.25, 0.3), level, zoom_matrix, *zooms)
    layer = layer * (layer >= level.pick(0.6, 0.5, 0.55, 0.6, 0.65)).to(x.dtype)
    layer = layer.clamp_(0, 1).mul_(255).floor_()
    radii, sigmas = (8, 10, 10, 12, 14), (3.0, 4.0, 4.0, 6.0, 12.0)
    layer = streak(layer, level, noise.integers(ANGLES), radii, sigmas, (-135.0, -45.0))
    layer = layer.round_().div_(255)
    kept = level.pick(0.95, 0.9, 0.9, 0.85, 0.8)
    pale = torch.maximum(x, luma(x) * 1.5 + 0.5)
    return x * kept + pale * (1 - kept) + (layer + layer.flip(2, 3))
