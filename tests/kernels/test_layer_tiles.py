"""`cka_matrix` by Triton's tiles: values against the literal formula in fp64, and launches, which widths do not change.

An interpreter runs the kernels on a CPU; fake CUDA tensors count what would be launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bird_kernels
from bird_kernels import backends, matrix
from tests.accuracy import poison
from tests.kernels.test_matrix import Largest, literal, network
from tests.kernels.test_no_sync import NoCopies
from tests.kernels.test_shifted_counts import CUDA, listened

tiles = pytest.importorskip("bird_kernels.backends.triton.layers", reason="Triton does not exist for this system")
triton = pytest.importorskip("bird_kernels.backends.triton")
launch = pytest.importorskip("bird_kernels.backends.triton.launch")

XS, YS = (70, 1, 33), (5,)  # widths: several steps, less than one, one column
N = 130  # rows: six upper tiles, the last ones of two rows


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Matrices are computed as on a GPU, with room for four tiles of each layer at a time: 3 and 3. How many layers
    each had."""
    calls: list[int] = []
    original = triton.layer_products
    monkeypatch.setattr(triton, "layer_products", lambda *call: (calls.append(len(call[0])), original(*call))[1])
    monkeypatch.setattr(backends, "compares", lambda device: True)
    monkeypatch.setattr(matrix, "LARGEST_STRIPS", (len(XS) + len(YS)) * (4 * tiles.BLOCK**2 + N))
    with poison():
        yield calls
    assert calls


def spread(layers: Sequence[Tensor], mean: float) -> list[Tensor]:
    """Layers with this mean, in units of their spread."""
    return [(x.double() + mean * x.double().std()).to(x.dtype) for x in layers]


@pytest.mark.parametrize(
    ("dtype", "mean", "masked"),
    [
        (torch.float32, 0.0, False),
        (torch.float32, 1e3, True),
        (torch.bfloat16, 0.0, True),
        (torch.bfloat16, 30.0, False),
        (torch.bfloat16, 1e3, True),
        (torch.float16, 1e3, False),
    ],
    ids=str,
)
def test_is_the_literal_formula(
    dtype: torch.dtype, mean: float, masked: bool, estimator: str, device: torch.device
) -> None:
    """The error of halves is that of rounding the centred features: products are accumulated in fp32."""
    xs, ys = (spread(network(w, N, seed, device, 0.0, dtype), mean) for seed, w in enumerate((XS, YS)))
    mask = torch.arange(N, device=device) % 5 != 2 if masked else None
    allowed = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    for others in (ys, None):
        found = bird_kernels.cka_matrix(xs, others, estimator=estimator, mask=mask)
        assert found.dtype == torch.float32
        wanted = literal(xs, others or xs, "cka", estimator, mask)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=allowed)
    assert torch.equal(found, found.T)
    assert torch.equal(found, bird_kernels.cka_matrix(xs, estimator=estimator, mask=mask))


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_a_row_that_dominates(size: float, many: int, device: torch.device) -> None:
    """Unbiased, in one layer or in all."""
    xs = network(XS, N, 0, device)
    for layer in xs[:many]:
        layer[100] *= size
    found = bird_kernels.cka_matrix(xs, estimator="unbiased")
    torch.testing.assert_close(found.double(), literal(xs, xs, "cka", "unbiased", None), rtol=0, atol=2e-6)


def test_scales_and_rows_of_tokens(estimator: str, device: torch.device) -> None:
    xs = network(XS[:2], N, 0, device, 3.0)
    truth = literal(xs, xs, "cka", estimator, None)
    scaled = [(1e-12 * xs[0]).unflatten(0, (5, 26)), (1e12 * xs[1]).T.contiguous().T.unflatten(0, (5, 26))]
    found = bird_kernels.cka_matrix(scaled, estimator=estimator, row_dims=2)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6)
    hsics = matrix.hsic_matrix(xs, estimator=estimator)
    torch.testing.assert_close(hsics.xx, literal(xs, xs, "hsic", estimator, None).diagonal(), rtol=1e-5, atol=0)
    found = matrix.hsic_matrix(scaled, estimator=estimator, row_dims=2).xx
    torch.testing.assert_close(
        found, hsics.xx * torch.tensor([1e-48, 1e48], dtype=torch.float64, device=device), rtol=1e-5, atol=0
    )


def test_layers_without_variance_and_nan(estimator: str, device: torch.device) -> None:
    xs = network(XS, N, 0, device)
    before = bird_kernels.cka_matrix(xs, estimator=estimator)
    xs[0] = torch.full_like(xs[0], 0.1)
    xs[2][120, 1] = torch.inf
    found = bird_kernels.cka_matrix(xs, estimator=estimator)
    assert (found[0, :2] == 0).all()
    assert found[2].isnan().all()
    assert found[:, 2].isnan().all()
    assert torch.equal(found[1, 1], before[1, 1])


def test_rows_too_few_under_a_mask_give_nan(estimator: str, device: torch.device) -> None:
    xs = network(XS[:2], 9, 0, device)
    mask = torch.arange(9, device=device) < (1 if estimator == "biased" else 3)
    assert bird_kernels.cka_matrix(xs, estimator=estimator, mask=mask).isnan().all()


def test_long_sums_go_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PART` columns at a time, of which the last ones are fewer."""
    monkeypatch.setattr(tiles, "PART", 64)
    triton._layers_of.cache_clear()
    xs = network((200, 64, 90), 20, 0, device)
    found = bird_kernels.cka_matrix(xs)
    torch.testing.assert_close(found.double(), literal(xs, xs, "cka", "biased", None), rtol=0, atol=2e-6)
    triton._layers_of.cache_clear()


RESNET18 = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4 + [1000]
NETWORKS = {
    "pooled": RESNET18,
    "no two widths agree": [60 + 7 * layer for layer in range(18)],
    "convolutions": [64 * 56 * 56] * 5 + [128 * 28 * 28] * 4 + [256 * 14 * 14] * 4 + [512 * 7 * 7] * 4 + [1000],
    "narrow": [8 + layer for layer in range(18)],  # the cross route's, if it were not for the launches
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_launches(name: str, dtype: torch.dtype, masked: bool, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """L + M + 12 at the most, whatever the widths; and nothing is copied from the host or read. (Plain PyTorch: 826 of
    "pooled" in fp32, unbiased; 2,126 if no widths agree; 3,473 by the cross route.)"""
    monkeypatch.setattr(matrix, "LARGEST_STRIPS", 1 << 24)
    monkeypatch.setattr(triton, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(tiles, "aligned", lambda *tensors: True)
    for module in (launch, triton):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    for others in (True, False):
        with FakeTensorMode():
            xs, ys = ([torch.empty(1000, d, dtype=dtype, device=CUDA) for d in NETWORKS[name]] for _ in range(2))
            mask = torch.empty(1000, dtype=torch.bool, device=CUDA) if masked else None
            with NoCopies(), Largest() as seen, listened() as count:
                found = bird_kernels.cka_matrix(xs, ys if others else None, estimator=estimator, mask=mask)
        assert found.shape == (18, 18)
        assert len(count.names) <= 18 + 18 + 12
        if max(NETWORKS[name]) <= 1000:  # as the strips of 128 rows of all layers are, or a layer
            assert seen.elements <= max(len(xs) * (1 + others) * 128 * 1000, 1000 * 1000)
