"""Devices without fp64, and devices that nobody here has: everything runs there, or says in words what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bird_kernels
from bird_kernels import RBF, CKALoss, HSICLoss, Statistics, cka_loss, ops, plan, token_cka_loss
from bird_kernels.matrix import hsic_matrix
from bird_kernels.types import Stash
from tests.accuracy import described, features
from tests.kernels.device_without_fp64 import MixedDevicesError, NoDoubleError, OnDevice, WithoutDoubles

N, P, Q = 24, 9, 7
KEYS = ["MPS", "XPU", "HPU", "PrivateUse1"]  # the dispatcher's names of devices

Call = Callable[[Tensor, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code that runs is that of plain tensors, though a mode looks on."""
    monkeypatch.setattr(ops, "watched", lambda *tensors: False)
    return


def statistics(x: Tensor, y: Tensor, mask: Tensor) -> Statistics:
    total, other = Statistics(), Statistics()
    for each in (total, total, other):
        each.update(x, y, mask)
    total.merge(other)
    return total


def tokens(x: Tensor, y: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    x, y = x.unflatten(0, (4, 6)), y.unflatten(0, (4, 6))
    return token_cka_loss(x, y, mask=None if mask is None else mask.unflatten(0, (4, 6)), **options)


# Training must run.
LOSSES: dict[str, Call] = {
    "cka_loss": lambda x, y, mask: cka_loss(x, y),
    "cka_loss, masked": lambda x, y, mask: cka_loss(x, y, mask=mask),
    "unbiased": lambda x, y, mask: cka_loss(x, y, estimator="unbiased"),
    "unbiased, masked": lambda x, y, mask: cka_loss(x, y, estimator="unbiased", mask=mask),
    "cka": lambda x, y, mask: bird_kernels.cka(x, y),
    "hsic": lambda x, y, mask: bird_kernels.hsic(x, y),
    "hsic, unbiased": lambda x, y, mask: bird_kernels.hsic(x, y, estimator="unbiased", mask=mask),
    "sqrt": lambda x, y, mask: cka_loss(x, y, sqrt=True),
    "uncentred": lambda x, y, mask: cka_loss(x, y, center=False),
    "gram_mse": lambda x, y, mask: bird_kernels.gram_mse(x, y),
    "lists": lambda x, y, mask: cka_loss([x, x[:, :3]], [y, y], mask=mask),
    "lists with weights": lambda x, y, mask: cka_loss([x, x[:, :3]], [y, y], weights=[0.5, 2.0]),
    "modules": lambda x, y, mask: CKALoss()(x, y) + HSICLoss(estimator="unbiased")(x, y),
    "tokens": lambda x, y, mask: tokens(x, y, mask),
    "last tokens": lambda x, y, mask: tokens(x, y, None, tokens="last"),
    "mean tokens": lambda x, y, mask: tokens(x, y, mask, tokens="mean"),
}
# These may refuse.
OTHERS: dict[str, Call] = {
    "rbf": lambda x, y, mask: cka_loss(x, y, kernel="rbf"),
    "rbf, masked": lambda x, y, mask: cka_loss(x, y, kernel="rbf", mask=mask, estimator="unbiased"),
    "rbf, fixed": lambda x, y, mask: cka_loss(x, y, kernel=RBF(sigma=2.0)),
    "rbf, threshold": lambda x, y, mask: cka_loss(x, y, kernel=RBF(threshold=0.5)),
    "rbf, flow": lambda x, y, mask: cka_loss(x, y, kernel=RBF(flow=True)),
    "rbf, uncentred": lambda x, y, mask: cka_loss(x, y, kernel="rbf", center=False),
    "rbf gram_mse": lambda x, y, mask: bird_kernels.gram_mse(x, y, kernel="rbf"),
    "sequences": lambda x, y, mask: tokens(x, y, mask, tokens="sequence"),
    "sequences, unbiased": lambda x, y, mask: tokens(x, y, None, tokens="sequence", estimator="unbiased"),
    "centered_gram": lambda x, y, mask: bird_kernels.centered_gram(x).square().sum(),
    "centered_gram, rbf": lambda x, y, mask: bird_kernels.centered_gram(x, kernel="rbf").square().sum(),
    "cka_matrix": lambda x, y, mask: bird_kernels.cka_matrix([x, y], [y], mask=mask, estimator="unbiased"),
    "cka_matrix, by features": lambda x, y, mask: bird_kernels.cka_matrix([x[:, :2]], [y[:, :2], y[:, :1]]),
    "cka_matrix, itself": lambda x, y, mask: bird_kernels.cka_matrix([x, y]),
    "hsic_matrix": lambda x, y, mask: hsic_matrix([x, y]).xy,
    "statistics": lambda x, y, mask: statistics(x, y, mask).cka(),
    "statistics, unbiased": lambda x, y, mask: statistics(x, y, mask).hsic("unbiased"),
    "statistics, gradient": lambda x, y, mask: statistics(x, y, mask).gradient(x, y).sum(),
    "reference": lambda x, y, mask: cka_loss(x, y, backend="reference"),
}
CALLS = LOSSES | OTHERS


def on_cpu(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, y = features(N, P, Q, dtype, mean=2.0)
    return x, y, torch.arange(N) % 5 != 1


def refuses_in_words(error: Exception) -> bool:
    """Of our own: what is missing, where, and what to do."""
    return isinstance(error, (TypeError, ValueError)) and not isinstance(error, NoDoubleError) and "fp64" in str(error)


def run(call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor] | None:
    """Value, and gradients of x and y, brought to the CPU; None where the call refuses."""
    mode = WithoutDoubles()
    x, y, mask = (mode.put(tensor.clone()) for tensor in on_cpu(dtype))
    x.requires_grad_()
    y.requires_grad_()
    with mode:
        try:
            value = call(x, y, mask)
        except Exception as error:
            if refuses_in_words(error):
                return None
            raise
        found = [value]
        if value.requires_grad:
            found += torch.autograd.grad(value, (x, y), allow_unused=True)
    assert value.device.type in (mode.device.type, "cpu")  # statistics may live on the host
    return [tensor.held if isinstance(tensor, OnDevice) else tensor for tensor in found if tensor is not None]


def expected(call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, y, mask = on_cpu(dtype)
    x.requires_grad_()
    y.requires_grad_()
    value = call(x, y, mask)
    found = [value]
    if value.requires_grad:
        found += torch.autograd.grad(value, (x, y), allow_unused=True)
    return [tensor for tensor in found if tensor is not None]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() - w.double()).norm() <= tolerance * w.double().norm()


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name: str) -> None:
    found = run(CALLS[name])
    assert found is not None or name in OTHERS
    if found is not None:
        assert_same(found, expected(CALLS[name]))


@pytest.mark.parametrize("name", ["cka_loss", "unbiased, masked", "lists with weights", "gram_mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype: torch.dtype, name: str) -> None:
    found = run(LOSSES[name], dtype=dtype)
    assert found is not None
    assert_same(found, expected(LOSSES[name], dtype=dtype), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["cka_loss", "unbiased, masked", "lists"])
def test_on_both_routes(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "choose_route", lambda *sizes: route)
    found = run(LOSSES[name])
    assert found is not None
    assert_same(found, expected(LOSSES[name]))


def test_streamed_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips that nobody keeps, and the median that does not look."""
    monkeypatch.setattr(plan, "KEPT", 0)
    monkeypatch.setattr(plan, "STRIP", {"cpu": 16, "cuda": 16})
    found = run(OTHERS["rbf"])
    if found is not None:
        assert_same(found, expected(OTHERS["rbf"]))


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
