"""Every corruption beside the usual way, one picture at a time, from the same random numbers; and its parts beside
OpenCV's, Pillow's and SciPy's."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image
from torch import Tensor

from bird.lab.vision.corruptions import CORRUPTIONS, SEVERITIES, corrupt, drops, filters, ice, jpeg
from bird.lab.vision.corruptions.filters import Level
from bird.lab.vision.corruptions.random import Noise, keys
from tests.bird.replay import Recorder, Replay
from tests.bird.usual_corruptions import REFERENCE

BYTE = 1 / 255
# Largest mean and largest single difference that are allowed, in parts of 0-1. The usual way rounds to bytes in the
# middle of pixelation, glass blur (where a whole number may fall to either side) and JPEG (whose transform is in whole
# numbers, so that a coefficient half-way between two steps may take the other one).
EXACT = (1e-6, 1e-5)
TOLERANCE = {
    "pixelate": (0.5 * BYTE, 1.01 * BYTE),
    "glass_blur": (0.05 * BYTE, 1.01 * BYTE),
    "jpeg_compression": (BYTE, 0.2),
}
SHARED_DRAWS = [name for name in REFERENCE if name not in ("impulse_noise", "shot_noise")]


def pictures(n: int, height: int, width: int) -> np.ndarray:
    """Smooth pictures in colour with some grain, uint8 ``[n, height, width, 3]``."""
    rng = np.random.default_rng(0)
    smooth = [cv2.resize(p, (width, height), interpolation=cv2.INTER_CUBIC) for p in rng.random((n, 7, 7, 3))]
    images = np.clip(255 * np.stack(smooth) + rng.normal(0, 5, (n, height, width, 3)), 0, 255).astype(np.uint8)
    images[:, :4, 4:20] = np.arange(0, 256, 17, dtype=np.uint8)[:, None]  # greys, from black to white
    return images


def to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255


def both_ways(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Severities 1, 2, ... in turn: (them, ours, the usual way from the same draws)."""
    level = torch.arange(len(images)) % 5
    recorder = Recorder(keys(torch.arange(len(images)), 7))
    ours = CORRUPTIONS[name](to_tensor(images), Level(level), recorder).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    usual = [
        REFERENCE[name](image, i % 5 + 1, Replay(recorder, i))  # type: ignore[arg-type]
        for i, image in enumerate(images)
    ]
    return level.numpy() + 1, ours, np.stack(usual)


@pytest.mark.parametrize("shape", [(32, 32), (28, 28), (24, 40)])
@pytest.mark.parametrize("name", SHARED_DRAWS)
def test_the_usual_way_gives_the_same_from_the_same_draws(name: str, shape: tuple[int, int]) -> None:
    images = pictures(15, *shape)
    severities, ours, usual = both_ways(name, images)
    mean, most = TOLERANCE.get(name, EXACT)
    changed = np.abs(usual - images / 255).mean(axis=(1, 2, 3))
    assert (changed > 0.001).all(), severities[changed <= 0.001]  # there is something to compare
    difference = np.abs(ours - usual)
    for severity in SEVERITIES:
        mine = difference[severities == severity]
        assert mine.mean() <= mean, severity
        assert mine.max() <= most, severity


def test_shot_noise_is_the_exact_quantile_but_for_single_photons() -> None:
    severities, ours, usual = both_ways("shot_noise", pictures(25, 32, 32))
    photons = np.array([500, 250, 100, 75, 50])[severities - 1][:, None, None, None]
    away = np.abs(ours - usual) * photons
    assert (away > 0.01).mean() < 0.003
    assert (away > 1.01).mean() < 0.0005


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_has_scikit_images_shares(severity: int) -> None:
    rng = np.random.default_rng(0)
    x = torch.full((100, 3, 32, 32), 0.5)
    ours = corrupt(x, "impulse_noise", severity, index=torch.arange(100)).numpy()
    usual = np.stack(
        [REFERENCE["impulse_noise"](np.full((32, 32, 3), 128, np.uint8), severity, rng) for _ in range(100)]
    )
    counts = [[(y == 0).sum(), (y == 1).sum(), ((y != 0) & (y != 1)).sum()] for y in (ours, usual)]
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-3
    assert set(np.unique(ours)) == {0, 0.5, 1}


GREY_IS_ONE_COLOUR = (
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "fog", "brightness", "contrast",
    "elastic_transform", "pixelate", "gaussian_blur",
)  # fmt: skip


def grey_and_coloured(name: str, grey: Tensor) -> tuple[Tensor, Tensor]:
    level = Level(torch.arange(10) % 5)
    both = grey, grey.repeat(1, 3, 1, 1).contiguous()
    one, three = (CORRUPTIONS[name](x, level, Noise(torch.arange(10))) for x in both)
    return one, three


@pytest.mark.parametrize("name", GREY_IS_ONE_COLOUR)
def test_grey_pictures_become_what_a_grey_colour_picture_becomes(name: str) -> None:
    one, three = grey_and_coloured(name, to_tensor(pictures(10, 32, 32))[:, :1])
    torch.testing.assert_close(one.expand_as(three), three, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("spatter", 1e-5), ("frost", 0.03)])
def test_grey_spatter_and_frost_have_the_luminance_of_the_coloured_ones(name: str, tolerance: float) -> None:
    """Frost's tint is a little darker, and clipped."""
    one, three = grey_and_coloured(name, torch.full((10, 1, 32, 32), 0.2))
    luminance = (three * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(one, luminance, rtol=0, atol=tolerance)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_grey_jpeg_is_pillows(severity: int) -> None:
    images = pictures(20, 32, 32)[..., 0]
    x = torch.from_numpy(images).unsqueeze(1).float() / 255
    ours = corrupt(x, "jpeg_compression", severity, index=torch.arange(20))[:, 0].numpy()
    for image, mine in zip(images, ours, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
        assert np.abs(mine - np.asarray(Image.open(file)) / 255).mean() < BYTE


@pytest.mark.parametrize("quality", [10, 40, 50, 58, 65, 80, 95])
def test_quantisation_tables_are_pillows(quality: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization  # type: ignore[attr-defined]
    for chroma in (False, True):
        ours = jpeg.quantisation_table(quality, chroma=chroma)
        assert sorted(ours.flatten()) == sorted(tables[chroma])
        assert ours[0, :3].tolist() == list(tables[chroma])[:3]


def fields(n: int) -> np.ndarray:
    """Bytes like spatter's drops ``[n, 32, 32]``: zero but where a smooth field is high."""
    rng = np.random.default_rng(1)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(0.65, 0.3, (n, 32, 32)), (0, 0.9, 0.9))
    return (np.where(smooth < 0.69, 0, smooth.clip(0, 1)) * 255).astype(np.uint8)


def test_edges_are_cannys() -> None:
    bytes_ = fields(300)
    ours = drops.edges(torch.from_numpy(bytes_).unsqueeze(1).float())[:, 0].numpy()
    assert 0.1 < ours.mean() < 0.9
    np.testing.assert_array_equal(ours * 255, [cv2.Canny(image, 50, 150) for image in bytes_])


def test_distances_are_opencvs() -> None:
    rng = np.random.default_rng(2)
    edges = (rng.random((100, 32, 32)) < rng.choice([0.002, 0.01, 0.1], (100, 1, 1))).astype(np.uint8)
    edges[:, 5, 7] = 1
    ours = drops.distance_to(torch.from_numpy(edges).unsqueeze(1).float())[:, 0].numpy()
    usual = np.stack([cv2.distanceTransform(1 - edge, cv2.DIST_L2, 5) for edge in edges])
    assert usual.max() > 20
    np.testing.assert_allclose(ours, usual.clip(max=20), atol=1e-4)
    assert (drops.distance_to(torch.zeros(1, 1, 32, 32)) == 20).all()


def test_equalisation_is_opencvs() -> None:
    values = np.random.default_rng(3).binomial(20, 0.3, (50, 32, 32)).astype(np.uint8)
    values[0], values[1], values[2] = 7, 0, 20
    ours = drops.equalised(torch.from_numpy(values).unsqueeze(1).float())[:, 0].numpy()
    np.testing.assert_array_equal(ours, [cv2.equalizeHist(image) for image in values])


def test_pictures_of_frost_are_five_and_without_a_seam() -> None:
    pictures_ = ice.textures(torch.device("cpu"))
    assert pictures_.shape == (5, ice.SIDE, ice.SIDE)
    assert pictures_.min() >= 0
    assert pictures_.max() <= 1
    assert ((pictures_.mean((1, 2)) > 0.35) & (pictures_.mean((1, 2)) < 0.65)).all()
    assert (pictures_.std((1, 2)) > 0.1).all()
    assert np.abs(np.corrcoef(pictures_.flatten(1)) - np.eye(5)).max() < 0.3
    inside, across = np.zeros((2, ice.SIDE, ice.SIDE))
    ice._draw(inside, 50.0, 60.0, 0.7, 20.0, 1.0)
    ice._draw(across, 50.0 + 64, 60.0 + 64, 0.7, 20.0, 1.0)
    np.testing.assert_allclose(across, np.roll(inside, (64, 64), (0, 1)), atol=1e-12)
    haze = ice._enlarged(ice._Dice(0).field(8))
    for axis in (0, 1):
        steps = np.abs(haze - np.roll(haze, 1, axis)).mean(1 - axis)  # of each line to the one before it
        assert steps[0] <= steps[1:].max()


def test_exact_products_have_no_order() -> None:
    x = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 8 - 4
    matrix = filters.matrices(filters.gaussian_matrix, 32, (1.0,), x.device)[0]
    grid = filters.to_grid(x)
    forward = (grid.unsqueeze(-2) * matrix).sum(-1)
    backward = (grid.flip(-1).unsqueeze(-2) * matrix.flip(-1)).cumsum(-1)[..., -1]
    assert torch.equal(forward, backward)
    assert torch.equal(grid @ matrix.T, forward)
    torch.testing.assert_close(grid.float(), x, rtol=0, atol=2.0**-24)
