"""What the Triton backend launches for Gaussian kernels on CUDA, counted on fake tensors."""

from __future__ import annotations

import contextlib
import importlib
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
    gradient = importlib.import_module("bird_kernels.backends.triton.gradient")
    monkeypatch.setattr(gradient, "multiprocessors", lambda device: 132)
    for module in (shift, gradient):
        monkeypatch.setattr(module, "aligned", lambda *tensors: True)
    with FakeTensorMode():
        yield


def counted(n: int, kernel: RBF, masked: bool = False, name: str = "triton") -> tuple[Count, Count]:
    """Of a forward and of its backward, of 512 features of each side in fp32."""
    x, y = torch.empty(n, 512, device=CUDA), torch.empty(n, 512, device=CUDA)
    mask = torch.empty(n, dtype=torch.bool, device=CUDA) if masked else None
    problem = Problem(n, 512, 512, x.dtype, CUDA, kernel=kernel, masked=masked)
    module = backends.module_of(name, "rbf")
    with listened() as forward:
        value, stash = module.forward(x, y, mask, problem, "gram")
    with listened() as backward:
        module.backward(value, x, y, mask, stash, problem, route="gram")
    return forward, backward


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [2, 1024, 8192])
@pytest.mark.parametrize(
    ("kernel", "digits"), [(RBF(), 4), (RBF(threshold=0.5), 4), (RBF(sigma=(1.0, 2.0)), 1)], ids=str
)
def test_launches(kernel: RBF, digits: int, n: int, masked: bool) -> None:
    """Nothing but kernels, forward and backward. (By library operations, the median took 155 launches between distances
    and kernels at n = 1,024, 561 at 8,192, masked 166 and 656, and the norms before them 5 to 9.)"""
    forward, backward = counted(n, kernel, masked)
    before, after = ["locate_kernel", "shift_kernel", "distances_kernel"], ["gram_rows_kernel", "moments_kernel"]
    assert forward.names == [*before, *digits * ["select_kernel"], *after]
    assert backward.names == ["backward_kernel"]


def test_memory_of_counts_is_bounded() -> None:
    """At 8,192 rows, in bytes for each pair of them: both matrices by each of 7 launches, and little else."""
    forward, _ = counted(8192, RBF())
    features, moments = 4 * 8192 * 4 * 512, 4 * 2**20
    assert 7 * 8 * 8192**2 < forward.bytes <= 7 * 8 * 8192**2 + 3 * features + 4 * 2 * 264 * 1024 + moments


@pytest.mark.parametrize("n", [1024, 8192])
def test_the_cost_model_knows_the_launches(n: int) -> None:
    """The library's operators are others in other versions of PyTorch."""
    problem = Problem(n, 512, 512, torch.float32, CUDA, kernel=RBF())
    for name, bound in (("triton", 0.0), ("library", 0.03)):
        forward, backward = counted(n, RBF(), name=name)
        launches = len(forward.names) + len(backward.names)
        assert cost.predict(problem, cost.UNKNOWN)[name].launches == pytest.approx(launches, rel=bound)
    assert n == 1024 or forward.bytes + backward.bytes == pytest.approx(cost.C.library_rbf_bytes * n**2, rel=0.05)
