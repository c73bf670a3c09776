"""The median of squared distances against torch.median, and what it must not wait for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bird_kernels import RBF, plan
from bird_kernels.backends.library_rbf import median, strips
from bird_kernels.types import Problem
from tests.accuracy import features
from tests.kernels.gaussian import N, P, Q, distances
from tests.selection import short

CPU = torch.device("cpu")


def found_median(x: Tensor, mask: Tensor | None, kernel: RBF, flat: int) -> Tensor:
    problem = Problem(len(x), x.shape[1], 1, x.dtype, CPU, masked=mask is not None, kernel=kernel)
    one = strips.Strips(x, mask, problem, x.new_empty(flat))
    counted = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    return median.median_of(one, counted.sum(dtype=torch.float64), kernel)


@short(
    "whole numbers are exact in both dtypes: every count of rows in fp32, one in fp64",
    lambda dtype, n: dtype == torch.float32 or n == 17,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", [RBF(), RBF(threshold=1.0)], ids=["median", "threshold"])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 17, 40])
@pytest.mark.parametrize("ties", [False, True])
def test_the_median_is_torch_s(ties: bool, n: int, kernel: RBF, dtype: torch.dtype, memory: str) -> None:
    """Even and odd numbers of distances, ties, equal rows: distances of whole numbers are exact in either form."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(-9, 10, (n, 2 if ties else 6), generator=generator).to(dtype)
    if ties:
        x[n // 2] = x[0]
    for mask in (None, torch.rand(n, generator=generator) < 0.8):
        rows = x if mask is None else x[mask]
        d = distances(rows)
        counted = d if kernel.threshold else d[d != 0]
        expected = counted.median().item() if counted.numel() else 0.0
        held = x if mask is None else torch.where(mask[:, None], x, 0.0)
        size = plan.strips_size(n, plan.STRIP["cpu"]) if memory != "streamed" else 0
        assert found_median(held, mask, kernel, size).item() == expected


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the median must not be read: nothing in its computation has a size that depends on the data."""
    monkeypatch.setattr(median, "FEW", 0)
    waits = {"aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::item", "aten::kthvalue"}
    seen = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    x = features(N, P, Q)[0]
    with Record():
        found_median(x, torch.arange(N) != 3, RBF(), 0)
    assert "aten::searchsorted" in seen
    assert not seen & waits
