"""Devices without fp64, and devices that nobody here has: everything runs there, or says in words what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bird_kernels import ops, plan
from bird_kernels.types import Stash
from tests.accuracy import described, features
from tests.kernels.device_without_fp64 import MixedDevicesError, NoDoubleError, OnDevice, WithoutDoubles
from tests.kernels.gaussian import in_strips
from tests.kernels.surface import CALLS, OTHERS, Call

N, P, Q = 24, 9, 7
KEYS = ["MPS", "XPU", "HPU", "PrivateUse1"]  # the dispatcher's names of devices


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code that runs is that of plain tensors, though a mode looks on."""
    monkeypatch.setattr(ops, "watched", lambda *tensors: False)
    return


def on_cpu(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, y = features(N, P, Q, dtype, mean=2.0)
    return x, y, torch.arange(N) % 5 != 1


def refuses_in_words(error: Exception) -> bool:
    """Of our own: what is missing, where, and what to do."""
    return isinstance(error, (TypeError, ValueError)) and not isinstance(error, NoDoubleError) and "fp64" in str(error)


def gradients(call: Call, rows: Sequence[Tensor], masked: bool) -> list[Tensor]:
    """Value, and gradients of x and y where there are some."""
    x, y, mask = rows
    x.requires_grad_()
    y.requires_grad_()
    value = call(x, y, mask if masked else None)
    found = [value, *(torch.autograd.grad(value, (x, y), allow_unused=True) if value.requires_grad else ())]
    return [tensor for tensor in found if tensor is not None]


def run(name: str, dtype: torch.dtype = torch.float32, masked: bool = False) -> list[Tensor] | None:
    """As `gradients`, brought to the CPU; None where the call refuses."""
    mode = WithoutDoubles()
    rows = [mode.put(tensor.clone()) for tensor in on_cpu(dtype)]
    with mode:
        try:
            found = gradients(CALLS[name], rows, masked)
        except Exception as error:
            if refuses_in_words(error):
                return None
            raise
    assert found[0].device.type in (mode.device.type, "cpu")  # statistics may live on the host
    return [tensor.held if isinstance(tensor, OnDevice) else tensor for tensor in found]


def expected(name: str, dtype: torch.dtype = torch.float32, masked: bool = False) -> list[Tensor]:
    return gradients(CALLS[name], on_cpu(dtype), masked)


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() - w.double()).norm() <= tolerance * w.double().norm()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(name: str, masked: bool) -> None:
    found = run(name, masked=masked)
    assert found is not None or name in OTHERS
    if found is not None:
        assert_same(found, expected(name, masked=masked))


@pytest.mark.parametrize("name", ["cka_loss", "unbiased", "lists with weights", "gram_mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype: torch.dtype, name: str) -> None:
    found = run(name, dtype, masked=name == "unbiased")
    assert found is not None
    assert_same(found, expected(name, dtype, masked=name == "unbiased"), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["cka_loss", "unbiased", "lists"])
def test_on_both_routes(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "choose_route", lambda *sizes: route)
    found = run(name, masked=True)
    assert found is not None
    assert_same(found, expected(name, masked=True))


def test_streamed_kernels() -> None:
    """Strips that nobody keeps, and the median that does not look."""
    with in_strips(0):
        found = run("rbf")
        if found is not None:
            assert_same(found, expected("rbf"))


# ---------------------------------------------------------------------------------------------- as operators


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("operator", ["bird::alignment", "bird::alignment_backward"])
def test_operators_are_registered_for_every_device(operator: str, key: str) -> None:
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)


def alignment(x: Tensor, y: Tensor, mask: Tensor, route: str, estimator: str) -> tuple[Tensor, ...]:
    call = described(route, "library", estimator)
    value, *stash = torch.ops.bird.alignment(x, y, mask, *call)
    dx, dy = torch.ops.bird.alignment_backward(torch.ones_like(value), x, y, mask, *stash, *call)
    return value, *stash, dx, dy


def test_operators_run_as_torch_compile_calls_them(route: str, estimator: str) -> None:
    """By the dispatcher; and their outputs are what the fake ones told the compiler, which lays out memory by it."""
    mode = WithoutDoubles("XPU")
    rows = [mode.put(tensor.clone()) for tensor in on_cpu(torch.float32)]
    with mode:
        found = alignment(*rows, route, estimator)
    wanted = alignment(*on_cpu(torch.float32), route, estimator)
    assert_same([found[0].held, *(d.held for d in found[-2:])], [wanted[0], *wanted[-2:]])  # type: ignore[attr-defined]
    with FakeTensorMode():
        x, y, mask = (torch.empty(t.shape, dtype=t.dtype, device=mode.device) for t in on_cpu(torch.float32))
        fake = alignment(x, y, mask, route, estimator)
    names = "value", *Stash._fields, "dx", "dy"
    for name, real, told in zip(names, found, fake, strict=True):
        assert (real.shape, real.dtype, real.device.type) == (told.shape, told.dtype, told.device.type), name


# ---------------------------------------------------------------------------------------------- the device itself


def test_the_device_refuses_what_real_ones_refuse() -> None:
    mode = WithoutDoubles()
    with mode:
        x = mode.put(torch.ones(3, 2))
        refused = [
            x.double, lambda: x.sum(dtype=torch.float64), lambda: x.new_zeros(2, dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device=mode.device), lambda: x.to(torch.complex128),
        ]  # fmt: skip
        for make in refused:
            with pytest.raises(NoDoubleError):
                make()
        with pytest.raises(MixedDevicesError):
            x + torch.ones(3, 2)
        assert mode.reads == 0
        x[0].mul_(torch.tensor(3.0, dtype=torch.float64))  # a number of the host is none of the device
        assert x.tolist() == [[3.0, 3.0], [1.0, 1.0], [1.0, 1.0]]
        assert x.sum().item() == 10.0
        assert mode.reads == 2


def test_fp64_features_cannot_be_there() -> None:
    """Nothing of ours need refuse them."""
    with pytest.raises(NoDoubleError):
        WithoutDoubles().put(torch.ones(3, 2, dtype=torch.float64))
