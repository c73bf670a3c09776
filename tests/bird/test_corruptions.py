"""Corruptions: the same for a sample in any batch, at any severity, without waiting for the device."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from bird.lab.vision.augment import CropFlip, PhotometricViews
from bird.lab.vision.corruptions import (
    CORRUPTIONS,
    HELD_OUT_CORRUPTIONS,
    SEVERITIES,
    STRONGEST,
    TEACHER_CORRUPTIONS,
    Mixture,
    corrupt,
    noise,
    random,
)
from bird.lab.vision.corruptions.random import Noise
from bird.lab.vision.data import to_float
from tests.bird.shipped import fashion

NAMES = list(CORRUPTIONS)
# Of these a higher severity is not a greater change, by definition: glass blur 1-3 choose neighbours alike, elastic
# deformation trades the affine map for ripples, saturation falls before it rises, frost dims, spatter turns to mud,
# and motion blur 3 and 4 have one sigma.
NOT_MONOTONE = ("glass_blur", "elastic_transform", "saturate", "frost", "spatter", "motion_blur")
MONOTONE = [name for name in NAMES if name not in NOT_MONOTONE]
FIXED = (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "saturate", "gaussian_blur",
)  # fmt: skip


def photos(n: int) -> Tensor:
    return to_float(fashion(range(5, 10)).test.images[:: 1250 // n][:n])


def colours(n: int, side: int = 32) -> Tensor:
    """Smooth pictures in colour with some grain, float32 ``[n, 3, side, side]``, bytes over 255."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (smooth * 255 + 5 * torch.randn(n, 3, side, side, generator=generator)).clamp(0, 255).round() / 255


def one(name: str, severity: int, x: Tensor, seed: int = 0) -> Tensor:
    return corrupt(x, name, severity, index=torch.arange(len(x)), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_meets_the_same_corruption_in_any_batch(name: str, device: torch.device) -> None:
    x, index = colours(130).to(device), torch.arange(100, 230)  # more than a CPU takes at a time
    order = torch.tensor([7, 2, 129, 2])
    whole = {severity: corrupt(x, name, severity, index=index) for severity in SEVERITIES} | {0: x}
    for severity in SEVERITIES:
        assert torch.equal(corrupt(x[order], name, severity, index=index[order]), whole[severity][order])
        for start, stop in ((0, 1), (5, 6), (97, 104), (1, 14)):
            part = slice(start, stop)
            assert torch.equal(corrupt(x[part], name, severity, index=index[part]), whole[severity][part])
    mixed = (torch.arange(130) * 5 % 6).to(device)
    expected = torch.stack([whole[severity][i] for i, severity in enumerate(mixed.tolist())])
    assert torch.equal(corrupt(x, name, mixed, index=index), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_same_with_two_threads(name: str) -> None:
    x, threads = colours(20, 64), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(one(name, 5, x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_range_dtype_and_severity_zero(name: str) -> None:
    for x in (colours(8), photos(8)):
        before = x.clone()
        for severity in SEVERITIES:
            y = one(name, severity, x)
            assert y.shape == x.shape
            assert y.dtype == torch.float32
            assert y.min() >= 0
            assert y.max() <= 1
            assert torch.equal(y, x) == (name == "saturate" and x.shape[1] == 1)  # grey has no saturation
        assert torch.equal(one(name, 0, x), x)
        assert torch.equal(x, before)
        assert one(name, 0, x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 9, 5), (2, 3, 48, 64)])
def test_black_and_white_of_any_size_stay_numbers(name: str, shape: tuple[int, ...]) -> None:
    severities = torch.tensor([2, 5])
    for light in (0.0, 1.0):
        y = corrupt(torch.full(shape, light), name, severities, index=torch.arange(2))
        assert y.isfinite().all()


@pytest.mark.parametrize("name", MONOTONE)
def test_a_higher_severity_changes_more(name: str) -> None:
    x = colours(100)
    changes = [(one(name, severity, x) - x).abs().mean().item() for severity in SEVERITIES]
    assert changes == sorted(changes)
    assert changes[4] > 1.3 * changes[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIXED])
def test_seed_and_sample_each_change_what_is_random(name: str) -> None:
    x = colours(1).expand(2, -1, -1, -1)
    y = one(name, 5, x)
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y, one(name, 5, x, seed=1))


def test_fields_of_neighbouring_severities_are_independent() -> None:
    x = torch.full((40, 1, 32, 32), 0.5)
    mild, strong = (one("gaussian_noise", severity, x) - x for severity in (1, 2))
    assert abs(np.corrcoef(mild.flatten(), strong.flatten())[0, 1]) < 5 / np.sqrt(x.numel())


def test_noise_is_uniform_normal_and_independent() -> None:
    noise = Noise(torch.arange(400))
    uniform, normal = noise.uniform(501), noise.normal(501)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert scipy.stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    assert scipy.stats.kurtosis(normal.flatten()) == pytest.approx(0, abs=5 * np.sqrt(24 / normal.numel()))
    for rows in (uniform, uniform.T, normal, normal.T):  # neighbouring samples, neighbouring positions
        correlation = np.corrcoef(rows[:-1].flatten(), rows[1:].flatten())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(rows.numel())
    assert not torch.equal(noise.uniform(501), uniform)


def test_noise_is_white() -> None:
    fields = Noise(torch.arange(300)).normal(32, 32)
    power = torch.fft.fft2(fields.double()).abs().square().mean(0) / 1024
    assert (power - 1).abs().max() < 6 / np.sqrt(300)  # of 1,024 waves, each the mean of 300 exponential numbers


def test_whole_numbers_are_uniform() -> None:
    drawn = Noise(torch.arange(300)).integers(5, 100)
    assert scipy.stats.chisquare(torch.bincount(drawn.flatten(), minlength=5).numpy()).pvalue > 1e-3


def test_normal_quantiles_are_scipys() -> None:
    share = torch.arange(65536, dtype=torch.int32)
    expected = scipy.stats.norm.ppf((np.arange(65536) + 0.5) / 65536)
    np.testing.assert_allclose(random.quantile(share).numpy(), expected, rtol=2e-5, atol=1e-9)
    assert random.quantile(share).double().var().item() == pytest.approx(1, abs=1e-4)


def test_bits_are_the_hash_of_sample_and_position() -> None:
    numbers = Noise(torch.tensor([3, 2**32 - 5]))
    numbers.bits(7)
    again = numbers.bits(2, 3)
    for row, key in zip(again, (3, 2**32 - 5), strict=True):
        expected = [random.hash32(random.hash32(position) ^ key) for position in range(7, 13)]
        assert [bits & 0xFFFFFFFF for bits in row.flatten().tolist()] == expected


@pytest.mark.parametrize("rate", [0.0, 0.3, 2.0, 3.99, 4.01, 20.0, 130.0, 500.0])
def test_poisson_numbers_are_the_exact_quantiles(rate: float) -> None:
    bits = Noise(torch.arange(100)).bits(2000)
    drawn = noise.poisson(torch.full((100, 2000), rate), bits).double().numpy()
    uniform = ((bits.long() >> 8 & 0xFFFFFF).double() + 0.5) / 2**24
    exact = scipy.stats.poisson.ppf(uniform.numpy(), rate)
    assert (drawn != exact).mean() < 0.003
    assert (np.abs(drawn - exact) > 1).mean() < 0.0005  # in the tails, which 65,536 normal quantiles cut at 4.3
    assert drawn.mean() == pytest.approx(rate, abs=5 * np.sqrt(rate / drawn.size))
    assert drawn.var() == pytest.approx(rate, rel=0.02)


def test_names_follow_the_benchmark() -> None:
    assert TEACHER_CORRUPTIONS == (
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    )  # fmt: skip
    assert HELD_OUT_CORRUPTIONS == ("spatter", "saturate", "speckle_noise", "gaussian_blur")
    assert (*TEACHER_CORRUPTIONS, *HELD_OUT_CORRUPTIONS) == tuple(CORRUPTIONS)


def test_mixture_gives_every_corruption_its_turn_at_every_severity() -> None:
    names = ("brightness", "contrast")
    x, index = torch.full((1200, 1, 4, 4), 0.25), torch.arange(1200)
    x[:, :, :2] = 0.5
    y = Mixture(names)(x, index, epoch=0)
    brighter = (y[0::2] - x[0::2]).mean(dim=(1, 2, 3))  # 0, 0.05, 0.1, 0.15, 0.2, 0.3: the severity, read off
    severities = (brighter * 20).round().clamp(max=5).long()
    assert scipy.stats.chisquare(torch.bincount(severities, minlength=6).numpy()).pvalue > 1e-3
    torch.testing.assert_close(y[1::2].mean(dim=(1, 2, 3)), x[1::2].mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("names", [TEACHER_CORRUPTIONS, NAMES])
def test_mixture_repeats_itself_but_not_over_epochs(names: tuple[str, ...]) -> None:
    x, index, mixture = photos(40), torch.arange(40), Mixture(names)
    first = mixture(x, index, 0)
    assert torch.equal(first, mixture(x, index, 0))
    assert not torch.equal(first, mixture(x, index, 1))
    assert not torch.equal(first, Mixture(names, seed=1)(x, index, 0))
    assert mixture(x[:3], index[:3], 0).shape == x[:3].shape  # fewer samples than corruptions


def test_nothing_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, index = colours(40), torch.arange(40)
    mixture = Mixture(NAMES)
    mixture(x, index, 0)  # tables are made on the host, once
    for name in NAMES:
        one(name, 3, x)
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, _n=name, _r=real: reads.append(_n) or _r(self, *a))
    mixture(x, index, 1)
    for name in NAMES:
        one(name, 3, x)
    assert reads == []


def eight_bits(x: Tensor) -> Tensor:
    return (x * 255).round() / 255  # as scores are rounded, ties too: brightness 5 adds 76.5


def test_six_and_seven_are_five_again_in_eight_bits() -> None:
    x = colours(12)
    for name in FIXED:
        again = x
        for severity in (5, 6, STRONGEST):
            again = one(name, 5, eight_bits(again))
            assert torch.equal(one(name, severity, x), again), name
    grey, five = torch.full((8, 3, 32, 32), 0.5), 0.10
    for severity, times in ((5, 1), (6, 2), (7, 3)):  # noise of their own: variances add up
        deviation = (one("gaussian_noise", severity, grey) - grey).std().item()
        assert deviation == pytest.approx(five * times**0.5, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_several_severities_meets_the_same_beyond_five(name: str, device: torch.device) -> None:
    x, index = colours(9).to(device), torch.arange(40, 49)
    severities = torch.tensor([7, 0, 6, 5, 7, 1, 6, 9, 3])
    mixed = corrupt(x, name, severities.to(device), index=index, strongest=7)
    for i, severity in enumerate(severities.clamp(max=7).tolist()):
        assert torch.equal(mixed[i], corrupt(x[i : i + 1], name, severity, index=index[i : i + 1])[0])
    clamped = corrupt(x, name, severities.to(device), index=index)
    assert torch.equal(clamped[0], corrupt(x[:1], name, 5, index=index[:1])[0])


@pytest.mark.parametrize("strongest", [5, 7])
def test_a_mixture_of_several_batches_is_that_of_each(strongest: int) -> None:
    x, index = colours(50), torch.arange(50) * 3
    alone = Mixture(NAMES[:15], seed=2, strongest=strongest)
    parts = [alone(x[i : i + 20], index[i : i + 20], 4) for i in (0, 20, 40)]
    together = Mixture(NAMES[:15], seed=2, strongest=strongest, batch_size=20)
    assert torch.equal(together(x, index, 4), torch.cat(parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rain"}, "unknown corruption 'rain'"),
        ({"severity": 8}, "severity must be 0 to 7, got 8"),
        ({"severity": -1}, "severity must be 0 to 7"),
        ({"index": torch.arange(3)}, "one number per image"),
        ({"x": torch.zeros(2, 28, 28)}, "must be float32"),
        ({"x": torch.zeros(2, 1, 28, 28, dtype=torch.uint8)}, "must be float32"),
        ({"x": torch.zeros(2, 2, 28, 28)}, "1 or 3 channels"),
        ({"x": torch.zeros(2, 1, 28, 3)}, "at least 4 x 4"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(2, 1, 28, 28), "name": "fog", "severity": 1, "index": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        corrupt(**arguments | change)  # type: ignore[arg-type]


# Random crops and flips


def choices(x: Tensor) -> Tensor:
    """All crops of one image ``[c, h, w]`` after padding by four, plain and flipped, ``[2, 9, 9, c, h, w]``."""
    padded = F.pad(x, [4] * 4)
    height, width = x.shape[1:]
    crops = torch.stack([torch.stack([padded[:, i : i + height, j : j + width] for j in range(9)]) for i in range(9)])
    return torch.stack([crops, crops.flip(-1)])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 12, 10)])
def test_every_result_is_a_crop(shape: tuple[int, int, int], flip: bool) -> None:
    n = 1500
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = CropFlip(1, flip=flip)(image.expand(n, *shape).contiguous(), torch.arange(n), 0)
    known = choices(image).flatten(0, 2).flatten(1)
    distance = torch.cdist(found.flatten(1).double(), known.double())
    nearest = distance.argmin(1)
    assert torch.equal(known[nearest], found.flatten(1))
    counts = torch.bincount(nearest, minlength=162)
    used = counts if flip else counts[:81]
    assert counts.sum() == used.sum()
    expected = n / len(used)  # chi-square of a uniform choice: at 161 degrees its 99.9 % lies at 223, at 80 at 125
    assert ((used - expected) ** 2 / expected).sum() < {162: 223, 81: 125}[len(used)]


@pytest.mark.parametrize("kind", [CropFlip, PhotometricViews])
def test_it_depends_on_sample_epoch_and_seed_alone(kind: type[CropFlip | PhotometricViews]) -> None:
    x = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    index = torch.randperm(1000)[:50]
    whole = kind(2)(x, index, 3)
    some = torch.tensor([7, 3, 40])
    assert kind(2)(x[some], index[some], 3).equal(whole[some])
    assert not kind(2)(x, index, 4).equal(whole)
    assert not kind(3)(x, index, 3).equal(whole)


def test_views_of_a_picture_of_two_levels() -> None:
    """Half black, half 0.5, 2,000 times: the ranges of b, c and a are found again where nothing is clamped."""
    n = 2000
    x = torch.zeros(n, 1, 4, 4)
    x[:, :, :2] = 0.5
    low, high = PhotometricViews(1)(x, torch.arange(n), 0).double()[:, 0, [3, 0], 0].unbind(1)
    assert min(low.min(), high.min()) >= 0
    assert max(low.max(), high.max()) <= 1
    inside = (torch.minimum(low, high) > 0) & (torch.maximum(low, high) < 1)
    spread, middle = (low - high)[inside], ((low + high) / 2)[inside]  # c (b - 0.5), and (b + 0.5) / 2 + a
    assert spread.min() > -0.5
    assert spread.max() < 0.5
    assert 0.0 < middle.min() < 0.15
    assert 0.85 < middle.max() < 1.0
    assert spread.abs().mean() == pytest.approx(0.625 * 0.25, abs=0.02)  # the means of c and of |b - 0.5|
