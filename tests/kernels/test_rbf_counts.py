"""What the Triton backend launches for Gaussian kernels on CUDA, counted on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bird_kernels import RBF, backends, cost
from bird_kernels.types import Problem
from tests.kernels.test_shifted_counts import CUDA, Count, launch, listened, shift


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of which nothing but the architecture is asked."""
    backend = backends.module_of("triton", "rbf")
    monkeypatch.setattr(backend, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(shift, "aligned", lambda *tensors: True)
    with FakeTensorMode():
        yield


def counted(n: int, kernel: RBF, **options: object) -> Count:
    x, y = (torch.empty(n, d, dtype=torch.bfloat16, device=CUDA) for d in (512, 384))
    mask = torch.empty(n, dtype=torch.bool, device=CUDA) if options.get("masked") else None
    problem = Problem(n, 512, 384, x.dtype, CUDA, kernel=kernel, **options)
    with listened() as count:
        backends.module_of("triton", "rbf").forward(x, y, mask, problem, "gram")
    return count


@pytest.mark.parametrize("kernel", [RBF(), RBF(threshold=0.5), RBF(sigma=(1.0, 2.0))], ids=str)
@pytest.mark.parametrize("n", [64, 1024, 8192])
def test_x(n, kernel):
    for masked in (False, True):
        names = counted(n, kernel, masked=masked).names
        a, b = names.index("distances_kernel"), names.index("gram_rows_kernel")
        print(n, kernel, masked, len(names), b - a - 1, names[:a])
