"""The 19 corruptions for one picture at a time, with NumPy, SciPy, scikit-image, OpenCV and Pillow: the usual way.

The definitions of CIFAR-10-C as users compute them: the truth that the tests hold `bird.lab.vision.corruptions` to, and
the rival of benchmarks/corruptions.
Three differ from the published program, in what cannot be installed: motion blur and snow's streaks use OpenCV with the
kernel that ImageMagick's documentation describes, and frost takes the pictures of `bird`.

A corruption takes a uint8 picture ``[height, width, 3]``, a severity from 1 to 5 and NumPy's generator (or what draws
like one), and gives float ``[height, width, 3]`` in 0-1, not rounded to bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv
from skimage.filters import gaussian
from skimage.util import random_noise

from bird.lab.vision.corruptions import CORRUPTIONS
from bird.lab.vision.corruptions.ice import textures

Array = np.ndarray
Random = np.random.Generator


def _gaussian_noise(image: Array, severity: int, rng: Random) -> Array:
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return _clip(image / 255 + rng.normal(scale=scale, size=image.shape))


def _shot_noise(image: Array, severity: int, rng: Random) -> Array:
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return _clip(rng.poisson(image / 255 * photons) / photons)


def _impulse_noise(image: Array, severity: int, rng: Random) -> Array:
    return random_noise(image / 255, mode="s&p", amount=(0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1], rng=rng)


def _speckle_noise(image: Array, severity: int, rng: Random) -> Array:
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    x = image / 255
    return _clip(x + x * rng.normal(scale=scale, size=image.shape))


def _gaussian_blur(image: Array, severity: int, rng: Random) -> Array:
    return _clip(gaussian(image / 255, sigma=(0.4, 0.6, 0.7, 0.8, 1)[severity - 1], channel_axis=-1))


def _defocus_blur(image: Array, severity: int, rng: Random) -> Array:
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    across, down = np.meshgrid(np.arange(-8, 9), np.arange(-8, 9))
    disk = (across**2 + down**2 <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), ksize=(3, 3), sigmaX=alias)
    return _clip(cv2.filter2D(image / 255, -1, kernel))


def _glass_blur(image: Array, severity: int, rng: Random) -> Array:
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    x = np.uint8(gaussian(image / 255, sigma=sigma, channel_axis=-1) * 255)
    height, width = x.shape[:2]
    for _ in range(rounds):
        for i in range(height - 1, 1, -1):
            for j in range(width - 1, 1, -1):
                right, down = rng.integers(-1, 1, size=2)
                # As published, with pixels that are views: the second assignment reads what the first has written.
                x[i, j], x[i + down, j + right] = x[i + down, j + right], x[i, j]
    return _clip(gaussian(x / 255, sigma=sigma, channel_axis=-1))


def _motion_blur(image: Array, severity: int, rng: Random) -> Array:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return _streak(image / 255, radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(image: Array, severity: int, rng: Random) -> Array:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    x = (image / 255).astype(np.float32)
    return _clip((x + sum(_magnified(x, factor) for factor in factors)) / (len(factors) + 1))


def _snow(image: Array, severity: int, rng: Random) -> Array:
    mean, scale, zoom, bar, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    x = (image / 255).astype(np.float32)
    layer = _magnified(rng.normal(loc=mean, scale=scale, size=x.shape[:2])[..., None], zoom)[..., 0]
    layer[layer < bar] = 0
    flakes = (np.clip(layer, 0, 1) * 255).astype(np.uint8).astype(np.float64)
    flakes = np.round(_streak(flakes, radius, sigma, rng.uniform(-135, -45)))[..., None] / 255
    grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None]
    x = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return _clip(x + flakes + np.rot90(flakes, k=2))


def _frost(image: Array, severity: int, rng: Random) -> Array:
    kept, added = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    picture = _frost_pictures()[rng.integers(0, 5)]
    top, left = (rng.integers(0, size) for size in picture.shape[:2])
    height, width = image.shape[:2]
    ice = picture.take(range(top, top + height), 0, mode="wrap").take(range(left, left + width), 1, mode="wrap")
    return _clip(kept * image / 255 + added * ice)


def _fog(image: Array, severity: int, rng: Random) -> Array:
    thick, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    x = image / 255
    height, width = x.shape[:2]
    light = _plasma(1 << (max(height, width) - 1).bit_length(), decay, rng)[:height, :width, None]
    return _clip((x + thick * light) * x.max() / (x.max() + thick))


def _brightness(image: Array, severity: int, rng: Random) -> Array:
    hsv = rgb2hsv(image / 255)
    hsv[..., 2] = _clip(hsv[..., 2] + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1])
    return _clip(hsv2rgb(hsv))


def _saturate(image: Array, severity: int, rng: Random) -> Array:
    times, plus = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    hsv = rgb2hsv(image / 255)
    hsv[..., 1] = _clip(hsv[..., 1] * times + plus)
    return _clip(hsv2rgb(hsv))


def _contrast(image: Array, severity: int, rng: Random) -> Array:
    x = image / 255
    mean = x.mean(axis=(0, 1), keepdims=True)
    return _clip((x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + mean)


def _elastic_transform(image: Array, severity: int, rng: Random) -> Array:
    reach, sigma, jitter = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[
        severity - 1
    ]
    x = (image / 255).astype(np.float32)
    height, width = x.shape[:2]
    side = min(height, width)
    middle, third = np.float32([width // 2, height // 2]), side // 3
    corners = middle + third * np.float32([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-jitter * side, jitter * side, size=(3, 2)).astype(np.float32)
    x = cv2.warpAffine(x, cv2.getAffineTransform(corners, moved), (width, height), borderMode=cv2.BORDER_REFLECT_101)
    right, down = (
        gaussian(rng.uniform(-1, 1, size=(height, width)), sigma * side, mode="reflect", truncate=3) * reach * side
        for _ in range(2)
    )
    rows, columns, channels = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return _clip(
        ndimage.map_coordinates(
            x, (rows + down[..., None], columns + right[..., None], channels), order=1, mode="reflect"
        )
    )


def _pixelate(image: Array, severity: int, rng: Random) -> Array:
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    picture = Image.fromarray(image)
    small = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BOX)) / 255


def _jpeg_compression(image: Array, severity: int, rng: Random) -> Array:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    return np.asarray(Image.open(file)) / 255


def _spatter(image: Array, severity: int, rng: Random) -> Array:
    mean, scale, sigma, bar, thick = (
        (0.62, 0.1, 0.7, 0.7, 0.5),
        (0.65, 0.1, 0.8, 0.7, 0.5),
        (0.65, 0.3, 1, 0.69, 0.5),
        (0.65, 0.1, 0.7, 0.69, 0.6),
        (0.65, 0.1, 0.5, 0.68, 0.6),
    )[severity - 1]
    x = (image / 255).astype(np.float32)
    field = gaussian(rng.normal(loc=mean, scale=scale, size=x.shape[:2]), sigma=sigma)
    if severity > 3:
        cover = gaussian((field > bar).astype(np.float32), sigma=thick)
        cover[cover < 0.8] = 0
        return _clip(x * (1 - cover[..., None]) + cover[..., None] * np.array([63, 42, 20]) / 255)
    drops = (np.where(field < bar, 0, field) * 255).clip(max=255).astype(np.uint8)  # published without clip: it wraps
    relief = _relief(drops)
    cover = (drops * relief)[..., None]
    highest = cover.max()
    return _clip(x + (cover / highest * thick if highest > 0 else 0) * np.array([175, 238, 238]) / 255)


def _relief(drops: Array) -> Array:
    """The distance to the drops' edges, equalised, embossed and blurred."""
    distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.threshold(distance, 20, 20, cv2.THRESH_TRUNC)[1]
    distance = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    return cv2.blur(cv2.filter2D(distance, cv2.CV_8U, emboss), (3, 3)).astype(np.float32)


def _clip(x: Array) -> Array:
    return np.clip(x, 0, 1)


def _streak(x: Array, radius: float, sigma: float, degrees: float) -> Array:
    """Half a Gaussian from the pixel outwards, along whole pixels nearest to the line."""
    i = np.arange(2 * math.ceil(radius) + 1)
    angle = math.radians(degrees)
    down, right = (np.ceil(i * part - 0.5).astype(int) for part in (math.sin(angle), math.cos(angle)))
    reach = len(i)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, (down + reach, right + reach), np.exp(-(i**2) / (2 * sigma**2)))
    return cv2.filter2D(x, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def _magnified(x: Array, factor: float) -> Array:
    """The middle, enlarged to the picture's size."""
    starts = [(size - math.ceil(size / factor)) // 2 for size in x.shape[:2]]
    top, left = starts
    middle = x[top : top + math.ceil(x.shape[0] / factor), left : left + math.ceil(x.shape[1] / factor)]
    large = ndimage.zoom(middle, (factor, factor, 1), order=1)
    top, left = ((after - before) // 2 for after, before in zip(large.shape[:2], x.shape[:2], strict=True))
    return large[top : top + x.shape[0], left : left + x.shape[1]]


def _plasma(side: int, decay: float, rng: Random) -> Array:
    """Diamond-square on a torus, scaled to 0-1."""
    clouds = np.zeros((side, side))
    step, wibble = side, 100.0
    while step > 1:
        half = step // 2

        def middle(total: Array, wibble: float = wibble) -> Array:
            return total / 4 + wibble * rng.uniform(-wibble, wibble, size=total.shape)

        corners = clouds[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        centres = middle(pairs + np.roll(pairs, -1, 1))
        clouds[half::step, half::step] = centres
        clouds[::step, half::step] = middle(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1))
        clouds[half::step, ::step] = middle(centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0))
        step, wibble = half, wibble / decay
    clouds -= clouds.min()
    return clouds / clouds.max()


@lru_cache(maxsize=1)
def _frost_pictures() -> Array:
    """``[5, side, side, 3]``."""
    tint = np.array([0.9, 0.98, 1.06])
    return np.minimum(textures(torch.device("cpu")).numpy()[..., None] * tint, 1)


REFERENCE: dict[str, Callable[[Array, int, Random], Array]] = {name: globals()[f"_{name}"] for name in CORRUPTIONS}
