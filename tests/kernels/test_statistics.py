"""Statistics of a stream: however its rows are cut, merged, saved or reduced, they give the value of all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import Statistics, distributed, reference, sums
from bird_kernels.sums import Sums
from tests.accuracy import features

CUTS = [0, 11, 1, 30, 19]  # rows per update


def stream(x: Tensor, y: Tensor, cuts: list[int] = CUTS, mask: Tensor | None = None) -> Statistics:
    statistics = Statistics()
    masks = [None] * len(cuts) if mask is None else mask.split(cuts)
    for part in zip(x.split(cuts), y.split(cuts), masks, strict=True):
        statistics.update(*part)
    return statistics


def assert_close(statistics: Statistics, x: Tensor, y: Tensor, bound: float, mask: Tensor | None = None) -> None:
    for estimator in ("biased", "unbiased"):
        for name in ("cka", "hsic"):
            value = getattr(statistics, name)(estimator)
            truth = getattr(reference, name)(x, y, mask, estimator)
            assert (value.shape, value.dtype) == ((), torch.float64)
            assert abs(value - truth) <= bound * abs(truth), (name, estimator)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)], ids=str
)
def test_any_split_gives_the_whole(dtype: torch.dtype, bound: float, mean: float, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cuda":
        bound = 5e-3  # centred rows are rounded to it again
    x, y = features(61, 7, 5, dtype, device, mean)
    statistics = stream(x, y)
    assert statistics.n == 61
    assert_close(statistics, x, y, bound)
    mask = torch.arange(61, device=device) % 5 > 1
    x[~mask] = torch.nan
    assert_close(stream(x, y, mask=mask), x, y, bound, mask)


def test_tokens_and_images_are_rows() -> None:
    x, y = features(60, 6, 5, torch.float64)
    statistics = Statistics()
    for a, b in zip(x.split(20), y.split(20), strict=True):
        statistics.update(a.view(4, 5, 2, 3), b.view(4, 5, 5).float(), row_dims=2)
    assert_close(statistics, x, y.float(), 1e-12)
    shaped = statistics.gradient(x.view(12, 5, 2, 3), y.view(12, 5, 5), row_dims=2)
    assert torch.equal(shaped, statistics.gradient(x, y).view(12, 5, 2, 3))


def test_a_drifting_mean_costs_no_digits(device: torch.device) -> None:
    """Means wander over six standard deviations around 1000: products about zero would keep two of fp32's digits."""
    x, y = features(20_000, 6, 4, torch.float64, device)
    time = torch.linspace(0, 1, len(x), dtype=torch.float64, device=device)[:, None]
    x = (x + 1000 + 3 * torch.sin(5 * time + torch.arange(6, device=device))).float()
    y = (y - 1000 + 3 * torch.cos(4 * time * torch.arange(4, device=device))).float()
    statistics = Statistics()
    for part in zip(x.split(97), y.split(97), strict=True):
        statistics.update(*part)
    a, b = (side.double() - side.double().mean(0) for side in (x, y))
    kappa, lam = a.square().sum(1), b.square().sum(1)
    for estimator in ("biased", "unbiased"):

        def hsic(p: Tensor, q: Tensor, k: Tensor, l: Tensor, unbiased: bool = estimator == "unbiased") -> Tensor:
            n, product = len(p), (p.T @ q).square().sum()
            return product - unbiased * (n / (n - 2) * (k @ l) - k.sum() * l.sum() / ((n - 1) * (n - 2)))

        norm = 20_000 * 19_997 if estimator == "unbiased" else 19_999**2
        true = hsic(a, b, kappa, lam), hsic(a, a, kappa, kappa), hsic(b, b, lam, lam)
        cka = true[0] / (true[1] * true[2]).sqrt()
        assert abs(statistics.cka(estimator) / cka - 1) < 1e-7
        assert abs(statistics.hsic(estimator) / (true[0] / norm) - 1) < 1e-7


def test_merging_is_the_union_of_the_rows() -> None:
    x, y = features(61, 7, 5, torch.float64, mean=10)
    first, second, rest = (
        stream(a, b, [len(a)]) for a, b in zip(x.split([4, 40, 17]), y.split([4, 40, 17]), strict=True)
    )
    before, other = second.state_dict(), rest.state_dict()
    second.merge(rest)
    assert all(torch.equal(value, other[name]) for name, value in rest.state_dict().items())
    merged = Statistics()
    for part in (Statistics(), first, Statistics(), second):
        merged.merge(part)
    assert_close(merged, x, y, 1e-12)
    assert (merged.n, first.n, second.n, rest.n) == (61, 4, 57, 17)
    assert_close(first, x[:4], y[:4], 1e-12)
    assert_close(Statistics.from_state_dict(before), x[4:44], y[4:44], 1e-12)


def test_products_in_fp32_stay_marked() -> None:
    """One-hot rows have no unbiased self-HSIC; whether a small one is rounding depends on what it was computed in."""
    x = torch.eye(40)[:, :39] * 3.7 + 5
    y = features(40, 3, 4)[1]
    merged = Statistics()
    merged.update(x[:0].double(), y[:0].double())
    merged.merge(stream(x, y, [9, 31]))
    assert merged.cka("unbiased") == 0.0
    again = Statistics.from_state_dict(merged.state_dict())
    assert again.cka("unbiased") == 0.0


def test_a_constant_side_has_no_geometry(estimator: str, device: torch.device) -> None:
    x, y = features(61, 7, 5, device=device, mean=1000)
    y = torch.full_like(y, 1000.1)
    nobody = torch.zeros(3, dtype=torch.bool, device=device)
    for a, b in [(x, y), (y, x)]:
        for empty in range(3):
            statistics = Statistics()
            for part in (*empty * [(a[:3], b[:3], nobody)], *zip(a.split(4), b.split(4), strict=True)):
                statistics.update(*part)
            assert statistics.cka(estimator) == 0.0
            assert not statistics.gradient(a, b, estimator).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_features_of_any_size_are_right_or_nan(dtype: torch.dtype) -> None:
    """Never a wrong number: 8.13 once came of 1e-25, and an OverflowError of 1e100 in fp64."""
    x, y = features(61, 8, 6, dtype)
    true = reference.cka(x, y)
    fits, exponents = 12, [-38, -25, -23, -20, -16, -12, 0, 12, 16, 19, 30]
    if dtype == torch.float64:
        fits, exponents = 70, [*exponents, -200, -160, -100, -80, -70, 70, 80, 100, 160]
    for exponent in exponents:
        size = 10.0**exponent
        for a, b in ((size, 1.0), (1.0, size), (size, size)):
            statistics = stream(x * a, y * b)
            found, gradient = statistics.cka(), statistics.gradient(a * x, b * y)
            if abs(exponent) <= fits:
                torch.testing.assert_close(found, true, rtol=1e-5, atol=0.0)
            else:
                assert found.isnan()
                assert gradient.isnan().all()


def test_autocast_does_not_reach_the_products(estimator: str, device: torch.device) -> None:
    x, y = features(61, 7, 5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        statistics = stream(x, y)
        value, gradient = statistics.cka(estimator), statistics.gradient(x, y, estimator)
    outside = stream(x, y)
    assert value == outside.cka(estimator)
    assert torch.equal(gradient, outside.gradient(x, y, estimator))


def test_features_with_a_graph_leave_none_behind() -> None:
    x, y = (side.requires_grad_() for side in features(61, 7, 5))
    assert not any(value.requires_grad for value in stream(x, y).state_dict().values())


def test_loading_a_state_reads_no_device() -> None:
    """Meta tensors have no numbers to read."""
    statistics = Statistics()
    statistics.update(*features(9, 3, 4))
    state = statistics.state_dict()
    assert state["eps"].item() == torch.finfo(torch.float32).eps
    again = Statistics.from_state_dict({k: v if k == "eps" else v.to("meta") for k, v in state.items()})
    assert again._products == torch.float32
    assert again.state_dict()["xx"].device.type == "meta"


def test_a_saved_state_goes_on_to_the_same_bits(tmp_path: Path, estimator: str) -> None:
    x, y = features(61, 7, 5)
    statistics = stream(x[:30], y[:30], [11, 19])
    torch.save(statistics.state_dict(), tmp_path / "statistics.pt")
    loaded = Statistics.from_state_dict(torch.load(tmp_path / "statistics.pt", weights_only=True))
    state = loaded.state_dict()
    for each in (statistics, loaded, Statistics.from_state_dict(state)):  # whose update must leave the state alone
        each.update(x[30:], y[30:])
    assert torch.equal(state["xx"], Statistics.from_state_dict(state).state_dict()["xx"])
    assert not torch.equal(state["xx"], loaded.state_dict()["xx"])
    assert loaded.cka(estimator) == statistics.cka(estimator)
    assert repr(loaded) == "Statistics(n=61, x=7 features, y=5 features, device=cpu)"
    empty = Statistics.from_state_dict(Statistics().state_dict())
    assert repr(empty) == "Statistics(n=0)"
    with pytest.raises(ValueError, match=r"no state of Statistics: 'norms\.kx' is not among \['n'\]"):
        Statistics.from_state_dict({"n": torch.ones(())})


def test_moving_keeps_everything(device: torch.device) -> None:
    x, y = features(61, 7, 5)
    statistics = stream(x, y)
    there = statistics.to(device)
    assert there.state_dict()["xx"].device.type == device.type
    there.update(x.to(device), y.to(device))
    back = there.to("cpu")
    assert back.n == 122
    assert statistics.n == (61 if there is not statistics else 122)
    abroad = Statistics.from_state_dict(
        {k: v.to("meta") for k, v in statistics.state_dict().items() if k != "eps"} | {"eps": torch.ones(())}
    )
    with pytest.raises(ValueError, match=r"statistics are on meta, x and y on cpu: move them with \.to\(\)"):
        abroad.update(x, y)


def test_mistakes_are_named() -> None:
    x, y = features(61, 7, 5)
    statistics = stream(x, y)
    with pytest.raises(ValueError, match="of x and y with 7 and 5 features; x and y have 7 and 4"):
        statistics.update(x, y[:, :4])
    with pytest.raises(ValueError, match="with 7 and 5 features; the other statistics have 5 and 7"):
        statistics.merge(stream(y, x))
    with pytest.raises(ValueError, match="must have the same rows"):
        statistics.update(x, y[1:])
    with pytest.raises(TypeError, match=r"convert it with mask\.bool"):
        statistics.update(x, y, torch.ones(61))
    with pytest.raises(ValueError, match="estimator must be one of 'biased', 'unbiased'; got 'debiased'"):
        statistics.cka("debiased")
    with pytest.raises(ValueError, match="precision must be one of"):
        Statistics(precision="fp8")
    with pytest.raises(ValueError, match="call update"):
        Statistics().cka()
    assert statistics.n == 61


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_a_rank_without_updates_takes_its_device_from_the_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group with a backend for each device: the name of its backend does not say where the others reduce."""
    seen: list[tuple[Sums, object]] = []
    devices = ["cpu", "meta"]
    others = [7, 5, 4, 1 + devices.index(kind)]
    monkeypatch.setattr(distributed, "world_size", lambda group: 2)
    monkeypatch.setattr(distributed, "devices", lambda group: devices)
    monkeypatch.setattr(distributed, "agree", lambda group, error, terms, mine: [list(mine), others])
    monkeypatch.setattr(distributed, "all_reduce", lambda values, group: values)
    monkeypatch.setattr(sums, "merged", lambda own, totals, group: seen.append((*own, group)) or own)
    statistics = Statistics()
    group: Any = object()
    statistics.all_reduce(group)
    ((own, reduced_in),) = seen
    assert reduced_in is group
    assert {value.device.type for value in (*own[:-1], *own.norms)} == {kind}
    assert (own.mean_x.shape, own.mean_y.shape, own.xx.dtype) == ((7,), (5,), torch.float64)
    if kind == "cpu":
        assert statistics.state_dict()["eps"] == torch.finfo(torch.float32).eps  # the others' products
