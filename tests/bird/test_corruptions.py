"""Corruptions: the same for a sample in any batch, with the statistics that their names promise."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from bird.vision.corruptions import (
    CORRUPTIONS,
    HELD_OUT_CORRUPTIONS,
    SEVERITIES,
    TEACHER_CORRUPTIONS,
    Mixture,
    Noise,
    corrupt,
)
from bird.vision.data import load_fashion, to_float

NAMES = list(CORRUPTIONS)


def photos(n: int) -> Tensor:
    return to_float(load_fashion(range(5, 10)).test.images[:: 1250 // n][:n])


def one(name: str, severity: int, x: Tensor, seed: int = 0) -> Tensor:
    return corrupt(x, name, severity, index=torch.arange(len(x)), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_meets_the_same_noise_in_any_batch(name: str, device: torch.device) -> None:
    x, index = photos(13).to(device), torch.arange(100, 113)
    whole = corrupt(x, name, 3, index=index)
    order = torch.tensor([7, 2, 12, 2])
    assert torch.equal(corrupt(x[order], name, 3, index=index[order]), whole[order])
    for start, stop in ((0, 1), (5, 6), (1, 4), (3, 13)):
        part = slice(start, stop)
        assert torch.equal(corrupt(x[part], name, 3, index=index[part]), whole[part])
    severities = torch.tensor([3, 0, 5, 3, 1, 2, 4, 3, 0, 5, 1, 2, 3], device=device)
    mixed = corrupt(x, name, severities, index=index)
    for i, severity in enumerate(severities.tolist()):
        alone = corrupt(x[i : i + 1], name, severity, index=index[i : i + 1])
        assert torch.equal(mixed[i : i + 1], alone)


@pytest.mark.parametrize("name", NAMES)
def test_range_dtype_and_severity_zero(name: str) -> None:
    x = photos(20)
    for severity in SEVERITIES:
        y = one(name, severity, x)
        assert y.shape == x.shape
        assert y.dtype == torch.float32
        assert y.min() >= 0
        assert y.max() <= 1
        assert not torch.equal(y, x)
    assert torch.equal(one(name, 0, x), x)


# Spatter turns from light drops to dark mud, which hardly shows on a black background; its cover is tested
# below.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "spatter"])
def test_a_higher_severity_changes_more(name: str) -> None:
    x = photos(200)
    changes = [(one(name, severity, x) - x).abs().mean().item() for severity in SEVERITIES]
    assert changes == sorted(changes)
    assert changes[4] > 1.3 * changes[0]


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "spatter", "fog"])
def test_seed_sample_and_severity_each_change_the_noise(name: str) -> None:
    x = photos(2)[:1].expand(2, -1, -1, -1)
    y = one(name, 3, x)
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y, one(name, 3, x, seed=1))


def test_noise_is_uniform_normal_and_independent() -> None:
    noise = Noise(torch.arange(400))
    uniform, normal = noise.uniform(501), noise.normal(501)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert scipy.stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    for rows in (uniform, uniform.T, normal, normal.T):  # neighbouring samples, neighbouring positions
        correlation = np.corrcoef(rows[:-1].flatten(), rows[1:].flatten())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(rows.numel())
    assert not torch.equal(noise.uniform(501), uniform)


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.08), (2, 0.12)])
def test_gaussian_noise_has_its_standard_deviation(severity: int, deviation: float) -> None:
    change = one("gaussian_noise", severity, torch.full((50, 1, 28, 28), 0.5)) - 0.5
    assert change.std().item() == pytest.approx(deviation, rel=0.02)
    assert change.mean().item() == pytest.approx(0, abs=5 * deviation / 198)


def test_speckle_noise_grows_with_the_light() -> None:
    x = torch.tensor([0.0, 0.25, 0.5]).view(3, 1, 1, 1).expand(3, 1, 100, 100)
    deviations = (one("speckle_noise", 1, x) - x).std(dim=(1, 2, 3))
    torch.testing.assert_close(deviations, 0.15 * torch.tensor([0.0, 0.25, 0.5]), rtol=0.03, atol=0)


@pytest.mark.parametrize(("severity", "photons"), [(1, 60), (3, 12), (5, 3)])
def test_shot_noise_is_poisson(severity: int, photons: int) -> None:
    light = 0.5
    counts = one("shot_noise", severity, torch.full((40, 1, 28, 28), light)).flatten() * photons
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    observed = torch.bincount(counts.round().long(), minlength=photons + 1).numpy()
    expected = scipy.stats.poisson.pmf(np.arange(photons + 1), light * photons)
    expected[-1] += scipy.stats.poisson.sf(photons, light * photons)  # more than white is white
    common = expected * observed.sum() > 5
    assert observed[~common].sum() <= 50
    share = expected[common] / expected[common].sum()
    assert scipy.stats.chisquare(observed[common], share * observed[common].sum()).pvalue > 1e-3


def test_impulse_noise_is_half_salt_half_pepper() -> None:
    y = one("impulse_noise", 5, torch.full((50, 1, 28, 28), 0.5))
    assert (y == 0).float().mean().item() == pytest.approx(0.135, rel=0.05)
    assert (y == 1).float().mean().item() == pytest.approx(0.135, rel=0.05)
    assert ((y == 0) | (y == 0.5) | (y == 1)).all()


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.6), (3, 1.2), (5, 2.0)])
def test_gaussian_blur_is_scipys(severity: int, sigma: float) -> None:
    x = photos(3)
    expected = [
        scipy.ndimage.gaussian_filter(image.double().numpy(), sigma, mode="nearest", truncate=4) for image in x[:, 0]
    ]
    torch.testing.assert_close(
        one("gaussian_blur", severity, x)[:, 0], torch.tensor(np.array(expected)).float(), rtol=0, atol=1e-6
    )


def test_defocus_blur_spreads_a_point_over_a_disk() -> None:
    x = torch.zeros(1, 2, 21, 23)
    x[:, :, 10, 11] = 1
    for severity, radius in zip(SEVERITIES, (0.8, 1.2, 1.7, 2.3, 3.0), strict=True):
        y = one("defocus_blur", severity, x)[0]
        assert torch.equal(y[0], y[1])
        assert y[0].sum().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(y[0], y[0].flip(0, 1))
        rows, columns = y[0].nonzero().T
        assert max((rows - 10).abs().max(), (columns - 11).abs().max()) == round(radius)
    # at radius 3 every pixel well inside the disk gets one part in its area
    assert y[0, 10, 11].item() == pytest.approx(1 / (np.pi * 3**2), rel=0.03)
    torch.testing.assert_close(one("defocus_blur", 5, torch.full((1, 1, 9, 9), 0.3)), torch.full((1, 1, 9, 9), 0.3))


def test_brightness_and_contrast_in_closed_form() -> None:
    x = photos(4)
    torch.testing.assert_close(one("brightness", 2, x), (x + 0.2).clamp(max=1))
    mean = x.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(one("contrast", 3, x), mean + 0.2 * (x - mean))


def test_pixelate_averages_cells() -> None:
    x = photos(4)
    halves = F.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(one("pixelate", 3, x), halves)  # 14 cells a side
    uneven = one("pixelate", 2, x)  # 17 cells over 28 pixels: the mean of a cell counts split pixels in part
    assert uneven.flatten(1).unique(dim=1).shape[1] <= 17 * 17
    first = (x[:, :, 0, 0] + x[:, :, 1, 0] * 11 / 17 + x[:, :, 0, 1] * 11 / 17 + x[:, :, 1, 1] * (11 / 17) ** 2) * (
        17 / 28
    ) ** 2
    torch.testing.assert_close(uneven[:, :, 0, 0], first)


def test_fog_lightens_the_dark_and_keeps_white() -> None:
    x = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)])
    y = one("fog", 5, x)
    assert y[0].mean().item() == pytest.approx(0.5 * 1.5 / 2.5, abs=0.15)
    assert y[1].min() > 0.4
    assert (y[1] >= y[0].min()).all()


def test_spatter_covers_more_with_severity_and_leaves_the_rest() -> None:
    x = torch.full((50, 1, 28, 28), 0.4)
    covered = [(one("spatter", severity, x) != x).float().mean().item() for severity in SEVERITIES]
    thresholds = (1.6, 1.3, 1.0, 0.8, 0.4)  # of a field that is standard normal in every pixel
    assert covered == pytest.approx(scipy.stats.norm.sf(thresholds), rel=0.1)


def test_held_out_corruptions_are_not_the_teachers() -> None:
    assert len(TEACHER_CORRUPTIONS) == 7
    assert len(HELD_OUT_CORRUPTIONS) == 4
    assert set(TEACHER_CORRUPTIONS) | set(HELD_OUT_CORRUPTIONS) == set(CORRUPTIONS)
    assert not set(TEACHER_CORRUPTIONS) & set(HELD_OUT_CORRUPTIONS)


def test_mixture_gives_every_corruption_its_turn_at_every_severity() -> None:
    names = ("brightness", "contrast")
    x, index = torch.full((1200, 1, 4, 4), 0.25), torch.arange(1200)
    x[:, :, :2] = 0.5
    y = Mixture(names)(x, index, epoch=0)
    brighter = (y[0::2] - x[0::2]).mean(dim=(1, 2, 3))  # 0, 0.1, ... 0.5: the severity, read off
    severities = (brighter * 10).round().long()
    assert scipy.stats.chisquare(torch.bincount(severities, minlength=6).numpy()).pvalue > 1e-3
    torch.testing.assert_close(y[1::2].mean(dim=(1, 2, 3)), x[1::2].mean(dim=(1, 2, 3)))


def test_mixture_repeats_itself_but_not_over_epochs() -> None:
    x, index, mixture = photos(20), torch.arange(20), Mixture()
    first = mixture(x, index, 0)
    assert torch.equal(first, mixture(x, index, 0))
    assert not torch.equal(first, mixture(x, index, 1))
    assert not torch.equal(first, Mixture(seed=1)(x, index, 0))
    assert mixture(x[:3], index[:3], 0).shape == (3, 1, 28, 28)  # fewer samples than corruptions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rain"}, "unknown corruption 'rain'"),
        ({"severity": 6}, "severity must be 0 to 5, got 6"),
        ({"severity": -1}, "severity must be 0 to 5"),
        ({"index": torch.arange(3)}, "one number per image"),
        ({"x": torch.zeros(2, 28, 28)}, "must be float32"),
        ({"x": torch.zeros(2, 1, 28, 28, dtype=torch.uint8)}, "must be float32"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 1, 28, 28),
        "name": "fog",
        "severity": 1,
        "index": torch.arange(2),
    } | change
    with pytest.raises(ValueError, match=message):
        corrupt(**arguments)  # type: ignore[arg-type]
